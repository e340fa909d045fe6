"""`weft regmean-pp MODEL… OUT`, `weft iteris MODEL… OUT`: merges by what the merged model makes of inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weft.checkpoints.base import Checkpoint

app = typer.Typer()
FUNCTION = "PKG:FN"

Models = Annotated[
    list[str], typer.Argument(help="Models, and at the end the folder to write.", metavar="MODEL… OUT")
]
Data = Annotated[
    str | None,
    typer.Option(metavar=FUNCTION, help="A function that gives the data: a list, one entry a model."),
]
Texts = Annotated[
    list[Path] | None, typer.Option(help="Texts (.txt, .jsonl, .gz) of a model's own task; once a model.")
]
Module = Annotated[
    str | None, typer.Option(metavar=FUNCTION, help="Makes the torch module, if it is none of transformers.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="At most so many examples of each task.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the function.")
]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows of text in a batch.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("regmean-pp")
def regmean_pp(
    models: Models,
    data: Data = None,
    texts: Texts = None,
    base: Annotated[str | None, typer.Option(help="The base, for methods on task vectors.")] = None,
    method: Annotated[str, typer.Option(help="regmean, lot or gram.")] = "regmean",
    module: Module = None,
    samples: Samples = None,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Only by blocks: one in memory at a time.")
    ] = False,
    set_: Settings = None,
    length: Length = 512,
    batch: Batch = 8,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Merge block by block, on the inputs that the merged blocks before make (RegMean++)."""
    import weft

    more = {"base": base, "method": method, "by_block": by_block or None}
    _merge(
        weft.regmean_pp,
        models,
        data,
        texts,
        module,
        samples,
        set_,
        length,
        batch,
        overwrite,
        quiet,
        json,
        more,
    )


@app.command()
def iteris(
    models: Models,
    data: Data = None,
    texts: Texts = None,
    module: Module = None,
    samples: Samples = None,
    rounds: Annotated[int, typer.Option(help="At most so many rounds of measuring and solving.")] = 5,
    set_: Settings = None,
    length: Length = 512,
    batch: Batch = 8,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Merge so that layers keep the experts' outputs on the merged model's inputs (IterIS)."""
    import weft
    from weft.cli.output import note

    def told(number: int, change: float) -> None:
        note(f"round {number}: all weights together changed by {change:.2g} of themselves")

    more: dict[str, Any] = {"rounds": rounds} | ({} if quiet or json else {"told": told})
    _merge(
        weft.iteris, models, data, texts, module, samples, set_, length, batch, overwrite, quiet, json, more
    )


def _merge(
    verb: Any, models: list[str], data: str | None, texts: list[Path] | None, module: str | None,
    samples: int | None, set_: list[str] | None, length: int, batch: int, overwrite: bool, quiet: bool, json: bool,
    more: dict[str, Any],
) -> None:  # fmt: skip
    """Read what was given, call the verb, save what it made."""
    import inspect

    import weft
    from weft.cli.output import key_values, one_line, print_json
    from weft.errors import UsageError, did_you_mean
    from weft.search.objective import imported

    *inputs, out = models
    if len(inputs) < 2:
        raise UsageError("name the models and then the folder to write: at least two models to merge")
    if (data is None) == (texts is None):
        raise UsageError("give the data: --data PKG:FN, or --texts FILE once a model, one of both")
    settings = key_values(set_ or [])
    known = inspect.signature(verb).parameters
    for key in settings:
        if key in ("models", "data", "module", "samples", "forward", "told", *more):
            raise UsageError(f"--set {key}: there is an option or an argument for it, or it is no text")
        if key not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise UsageError(f"--set {key}: no such setting{did_you_mean(key, known)}")
    sources = [weft.load(m) for m in inputs]
    given = list(imported(data)()) if data is not None else _texts(sources, texts or [], length, batch)
    found = verb(
        sources,
        given,
        module=None if module is None else imported(module)(),
        samples=samples,
        **more,
        **settings,
    )
    saved = weft.save(found, out, overwrite=overwrite)
    if json:
        print_json({"out": str(saved.path), "tensors": len(list(found)), "models": inputs})
    elif not quiet:
        print(f"{one_line(saved.path)}: {len(list(found))} tensors of {len(inputs)} models")


def _texts(sources: list[Checkpoint], files: list[Path], length: int, batch: int) -> list[Any]:
    from weft.errors import UsageError
    from weft.llm.hf import tokenizer_of
    from weft.statistics.texts import texts

    if len(files) != len(sources):
        raise UsageError(
            f"there are {len(sources)} models and {len(files)} --texts: give one a model, in their order"
        )
    size = {
        s.origin: next((i.shape[0] for n, i in s.tensors.items() if "embed" in n or "wte" in n), 256)
        for s in sources
    }
    return [
        texts(f, tokenizer_of(s), vocabulary=size[s.origin], length=length, batch=batch)
        for s, f in zip(sources, files, strict=True)
    ]
