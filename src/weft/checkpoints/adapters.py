"""PEFT's adapter folders as base + an update that is expanded only where it is read.

Every tensor of an adapter must find its place in the base, or nothing is loaded: the field's commonest bug
is an adapter that matches nothing and a merge that changes nothing. What is not understood is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.folders import Folder, LocalFolder
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown
from weft.checkpoints.model import read_config
from weft.checkpoints.refs import Kind, Ref, parse_ref
from weft.checkpoints.updates import Hadamard, Kronecker, LoraModule, Scaling, Update
from weft.errors import DataError, DataProblems, UsageError

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_KEY = re.compile(
    r"(?P<module>.+)\.(lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)|(?P<ia3>ia3_l)"
    r"|(?P<lycoris>(hada|lokr)_\w+))(\.default)?(?P<leaf>\.weight|\.bias)?"
)
_KEPT = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
"""Parts of a name that PEFT's wrappers add: the same tensor without them is the base's."""
_NESTED = re.compile(r"(\.base_layer)*$")
_REFUSED = (
    "layer_replication", "trainable_token_indices", "use_qalora", "use_bdlora", "alora_invocation_tokens",
    "arrow_config", "megatron_config", "kasa_config", "velora_config",
)  # fmt: skip
_KINDS = ("LORA", "IA3", "LOHA", "LOKR")
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Starts that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ) change it."""
Scale = Callable[[int | None], float]
"""The rank that the tensors show → the factor of the update."""


@dataclass(frozen=True, slots=True)
class Stack:
    """An update of stacked experts of which it is not settled yet which parameter of the module it is for."""

    a: str
    b: str
    parameters: Mapping[str, tuple[int, float]]
    """The parameters of the module that the config names → their r and scale."""


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter: what it adds to which weight and bias, and what it replaces, by the adapter's names."""

    origin: str
    config: Mapping[str, Any]
    weights: Checkpoint
    modules: Mapping[str, Update]
    """Weight → its low-rank update."""
    biases: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Bias (or any tensor) → (tensor of the same shape, factor) added to it."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Tensor → the adapter's full replacement (modules_to_save, trained biases)."""
    scalings: Mapping[str, Scaling] = field(default_factory=dict)
    """Weight → what multiplies it."""
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    """Module, with `.base_layer` once for each wrapper outside → its update, not settled yet."""
    underscored: bool = False
    """Names have underscores where the base has dots (kohya)."""

    @property
    def transposed(self) -> bool:
        """True where weights are stored `[in, out]` (GPT-2's Conv1D)."""
        return bool(self.config.get("fan_in_fan_out"))


def load_adapter(source: Ref | Folder | Path | str, *, limits: Limits = DEFAULT_LIMITS) -> Lora:
    """Read an adapter: a folder with adapter_config.json, or one file as image trainers write them.

    DataError if it is not understood.
    """
    from weft.checkpoints.load import open_folder, open_weights

    if isinstance(source, Folder):
        folder = source
    else:
        source = Ref(str(source)) if isinstance(source, Path) else source
        ref = parse_ref(source) if isinstance(source, str) else source
        if ref.path.endswith(".safetensors") and ref.lora is None:
            from weft.checkpoints.load import load
            from weft.checkpoints.trainers import describe_file

            return describe_file(load(ref, limits=limits))
        folder = open_folder(ref)
    names = folder.files()
    if "adapter_config.json" not in names:
        raise DataError(f"{folder.name} is no adapter: it has no adapter_config.json")
    config = read_config(folder, "adapter_config.json", limits)
    _check_config(config, folder.name)
    found = [n for n in _WEIGHTS if n in names]
    if not found:
        raise DataError(f"{folder.name} has no {_WEIGHTS[0]}; fetch the adapter again")
    return describe(config, open_weights(folder.open(found[0]), limits), folder.name)


