"""`weft route`: a routed model out of a base and its experts, what it costs, and static models out of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from weft.routing.routed import Routed

app = typer.Typer(
    name="route",
    help="Models that are merged anew for each input. weft evaluate scores one.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
FUNCTION = "PKG:FN"

ModuleOf = Annotated[
    str | None, typer.Option(metavar=FUNCTION, help="Makes the torch module, if it is none of transformers.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def build(
    base: Annotated[str, typer.Argument(help="What the experts started from.", metavar="BASE")],
    out: Annotated[Path, typer.Argument(help="A folder for the routed model.", metavar="OUT")],
    expert: Annotated[
        list[str] | None, typer.Option(metavar="TASK=MODEL", help="A task's own model; repeat.")
    ] = None,
    shared: Annotated[
        str, typer.Option(help="What is not routed: a method, base, or a model.")
    ] = "task_arithmetic",
    residual: Annotated[
        str, typer.Option(help="full, lowrank:16, sparse:0.1, sign, quantised:4, emr, tall:0.4 …")
    ] = "lowrank:16",
    gate: Annotated[
        str, typer.Option(help="oracle, prototype, router, energy, residue, entropy or preference.")
    ] = "oracle",
    where: Annotated[
        list[str] | None, typer.Option(help="all, linear, mlp, or patterns of submodules' names; repeat.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar=FUNCTION, help="A function that gives inputs by task, as a dict.")
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="Texts of a task, instead of --data; repeat."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples a task that the gate sees.")] = 32,
    module: ModuleOf = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Other settings: rests_on, rest, combine, how, split."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text in a batch.")] = 8,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Keep a shared merge, what each expert knows beyond it, and a gate."""
    import weft
    from weft.cli.output import key_values, one_line, print_json
    from weft.errors import UsageError, did_you_mean
    from weft.search.objective import imported

    experts = pairs(expert or [], "--expert is TASK=MODEL")
    if len(experts) < 2:
        raise UsageError("name two experts or more: --expert TASK=MODEL, once a task")
    if data is not None and texts:
        raise UsageError("--data and --texts both give inputs: give one of them")
    settings = key_values(set_ or [])
    for key in settings:
        if key not in SETTINGS:
            raise UsageError(f"--set {key}: no such setting{did_you_mean(key, SETTINGS)}")
    source = weft.load(base)
    inputs: Any = imported(data)() if data is not None else None
    if texts:
        inputs = texts_of(source, pairs(texts, "--texts is TASK=FILE"), length, batch)
    learns = gate == "router"
    if learns and inputs is None:
        raise UsageError("a router learns from inputs by task: give --data or --texts")
    routed = weft.route(
        network(source, module), source, experts, shared=_shared(shared), residual=residual, gate=gate,
        where=_where(where), data=None if learns else inputs, samples=samples, **settings,
    )  # fmt: skip
    if learns:
        from weft.routing.learning import fit_router

        fit_router(routed, inputs, samples=samples, **{k: v for k, v in settings.items() if k == "split"})
    routed.save(out, overwrite=overwrite)
    if json:
        print_json({"out": str(out), "tasks": list(routed.tasks), "cost": routed.cost().to_json()})
    else:
        print(f"{one_line(out)}: {', '.join(routed.tasks)}\n{routed.cost()}")


@app.command()
def show(
    routed: Annotated[str, typer.Argument(help="A routed model's folder.", metavar="ROUTED")],
    base: Annotated[str | None, typer.Option(help="A model of transformers with its config.")] = None,
    module: ModuleOf = None,
    json: Json = False,
) -> None:
    """Print tasks, parts and costs of a routed model."""
    from weft.cli.output import one_line, print_json

    found = _loaded(routed, base, module)
    if json:
        print_json({"tasks": list(found.tasks), "parts": [b.name for b in found.blocks], "gate": found.gating.kind,
                    "cost": found.cost().to_json()})  # fmt: skip
        return
    print(
        f"{one_line(routed)}: {', '.join(found.tasks)}; gate {found.gating.kind}, {len(found.blocks)} parts"
    )
    print(found.cost())


