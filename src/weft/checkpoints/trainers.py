"""Adapters in one file, as trainers of image models write them: kohya, LyCORIS, diffusers and their kin.

A file names modules its own way: with underscores for dots (kohya), with dots, with a processor's attribute in
between. The scale is alpha / r where the file has an alpha, what the header says where it says something, else 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from weft.checkpoints.adapters import Lora, lycoris, scale_of
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.strictjson import parse_json
from weft.checkpoints.updates import LoraModule, Update
from weft.errors import DataProblems

_KEY = re.compile(
    r"(?P<module>.+?)[._]?(?:"
    r"(?P<down>(?<=[._])lora_down|(?<=[._])lora\.down|(?<=[._])lora_linear_layer\.down|(?<=[._])lora_A(?:\.default)?)"
    r"\.weight"
    r"|(?P<up>(?<=[._])lora_up|(?<=[._])lora\.up|(?<=[._])lora_linear_layer\.up|(?<=[._])lora_B(?:\.default)?)"
    r"\.weight"
    r"|(?P<mid>(?<=[._])lora_mid)\.weight"
    r"|(?<=\.)(?P<dora_scale>dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
    r"|(?<=\.)(?P<other>alpha|(?:hada|lokr)_\w+|diff|diff_b|w_norm|b_norm|set_weight))"
)
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")
"""diffusers' first format hung factors on the attention's processor."""
_ADDED = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
_HEADER = "lora_adapter_metadata"


def describe_file(weights: Checkpoint) -> Lora:
    """Sort a file's tensors by module. DataProblems listing every tensor that is not understood."""
    parts: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for key in weights:
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"{shown(key)} is no adapter's tensor weft knows")
            continue
        kind = match["other"] or next(k for k in ("down", "up", "mid", "dora_scale") if match[k])
        module = _PROCESSOR.sub(lambda m: f".{m[1]}" + (".0" if m[1] == "to_out" else ""), match["module"])
        parts.setdefault(module.removeprefix("base_model.model."), {})[kind] = key
    config = _header(weights)
    modules: dict[str, Update] = {}
    added: dict[str, tuple[str, float]] = {}
    replaced: dict[str, str] = {}
    for module, part in parts.items():
        alpha = part.pop("alpha", None)
        for kind, leaf in _ADDED.items():
            if kind in part:
                added[f"{module}.{leaf}"] = (part.pop(kind), 1.0)
        if "set_weight" in part:
            replaced[f"{module}.weight"] = part.pop("set_weight")
        if part:
            update = _update(module, part, weights, alpha, config, problems)
            if update is not None:
                modules[f"{module}.weight"] = update
    if not parts:
        problems.append("it holds no tensors")
    if problems:
        raise DataProblems(f"{weights.origin} cannot be read as an adapter", problems)
    names = [*modules, *added, *replaced]
    underscored = all("." not in n.rpartition(".")[0] and "_" in n for n in names)
    return Lora(weights.origin, config, weights, modules, added, replaced, underscored=underscored)


def _update(
    module: str, part: dict[str, str], weights: Checkpoint, alpha: str | None,
    config: Mapping[str, Any], problems: list[str],
) -> Update | None:  # fmt: skip
    def scale(rank: int | None) -> float:
        if rank is None:  # LyCORIS: a whole Kronecker product has no rank, and its alpha does not count
            return 1.0
        if alpha is not None:
            return float(weights.tensor(alpha).to("cpu").double().reshape(-1)[0]) / rank
        component, _, inner = module.partition(".")
        own = {k.partition(".")[2]: v for k, v in config.items() if k.startswith(f"{component}.")}
        if own:
            return scale_of(own, inner, rank, problems)
        return scale_of(config, module, rank, problems) if "lora_alpha" in config else 1.0

    if any(kind.startswith(("hada_", "lokr_")) for kind in part):
        made = lycoris(part, weights, scale)
        if made is None:
            problems.append(f"{shown(module)} lacks some of its factors: {', '.join(sorted(part))}")
        return made
    down, up, middle = part.pop("down", None), part.pop("up", None), part.pop("mid", None)
    magnitude = part.pop("dora_scale", None)
    if down is None or up is None or part:
        problems.append(f"{shown(module)} lacks one of its factors down and up")
        return None
    return LoraModule(down, up, scale(weights.info(up).shape[1]), False, magnitude, middle)


def _header(weights: Checkpoint) -> Mapping[str, Any]:
    """The configuration that diffusers puts into the file's header, as data; empty where there is none."""
    text = (getattr(weights, "metadata", None) or {}).get(_HEADER)
    if not isinstance(text, str):
        return {}
    return parse_json(text.encode(), f"{weights.origin} ({_HEADER})", "config-json", depth=8)
