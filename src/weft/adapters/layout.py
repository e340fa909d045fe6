"""How an adapter's factors are named, shaped and described in a file: PEFT's folders and kohya's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from weft.adapters.factors import Factors, Slot, split_slice
from weft.checkpoints.base import TensorInfo
from weft.errors import DataProblems, UsageError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
_TOGETHER = 16
__all__ = [
    "VLLM_RANKS",
    "Held",
    "Slot",
    "kohya_entries",
    "peft_config",
    "peft_entries",
    "stacks",
    "vllm_slots",
]


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of the file: factor A or B of a weight, or of the slices of a stack of experts."""

    part: Literal["A", "B"]
    weights: tuple[str, ...]
    slot: Slot
    stacked: bool = False
    up: tuple[int, ...] = ()
    """Shape of B where it is not `[out, r]`."""

    @property
    def info(self) -> TensorInfo:
        (out, *rest), r = self.slot.dims, self.slot.rank * len(self.weights)
        if self.part == "A":
            return TensorInfo((r, *rest), self.slot.dtype)
        return TensorInfo(self.up or (out, r), self.slot.dtype)

    @property
    def once(self) -> tuple[str, ...]:
        """The weights whose reading this tensor is charged with: A and B are computed together."""
        return self.weights if self.part == "A" else ()

    def place(self, factors: Callable[[str], Factors]) -> Tensor:
        """The tensor as it stands in the file, float64."""
        parts = [self._padded(factors(weight)) for weight in self.weights]
        if self.part == "A":
            return torch.cat(parts, 0).reshape(self.info.shape)
        # PEFT lays the experts of B out with the expert running fastest
        whole = torch.stack(parts, -1).flatten(1) if self.stacked else parts[0]
        return whole.reshape(self.info.shape)

    def _padded(self, made: Factors) -> Tensor:
        lacking = self.slot.rank - made.rank
        assert lacking >= 0, f"{self.weights[0]}: rank {made.rank} does not fit {self.slot.rank}"
        if self.part == "A":
            return torch.cat([made.a, made.a.new_zeros(lacking, made.a.shape[1])])
        return torch.cat([made.b, made.b.new_zeros(made.b.shape[0], lacking)], 1)


def stacks(slots: Mapping[str, Slot]) -> dict[str, list[str]]:
    """Weight → its slots' names: itself, or the slices of a stack of experts in order."""
    found: dict[str, list[str]] = {}
    for name in slots:
        found.setdefault(split_slice(name)[0], []).append(name)
    return {weight: sorted(names, key=lambda n: split_slice(n)[1] or 0) for weight, names in found.items()}


def peft_entries(slots: Mapping[str, Slot]) -> dict[str, Held]:
    """PEFT's tensors. Stacked experts of one module nest: the first parameter's wrapper is the innermost."""
    pairs: list[tuple[str, Held, str, Held]] = []
    grouped = stacks(slots)
    experts = [weight for weight, names in grouped.items() if names != [weight]]
    for weight, names in grouped.items():
        slot = slots[names[0]]
        stacked = weight in experts
        if stacked:
            module, depth = weight.rpartition(".")[0], _later_siblings(weight, experts)
            slot = replace(slot, rank=max(slots[n].rank for n in names))
            prefix = f"base_model.model.{module}{'.base_layer' * depth}.lora_"
        else:
            prefix = f"base_model.model.{weight.removesuffix('.weight')}.lora_"
        ends = ("embedding_A", "embedding_B") if slot.embedding else ("A.weight", "B.weight")
        up = (slot.dims[0], slot.rank, *(1 for _ in slot.dims[2:])) if len(slot.dims) > 2 else ()
        pairs.append((
            prefix + ends[0], Held("A", tuple(names), slot, stacked),
            prefix + ends[1], Held("B", tuple(names), slot, stacked, up),
        ))  # fmt: skip
    return dict(interleaved(pairs))


def _later_siblings(weight: str, experts: Sequence[str]) -> int:
    module = weight.rpartition(".")[0]
    after = experts[experts.index(weight) + 1 :]
    return sum(other.rpartition(".")[0] == module for other in after)


