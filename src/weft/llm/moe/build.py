"""`build_moe`: dense models of one shape → a mixture, assembled lazily from ranges of their tensors.

Attention, norms and embeddings come from the base; each expert gives its MLPs; the router's rows come from
`gates.py`. Only the router is computed here: every other tensor is read when the mixture is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.assembled import Assembled, Span, Whole, joined
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.lazy import Cast
from weft.checkpoints.memory import StateDict
from weft.errors import DataProblems, UsageError
from weft.llm.layout import layout
from weft.llm.moe.families import PARTS, Family, Sizes, choose, mixture_config
from weft.llm.moe.gates import complaints, condition, gate_vectors
from weft.llm.moe.noise import Noisy
from weft.llm.moe.recipe import Expert, MixtureRecipe, read_mixture
from weft.recipes.build import Loader
from weft.recipes.read import Readable
from weft.recipes.recipe import Recipe, show_source


@dataclass(frozen=True)
class Mixture:
    """What became of a recipe: the mixture, unread, and what is known of its router."""

    checkpoint: Checkpoint
    gates: Tensor
    """Router rows `[layers, experts, hidden]`, float32."""
    family: Family
    notes: tuple[str, ...]
    recipe: MixtureRecipe

    @property
    def condition(self) -> list[float]:
        """Condition number of the router's rows, by layer."""
        return condition(self.gates)


