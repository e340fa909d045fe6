"""The report: one HTML file that asks the network for nothing."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path

from weft.demo import plots, write_whole
from weft.demo.results import Results, Row, findings, percent
from weft.demo.table import notes
from weft.demo.tasks import CONTROL, TASKS

NAME = "report.html"


def write_report(results: Results, out: Path) -> Path:
    """Write `out/report.html`, whole or not at all, and return its path."""
    plots.require_matplotlib()
    path = out / NAME
    write_whole(path, page(results))
    return path


def page(results: Results) -> str:
    """The HTML of the report. Every text is escaped; only drawings, style and script are not."""
    here = files(__package__)
    style, script = ((here / name).read_text("utf-8") for name in ("report.css", "report.js"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    body = "\n".join(
        (header(results), "<main>", found(results), tasks(), ranking(results), heat_map(results),
         curves(results), worst(results), measured(results), "</main>", footer(results))
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>weft demo: five experts, one network</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def preferred(results: Results) -> Row:
    """The merge into one model that has the best validation accuracy."""
    return max((r for r in results.merges if not r.needs), key=lambda r: r.validation)


def header(results: Results) -> str:
    """Title and the four numbers that frame all others."""
    best = preferred(results)
    shown = [
        ("", results.row("base"), "the base, before any fine-tuning"),
        ("main", best, f"{best.title}: all experts in one set of weights"),
        ("", results.row("experts"), "the experts, each on its own task"),
        ("", results.row("joint"), "one model trained on all data together"),
    ]
    tiles = "".join(
        f'<div class="tile {kind}"><b>{percent(r.scores.average)}</b><span>{escape(text)}</span></div>'
        for kind, r, text in shown
    )
    threads = "".join(
        f'<rect x="{12 * i}" y="{3 * (i % 2)}" width="10" height="4" rx="2" fill="var(--{c})"/>'
        for i, c in ((i, ("first", "second")[i % 2]) for i in range(12))
    )
    return (
        f'<header><svg class="weave" viewBox="0 0 144 8" preserveAspectRatio="xMinYMid" aria-hidden="true">'
        f"{threads}</svg><h1>Five experts, one network</h1>"
        '<p class="lead">Small networks, each fine-tuned on another way of showing handwritten digits, '
        "merged in weight space, and tested on images that none of them has seen. "
        "Average accuracy over the five tasks:</p>"
        f'<div class="tiles">{tiles}</div></header>'
    )


def found(results: Results) -> str:
    """The findings as a list."""
    items = "".join(f"<li>{escape(text)}</li>" for text in findings(results))
    return f"<section><h2>What came out</h2><ul>{items}</ul></section>"


def tasks() -> str:
    """A picture and a line for every task."""
    shown = "".join(
        f"<figure>{plots.pixels(t)}<figcaption><b>{escape(t.name)}</b><br>{escape(t.about)}</figcaption></figure>"
        for t in (*TASKS.values(), CONTROL)
    )
    return f'<section><h2>The tasks</h2><div class="views">{shown}</div></section>'


def ranking(results: Results) -> str:
    """The sortable table."""
    columns = (
        "model", "scale", "average", "of experts", "worst task", CONTROL.name, "validation", "time, ms",
    )  # fmt: skip
    heads = "".join(f'<th scope="col"><button type="button">{escape(c)}</button></th>' for c in columns)
    best = preferred(results)
    body = "".join(_ranking_row(results, r, r is best) for r in results.rows)
    explained = "".join(f"<li>{escape(line.strip())}</li>" for line in notes(results))
    return (
        f'<section><h2>Every model on the test split</h2><p class="note">Click a heading to sort. The '
        f"highlighted row is the one that the validation split prefers among merges into a single model.</p>"
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><ul class="note">{explained}</ul></section>'
    )


def _ranking_row(results: Results, row: Row, best: bool) -> str:
    task, lowest = row.scores.worst
    upright = row.scores.accuracy.get(CONTROL.name)
    average = f"{percent(row.scores.average)} <small>± {100 * row.scores.error:.1f}</small>"
    ms = None if row.seconds is None else 1000 * row.seconds
    numbers: tuple[tuple[float | None, str], ...] = (
        (row.scores.average, average),
        (results.relative(row), percent(results.relative(row))),
        (lowest, f"<small>{escape(task)}</small> {percent(lowest)}"),
        (upright, percent(upright)),
        (row.validation, percent(row.validation)),
        (ms, "" if ms is None else f"{ms:.0f}"),
    )
    label, setting = escape(row.label, quote=True), escape(row.setting, quote=True)
    cells = "".join(
        f'<td data-value="{"" if value is None else f"{value:.6f}"}">{text}</td>' for value, text in numbers
    )
    star = "&nbsp;*" if row.needs else ""
    return (
        f'<tr class="{row.kind}{" best" if best else ""}">'
        f'<th scope="row" data-value="{label}">{label}{star}</th>'
        f'<td class="text" data-value="{setting}"><small>{setting}</small></td>'
        f"{cells}</tr>"
    )


def shown_once(results: Results) -> list[Row]:
    """One row a method: the tuned one where there are two."""
    return [r for r in results.rows if r.tuned or not any(o.name == r.name and o.tuned for o in results.rows)]


def heat_map(results: Results) -> str:
    """Accuracy of every model on every task, darker where higher."""
    names = (*TASKS, CONTROL.name)
    rows = shown_once(results)
    low = min(v for r in rows for v in r.scores.accuracy.values())
    lines = []
    for row in rows:
        cells = []
        for name in names:
            value = row.scores.accuracy.get(name)
            kinds = ["gap"] if name == CONTROL.name else []
            if value is None:
                cells.append(f'<td class="{" ".join(kinds)}"></td>')
                continue
            depth = 6 + 94 * (value - low) / (1 - low)
            kinds += ["strong"] if depth > 68 else []
            kinds += ["own"] if row.name == name else []
            cells.append(
                f'<td class="{" ".join(kinds)}"><span style="--v:{depth:.0f}">{100 * value:.1f}</span></td>'
            )
        lines.append(f'<tr class="{row.kind}"><th scope="row">{escape(row.title)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{escape(n)}</th>' for n in names)
    return (
        '<section><h2>Task by task</h2><p class="note">Accuracy on test in percent; outlined: an expert on '
        "its own task. Methods with a scale are shown at the one validation chose.</p>"
        '<div class="scroll">'
        f'<table class="heat"><thead><tr><th scope="col">model</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def curves(results: Results) -> str:
    """One small drawing a method with a scale."""
    drawn = "".join(
        f"<figure>{plots.scale_curve(r, results)}<figcaption><b>{escape(r.label)}</b><br>"
        f"scale {r.scale:g} chosen</figcaption></figure>"
        for r in results.rows
        if r.curve
    )
    return (
        "<section><h2>How much the scale matters</h2><p>The scale multiplies what is added to the base. The "
        "dot marks the scale that the validation split chose; the test curve is drawn to show what that "
        "choice is worth and was not used to make it. Validation and test hold different images: their "
        "curves may lie at different heights by chance, and it is the shape that counts.</p>"
        '<div class="key"><span><i></i>test</span><span><i class="dash"></i>validation</span>'
        '<span><i class="dot"></i>chosen</span><span><i class="dots"></i>base, test</span></div>'
        f'<div class="curves">{drawn}</div></section>'
    )


def worst(results: Results) -> str:
    """Worst task beside the average."""
    rows = [r for r in shown_once(results) if r.name not in TASKS]
    return (
        "<section><h2>The task that suffers most</h2><p>An average hides a task that was given up. The bar "
        "ends at the accuracy on the named, worst task, the dot is the average.</p>"
        f'<div class="wide">{plots.worst_task(rows, results)}</div></section>'
    )


def measured(results: Results) -> str:
    """What was measured, and what must not be concluded from it."""
    n = results.images
    paragraphs = (
        "All models are one multilayer perceptron (64, 256, 256, 256, 10). The base was trained on "
        f"{n['pretrain']} upright digits and a few views of them for each task; every expert continues "
        f"from the base on {n['train']} other images in one view, its classifier frozen. Weights are "
        "stored in 16 bits.",
        "scikit-learn's 1797 digits were divided once, before any view was made: "
        f"{n['pretrain']} to pre-train, {n['train']} to fine-tune, {n['validation']} to choose scales, "
        f"{n['test']} to test. No test image was seen by any model in any view. Writers are not "
        "separated: the bundled data does not name them.",
        "One scale a method is chosen for all tasks together, on labelled validation images; that is "
        "more than 'no data', which is why each method's default is listed beside it. Other parameters "
        "stay at their defaults, unless the row's name says otherwise.",
        "Tasks share their original images, so standard errors and comparisons count originals, not "
        "views. Differences are called such when they exceed two standard errors; with many comparisons "
        "one in twenty would do so by chance. All of this is one training run: it shows nothing about "
        "other seeds or networks.",
        "The tasks, the base's strength and the training settings were settled while looking at early "
        "tables, test accuracies included, and 'TIES, nothing trimmed' and the wider scales of "
        "Breadcrumbs were added after seeing the first ones. Levels are thus those of a demonstration.",
        "A network of 150\u202f000 weights is no language model. Methods made for large models with "
        "small updates (TIES, DARE, Breadcrumbs) need not show their strengths here, and are not tuned "
        "until they do.",
    )
    text = "".join(f"<p>{escape(p)}</p>" for p in paragraphs)
    return f"<section><h2>What was measured</h2>{text}</section>"


def footer(results: Results) -> str:
    """Versions, seeds, date."""
    facts = {
        "versions": ", ".join(f"{k} {v}" for k, v in results.versions.items()),
        "seeds": f"{', '.join(map(str, results.seeds))} for random methods; 0 for the training",
        "date": results.date,
        "time": f"{results.seconds:.0f} s for all merges and measurements",
        "again": "weft demo (these numbers); python -m weft.demo.train (the models)",
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<footer><dl>{items}</dl></footer>"
