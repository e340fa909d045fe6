"""`weft learn MODEL... --out OUT`: coefficients of a merge by gradient."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from weft.learn.loop import Learned

app = typer.Typer()
FUNCTION = "PKG:FN"
SHOWN = 16
"""Most numbers that are printed of the coefficients."""


@app.command()
def learn(
    models: Annotated[list[str], typer.Argument(help="Paths, Hub ids or URLs.", metavar="MODEL...")],
    data: Annotated[
        str, typer.Option(metavar=FUNCTION, help="A function that gives data, by task where there are tasks.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for the merged model.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Write the merge as a recipe here.")] = None,
    how: Annotated[
        str,
        typer.Option(
            help="learn (a loss of your choice), adamerging, adarank, atlas, concrete, symerge, expert_merging, "
            "dam, prodistill, learned_soup, mehl_soup or twa."
        ),
    ] = "learn",
    base: Annotated[str | None, typer.Option(help="What the models were fine-tuned from.")] = None,
    module: Annotated[
        str | None,
        typer.Option(metavar=FUNCTION, help="Makes the torch module, if it is none of transformers."),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="entropy, distill, self_label, cross_entropy …, or PKG:FN of a Shot.")
    ] = None,
    parts: Annotated[
        str | None, typer.Option(help="model, layer, tensor, row, column, element or blocks:N.")
    ] = None,
    constraint: Annotated[str | None, typer.Option(help="free, box, simplex or affine.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Gradient steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples of a task in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the data, random masks.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Name of a model's task, once for each model in order.")
    ] = None,
    private: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Parameters that each task keeps; OUT has a folder a task."),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar=FUNCTION, help="Data on which the best step is chosen.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="What the data are: train, unlabelled, test-time … (is recorded).")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as every=50 or hold=false."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Learn the coefficients of a merge from data, by gradient."""
    from weft.errors import UsageError
    from weft.learn.named import learn_by_name
    from weft.search.objective import imported

    if out is None and recipe is None:
        raise UsageError("say where the result goes: --out FOLDER, --recipe FILE or both")
    if recipe is not None and recipe.exists() and not overwrite:
        raise UsageError(f"{recipe} exists already; name another file, or give --overwrite")
    settings: dict[str, Any] = {
        "loss": imported(loss) if loss and ":" in loss else loss, "parts": parts, "constraint": constraint,
        "steps": steps, "lr": lr, "batch": batch, "seed": seed, "tasks": task or None, "private": private or None,
        "validation": None if validation is None else imported(validation)(), "split": split,
    }  # fmt: skip
    settings = {k: v for k, v in settings.items() if v is not None}
    from weft.cli.output import key_values

    more = key_values(set_ or [])
    if twice := [k for k in more if k in settings]:
        raise UsageError(f"{', '.join(twice)}: given by an option and by --set")
    net = _module(module, base or models[0])
    found = learn_by_name(how, net, base, models, imported(data)(), settings | more)
    _write(found, out, recipe, overwrite)
    _tell(found, how, out, recipe, quiet, json)


def _module(function: str | None, model: str) -> nn.Module:
    if function is None:
        from weft.api import load
        from weft.llm.hf import to_transformers

        return to_transformers(load(model))
    from torch import nn

    from weft.errors import UsageError
    from weft.search.objective import imported

    made = imported(function)()
    if not isinstance(made, nn.Module):
        raise UsageError(f"--module {function} must give a torch module, not a {type(made).__name__}")
    return made


def _write(found: Learned, out: Path | None, recipe: Path | None, overwrite: bool) -> None:
    import weft

    text = None
    if recipe is not None:  # before anything is written: not every merge is a recipe
        from weft.search.candidates import as_yaml

        text = f"# learned on {found.split} data\n{as_yaml(found.recipe())}"
    if out is not None and found.merged.private:
        for task in found.merged.tasks or ():
            weft.save(found.checkpoint(task), out / task, overwrite=overwrite)
    elif out is not None:
        weft.save(found.checkpoint(), out, overwrite=overwrite)
    if recipe is not None and text is not None:
        recipe.write_text(text, encoding="utf-8")


def _tell(
    found: Learned, how: str, out: Path | None, recipe: Path | None, quiet: bool, as_json: bool
) -> None:
    from weft.cli.output import note, one_line, print_json

    written = [str(p) for p in (out, recipe) if p is not None]
    if found.test_time and not quiet:
        note("learned from test inputs: do not rank this with methods that never saw them")
    if as_json:
        few = {k: c.tolist() for k, c in found.coefficients.items() if c.ndim <= 1}
        print_json({"written": written, "how": how, **found.to_json(), "coefficients": few})
    elif not quiet:
        first, last = (found.losses[0], found.losses[-1]) if found.losses else (float("nan"), float("nan"))
        print(
            f"{one_line(', '.join(written))}: {how}, {len(found.losses)} steps on {found.split} data, "
            f"loss {first:.4g} → {last:.4g}"
        )
        table = found.coefficients
        if sum(c.numel() for c in table.values()) <= SHOWN:
            for key, c in table.items():
                print(f"  {key}: {', '.join(f'{v:.4g}' for v in c.reshape(-1).tolist())}")
