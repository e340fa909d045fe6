"""One HTML page that asks the network for nothing: sortable table, heat map, radar, curve, cost."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path

from weft.bench import drawings
from weft.bench.results import Results, Row, settings, write_text
from weft.bench.table import TITLES, group, grouped, millions, notes, number


def write_page(results: Results, path: str | Path) -> None:
    """Write the page, whole or not at all."""
    write_text(path, page(results))


def page(results: Results) -> str:
    """The HTML. Every text is escaped; only drawings, style and script are not."""
    style = "\n".join((files("weft.demo") / "report.css", files("weft.bench") / "page.css")[i].read_text("utf-8")
                      for i in (0, 1))  # fmt: skip
    script = (files("weft.demo") / "report.js").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    title = f"weft bench: {results.suite}"
    body = "\n".join(
        (header(results), "<main>", ranking(results), heat_map(results), radar(results), curve(results),
         cost(results), measured(results), "</main>", footer(results))
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body class='bench'>\n{body}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def title(row: Row) -> str:
    return f"{row.label}, tuned" if row.how == "tuned" else row.label


def preferred(results: Results) -> Row | None:
    """The static merge that validation prefers."""
    rows = grouped(results).get("static", [])
    return max(rows, key=lambda r: r.average("validation") or 0.0) if rows else None


def header(results: Results) -> str:
    best = preferred(results)
    rows = {r.name: r for r in results.at() if r.how == "reference"}
    shown = [
        ("", rows.get("base"), "the base, before fine-tuning"),
        ("", rows.get("experts"), "the experts, one a task"),
    ]
    if best is not None:
        shown.insert(1, ("main", best, f"{title(best)}: one set of weights, preferred by validation"))
    if "joint" in rows:
        shown.append(("", rows["joint"], "one model trained on all data together"))
    tiles = "".join(
        f'<div class="tile {kind}"><b>{number(results, r.mean)}</b><span>{escape(text)}</span></div>'
        for kind, r, text in shown
        if r is not None
    )
    metric = "perplexity, lower is better" if results.lower_is_better else "accuracy in percent"
    count = results.sizes[-1]
    return (
        f"<header><h1>{escape(results.suite)}</h1><p class='lead'>{escape(results.about)}</p>"
        f"<p class='lead'>Mean over {count} tasks, {metric}:</p><div class='tiles'>{tiles}</div></header>"
    )


def ranking(results: Results) -> str:
    """The sortable table, one body: what may not be compared is told apart in a column."""
    columns = (
        "method", "setting", "kind", "has seen", "mean", "of experts", "worst task", "unseen", "damaged", "ECE",
        "params", "seconds", "MiB",
    )  # fmt: skip
    heads = "".join(f'<th scope="col"><button type="button">{escape(c)}</button></th>' for c in columns)
    best = preferred(results)
    rows = [r for rows in grouped(results).values() for r in reversed(rows)]
    body = "".join(_line(results, r, r is best) for r in rows)
    told = "".join(f"<li>{escape(n)}</li>" for n in notes(results))
    return (
        "<section><h2>Every method</h2><p class='note'>Click a heading to sort. Highlighted: the static merge that "
        "the validation data prefer. Test-time methods have adapted on the inputs of the test.</p>"
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        f'</div><ul class="note">{told}</ul></section>'
    )


def _line(results: Results, row: Row, best: bool) -> str:
    task, low = results.worst(row)
    unseen, damaged = row.averages("unseen"), row.averages("corrupted")
    interval = "" if row.interval is None else f" <small>± {number(results, row.interval)}</small>"
    ece, seconds, peak, size = (row.average(n) for n in ("ece", "seconds", "peak", "parameters"))
    apart = sum(unseen.values()) / len(unseen) if unseen else None
    hurt = sum(damaged.values()) / len(damaged) if damaged else None
    relative = results.normalised(row)
    kind = group(row)
    how = " · ".join(filter(None, [settings(row), results.partly(row)]))
    texts = ((how, how), (kind, kind), (row.seen, row.seen))
    numbers: tuple[tuple[float | None, str], ...] = (
        (row.mean, number(results, row.mean) + interval),
        (relative, f"{100 * relative:.1f}"),
        (low, f"<small>{escape(task)}</small> {100 * low:.0f}"),
        (apart, number(results, apart)),
        (hurt, number(results, hurt)),
        (ece, "" if ece is None else f"{100 * ece:.1f}"),
        (size, millions(size)),
        (seconds, "" if seconds is None else f"{seconds:.2g}"),
        (peak, "" if peak is None else f"{peak:.0f}"),
    )
    cells = "".join(
        f'<td class="text" data-value="{escape(v, quote=True)}"><small>{escape(t)}</small></td>'
        for v, t in texts
    ) + "".join(f'<td data-value="{"" if v is None else f"{v:.6f}"}">{text}</td>' for v, text in numbers)
    name = escape(title(row), quote=True)
    classes = f"{'reference' if row.how == 'reference' else ''}{' best' if best else ''}"
    return f'<tr class="{classes}"><th scope="row" data-value="{name}">{name}</th>{cells}</tr>'


def shown(results: Results) -> list[Row]:
    """One row a method, the tuned one where there are two; best last within its group."""
    rows = [r for rows in grouped(results).values() for r in rows]
    tuned = {r.name for r in rows if r.how == "tuned"}
    return [r for r in rows if r.how != "fixed" or r.name not in tuned]


def heat_map(results: Results) -> str:
    """Share of the expert that every method reaches on every task, darker where higher."""
    rows = shown(results)
    names = list(rows[0].tasks)
    low = min(0.9, *(v for r in rows for v in results.relative(r).values()))
    lines, before = [], ""
    for row in reversed(rows):
        if group(row) != before:
            before = group(row)
            lines.append(
                f'<tr class="group"><th colspan="{len(names) + 1}">{escape(TITLES[before])}</th></tr>'
            )
        cells = []
        for name in names:
            share = results.relative(row)[name]
            depth = max(0.0, min(100.0, 6 + 94 * (share - low) / (1 - low)))
            strong = "strong" if depth > 68 else ""
            cells.append(f'<td class="{strong}"><span style="--v:{depth:.0f}">{number(results, row.tasks[name])}'
                         "</span></td>")  # fmt: skip
        kind = "reference" if row.how == "reference" else ""
        lines.append(f'<tr class="{kind}"><th scope="row">{escape(title(row))}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{escape(n)}</th>' for n in names)
    return (
        "<section><h2>Task by task</h2><p class='note'>The shade is the share of the expert's score; "
        "methods that were tuned are shown tuned.</p><div class='scroll'><table class='heat'>"
        "<thead><tr><th scope='col'>method</th>"
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def radar(results: Results) -> str:
    """The base, the mean, task arithmetic, the best static merge and the best routed one, task by task."""
    best = preferred(results)
    groups = grouped(results)
    wanted: list[Row | None] = [
        *(
            next((r for r in shown(results) if r.name == n), None)
            for n in ("base", "linear", "task_arithmetic")
        ),
        best,
        groups["routed"][-1] if "routed" in groups else None,
    ]
    rows = list({id(r): r for r in wanted if r is not None}.values())
    names = list(results.row("experts").tasks)
    if len(names) < 3 or not rows:
        return ""
    drawn = drawings.radar(names, {title(r): [results.relative(r)[n] for n in names] for r in rows})
    return (
        "<section><h2>Which task pays</h2><p class='note'>Share of each task's expert; the outer ring "
        f"is the expert.</p><div class='wide'>{drawn}</div></section>"
    )


def curve(results: Results) -> str:
    """Share of the experts over the number of tasks, where several were run."""
    if len(results.sizes) < 2:
        return ""
    lines = {}
    for row in shown(results):
        if group(row) in ("static", "routed") or row.name in ("base", "ensemble"):
            same = [r for r in results.rows if r.name == row.name and r.how == row.how]
            lines[title(row)] = [
                (float(r.size), 100 * results.normalised(r)) for r in sorted(same, key=lambda r: r.size)
            ]
    drawn = drawings.lines(lines, "number of tasks", "% of the experts")
    return (
        "<section><h2>More tasks</h2><p class='note'>Mean share of the experts' scores as tasks are added.</p>"
        f"<div class='wide'>{drawn}</div></section>"
    )


def cost(results: Results) -> str:
    """Mean share of the experts against merge seconds, on a logarithmic axis."""
    points = [
        (max(1e-3, s), 100 * results.normalised(r), title(r), group(r))
        for r in shown(results)
        if (s := r.average("seconds")) is not None
    ]
    if not points:
        return ""
    drawn = drawings.scatter(points, "seconds to merge (with what was measured for it)", "% of the experts")
    return f"<section><h2>Accuracy against cost</h2><div class='wide'>{drawn}</div></section>"


def measured(results: Results) -> str:
    paragraphs = (
        "'has seen' says what a method took besides the models: nothing, inputs without labels, labels, or "
        "the inputs of the test itself. Those that adapt on test inputs stand apart.",
        "A tuned row has the value of one parameter that was best on the validation split; the other row has the "
        "published value. Test data choose nothing, test-time methods excepted.",
        "Seconds are of one merge on this machine, with the statistics it needs. MiB is how far the process's "
        "memory rose above what it held before the merge: for models as small as these mostly noise.",
        "ECE is the gap between confidence and accuracy in 15 bins. 'Damaged' are test images with noise, blur "
        "and low contrast; 'unseen' are tasks without an expert.",
    )
    text = "".join(f"<p>{escape(p)}</p>" for p in paragraphs)
    return f"<section><h2>What was measured</h2>{text}</section>"


def footer(results: Results) -> str:
    facts = {
        "command": results.command, "seeds": ", ".join(map(str, results.seeds)), "machine": results.machine,
        "date": results.date, "time": f"{results.seconds:.0f} s, training not cached before included",
        "versions": ", ".join(f"{k} {v}" for k, v in results.versions.items()),
    }  # fmt: skip
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    return f"<footer><dl>{items}</dl></footer>"
