"""The command line: `weft VERB`. Verbs import what they need when they run, so `--help` is quick."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.advise import app as advise_app
from weft.cli.align import app as align_app
from weft.cli.analyze import app as analyze_app
from weft.cli.bench import app as bench_app
from weft.cli.calibrate import app as calibrate_app
from weft.cli.delta import app as delta_app
from weft.cli.evaluate import app as evaluate_app
from weft.cli.export import app as export_app
from weft.cli.learn import app as learn_app
from weft.cli.lora import app as lora_app
from weft.cli.measure import app as measure_app
from weft.cli.moe import app as moe_app
from weft.cli.remeasuring import app as remeasuring_app
from weft.cli.route import app as route_app
from weft.cli.tokens import app as tokens_app

app = typer.Typer(
    name="weft",
    help="Weave the weights of several trained networks into one.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich takes longer than all the rest of it
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. parameters.density=0.5."
    ),
]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from weft._version import __version__

        print(f"weft {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


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
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the output in transformers and compare it with its inputs.")
    ] = False,
    verify_text: Annotated[
        Path | None, typer.Option(help="Verify on this text (.txt, .jsonl, .gz) instead of the bundled one.")
    ] = None,
    log_json: Annotated[
        Path | None, typer.Option(help="Append events as JSON lines to this file ('-': stdout).")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    json: Json = False,
) -> None:
    """Merge checkpoints as a recipe says. Interrupted, the same command goes on where it stopped."""
    from weft.cli.merging import run

    status = run(
        recipe, out, sets=set_ or [], seed=seed, dry_run=dry_run, explain=explain, log_json=log_json,
        quiet=quiet, as_json=json, memory=memory, threads=threads, device=device, dtype=dtype,
        shard_size=shard_size, executor=executor, overwrite=overwrite, digests=digests,
        verify=verify or verify_text is not None, verify_text=verify_text,
    )  # fmt: skip
    raise typer.Exit(status)


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")],
    set_: Set = None,
    headers: Annotated[
        bool, typer.Option(help="Also read the models' headers: names, shapes, dtypes.")
    ] = True,
    json: Json = False,
) -> None:
    """Report every problem of a recipe before any weight is read."""
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
    from weft.cli.inspecting import inspect_model

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
    """List the merging methods, or show one (or a step) in full."""
    from weft.cli.showing import list_methods

    list_methods(name, json)


@app.command()
def systems(
    section: Annotated[str | None, typer.Option(help="Only this section of the survey, e.g. 2.2.3.")] = None,
    json: Json = False,
) -> None:
    """List the named systems of the field: which of them work?"""
    from weft.cli.cataloguing import list_systems

    list_systems(section, json)


@app.command()
def search(
    search: Annotated[str, typer.Argument(help="A search file (YAML).", metavar="SEARCH")],
    out: Annotated[Path | None, typer.Option(help="Write the winner's recipe here.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Candidates in all; goes before the file's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Goes before the file's.")] = None,
    storage: Annotated[
        Path | None, typer.Option(help="SQLite file from which the same search goes on.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Candidates measured at a time.")] = None,
    executor: Annotated[str | None, typer.Option(help="local or ray.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="For inputs and merged tensors, e.g. 8GiB. Default: a quarter of RAM.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no line a candidate.")] = False,
    json: Json = False,
) -> None:
    """Search a recipe's parameters for the best score on validation data."""
    from weft.cli.search import run_search

    run_search(
        search, out, plot, json, quiet, trials=trials, seed=seed, storage=storage, jobs=jobs,
        executor=executor, memory=memory,
    )  # fmt: skip


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A merged model's folder.", metavar="MODEL")],
    parent: Annotated[
        list[str] | None, typer.Option(help="A model it was made from; may be given several times.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text (.txt, .jsonl, .gz) instead of the bundled one.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most so many tokens of it.")] = 4096,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    record: Annotated[bool, typer.Option("--record", help="Put it into the manifest and card.")] = False,
    json: Json = False,
) -> None:
    """Run a model with transformers: does it load, compute and predict? Exit status 1 if not."""
    from weft.cli.verifying import verify_folder

    status = verify_folder(
        model, parent or [], text=text, tokens=tokens, device=device, record=record, as_json=json
    )
    raise typer.Exit(status)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A merged model's folder.", metavar="FOLDER")],
    repo: Annotated[str, typer.Argument(help="org/name on the Hub.", metavar="REPO")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="If the repository is new.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it isn't there.")] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload with weft",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and stop.")] = False,
    json: Json = False,
) -> None:
    """Upload a model to the Hub. Interrupted, the same command goes on where it stopped."""
    from weft.cli.push import push_folder

    push_folder(
        folder, repo, private=private, revision=revision, message=message, create_pr=create_pr,
        dry_run=dry_run, as_json=json,
    )  # fmt: skip


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from weft.cli.output import print_json
    from weft.recipes import json_schema

    print_json(json_schema())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write the report.")] = Path("weft-demo"),
    json: Annotated[Path | None, typer.Option("--json", help="Also write the results as JSON.")] = None,
) -> None:
    """Merge small real experts, evaluate them, write a report."""
    from weft.demo import demo as run_demo

    run_demo(out, json_path=json)