def describe(config: Mapping[str, Any], weights: Checkpoint, origin: str) -> Lora:
    """Sort the adapter's tensors into updates, scalings, biases and replacements."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    problems: list[str] = []
    for key in weights:
        name = key.removeprefix("base_model.model.")
        match = _KEY.fullmatch(name)
        if match:
            part = match["part"] or match["ia3"] or match["lycoris"]
            part += ".bias" if match["leaf"] == ".bias" else ""
            parts.setdefault(match["module"], {})[part] = key
        elif "lora_" in name or "token_adapter" in name:
            problems.append(f"{shown(key)} is no LoRA tensor weft knows")
        elif ".original_module." not in name:  # PEFT's own copy of what it replaced
            replaced.setdefault(_KEPT.sub(".", name), key)
    sorted_ = _Sorted(config, weights, problems)
    for module, part in parts.items():
        sorted_.add(module, part)
    if not parts and not replaced:
        problems.append("it holds no tensors")
    if problems:
        raise DataProblems(f"the adapter {origin} cannot be read", problems)
    return Lora(
        origin, config, weights, sorted_.modules, sorted_.biases, replaced, sorted_.scalings, sorted_.stacks
    )


class _Sorted:
    """The adapter's modules by kind, as they are found; what is wrong goes to `problems`."""

    def __init__(self, config: Mapping[str, Any], weights: Checkpoint, problems: list[str]) -> None:
        self.config, self.weights, self.problems = config, weights, problems
        self.modules: dict[str, Update] = {}
        self.biases: dict[str, tuple[str, float]] = {}
        self.scalings: dict[str, Scaling] = {}
        self.stacks: dict[str, Stack] = {}

    def add(self, module: str, part: dict[str, str]) -> None:
        def scale(rank: int | None) -> float:
            return scale_of(self.config, module, rank, self.problems)

        if "ia3_l" in part:
            self.scalings[f"{module}.weight"] = self._scaling(module, part["ia3_l"])
            return
        if any(p.startswith(("hada_", "lokr_")) for p in part):
            made = lycoris(part, self.weights, scale)
            if made is None:
                self.problems.append(f"{shown(module)} lacks some of its factors: {', '.join(sorted(part))}")
            else:
                self.modules[f"{module}.weight"] = made
            return
        kind = "embedding_" if "embedding_A" in part else ""
        a, b = part.pop(f"{kind}A", None), part.pop(f"{kind}B", None)
        magnitude, bias = part.pop("magnitude_vector", None), part.pop("B.bias", None)
        if a is None or b is None or part:
            self.problems.append(f"{shown(module)} lacks one of its factors A and B")
            return
        own = _NESTED.sub("", module)
        parameters = _parameters(self.config, own)
        if parameters and not magnitude and not kind:
            known = {p: self._rank_and_scale(f"{own}.{p}") for p in parameters}
            self.stacks[module] = Stack(a, b, known)
            return
        update = LoraModule(a, b, scale(self.weights.info(a).shape[0]), bool(kind), magnitude)
        self.modules[f"{module}.weight"] = update
        if bias:
            self.biases[f"{module}.bias"] = (bias, update.scale)

    def _rank_and_scale(self, name: str) -> tuple[int, float]:
        """r and the scale of a parameter, whose own name patterns are matched against."""
        r = _by_pattern(self.config.get("rank_pattern"), name, self.config.get("r"))
        scale = scale_of(self.config, name, None, self.problems)
        return (r if type(r) is int else 0), scale

    def _scaling(self, module: str, key: str) -> Scaling:
        """Which side is scaled: by the vector's shape, and by the config for a convolution's."""
        shape = self.weights.info(key).shape
        if len(shape) == 2:
            return Scaling(key, inner=shape[0] == 1 and shape[1] != 1)
        ends = self.config.get("feedforward_modules") or []
        inner = (
            bool(is_harmless(ends) and re.fullmatch(ends, module))
            if isinstance(ends, str)
            else any(module == e or module.endswith(f".{e}") for e in ends)
        )
        return Scaling(key, inner)


def lycoris(part: Mapping[str, str], weights: Checkpoint, scale: Scale) -> Hadamard | Kronecker | None:
    """LoHa or LoKr from its tensors' names; None where some are missing. `scale(rank)` gives the factor."""
    has = part.__contains__
    magnitude = part.get("dora_scale")
    if all(map(has, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))):
        middles = (part["hada_t1"], part["hada_t2"]) if has("hada_t1") and has("hada_t2") else None
        if len(part) - bool(magnitude) != (6 if middles else 4):
            return None
        rank = weights.info(part["hada_w1_b"]).shape[0]
        return Hadamard(
            (part["hada_w1_a"], part["hada_w1_b"]), (part["hada_w2_a"], part["hada_w2_b"]), scale(rank),
            middles, magnitude,
        )  # fmt: skip
    sides = []
    for side in ("lokr_w1", "lokr_w2"):
        pair = (side,) if has(side) else (f"{side}_a", f"{side}_b")
        if not all(map(has, pair)):
            return None
        sides.append(tuple(part[p] for p in pair))
    middle = part.get("lokr_t2")
    if len(part) - bool(magnitude) != len(sides[0]) + len(sides[1]) + bool(middle):
        return None
    inner = [weights.info(pair[1]).shape[0] for pair in sides if len(pair) == 2]
    return Kronecker(sides[0], sides[1], scale(inner[0] if inner else None), middle, magnitude)


def _parameters(config: Mapping[str, Any], module: str) -> tuple[str, ...]:
    """The parameters of a module that `target_parameters` names."""
    found = []
    for target in config.get("target_parameters") or ():
        owner, _, parameter = str(target).rpartition(".")
        if owner and (module == owner or module.endswith(f".{owner}")):
            found.append(parameter)
    return tuple(dict.fromkeys(found))


def _check_config(config: Mapping[str, Any], origin: str) -> None:
    problems = []
    kind = config.get("peft_type", "LORA")
    if kind not in _KINDS:
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
        if not isinstance(pattern, dict) or not all(map(is_harmless, pattern)):
            problems.append(f"{key} is no table of simple name patterns")
    targets = config.get("target_parameters")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        problems.append("target_parameters is no list of names")
    if problems:
        raise DataProblems(f"the adapter {origin} is of a kind that weft does not expand", problems)


def is_harmless(pattern: str) -> bool:
    """False for a pattern that could take for ever to match (a stranger wrote it)."""
    if len(pattern) > 200 or re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError):
        return False
    return True


def scale_of(config: Mapping[str, Any], module: str, rank: int | None, problems: list[str]) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own alpha and r where patterns say so.

    `rank` is what the tensors say, to be compared; None where they do not say it alone (stacks, whole LoKr).
    """
    r = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha", r)))
    if type(r) is not int or r < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        problems.append(f"{shown(module)}: r = {shown(r)}, alpha = {shown(alpha)} are no rank and factor")
        return 0.0
    if rank is not None and r != rank:
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
