"""`weft inspect`: what a checkpoint holds, as a few lines and a table of name patterns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weft.analysis.groups import patterns
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.cli.output import console, figure, one_line, percent, print_json, shape_text, table
from weft.engine.budget import show_size
from weft.llm.consistency import contradictions
from weft.llm.layout import Layout, layout
from weft.llm.parts import parts

if TYPE_CHECKING:
    from weft.analysis.values import Values

FACTS = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings", "dtype",
    "torch_dtype",
)  # fmt: skip
"""Keys of config.json worth a line."""


def inspect_model(model: str, values: bool, as_json: bool) -> None:
    """Print what a checkpoint holds; with `values` also what its numbers look like."""
    checkpoint = load(model)
    found: dict[str, Values] | None = None
    if values:
        from weft.analysis.parallel import in_parallel
        from weft.analysis.values import survey_values

        with in_parallel():
            found = survey_values(checkpoint)
    told = describe(checkpoint)
    if as_json:
        if found is not None:
            for tensor in told["tensors"]:
                tensor["values"] = found[tensor["name"]].to_json()
        print_json(told)
        return
    _show_facts(told)
    _show_tensors(checkpoint, found)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as plain data."""
    infos, found = checkpoint.tensors, layout(checkpoint)
    parameters: Counter[str] = Counter()
    for info in infos.values():
        parameters[info.kind.name] += info.numel
    return {
        "origin": checkpoint.origin,
        "format": _format(checkpoint),
        "files": [{"path": f.path, "bytes": f.size} for f in checkpoint.files],
        "tensor_count": len(infos),
        "parameters": sum(i.numel for i in infos.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(parameters),
        "layers": {s.prefix.removesuffix("."): s.count for s in found.stacks.values()},
        "layout": describe_layout(checkpoint, found),
        "tied": dict(checkpoint.aliases),
        "config": None if checkpoint.config is None else dict(checkpoint.config),
        "assets": [a.name for a in checkpoint.assets],
        "skipped": list(getattr(checkpoint, "skipped", ())),
        "tensors": [
            {"name": n, "shape": list(i.shape), "dtype": i.kind.name, "bytes": i.nbytes}
            for n, i in infos.items()
        ],
    }


def describe_layout(checkpoint: Checkpoint, found: Layout) -> dict[str, Any]:
    """What weft takes a checkpoint's structure to be, and where the config contradicts it."""
    return {
        "stacks": [
            {"prefix": s.prefix, "count": s.count, "counted_by": [".".join(p) for p in s.counted_by],
             "listed_by": [".".join(p) for p in s.listed_by], "holes": list(s.holes)}
            for s in found.stacks.values()
        ],
        "parts": [p.name for p in parts(checkpoint, found).values()],
        "vocabulary": dict(found.vocabulary),
        "experts": {"each": max((e.count for e in found.experts.values()), default=0),
                    "blocks": len(found.experts), "fused": any(e.fused for e in found.experts.values())},
        "contradictions": contradictions(checkpoint, found),
    }  # fmt: skip


def _format(checkpoint: Checkpoint) -> str:
    paths = {f.path.split("?")[0] for f in checkpoint.files}
    kinds = {"safetensors" if p.endswith(".safetensors") else "torch" for p in paths}
    made = {"Adapted": ", a base with an adapter", "Dequantised": ", codes shown as their values"}
    return (" and ".join(sorted(kinds)) or "memory") + made.get(type(checkpoint).__name__, "")


def _show_facts(told: Mapping[str, Any]) -> None:
    def line(label: str, text: str) -> None:
        if text:
            print(f"{label:<12}{text}")

    def some(items: list[str]) -> str:
        more = f", … {len(items) - 8} more" if len(items) > 8 else ""
        return ", ".join(map(one_line, items[:8])) + more

    files = told["files"]
    size = show_size(sum(f["bytes"] for f in files))
    line("model", one_line(told["origin"]))
    line("format", f"{told['format']} ({len(files)} file{'s' * (len(files) != 1)}, {size})")
    line("tensors", f"{told['tensor_count']:,}, {show_size(told['bytes'])}")
    dtypes = told["dtypes"]
    each = "" if len(dtypes) == 1 else ": " + ", ".join(f"{n:,} {d}" for d, n in dtypes.items())
    line("parameters", f"{told['parameters']:,}{each or ' ' + next(iter(dtypes), '')}")
    found = told["layout"]
    for i, stack in enumerate(found["stacks"]):
        fields = [*stack["counted_by"], *stack["listed_by"]]
        said = f" ({', '.join(fields)})" if fields else ""
        line(
            "" if i else "blocks",
            one_line(f"{stack['prefix'].removesuffix('.') or '(top)'}: {stack['count']}{said}"),
        )
    line("parts", some(found["parts"]) if len(found["parts"]) > 1 else "")
    line("vocabulary", some([f"{n}: {rows:,}" for n, rows in found["vocabulary"].items()]))
    if found["experts"]["blocks"]:
        kept = "one tensor for all" if found["experts"]["fused"] else "a tensor each"
        line("experts", f"{found['experts']['each']} in each of {found['experts']['blocks']} blocks, {kept}")
    for text in found["contradictions"]:
        line("but", one_line(text))
    config = told["config"] or {}
    text = config.get("text_config")
    every = {**(text if isinstance(text, Mapping) else {}), **config}
    facts = [f"{k} {_fact(every[k])}" for k in FACTS if every.get(k) is not None]
    line("config", one_line(", ".join(facts)))
    line("tied", some([f"{a} → {t}" for a, t in told["tied"].items()]))
    line("carries", some(told["assets"]))
    line("skipped", some(told["skipped"]))


def _fact(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _show_tensors(checkpoint: Checkpoint, found: Mapping[str, Values] | None) -> None:
    columns = ["tensors", ">count", ">shape", "dtype", ">parameters"]
    if found is not None:
        columns += [">norm", ">rms", ">min", ">max", ">zeros", ">NaN", ">infinite"]
    listed = table(*columns)
    for group in patterns(checkpoint.tensors):
        info, count = group.info, len(group.names)
        row = [one_line(group.pattern), f"×{count}" if count > 1 else "", shape_text(info.shape),
               info.kind.name, f"{info.numel * count:,}"]  # fmt: skip
        if found is not None:
            row += _figures(found, group.names)
        listed.add_row(*row)
    print()
    console().print(listed)
    spoilt = [n for n, v in (found or {}).items() if v.nan or v.inf]
    if spoilt:
        print(f"\nNaN or infinite values in {len(spoilt)} tensor{'s' * (len(spoilt) != 1)}:")
        for name in spoilt[:20]:
            print(f"  {one_line(name)}")
        if len(spoilt) > 20:
            print(f"  … and {len(spoilt) - 20} more; see --json")


def _figures(found: Mapping[str, Values], names: tuple[str, ...]) -> list[str]:
    from weft.analysis.values import Values

    v = Values.total(found[n] for n in names)
    return [figure(v.norm), figure(v.rms), figure(v.min), figure(v.max), percent(v.zero_fraction),
            f"{v.nan:,}", f"{v.inf:,}"]  # fmt: skip
