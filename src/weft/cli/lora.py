"""`weft lora`: adapters taken from models, merged, resized, applied and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weft.checkpoints.base import Checkpoint

app = typer.Typer(
    name="lora",
    help="Adapters: extract, merge, resize, apply, inspect.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[
    Path, typer.Argument(help="A folder to write (for kohya a .safetensors file).", metavar="OUT")
]
Rank = Annotated[int | None, typer.Option(help="Keep at most so many singular values a weight.")]
Energy = Annotated[
    float | None, typer.Option(help="Keep the least rank with this share of the squared norm.")
]
Ratio = Annotated[
    float | None, typer.Option(help="Keep singular values of at least this share of the largest.")
]
Threshold = Annotated[float | None, typer.Option(help="Keep singular values of at least this.")]
Base = Annotated[str | None, typer.Option(help="The adapters' base: names and shapes are held against it.")]
For = Annotated[str | None, typer.Option("--for", help="vllm: write only what vLLM loads, or say why not.")]
Format = Annotated[str, typer.Option("--format", help="peft, or kohya (one file).")]
Dtype = Annotated[str | None, typer.Option(help="Storage dtype of the output.")]
Memory = Annotated[str | None, typer.Option(help="Hard memory budget, e.g. 2GiB.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads. Default: one a core.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", "-w", help="Strength, once for each adapter in order.")
]


@app.command()
def extract(
    model: Annotated[
        str, typer.Argument(help="The fine-tuned model, or a recipe's output.", metavar="MODEL")
    ],
    base: Annotated[str, typer.Argument(help="What it was fine-tuned from.", metavar="BASE")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    ratio: Ratio = None,
    threshold: Threshold = None,
    fast: Annotated[bool, typer.Option("--fast", help="Sketch instead of the exact decomposition.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sketch.")] = 0,
    include: Annotated[str | None, typer.Option(help="Regular expression on weights' names.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Regular expression on weights' names.")] = None,
    rest: Annotated[str, typer.Option(help="Changed norms, biases …: skip, or save them whole.")] = "skip",
    embeddings: Annotated[str, typer.Option(help="lora, save (whole) or skip.")] = "lora",
    serve: For = None,
    layout: Format = "peft",
    dtype: Dtype = None,
    memory: Memory = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Take the difference of two models as an adapter; rank 32 if nothing else is said."""
    import torch

    from weft.adapters.extract import extract_lora
    from weft.analysis.parallel import in_parallel
    from weft.checkpoints.dtypes import parse_dtype

    _choice("rest", rest, "skip", "save")
    _choice("embeddings", embeddings, "lora", "save", "skip")
    _check_output(serve, layout)
    with in_parallel(threads):
        made = extract_lora(
            model, base, rank=rank, energy=energy, ratio=ratio, threshold=threshold, fast=fast, seed=seed,
            include=include, exclude=exclude, rest=rest, embeddings=embeddings,  # type: ignore[arg-type]
            dtype=parse_dtype(dtype) if dtype else torch.float32, layout=layout, serve=serve,  # type: ignore[arg-type]
        )  # fmt: skip
    _write(made, out, json, memory=memory, threads=threads, overwrite=overwrite)


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(help="Adapters.", metavar="ADAPTER...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder to write.", metavar="OUT")],
    how: Annotated[
        str, typer.Option(help="svd, concat, linear, ties, knots …; see the documentation.")
    ] = "svd",
    weights: Weights = None,
    rank: Rank = None,
    energy: Energy = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the way, e.g. density=0.3."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random masks.")] = 0,
    missing: Annotated[str, typer.Option(help="Weights that an adapter lacks: error, or zero.")] = "error",
    extras: Annotated[str, typer.Option(help="Biases and whole tensors: error, average or drop.")] = "error",
    base: Base = None,
    bases: Annotated[
        str, typer.Option(help="same, or any: allow configs that name different bases.")
    ] = "same",
    serve: For = None,
    layout: Format = "peft",
    dtype: Dtype = None,
    memory: Memory = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge adapters of one base into one, without forming a dense update."""
    from weft.adapters.merge import merge_adapters
    from weft.analysis.parallel import in_parallel
    from weft.checkpoints.dtypes import parse_dtype
    from weft.checkpoints.load import load

    _choice("missing", missing, "error", "zero")
    _choice("extras", extras, "error", "average", "drop")
    _choice("bases", bases, "same", "any")
    _check_output(serve, layout)
    with in_parallel(threads):
        made = merge_adapters(
            adapters, weights or None, how=how, rank=rank, energy=energy, seed=seed, missing=missing,  # type: ignore[arg-type]
            extras=extras, base=None if base is None else load(base), bases=bases, serve=serve,  # type: ignore[arg-type]
            layout=layout, dtype=parse_dtype(dtype) if dtype else None,  # type: ignore[arg-type]
            **_parameters(set_ or []),
        )  # fmt: skip
    _write(made, out, json, memory=memory, threads=threads, overwrite=overwrite)


@app.command()
def resize(
    adapter: Annotated[str, typer.Argument(help="An adapter.", metavar="ADAPTER")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    ratio: Ratio = None,
    threshold: Threshold = None,
    base: Base = None,
    serve: For = None,
    layout: Format = "peft",
    dtype: Dtype = None,
    memory: Memory = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """The best approximation of an adapter at other ranks, and what it loses."""
    from weft.adapters.resize import resize_lora
    from weft.analysis.parallel import in_parallel
    from weft.checkpoints.dtypes import parse_dtype
    from weft.checkpoints.load import load

    _check_output(serve, layout)
    with in_parallel(threads):
        made = resize_lora(
            adapter, rank=rank, energy=energy, ratio=ratio, threshold=threshold,
            base=None if base is None else load(base), dtype=parse_dtype(dtype) if dtype else None,
            layout=layout, serve=serve,  # type: ignore[arg-type]
        )  # fmt: skip
    _write(made, out, json, memory=memory, threads=threads, overwrite=overwrite)


@app.command()
def apply(
    base: Annotated[str, typer.Argument(help="The base model.", metavar="BASE")],
    adapters: Annotated[list[str], typer.Argument(help="Adapters.", metavar="ADAPTER...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder or .safetensors file.", metavar="OUT")],
    weights: Weights = None,
    dtype: Dtype = None,
    memory: Memory = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the base with adapters merged into it."""
    from weft.adapters.apply import apply_adapters
    from weft.checkpoints.dtypes import parse_dtype

    made = apply_adapters(base, list(adapters), weights or None)
    _write(made, out, json, memory=memory, threads=threads, overwrite=overwrite,
           dtype=parse_dtype(dtype) if dtype else None)  # fmt: skip


