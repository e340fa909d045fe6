"""`weft calibrate MODEL OUT`: a merged model mended with a little data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()
FUNCTION = "PKG:FN"


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Path, Hub id or URL.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="A folder for the calibrated model.", metavar="OUT")],
    how: Annotated[
        str, typer.Option(help="batchnorm, repair, head, surgery, magnitude or temperature.")
    ] = "batchnorm",
    data: Annotated[
        str | None,
        typer.Option(metavar=FUNCTION, help="A function that gives batches, or a dict of them by task."),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(metavar=FUNCTION, help="Makes the torch module, if it is none of transformers."),
    ] = None,
    parent: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="repair: a model that was merged; repeat.")
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=MODEL", help="surgery, magnitude: a task's own model; repeat."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="magnitude: what the experts started from.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any other setting, such as rank=64 or schedule=joint."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="At most so many examples.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Mend a merged model with data: statistics, REPAIR, head, surgery, magnitude, temperature."""
    import weft
    from weft.cli.output import key_values, note, one_line, print_json
    from weft.engine.plan import parse_device
    from weft.errors import UsageError
    from weft.search.objective import imported

    settings = key_values(set_ or [])
    given: dict[str, Any] = {
        "parents": list(parent) if parent else None,
        "experts": _experts(expert) if expert else None,
        "base": base,
        "module": None if module is None else imported(module)(),
        "samples": samples,
    }
    twice = [k for k, v in given.items() if v is not None and k in settings]
    if twice:
        raise UsageError(f"{', '.join(twice)}: given by an option and by --set")
    if data is None and how != "magnitude":
        raise UsageError("give the data: --data PKG:FN, a function that gives batches")
    settings |= {k: v for k, v in given.items() if v is not None}
    batches = imported(data)() if data is not None else None
    found = weft.calibrate(model, batches, how, device=parse_device(device), **settings)
    weft.save(found.checkpoint, out, overwrite=overwrite)
    for text in () if quiet else found.notes:
        note(text)
    if json:
        print_json({"out": str(out), **found.to_json()})
    elif not quiet:
        beside = f", {found.added:,} parameters beside the weights" if found.added else ""
        print(f"{one_line(out)}: {how}, {len(found.moved)} tensors changed{beside}")
        for key, value in found.told.items():
            if isinstance(value, float):
                print(f"  {key}: {value:.4g}")


def _experts(given: list[str]) -> dict[str, str]:
    from weft.errors import UsageError

    found = {}
    for item in given:
        task, equals, model = item.partition("=")
        if not task or not equals or not model:
            raise UsageError(f"--expert is TASK=MODEL, not {item!r}")
        found[task] = model
    return found
