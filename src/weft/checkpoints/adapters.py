"""PEFT's LoRA folders as base + an update that is expanded only where it is read.

Every tensor of an adapter must find its place in the base, or nothing is loaded: the field's commonest bug
is an adapter that matches nothing and a merge that changes nothing. What is not understood is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.folders import Folder, LocalFolder
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown
from weft.checkpoints.model import read_config
from weft.checkpoints.refs import Kind, Ref, parse_ref
from weft.errors import DataError, DataProblems, UsageError

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.default)?(?P<leaf>\.weight|\.bias)?"
)
_KEPT = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
"""Parts of a name that PEFT's wrappers add: the same tensor without them is the base's."""
_REFUSED = (
    "target_parameters", "layer_replication", "trainable_token_indices", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "megatron_config", "kasa_config", "velora_config",
)  # fmt: skip
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Starts that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ) change it."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One update `scale · B A` and the names of its factors in the adapter."""

    a: str
    b: str
    scale: float
    embedding: bool = False
    magnitude: str | None = None


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter: what it adds to which weight and bias, and what it replaces, by the adapter's names."""

    origin: str
    config: Mapping[str, Any]
    weights: Checkpoint
    modules: Mapping[str, LoraModule]
    """Weight → its low-rank update."""
    biases: Mapping[str, tuple[str, float]]
    """Bias → (tensor, factor) added to it."""
    replaced: Mapping[str, str]
    """Tensor → the adapter's full replacement (modules_to_save, trained biases)."""

    @property
    def transposed(self) -> bool:
        """True where weights are stored `[in, out]` (GPT-2's Conv1D)."""
        return bool(self.config.get("fan_in_fan_out"))


def load_adapter(source: Ref | Folder | Path | str, *, limits: Limits = DEFAULT_LIMITS) -> Lora:
    """Read an adapter folder: adapter_config.json and its weights. DataError if not understood."""
    if isinstance(source, Folder):
        folder = source
    else:
        from weft.checkpoints.load import open_folder

        source = Ref(str(source)) if isinstance(source, Path) else source
        folder = open_folder(parse_ref(source) if isinstance(source, str) else source)
    names = folder.files()
    if "adapter_config.json" not in names:
        raise DataError(f"{folder.name} is no adapter: it has no adapter_config.json")
    config = read_config(folder, "adapter_config.json", limits)
    _check_config(config, folder.name)
    found = [n for n in _WEIGHTS if n in names]
    if not found:
        raise DataError(f"{folder.name} has no {_WEIGHTS[0]}; fetch the adapter again")
    from weft.checkpoints.load import open_weights

    return describe(config, open_weights(folder.open(found[0]), limits), folder.name)


def describe(config: Mapping[str, Any], weights: Checkpoint, origin: str) -> Lora:
    """Sort the adapter's tensors into updates, biases and replacements."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    problems: list[str] = []
    for key in weights:
        name = key.removeprefix("base_model.model.")
        match = _KEY.fullmatch(name)
        if match:
            part = match["part"] + (".bias" if match["leaf"] == ".bias" else "")
            parts.setdefault(match["module"], {})[part] = key
        elif "lora_" in name or "token_adapter" in name:
            problems.append(f"{shown(key)} is no LoRA tensor weft knows")
        elif ".original_module." not in name:  # PEFT's own copy of what it replaced
            replaced.setdefault(_KEPT.sub(".", name), key)
    modules, biases = {}, {}
    for module, part in parts.items():
        kind = "embedding_" if "embedding_A" in part else ""
        a, b = part.pop(f"{kind}A", None), part.pop(f"{kind}B", None)
        magnitude, bias = part.pop("magnitude_vector", None), part.pop("B.bias", None)
        if a is None or b is None or part:
            problems.append(f"{shown(module)} lacks one of its factors A and B")
            continue
        scale = _scale(config, module, weights.info(a).shape[0], problems)
        modules[f"{module}.weight"] = LoraModule(a, b, scale, bool(kind), magnitude)
        if bias:
            biases[f"{module}.bias"] = (bias, scale)
    if not parts and not replaced:
        problems.append("it holds no tensors")
    if problems:
        raise DataProblems(f"the adapter {origin} cannot be read", problems)
    return Lora(origin, config, weights, modules, biases, replaced)


def _check_config(config: Mapping[str, Any], origin: str) -> None:
    problems = []
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        problems.append(f"peft_type {shown(kind)}: convert it to LoRA with peft, or merge it there")
    problems += [
        f"{key} = {shown(config[key])} changes what the tensors mean; merge it with peft first"
        for key in _REFUSED
        if config.get(key)
    ]
    start = config.get("init_lora_weights", True)
    if not any(start is known or start == known for known in _INITS):
        problems.append(
            f"init_lora_weights {shown(start)} has changed the base; save the adapter converted to plain "
            "LoRA (path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_harmless, pattern)):
            problems.append(f"{key} is no table of simple name patterns")
    if problems:
        raise DataProblems(f"the adapter {origin} is of a kind that weft does not expand", problems)


def _is_harmless(pattern: str) -> bool:
    """False for a pattern that could take for ever to match (a stranger wrote it)."""
    if len(pattern) > 200 or re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError):
        return False
    return True


def _scale(config: Mapping[str, Any], module: str, rank: int, problems: list[str]) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own alpha and r where patterns say so."""
    r = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", r))
    if type(r) is not int or r < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        problems.append(f"{shown(module)}: r = {shown(r)}, alpha = {shown(alpha)} are no rank and factor")
        return 0.0
    if r != rank:
        problems.append(f"{shown(module)} has rank {rank} but adapter_config.json says {r}")
    return float(alpha) / (sqrt(r) if config.get("use_rslora") else r)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value whose pattern matches the end of the module's name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def adapted_folder(folder: Folder, *, base: object, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """The model that an adapter folder stands for: its base, given or named by its config, and the update."""
    from weft.checkpoints.adapted import Adapted
    from weft.checkpoints.load import load

    lora = load_adapter(folder, limits=limits)
    if base is None:
        base = _named_base(folder, lora.config)
    return Adapted(load(base, limits=limits), lora, origin=folder.name)


