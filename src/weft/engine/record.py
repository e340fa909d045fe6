"""What is written beside the weights: config, index, travelling files, manifest (the card: card.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft._version import __version__
from weft.checkpoints.base import Checkpoint
from weft.engine.card import leaves
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
    config = without_code(dict(source), notes)
    stored: dict[str, int] = {}
    for info in plan.tensors.values():
        if info.kind.mergeable:
            name = info.kind.name
            stored[name] = stored.get(name, 0) + info.numel
    if stored:
        _state_dtype(config, stored, notes)
    if any(re.search(r"(^|\.)lm_head\.weight$", n) for n in plan.tensors):
        _untie(config, notes)
    return config, notes


def without_code(config: dict[str, Any], notes: list[str], path: str = "") -> dict[str, Any]:
    """The config without the keys that make a loader run code; each one left out adds a note."""
    kept = {}
    for key, value in config.items():
        if _CODE_KEYS.match(str(key)):  # a config in memory may count labels by number
            notes.append(f"config.json: {path}{key} left out, since it can make a loader run code")
        else:
            kept[key] = _value_without_code(value, notes, f"{path}{key}.")
    return kept


def _value_without_code(value: Any, notes: list[str], path: str) -> Any:
    if isinstance(value, dict):
        return without_code(value, notes, path)
    if isinstance(value, list):
        return [_value_without_code(v, notes, f"{path}{i}.") for i, v in enumerate(value)]
    return value


def _state_dtype(config: dict[str, Any], stored: Mapping[str, int], notes: list[str], path: str = "") -> None:
    """dtype keys, also those of the parts of a multimodal model, that name what no tensor has."""
    most = max(stored, key=lambda n: stored[n])
    for key, value in config.items():
        if isinstance(value, dict):
            _state_dtype(value, stored, notes, f"{path}{key}.")
        elif key in ("dtype", "torch_dtype") and value is not None and value not in stored:
            notes.append(f"config.json: {path}{key} {value} → {most}")
            config[key] = most


def _untie(config: dict[str, Any], notes: list[str], path: str = "") -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _untie(value, notes, f"{path}{key}.")
        elif key == "tie_word_embeddings" and value:
            config[key] = False
            notes.append(f"config.json: {path}{key} → false, since the output has a head of its own")


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
        "left_out": _left_out(plan.checkpoint),
        "notes": list(notes),
    }


def carried(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors copied rather than merged anywhere in the graph, with the reason."""
    found: dict[str, str] = {}
    for source in checkpoint.inputs:
        found |= carried(source)
    return found | dict(getattr(checkpoint, "carried", {}))


def noted(checkpoint: Checkpoint) -> list[str]:
    """What the nodes of the graph have to say of themselves, each thing once."""
    every = [n for source in checkpoint.inputs for n in noted(source)]
    return list(dict.fromkeys([*every, *getattr(checkpoint, "notes", ())]))


def _left_out(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Entries of the inputs' files that are no weights (counters, optimiser state, scales), by input."""
    return {s.origin: skipped for s in leaves(checkpoint) if (skipped := list(getattr(s, "skipped", ())))}


def _seeds(checkpoint: Checkpoint) -> set[int]:
    own = {seed} if isinstance(seed := getattr(checkpoint, "seed", None), int) else set()
    return own.union(*(_seeds(s) for s in checkpoint.inputs))