def interleaved(pairs: Sequence[tuple[str, Held, str, Held]]) -> Iterator[tuple[str, Held]]:
    """A few A's, then their B's: as threads take tensors in order, each works on a weight of its own."""
    for i in range(0, len(pairs), _TOGETHER):
        block = pairs[i : i + _TOGETHER]
        yield from ((key, held) for key, held, _, _ in block)
        yield from ((key, held) for _, _, key, held in block)


def kohya_entries(slots: Mapping[str, Slot], others: Sequence[str], origin: str) -> dict[str, Held]:
    """kohya's tensors: `<module>.lora_down.weight`, `<module>.lora_up.weight` (and `.alpha`, by the caller)."""
    wrong = [*others, *(n for n, s in slots.items() if s.transposed or split_slice(n)[1] is not None)]
    if wrong:
        raise UsageError(f"{origin}: kohya's format has no place for {', '.join(wrong)}")
    pairs = []
    for weight, slot in slots.items():
        module = weight.removesuffix(".weight")
        up = (slot.dims[0], slot.rank, *(1 for _ in slot.dims[2:]))
        pairs.append((
            f"{module}.lora_down.weight", Held("A", (weight,), slot),
            f"{module}.lora_up.weight", Held("B", (weight,), slot, False, up),
        ))  # fmt: skip
    return dict(interleaved(pairs))


def peft_config(
    slots: Mapping[str, Slot], replaced: Sequence[str], biases: bool, base_name: str | None
) -> dict[str, Any]:
    """adapter_config.json with alpha = r for every module, hence scale 1, and neither rsLoRA nor DoRA."""
    grouped = stacks(slots)
    ranks = {weight: max(slots[n].rank for n in names) for weight, names in grouped.items()}
    counts = list(ranks.values())
    usual = max(sorted(set(counts)), key=counts.count, default=1)
    experts = [weight for weight, names in grouped.items() if names != [weight]]
    modules = {w.removesuffix(".weight"): r for w, r in ranks.items() if w not in experts}
    # a pattern also matches the end of a longer name: those that it must not match get one of their own, and
    # the longer name comes first
    every = modules | {e: ranks[e] for e in experts}
    odd = {m for m, r in every.items() if r != usual}
    odd |= {m for m in modules if any(m.endswith(f".{o}") for o in odd)}
    pattern = {m: every[m] for m in sorted(odd, key=lambda m: (-len(m), m))}
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": base_name, "task_type": None, "inference_mode": True,
        "r": usual, "lora_alpha": usual, "lora_dropout": 0.0, "rank_pattern": pattern,
        "alpha_pattern": dict(pattern), "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": any(s.transposed and not s.embedding for n, s in slots.items()
                              if split_slice(n)[1] is None),
        "bias": "none", "lora_bias": biases, "init_lora_weights": True,
        "target_modules": sorted(modules),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in replaced}) or None,
    }  # fmt: skip
    if experts:
        config["target_parameters"] = sorted(experts)
    return config


def vllm_slots(slots: Mapping[str, Slot], others: Sequence[str], origin: str) -> tuple[dict[str, Slot], str]:
    """The slots with one rank that vLLM takes, and the flag to serve them with."""
    problems = [f"{name}: vLLM takes no tensors beside the low-rank updates" for name in others]
    for name, slot in slots.items():
        if slot.embedding or re.search(r"(^|\.)(lm_head|embed_tokens|wte|embed_out)\.weight$", name):
            problems.append(f"{name}: vLLM takes no update of embeddings or heads")
        elif split_slice(name)[1] is not None or len(slot.dims) > 2:
            problems.append(f"{name}: vLLM takes updates of linear layers only")
    needed = max((slot.rank for slot in slots.values()), default=1)
    if needed > VLLM_RANKS[-1]:
        problems.append(f"rank {needed} is more than vLLM's {VLLM_RANKS[-1]}: resize it first")
    if problems:
        raise DataProblems(f"vLLM would not load {origin}; leave these out", problems)
    rank = next(r for r in VLLM_RANKS if r >= needed)
    return {
        n: replace(s, rank=rank) for n, s in slots.items()
    }, f"serve it with vLLM's --max-lora-rank {rank}"