@app.command()
def export(
    routed: Annotated[str, typer.Argument(help="A routed model's folder.", metavar="ROUTED")],
    out: Annotated[Path, typer.Argument(help="A folder for the model.", metavar="OUT")],
    task: Annotated[str | None, typer.Option(help="The static model of one task.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="At fixed weights, one a task.")
    ] = None,
    mixture: Annotated[bool, typer.Option("--mixture", help="A mixture of experts of transformers.")] = False,
    base: Annotated[str | None, typer.Option(help="A model of transformers with its config.")] = None,
    module: ModuleOf = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a static model, or a mixture of experts where one fits."""
    import weft
    from weft.cli.output import one_line, print_json
    from weft.errors import UsageError

    if (task is not None) + (weights is not None) + mixture != 1:
        raise UsageError("say what to write: --task NAME, --weights A,B,… or --mixture, one of them")
    found = _loaded(routed, base, module)
    if mixture:
        from weft.routing.export import mixture as as_mixture

        made = as_mixture(found)
    else:
        made = found.checkpoint(task=task, weights=None if weights is None else numbers(weights, "--weights"))
    saved = weft.save(made, out, overwrite=overwrite)
    if json:
        print_json({"out": str(saved.path), "tensors": len(list(made))})
    else:
        print(f"{one_line(saved.path)}: {len(list(made))} tensors")


SETTINGS = ("rests_on", "rest", "combine", "how", "split")
"""What `--set` may say of `weft.route`."""


def pairs(given: list[str], form: str) -> dict[str, str]:
    """TASK=VALUE, each task once; `form` says how they are written."""
    from weft.errors import UsageError

    found: dict[str, str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{form}, not {item!r}")
        if name in found:
            raise UsageError(f"{form}: {name!r} is given twice")
        found[name] = value
    return found


def numbers(text: str, option: str) -> list[float]:
    """A,B,… of an option."""
    from weft.errors import UsageError

    try:
        return [float(v) for v in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} are numbers, one a task, such as 0.2,0.8, not {text!r}") from None


def _where(given: list[str] | None) -> Any:
    if not given:
        return "all"
    return given[0] if len(given) == 1 and given[0] in ("all", "linear", "mlp") else given


def _shared(text: str) -> Any:
    """A method's name, "base", or a checkpoint where it is neither."""
    import weft
    from weft.methods.registry import METHODS

    return text if text == "base" or text in METHODS else weft.load(text)


def network(source: Any, module: str | None) -> nn.Module:
    """The network that PKG:FN makes, else the model of transformers. UsageError where it makes none."""
    from torch import nn

    from weft.errors import UsageError
    from weft.llm.hf import to_transformers
    from weft.search.objective import imported

    made = to_transformers(source) if module is None else imported(module)()
    if not isinstance(made, nn.Module):
        raise UsageError(f"--module {module} must give a torch module, not a {type(made).__name__}")
    return made


def _loaded(path: str, base: str | None, module: str | None) -> Routed:
    import weft
    from weft.errors import UsageError
    from weft.routing.stored import load

    if (base is None) == (module is None):
        raise UsageError(
            "the network's code is yours: give --base MODEL (of transformers) or --module PKG:FN"
        )
    return load(path, network(None if base is None else weft.load(base), module))


def texts_of(
    source: Any, files: dict[str, str], length: int, batch: int, labels: bool = False
) -> dict[str, Any]:
    """Task → windows of its text, by the model's own tokenizer."""
    from weft.llm.hf import tokenizer_of
    from weft.statistics.texts import texts

    size = next((i.shape[0] for n, i in source.tensors.items() if "embed" in n or "wte" in n), 256)
    return {
        t: texts(Path(f), tokenizer_of(source), vocabulary=size, length=length, batch=batch, labels=labels)
        for t, f in files.items()
    }