@app.command()
def inspect(
    adapters: Annotated[
        list[str], typer.Argument(help="One adapter, or several to compare.", metavar="ADAPTER...")
    ],
    base: Base = None,
    json: Json = False,
) -> None:
    """Ranks, scales and norms weight by weight; what several adapters have in common."""
    from weft.cli.adapters import show

    show(list(adapters), base, json)


def _choice(option: str, value: str, *known: str) -> None:
    from weft.errors import UsageError, did_you_mean

    if value not in known:
        raise UsageError(f"--{option} {value}: choose {', '.join(known)}{did_you_mean(value, known)}")


def _check_output(serve: str | None, layout: str) -> None:
    _choice("format", layout, "peft", "kohya")
    if serve is not None:
        _choice("for", serve, "vllm")


def _parameters(sets: list[str]) -> dict[str, Any]:
    """`["density=0.3"]` → `{"density": 0.3}`."""
    from weft.errors import UsageError
    from weft.recipes.yaml import parse_value

    found: dict[str, Any] = {}
    for item in sets:
        key, sign, value = item.partition("=")
        if not sign or not key.isidentifier():
            raise UsageError(f"--set {item}: write it as KEY=VALUE, e.g. density=0.3")
        found[key] = parse_value(value, item)
    return found


def _write(made: Checkpoint, out: Path, as_json: bool, **settings: Any) -> None:
    from weft.cli.adapters import write

    write(made, out, as_json, **settings)