def _named_base(folder: Folder, config: Mapping[str, Any]) -> Ref:
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{folder.name} does not say which model it adapts; pass base=")
    ref = Ref(name, config.get("revision") if isinstance(config.get("revision"), str) else None)
    if ref.kind is Kind.URL:
        # an adapter from a stranger must not make us fetch from wherever it likes
        raise UsageError(f"{folder.name} names the base {shown(name)}; pass it as base= if you trust it")
    for start in [folder.path, Path()] if isinstance(folder, LocalFolder) else []:
        if (start / name).exists():
            return Ref(str(start / name))
    if ref.kind is Kind.LOCAL:
        raise UsageError(f"{folder.name} names the base {shown(name)}, which is not here; pass base=")
    return ref


def places(lora: Lora, base: Checkpoint) -> Callable[[str], str]:
    """How the adapter's names become the base's: as they are, or with one prefix removed or added.

    A checkpoint on disk may lack the prefix of the model class it was adapted in ("transformer.").
    DataProblems listing every tensor without a place under the best of these.
    """
    known = {*base.tensors, *base.aliases}
    wanted = [*lora.modules, *lora.biases, *lora.replaced]
    ways: list[tuple[str, str]] = [("", "")]
    ways += [(first, "") for first in sorted({n.partition(".")[0] + "." for n in wanted})]
    ways += [("", first) for first in sorted({n.partition(".")[0] + "." for n in known})]

    def missing(way: tuple[str, str]) -> list[str]:
        return [n for n in wanted if _moved(n, way) not in known]

    best = min(ways, key=lambda way: len(missing(way)))
    if missing(best):
        raise DataProblems(
            f"the adapter {lora.origin} does not fit {base.origin}; these have no place in it (is it the "
            "right base?)",
            [shown(n) for n in missing(best)],
        )
    return lambda name: _moved(name, best)


def _moved(name: str, way: tuple[str, str]) -> str:
    removed, added = way
    return added + name.removeprefix(removed)


def check_shapes(lora: Lora, name: str, base: TensorInfo, module: LoraModule) -> str | None:
    """Why an update cannot be added to a weight of this shape, or None. Also refuses unclear DoRA."""
    a, b = lora.weights.info(module.a).shape, lora.weights.info(module.b).shape
    if len(a) < 2 or len(b) < 2 or len(base.shape) < 2 or a[0] != b[1]:
        return f"{shown(name)}: A {list(a)} and B {list(b)} do not multiply"
    if any(n != 1 for n in b[2:]):
        return f"{shown(name)}: B {list(b)} is a convolution of its own, which weft does not expand"
    made = (b[0], *a[1:])
    if is_transposed(lora, base, module):
        made = made[::-1]
        if module.magnitude:
            return f"{shown(name)}: DoRA over a transposed weight is not supported; merge it with peft"
    if made != base.shape:
        return f"{shown(name)}: the update has shape {list(made)}, the base {list(base.shape)}"
    return None


def is_transposed(lora: Lora, base: TensorInfo, module: LoraModule) -> bool:
    """True where the weight is stored `[in, out]`: embeddings, and Conv1D by flag or by its shape."""
    a, b = lora.weights.info(module.a).shape, lora.weights.info(module.b).shape
    if module.embedding or len(a) != 2:
        return module.embedding
    plain, turned = base.shape == (b[0], a[1]), base.shape == (a[1], b[0])
    return turned and (lora.transposed or not plain)
