"""`weft evaluate MODEL`: any model on tasks; of a routed one also which experts it asks, and its cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weft.analysis.evaluation import Evaluation

app = typer.Typer()
FUNCTION = "PKG:FN"
SEEN = 0.005
"""Shares below it are not printed."""


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Path, Hub id or URL, or a folder of weft route or calibrate.", metavar="MODEL"),
    ],
    data: Annotated[
        str | None,
        typer.Option(metavar=FUNCTION, help="A function that gives data with labels, by task as a dict."),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="Texts of a task, instead of --data: perplexity; repeat."),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(metavar=FUNCTION, help="Makes the torch module, if it is none of transformers."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A routed model's network: a model of transformers with its config.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="cross_entropy (accuracy), next_token (perplexity), mse, or PKG:FN(outputs, labels)."
        ),
    ] = None,
    preference: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="A share a task, for models weighed by one.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="At most so many examples a task.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text in a batch.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on each task; of a routed one tell which experts are asked, its parameters and cost."""
    import weft
    from weft.cli.output import print_json
    from weft.cli.route import network, numbers, pairs, texts_of
    from weft.engine.plan import parse_device
    from weft.errors import UsageError
    from weft.search.objective import imported

    if (data is None) == (not texts):
        raise UsageError("give the data: --data PKG:FN or --texts TASK=FILE, one of both")
    if base is not None and module is not None:
        raise UsageError("--base and --module both say which network it is: give one of them")
    net = None
    if base is not None or module is not None:
        net = network(None if base is None else weft.load(base), module)
    given: Any = imported(data)() if data is not None else None
    if texts:
        files = pairs(texts, "--texts is TASK=FILE")
        if base is None and (Path(model) / "weft_routing.json").is_file():
            raise UsageError("texts of a routed model are cut by its base's tokenizer: give --base MODEL")
        given = texts_of(weft.load(base or model), files, length, batch, labels=True)
    of: Any = loss or ("next_token" if texts else "cross_entropy")
    found = weft.evaluate(
        model, given, module=net, loss=imported(of) if ":" in of else of, samples=samples,
        device=parse_device(device), preference=None if preference is None else numbers(preference, "--preference"),
    )  # fmt: skip
    if json:
        print_json(found.to_json())
    else:
        show(found)


def show(found: Evaluation) -> None:
    """A line a task, then the mean, the worst and what an answer costs."""
    from weft.cli.output import console, figure, one_line, percent, table

    share = found.metric == "accuracy"

    def told(value: float) -> str:
        return percent(value) if share else figure(value, 5)

    routed = found.tasks[0].sent is not None
    columns = ["task", ">examples", f">{found.metric}", *([] if found.metric == "loss" else [">loss"])]
    listed = table(*columns, *(["sent to"] if routed else []))
    for t in found.tasks:
        cells = [one_line(t.task), f"{t.examples:,}", told(t.score)]
        cells += [] if found.metric == "loss" else [figure(t.loss)]
        listed.add_row(*cells, *([_sent(t.sent or {})] if routed else []))
    console().print(listed)
    print(f"\n{found.headline}")
    if found.told:
        print("the task was told with each example")
    size = f"{found.parameters:,} parameters in {found.bytes:,} bytes; " if found.cost is None else ""
    print(f"{size}{1000 * found.seconds:.3g} ms an example here")
    if found.cost is not None:
        print(found.cost)


def _sent(shares: Any) -> str:
    """The experts that were asked, most first; what went to none of them, or evenly to several, is the rest."""
    from weft.cli.output import one_line

    most = sorted(((s, t) for t, s in shares.items() if s >= SEEN), reverse=True)
    rest = 1 - sum(shares.values())
    told = [f"{one_line(t)} {100 * s:.0f} %" for s, t in most]
    return ", ".join([*told, *([f"none {100 * rest:.0f} %"] if rest >= SEEN else [])])
