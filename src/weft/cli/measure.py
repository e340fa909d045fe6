"""`weft measure MODEL OUT`: what data say of a model, for methods that merge by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weft.checkpoints.base import Checkpoint

app = typer.Typer()
FUNCTION = "PKG:FN"


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="Path, Hub id or URL.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="A folder for the statistics.", metavar="OUT")],
    data: Annotated[
        str | None, typer.Option(metavar=FUNCTION, help="A function that gives the batches.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts (.txt, .jsonl, .gz), for models with a tokenizer.")
    ] = None,
    what: Annotated[
        str, typer.Option(metavar="A,B", help="gram, fisher, kfac, node, mean, abs_mean, cov …")
    ] = "gram",
    samples: Annotated[int | None, typer.Option(min=1, help="At most so many examples.")] = None,
    module: Annotated[
        str | None,
        typer.Option(metavar=FUNCTION, help="Makes the torch module, if it is none of transformers."),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="model (drawn from it), exact (every class) or given (the data's).")
    ] = "model",
    loss: Annotated[
        str | None, typer.Option(metavar=FUNCTION, help="loss(outputs, batch), one number an example.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="These parameters only.")] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=N", help="Units of N outputs (heads) for node."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text in a batch.")] = 8,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="One block in memory at a time; no gradients.")
    ] = False,
    precision: Annotated[str, typer.Option(help="Products in float64 or float32.")] = "float64",
    seed: Annotated[int, typer.Option(help="Seed of drawn labels.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    about: Annotated[str, typer.Option(help="What the data are; kept with the statistics.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure Gram matrices, Fisher information and the like of a model on data."""
    import warnings

    import weft
    from weft.cli.output import note, one_line, print_json
    from weft.engine.plan import parse_device
    from weft.errors import UsageError, WeftWarning
    from weft.search.objective import imported

    if (data is None) == (texts is None):
        raise UsageError("give the data: --data PKG:FN or --texts FILE, one of both")
    source = weft.load(model)
    given = imported(data)() if data is not None else _texts(source, texts, what, labels, length, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeftWarning)  # told below, as notes
        found = weft.measure(
            source, given, what, samples=samples, labels=_one_of(labels, "labels", "model", "exact", "given"),
            loss=None if loss is None else imported(loss), only=only or "*", units=_units(units or []), seed=seed,
            precision=_one_of(precision, "precision", "float64", "float32"), device=parse_device(device),
            module=None if module is None else imported(module)(), by_block=by_block,
            about=about or str(data or texts),
        )  # fmt: skip
    weft.save(found, out, overwrite=overwrite)
    assert found.config is not None
    told = found.config["weft_statistics"]
    for text in () if quiet else told["notes"]:
        note(text)
    if json:
        print_json({"out": str(out), "tensors": len(list(found)), **{k: told[k] for k in KEPT}})
    elif not quiet:
        print(
            f"{one_line(out)}: {', '.join(told['what'])} of {told['samples']} examples, {len(list(found))} tensors"
        )


KEPT = ("samples", "what", "labels", "seed", "data", "notes")
"""What is told of a measurement as JSON."""


def _texts(
    source: Checkpoint, path: Path | None, what: str, labels: str, length: int, batch: int
) -> list[dict[str, Any]]:
    from weft.llm.hf import tokenizer_of
    from weft.statistics.texts import texts

    assert path is not None
    slopes = {"gradient", "sensitivity"} & {w.strip() for w in what.split(",")}
    size = next((i.shape[0] for n, i in source.tensors.items() if "embed" in n or "wte" in n), 256)
    return texts(
        path, tokenizer_of(source), vocabulary=size, length=length, batch=batch,
        labels=labels == "given" or bool(slopes),
    )  # fmt: skip


def _one_of(value: str, option: str, *known: str) -> Any:
    from weft.errors import UsageError, did_you_mean

    if value not in known:
        raise UsageError(f"--{option} is {', '.join(known)}, not {value!r}{did_you_mean(value, known)}")
    return value


def _units(given: list[str]) -> dict[str, int]:
    from weft.errors import UsageError

    found = {}
    for item in given:
        pattern, equals, n = item.rpartition("=")
        if not equals or not n.isdigit():
            raise UsageError(f"--units is PATTERN=N, such as *.q_proj.weight=64, not {item!r}")
        found[pattern] = int(n)
    return found