app.add_typer(advise_app)
app.add_typer(align_app)
app.add_typer(analyze_app)
app.add_typer(calibrate_app)
app.add_typer(evaluate_app)
app.add_typer(bench_app)
app.add_typer(measure_app)
app.add_typer(remeasuring_app)
app.add_typer(route_app)
app.add_typer(learn_app)
app.add_typer(tokens_app)
app.add_typer(lora_app)
app.add_typer(moe_app)
app.add_typer(export_app)
app.add_typer(delta_app)


def main() -> None:
    """Entry point: errors become one message on stderr and an exit status, never a traceback."""
    from weft.cli.output import report_error
    from weft.errors import WeftError

    # torch and numba make a million objects that live for ever; looking through them again and again is a
    # fifth of the time they take to import
    gc.set_threshold(200_000, 50, 50)
    # numpy's BLAS starts a thread a core as it is imported, which spin for a tenth of a second; weft multiplies
    # matrices by torch
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows \u2212 rather than fail
            stream.reconfigure(errors="backslashreplace")
    status: object = None
    try:
        # returns the status of an Exit, among them 130 for a Ctrl-C, which it catches
        status = app(standalone_mode=False, prog_name="weft")
    except WeftError as error:
        report_error(str(error))
        status = error.exit_status
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except MemoryError:
        report_error("out of memory: lower --memory or --threads")
        status = 1
    except Exception as error:
        status = _report(error)
    if status == INTERRUPTED:
        report_error("interrupted; the same command goes on where this one stopped")
    if isinstance(status, int) and status:
        sys.exit(status)


def _report(error: Exception) -> int:
    """Say what the argument parser or the operating system refused; the exit status."""
    from difflib import get_close_matches

    from weft.cli.output import report_error

    # told by what they have, since typer's parser has moved between packages
    show = getattr(error, "format_message", None)
    if show is not None:
        context = getattr(error, "ctx", None)
        wrong, known = getattr(error, "option_name", None), getattr(error, "possibilities", None)
        message = show().rstrip(".")
        if wrong and known is not None:
            near = get_close_matches(wrong, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"there is no option {wrong}{hint}"
        report_error(message + (f" (see {context.command_path} --help)" if context is not None else ""))
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":  # an interrupt, as older versions of typer report it
        return INTERRUPTED
    if isinstance(error, OSError):
        report_error(f"{error.filename or 'a file'}: {error.strerror or error}")
        return 1
    if os.environ.get("WEFT_DEBUG"):
        raise error
    report_error(
        f"weft failed unexpectedly: {type(error).__name__}: {error}. This is a bug in weft; "
        f"set WEFT_DEBUG=1 to see where"
    )
    return 1


def process() -> None:
    """`main` as a process of its own, which ends without taking itself apart.

    To free torch's million objects one by one takes half as long as to make them, and the system frees them
    anyway. Whoever asked to be called at the end is called; where threads are left, Python waits for them.
    """
    status: int | str | None = 0
    try:
        main()
    except SystemExit as left:
        status = left.code
    if threading.active_count() > 1 or not isinstance(status, int | None):
        sys.exit(status)
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        pass
    except OSError:
        sys.exit(status)  # Python tries once more, and says what is wrong
    os._exit(status or 0)


if __name__ == "__main__":
    process()