class Known(StateDict):
    """Small tensors in memory whose identity is what they hold, so that a save of them can resume."""

    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in self:
            values = self.tensor(name).contiguous()
            digest.update(f"{name}{values.dtype}{list(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"Known({digest.hexdigest()})"


@dataclass(frozen=True)
class Dense:
    """The base as a stack of layers with one MLP each."""

    model: Checkpoint
    stack: str
    """`model.layers.`"""
    layers: int
    attention: frozenset[str]

    def mlp(self, layer: int, part: str) -> str:
        return f"{self.stack}{layer}.mlp.{part}.weight"


def build_moe(
    recipe: Readable | MixtureRecipe, *, loader: Loader | None = None, set: Sequence[str] = ()
) -> Mixture:
    """The mixture that a recipe describes (a path, YAML text, data, or what `read_mixture` returns).

    The base runs forward once over the prompts where gate_mode asks for its hidden states; nothing else is
    read but headers. Raises UsageError and DataError naming every expert and tensor that does not fit.
    """
    chosen = recipe if isinstance(recipe, MixtureRecipe) else read_mixture(recipe, set)
    load = _loading(loader)
    base = _dense(load(chosen.base))
    experts = [load(e.source) for e in chosen.experts]
    shared = [load(e.source) for e in chosen.shared]
    config = base.model.config or {}
    family = choose(str(config.get("model_type")), chosen.architecture, bool(shared), base.attention)
    sizes = _sizes(base, chosen, experts, shared)
    _check_shared(family, chosen, sizes)
    if chosen.layout == "fused" and not family.fuses:
        raise UsageError(f"layout: transformers has no {family.name}, so there is no fused layout of it")
    told = mixture_config(family, config, base.layers, sizes)
    gate = partial(gate_vectors, base.model, mode=chosen.gate_mode, layers=base.layers, stack=base.stack,
                   seed=chosen.seed, mergekit=chosen.compat == "mergekit")  # fmt: skip
    gates = gate(chosen.experts)
    shared_gates = gate(chosen.shared, name="shared_experts") if family.shared_gate and shared else None
    routers = _routers(base, family, gates, shared_gates)
    pieces = _Pieces(
        base, family, chosen.layout == "fused", _touched(chosen.experts, experts, chosen.seed, 0),
        _touched(chosen.shared, shared, chosen.seed, len(experts)), routers,
    ).all()  # fmt: skip
    whole: Checkpoint = Assembled(
        pieces, config=told, assets=base.model.assets, aliases=base.model.aliases,
        origin=f"{family.name} of {', '.join(show_source(e.source) for e in chosen.experts)}",
    )  # fmt: skip
    if chosen.dtype is not None:
        whole = Cast(whole, chosen.dtype)
    notes = (*chosen.notes, *_differences(family, chosen), *(complaints(gates) if chosen.prompted else ()))
    return Mixture(whole, gates, family, notes, chosen)


def _loading(loader: Loader | None) -> Callable[[Any], Checkpoint]:
    """A loader that opens each source once and builds recipes inside this one."""
    from weft.checkpoints.load import load
    from weft.recipes.build import build

    opened: dict[Any, Checkpoint] = {}

    def source(what: Any) -> Checkpoint:
        if what not in opened:
            recipe = isinstance(what, Recipe)
            opened[what] = build(what, loader=loader) if recipe else (loader or load)(what)
        return opened[what]

    return source


def _dense(model: Checkpoint) -> Dense:
    if model.config is None or "model_type" not in model.config:
        raise UsageError(f"base_model {model.origin} has no config.json that tells its model_type")
    found = layout(model)
    if found.experts:
        raise UsageError(f"base_model {model.origin} is a mixture already; a mixture is made of dense models")
    main = found.main()
    if main is None:
        raise UsageError(f"base_model {model.origin} has no layers")
    inside = f"{main.prefix}0."
    first = [n.removeprefix(inside) for n in model if n.startswith(inside)]
    return Dense(model, main.prefix, main.count, frozenset(n for n in first if not n.startswith("mlp.")))


def _sizes(
    base: Dense, recipe: MixtureRecipe, experts: Sequence[Checkpoint], shared: Sequence[Checkpoint]
) -> Sizes:
    """Widths of the experts' MLPs; DataProblems with every expert that does not fit the base or the others."""
    problems: list[str] = []
    hidden = base.model.info(base.mlp(0, PARTS[2])).shape[0] if base.mlp(0, PARTS[2]) in base.model else 0
    act = (base.model.config or {}).get("hidden_act", "silu")
    widths: list[int] = []
    listed = [*zip(recipe.experts, experts, strict=True), *zip(recipe.shared, shared, strict=True)]
    for i, (asked, model) in enumerate(listed):
        name = f"experts[{i}]" if i < len(experts) else f"shared_experts[{i - len(experts)}]"
        name = f"{name} ({show_source(asked.source)})"
        found = layout(model)
        main = found.main()
        if found.experts:
            problems.append(f"{name} is a mixture already; experts are dense models")
        elif main is None or main.prefix != base.stack or main.count != base.layers:
            count = 0 if main is None else main.count
            problems.append(f"{name} has {count} layers, base_model has {base.layers}")
        else:
            widths.append(_width(base, model, hidden, name, problems))
            other = (model.config or {}).get("hidden_act", "silu")
            if other != act:
                problems.append(f"{name} has the activation {other}, base_model {act}")
            if i < len(experts) and widths[-1] != widths[0] and widths[-1] and widths[0]:
                problems.append(
                    f"{name} has MLPs {widths[-1]} wide, those of the first expert are {widths[0]} wide"
                )
    if problems:
        raise DataProblems("these models cannot become one mixture", problems)
    shared_size = widths[-1] if shared else 0
    return Sizes(len(experts), recipe.experts_per_token, widths[0], shared_size, base.attention)


def _width(base: Dense, model: Checkpoint, hidden: int, name: str, problems: list[str]) -> int:
    """How wide the MLPs of an expert are; 0 after telling that they are none or do not fit."""
    before = len(problems)
    width = 0
    for layer in range(base.layers):
        for part in PARTS:
            tensor = base.mlp(layer, part)
            if tensor not in model:
                problems.append(f"{name} has no {tensor}")
                return 0
            if tensor.removesuffix("weight") + "bias" in model:
                problems.append(f"{name} has a bias in its MLPs, which no family of mixtures has: {tensor}")
                return 0
            shape = model.info(tensor).shape
            width = width or shape[0]
            fits = (hidden, width) if part == "down_proj" else (width, hidden)
            if shape != fits and len(problems) == before:
                problems.append(
                    f"{name}: {tensor} has shape {list(shape)} where {list(fits)} fits base_model"
                )
    return width if len(problems) == before else 0


def _check_shared(family: Family, recipe: MixtureRecipe, sizes: Sizes) -> None:
    for expert in recipe.shared:
        if family.shared_gate and recipe.prompted and not expert.positive:
            raise UsageError(
                f"shared_experts[0]: positive_prompts are missing: the gate of a {family.name}'s shared "
                "expert is made of them"
            )
        if not family.shared_gate and (expert.positive or expert.negative):
            raise UsageError(
                f"shared_experts[0]: a {family.name}'s shared expert has no gate, so it takes no prompts"
            )
    if recipe.shared and not family.shared_gate and sizes.shared_size % sizes.size:
        raise UsageError(
            f"shared_experts[0]: a {family.name}'s shared expert must be a multiple of {sizes.size} wide, "
            f"as its experts are; it is {sizes.shared_size} wide"
        )


def _differences(family: Family, recipe: MixtureRecipe) -> list[str]:
    """What a user could be surprised by."""
    notes = []
    if not family.fuses:
        notes.append(f"transformers has no {family.name}: load the result with a tool that has it")
    if not family.normalises and recipe.experts_per_token < len(recipe.experts):
        notes.append(
            f"a {family.name} does not normalise the weights of the chosen experts, so their sum is below one"
        )
    if family.shared and any(e.residual_scale == 1.0 for e in recipe.shared):
        notes.append(
            "the shared expert adds to the chosen ones: without residual_scale below one their sum is too large"
        )
    return notes


def _routers(base: Dense, family: Family, gates: Tensor, shared_gates: Tensor | None) -> Checkpoint:
    """Router tensors under the names `{layer}.{name}`."""
    made: dict[str, Tensor] = {}
    for layer in range(base.layers):
        made[f"{layer}.gate.weight"] = gates[layer].clone()
        if family.correction:
            made[f"{layer}.{family.correction}"] = torch.zeros(gates.shape[1])
        if shared_gates is not None:
            made[f"{layer}.{family.shared_gate}"] = shared_gates[layer].clone()
    return Known(made, origin="router")


def _touched(
    experts: Sequence[Expert], models: Sequence[Checkpoint], seed: int, first: int
) -> list[dict[str, Checkpoint]]:
    """For each expert, the checkpoint that each part is read from: with its noise, and its scale on `down`."""
    made = []
    for i, (expert, model) in enumerate(zip(experts, models, strict=True)):
        noisy = Noisy(model, expert.noise_scale, seed, first + i) if expert.noise_scale else model
        scaled = noisy if expert.residual_scale == 1.0 else noisy * expert.residual_scale
        made.append({PARTS[0]: noisy, PARTS[1]: noisy, PARTS[2]: scaled})
    return made


@dataclass(frozen=True)
class _Pieces:
    """Puts the tensors of the mixture together, in the base's order."""

    base: Dense
    family: Family
    fused: bool
    experts: Sequence[Mapping[str, Checkpoint]]
    shared: Sequence[Mapping[str, Checkpoint]]
    routers: Checkpoint

    def all(self) -> Mapping[str, Span | Whole]:
        pieces: dict[str, Span | Whole] = {}
        done: set[str] = set()
        for name in self.base.model:
            inside = name.removeprefix(self.base.stack)
            layer, _, rest = inside.partition(".")
            if inside == name or not rest.startswith("mlp."):
                pieces[name] = Span(self.base.model, name)
            elif layer not in done:
                done.add(layer)
                pieces |= self._block(int(layer))
        return pieces

    def _block(self, layer: int) -> dict[str, Span | Whole]:
        block = f"{self.base.stack}{layer}.{'mlp' if self.fused else self.family.block}."
        names = {part: self.base.mlp(layer, part) for part in PARTS}
        dtype = self.base.model.info(names[PARTS[0]]).dtype
        made: dict[str, Span | Whole] = {}
        for name in self.routers:
            if name.startswith(f"{layer}."):
                # a correction of the choice is kept in float32, as the classes read it
                stored = None if name.endswith("bias") else dtype
                made[block + name.removeprefix(f"{layer}.")] = Whole(
                    (Span(self.routers, name),), None, stored
                )
        gate, up, down = ([Span(e[part], names[part]) for e in self.experts] for part in PARTS)
        if self.fused:
            (wide, hidden), count = self.experts[0][PARTS[0]].info(names[PARTS[0]]).shape, len(gate)
            both = [span for pair in zip(gate, up, strict=True) for span in pair]
            made[f"{block}experts.gate_up_proj"] = joined(both, (count, 2 * wide, hidden))
            made[f"{block}experts.down_proj"] = joined(down, (count, hidden, wide))
        else:
            for i, spans in enumerate(zip(gate, up, down, strict=True)):
                made |= {f"{block}experts.{i}.{part}.weight": span
                         for part, span in zip(self.family.parts, spans, strict=True)}  # fmt: skip
        for expert in self.shared:
            made |= {f"{block}{self.family.shared}.{part}.weight": Span(expert[part], names[part])
                     for part in PARTS}  # fmt: skip
        return made
