"""The command line: `weft VERB`. Verbs import what they need when they run, so `--help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="weft",
    help="Weave the weights of several trained networks into one.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. parameters.density=0.5."
    ),
]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from weft._version import __version__

        print(f"weft {__version__}")
        raise typer.Exit()


@app.command()
def merge(
    recipe: Annotated[str, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")],
    out: Annotated[Path, typer.Argument(help="A folder, or one file ending in .safetensors.", metavar="OUT")],
    memory: Annotated[
        str | None, typer.Option(help="Hard memory budget, e.g. 2GiB. Default: a quarter of RAM.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: one a core.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print how one tensor is computed, and stop.")
    ] = None,
    set_: Set = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random masks; goes before the recipe's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Storage dtype of the output.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    executor: Annotated[str, typer.Option(help="local or ray.")] = "local",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    digests: Annotated[bool, typer.Option(help="Put sha256 of inputs and outputs in the manifest.")] = True,
    log_json: Annotated[
        Path | None, typer.Option(help="Append events as JSON lines to this file ('-': stdout).")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    json: Json = False,
) -> None:
    """Merge checkpoints as a recipe says. Interrupted, the same command goes on where it stopped."""
    from weft.cli.merging import run

    run(
        recipe, out, sets=set_ or [], seed=seed, dry_run=dry_run, explain=explain, log_json=log_json, quiet=quiet,
        as_json=json, memory=memory, threads=threads, device=device, dtype=dtype, shard_size=shard_size,
        executor=executor, overwrite=overwrite, digests=digests,
    )  # fmt: skip


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")],
    set_: Set = None,
    headers: Annotated[
        bool, typer.Option(help="Also read the models' headers: names, shapes, dtypes.")
    ] = True,
    json: Json = False,
) -> None:
    """Report every problem of a recipe at once, before a byte of weights is read."""
    from weft.cli.showing import check_recipe

    check_recipe(recipe, set_ or [], headers, json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Path, Hub id or URL.", metavar="MODEL")],
    values: Annotated[
        bool, typer.Option("--values", help="Also read the values: norms, extremes, NaN.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds."""
    from weft.cli.showing import inspect_model

    inspect_model(model, values, json)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Path, Hub id or URL.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Path, Hub id or URL.", metavar="B")],
    base: Annotated[str | None, typer.Option(help="Compare the task vectors A − base and B − base.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf).")] = None,
    json: Json = False,
) -> None:
    """Compare two checkpoints per tensor and per layer."""
    from weft.cli.comparing import diff_models

    diff_models(a, b, base, plot, json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.", metavar="[NAME]")] = None,
    json: Json = False,
) -> None:
    """List the merging methods: what each needs, its parameters, its paper."""
    from weft.cli.showing import list_methods

    list_methods(name, json)


@app.command()
def systems(
    section: Annotated[str | None, typer.Option(help="Only this section of the survey, e.g. 2.2.3.")] = None,
    json: Json = False,
) -> None:
    """List the named systems of the field, and which of them work in weft."""
    from weft.cli.showing import list_systems

    list_systems(section, json)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from weft.recipes import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write the report.")] = Path("weft-demo"),
    json: Annotated[Path | None, typer.Option("--json", help="Also write the results as JSON.")] = None,
) -> None:
    """Merge small real experts by several methods, evaluate them, write a report."""
    from weft.demo import demo as run_demo

    run_demo(out, json_path=json)


def main() -> None:
    """Entry point: errors become one message on stderr and an exit status, never a traceback."""
    from weft.cli.output import report_error
    from weft.errors import WeftError

    try:
        app(standalone_mode=False)
    except WeftError as error:
        report_error(str(error))
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        report_error("interrupted; the same command goes on where this one stopped")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except MemoryError:
        report_error("out of memory: lower --memory or --threads")
        sys.exit(1)
    except Exception as error:
        _report_click(error)


def _report_click(error: Exception) -> None:
    """Usage errors of the argument parser, and what the operating system refused."""
    from weft.cli.output import report_error

    show = getattr(error, "format_message", None)
    if show is not None:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        report_error(f"{show()}{hint}")
        sys.exit(getattr(error, "exit_code", 2))
    if type(error).__name__ in ("Exit", "Abort"):
        sys.exit(getattr(error, "exit_code", 1))
    if isinstance(error, OSError):
        report_error(f"{error.filename or 'a file'}: {error.strerror or error}")
        sys.exit(1)
    if os.environ.get("WEFT_DEBUG"):
        raise error
    report_error(
        f"weft failed unexpectedly: {type(error).__name__}: {error}. This is a bug in weft; "
        f"set WEFT_DEBUG=1 to see where"
    )
    sys.exit(1)


if __name__ == "__main__":
    main()
