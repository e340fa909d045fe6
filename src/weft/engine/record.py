"""What is written beside the weights: config, index, travelling files, manifest, model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft._version import __version__
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import dtype_name, is_mergeable
from weft.engine.plan import Plan
from weft.engine.writer import write_whole

# keys that make a loader fetch or run code that the weights' reader never asked for
_CODE_KEYS = re.compile(r"^(auto_map|custom_pipelines|trust_remote_code|.*_implementation(_internal)?)$")


def output_config(plan: Plan) -> tuple[dict[str, Any] | None, list[str]]:
    """config.json as the output needs it, with notes on what was changed and why."""
    source = plan.checkpoint.config
    if source is None:
        return None, []
    notes: list[str] = []
    config = _without_code(dict(source), notes)
    stored = {i.dtype for i in plan.tensors.values() if is_mergeable(i.dtype)}
    if len(stored) == 1:
        name = dtype_name(next(iter(stored)))
        for key in ("dtype", "torch_dtype"):
            if key in config and config[key] != name:
                notes.append(f"config.json: {key} {config[key]} → {name}")
                config[key] = name
    head_written = any(re.search(r"(^|\.)lm_head\.weight$", n) for n in plan.tensors)
    if config.get("tie_word_embeddings") and head_written:
        config["tie_word_embeddings"] = False
        notes.append("config.json: tie_word_embeddings → false, since the output has a head of its own")
    return config, notes


def _without_code(config: dict[str, Any], notes: list[str], path: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        if _CODE_KEYS.match(key):
            notes.append(f"config.json: {path}{key} left out, since it can make a loader run code")
        elif isinstance(value, dict):
            kept[key] = _without_code(value, notes, f"{path}{key}.")
        else:
            kept[key] = value
    return kept


def write_config(folder: Path, config: Mapping[str, Any] | None) -> None:
    if config is not None:
        write_whole(
            folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        )


def write_assets(folder: Path, checkpoint: Checkpoint) -> None:
    """Tokenizer, generation config and the like, byte for byte."""
    for asset in checkpoint.assets:
        target = folder / asset.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, asset.read())


def write_index(folder: Path, plan: Plan) -> None:
    """model.safetensors.index.json, where the weights are in several files."""
    if len(plan.layout.sizes) == 1:
        return
    index = {
        "metadata": {
            "total_size": sum(i.nbytes for i in plan.tensors.values()),
            "total_parameters": sum(i.numel for i in plan.tensors.values()),
        },
        "weight_map": {n: plan.layout.places[n].file for n in plan.tensors},
    }
    write_whole(folder / "model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())


def manifest(
    plan: Plan,
    *,
    recipe: Mapping[str, Any] | None,
    digests: Mapping[str, str | None],
    inputs: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """How the output came about: enough to check it and to make it again. Holds no time and no host."""
    return {
        "weft": __version__,
        "made_from": plan.checkpoint.origin,
        "recipe": recipe,
        "seeds": sorted(_seeds(plan.checkpoint)),
        "inputs": list(inputs),
        "outputs": [
            {"file": f, "size": size, "sha256": digests.get(f)} for f, size in plan.layout.sizes.items()
        ],
        "tensors": len(plan.tensors),
        "carried": carried(plan.checkpoint),
        "notes": list(notes),
    }


def carried(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors copied rather than merged anywhere in the graph, with the reason."""
    found: dict[str, str] = {}
    for source in checkpoint.inputs:
        found |= carried(source)
    return found | dict(getattr(checkpoint, "carried", {}))


def _seeds(checkpoint: Checkpoint) -> set[int]:
    own = {seed} if isinstance(seed := getattr(checkpoint, "seed", None), int) else set()
    return own.union(*(_seeds(s) for s in checkpoint.inputs))


def model_card(plan: Plan, recipe_text: str | None) -> str:
    """README.md in the Hub's conventions: front matter, what was merged, the recipe."""
    names = list(dict.fromkeys(s.origin for s in leaves(plan.checkpoint)))
    hub_ids = [n for n in names if re.fullmatch(r"[\w.-]+/[\w.-]+", n)]
    front = ["---"]
    if hub_ids:
        front += ["base_model:", *(f"- {n}" for n in hub_ids), "base_model_relation: merge"]
    if (plan.checkpoint.config or {}).get("architectures"):
        front.append("library_name: transformers")
    front += ["tags:", "- merge", "- weft", "---"]
    lines = [*front, "", "# Merged with weft", "", "Models:", "", *(f"- `{_plain(n)}`" for n in names), ""]
    lines += [
        f"Made by weft {__version__}; `weft-manifest.json` has the hashes of every input and output.",
        "",
    ]
    if recipe_text:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", recipe_text)), default=0))
        lines += ["Recipe:", "", f"{fence}yaml", recipe_text.rstrip(), fence, ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return re.sub(r"[`\x00-\x1f\x7f]", "?", text)


def leaves(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoints at the ends of the graph."""
    if not checkpoint.inputs:
        return [checkpoint]
    return [leaf for source in checkpoint.inputs for leaf in leaves(source)]
