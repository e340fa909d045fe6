"""`weft align B --to A OUT`: a model with its units in the order of another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()
FUNCTION = "PKG:FN"


@app.command()
def align(
    b: Annotated[str, typer.Argument(help="The model to be put in order: path, Hub id or URL.", metavar="B")],
    out: Annotated[
        Path | None, typer.Argument(help="A folder, or one file ending in .safetensors.", metavar="[OUT]")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="A", help="The model whose order it takes.")] = None,
    how: Annotated[
        str,
        typer.Option(
            help="weights, ste, sinkhorn, annealing, deep (--set network=FILE), rotations, activations, "
            "correlation, mudsc, cca, ot or transformers."
        ),
    ] = "weights",
    module: Annotated[
        str | None,
        typer.Option(metavar=FUNCTION, help="Makes the torch module, if it is none of transformers."),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(metavar=FUNCTION, help="Gives example inputs with which the module can be run."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar=FUNCTION, help="Gives the data, for the ways that need them.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="Take the symmetries from this file.")] = None,
    save_spec: Annotated[
        Path | None, typer.Option(help="Write the symmetries to this file, to be edited.")
    ] = None,
    print_spec: Annotated[bool, typer.Option("--print-spec", help="Print the symmetries and stop.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the way, e.g. tries=5."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory budget, e.g. 2GiB. Default: a quarter of RAM.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put the units of one model into the order of another's, so that the two can be averaged."""
    import weft
    from weft.align import PermutationSpec, agreement, discover, spec_of
    from weft.align.apply import Permuted
    from weft.align.stored import as_specified
    from weft.align.verb import MATCHERS
    from weft.align.verb import align as run
    from weft.cli.output import one_line, print_json, safe
    from weft.engine.staging import refuse_existing
    from weft.errors import UsageError
    from weft.search.objective import imported

    made, examples, given = (None if f is None else imported(f)() for f in (module, inputs, data))
    found: PermutationSpec | None = None
    if spec is not None:
        found = PermutationSpec.load(spec)
    elif how in MATCHERS or print_spec or save_spec is not None:
        found = spec_of(to or b, examples) if made is None else discover(made, examples)
    if found is not None and save_spec is not None:
        found.save(save_spec)
    if found is not None and print_spec:
        if json:
            print_json(found.to_json())
        else:
            print(safe(str(found)))
        return
    if to is None or out is None:
        if save_spec is not None:
            return
        raise UsageError("align needs both models and a place: weft align B --to A OUT (or --print-spec)")
    refuse_existing(out, overwrite)
    options = _options(set_ or [])
    if how == "weights" and memory is not None:
        options["memory"] = memory
    known = found if how in MATCHERS or spec is not None else None  # networks of two widths have two
    aligned = run(b, to=to, how=how, module=made, spec=known, data=given, **options)
    told: dict[str, Any] = {"out": str(out), "how": how}
    if isinstance(aligned, Permuted):
        order, eye = aligned.permutations, aligned.spec.identity()
        told["moved"] = sum(int((p != eye[n]).sum()) for n, p in order.items())
        told["units"] = aligned.spec.degrees
        pair = [as_specified(weft.load(m), aligned.spec) for m in (to, b)]
        told["agreement"] = [agreement(aligned.spec, *pair, p, memory=memory) for p in (None, order)]
    settings = {} if memory is None else {"memory": memory}
    weft.save(aligned, out, overwrite=overwrite, **settings)
    if json:
        print_json(told)
    elif not quiet:
        line = f"{one_line(out)}: {one_line(b)} in the order of {one_line(to)}, by {how}"
        if "moved" in told:
            before, after = told["agreement"]
            line += (f"; {told['moved']} of {told['units']} units moved, cosine of the weights {before:.4f} → "
                     f"{after:.4f}")  # fmt: skip
        print(line)


def _options(given: list[str]) -> dict[str, Any]:
    import yaml

    from weft.errors import UsageError

    found = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set is KEY=VALUE, such as tries=5, not {item!r}")
        found[key] = yaml.safe_load(value)
    return found
