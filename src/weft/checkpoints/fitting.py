"""An adapter's names and shapes held against a base: `fit` gives the adapter by the base's names, or refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from math import prod

from weft.checkpoints.adapters import Lora, Stack
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.limits import shown
from weft.checkpoints.updates import Experts, Hadamard, Kronecker, LoraModule, Scaling, Update
from weft.errors import DataProblems, UsageError

_TRAINERS = re.compile(r"(lora|lycoris)_((unet|te\d?|prior_unet|prior|transformer)_)?")
_ORDER = {"gate_up_proj": 0, "down_proj": 1}
"""In which order expert modules define their stacks; shapes settle it where there is a base."""
_PREFIXES = 4
"""Components of the base's names that an underscored name may leave out ("model.diffusion_model.")."""


def fit(lora: Lora, base: Checkpoint) -> Lora:
    """The adapter with every name as the base has it and stacks settled.

    DataProblems listing every tensor without a place, or every shape that does not fit.
    """
    place = _listed(lora, base) if lora.underscored else places(lora, base)
    problems: list[str] = []
    modules = {place(name): update for name, update in lora.modules.items()}
    modules |= _settled(lora, base, place, problems)
    fitted = replace(
        lora, modules=modules, stacks={}, underscored=False,
        biases={place(name): bias for name, bias in lora.biases.items()},
        replaced={place(name): key for name, key in lora.replaced.items()},
        scalings={place(name): scaling for name, scaling in lora.scalings.items()},
    )  # fmt: skip
    problems += _problems(fitted, base)
    if problems:
        raise DataProblems(f"the adapter {lora.origin} does not fit {base.origin}", problems)
    return fitted


def without_base(lora: Lora) -> Lora:
    """The adapter as it is, stacks of experts settled as far as that is possible without their base.

    PEFT's innermost wrapper is for the module's first parameter, so depth tells them apart where their order
    is known. UsageError where it is not.
    """
    modules, unclear = dict(lora.modules), []
    owners: dict[str, list[str]] = {}
    for module in sorted(lora.stacks, key=len, reverse=True):
        owners.setdefault(_owner(module), []).append(module)
    for owner, nested in owners.items():
        parameters = sorted(lora.stacks[nested[0]].parameters, key=lambda p: _ORDER.get(p, 0))
        known = len(parameters) == 1 or all(p in _ORDER for p in parameters)
        if len(parameters) != len(nested) or not known:
            unclear.append(owner)
            continue
        for module, parameter in zip(nested, parameters, strict=True):
            stack = lora.stacks[module]
            rank, scale = stack.parameters[parameter]
            count = max(lora.weights.info(stack.a).shape[0] // max(rank, 1), 1)
            modules[f"{owner}.{parameter}"] = Experts(stack.a, stack.b, scale, count)
    if unclear:
        raise UsageError(
            f"{lora.origin} updates several parameters of {', '.join(map(shown, unclear))}, which only the "
            "base can tell apart: pass base="
        )
    return replace(lora, modules=modules, stacks={})


def _info(base: Checkpoint, name: str) -> TensorInfo:
    return base.info(base.aliases.get(name, name))


def _wanted(lora: Lora) -> list[str]:
    stacks = (f"{_owner(module)}.{next(iter(stack.parameters))}" for module, stack in lora.stacks.items())
    return [*lora.modules, *lora.biases, *lora.replaced, *lora.scalings, *stacks]


def _owner(module: str) -> str:
    return re.sub(r"(\.base_layer)+$", "", module)


def places(lora: Lora, base: Checkpoint) -> Callable[[str], str]:
    """How the adapter's names become the base's: as they are, or with one prefix removed or added.

    A checkpoint on disk may lack the prefix of the model class it was adapted in ("transformer.").
    DataProblems listing every tensor without a place under the best of these.
    """
    known = {*base.tensors, *base.aliases}
    wanted = _wanted(lora)
    ways: list[tuple[str, str]] = [("", "")]
    ways += [(first, "") for first in sorted({n.partition(".")[0] + "." for n in wanted})]
    ways += [("", first) for first in sorted({n.partition(".")[0] + "." for n in known})]

    def missing(way: tuple[str, str]) -> list[str]:
        return [n for n in wanted if _moved(n, way) not in known]

    best = min(ways, key=lambda way: len(missing(way)))
    _refuse(lora, base, missing(best))
    return lambda name: _moved(name, best)


def _refuse(lora: Lora, base: Checkpoint, missing: list[str]) -> None:
    if missing:
        raise DataProblems(
            f"the adapter {lora.origin} does not fit {base.origin}; these have no place in it (is it the "
            "right base?)",
            [shown(n) for n in missing],
        )


def _moved(name: str, way: tuple[str, str]) -> str:
    removed, added = way
    return added + name.removeprefix(removed)


def _listed(lora: Lora, base: Checkpoint) -> Callable[[str], str]:
    """Underscored names → the base's. Dots cannot be told from underscores, so the base's own names are listed.

    A name may lack the first components of the base's; the match that leaves out fewest counts.
    """
    listed: dict[str, dict[int, list[str]]] = {}
    for name in (*base.tensors, *base.aliases):
        parts = name.split(".")
        for left_out in range(min(_PREFIXES, len(parts) - 1)):
            key = "_".join(parts[left_out:-1]) + "." + parts[-1]
            listed.setdefault(key, {}).setdefault(left_out, []).append(name)
    found: dict[str, str] = {}
    missing, unclear = [], []
    for name in _wanted(lora):
        prefix = _TRAINERS.match(name)
        keys = [name, *((name[prefix.end() :], name[prefix.end(1) + 1 :]) if prefix else ())]
        here = next((listed[key] for key in keys if key in listed), None)
        if here is None:
            missing.append(name)
        elif len(here[min(here)]) > 1:
            unclear.append(f"{shown(name)} may be {' or '.join(map(shown, here[min(here)]))}")
        else:
            found[name] = here[min(here)][0]
    _refuse(lora, base, missing)
    taken: dict[str, str] = {}
    for name in lora.modules:
        if name in found and taken.setdefault(found[name], name) != name:
            unclear.append(f"{shown(name)} and {shown(taken[found[name]])} are both for {found[name]}")
    if unclear:
        raise DataProblems(f"names of the adapter {lora.origin} are unclear in {base.origin}", unclear)
    return found.__getitem__


def _settled(
    lora: Lora, base: Checkpoint, place: Callable[[str], str], problems: list[str]
) -> dict[str, Update]:
    """Which parameter each stack of experts is for, and which axis its A reads: by shapes, if they can tell."""
    found: dict[str, Update] = {}
    owners: dict[str, list[Stack]] = {}
    for module, stack in lora.stacks.items():
        owners.setdefault(_owner(module), []).append(stack)
    for owner, stacks in owners.items():
        options = []
        for stack in stacks:
            options.append([
                reading
                for parameter, (rank, scale) in stack.parameters.items()
                if (n := place(f"{owner}.{parameter}")) in base or n in base.aliases
                for reading in _readings(lora, stack, n, _info(base, n).shape, rank, scale)
            ])  # fmt: skip
        fitting = [c for c in product(*options) if len({name for name, _ in c}) == len(c)]
        if len(fitting) == 1:
            found |= dict(fitting[0])
        else:
            shapes = ", ".join(f"A {list(lora.weights.info(s.a).shape)} B {list(lora.weights.info(s.b).shape)}"
                               for s in stacks)  # fmt: skip
            why = "fit its parameters in more than one way" if fitting else "do not fit its parameters"
            problems.append(
                f"{shown(owner)}: the factors of the experts ({shapes}) {why}; merge it with peft"
            )
    return found


def _readings(
    lora: Lora, stack: Stack, name: str, shape: tuple[int, ...], rank: int, scale: float
) -> list[tuple[str, Update]]:
    """The ways in which a stack's factors make a weight of this shape."""
    a, b = lora.weights.info(stack.a).shape, lora.weights.info(stack.b).shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or rank < 1 or a[0] % rank:
        return []
    count = a[0] // rank
    if len(shape) == 2 and count == 1 and shape == (b[0], a[1]):
        return [(name, LoraModule(stack.a, stack.b, scale))]
    if len(shape) != 3 or shape[0] != count:
        return []
    sides = [turned for turned, dims in ((False, shape[1:]), (True, shape[:0:-1])) if dims == (b[0], a[1])]
    return [(name, Experts(stack.a, stack.b, scale, count, turned)) for turned in sides]


def _problems(lora: Lora, base: Checkpoint) -> list[str]:
    problems = [
        problem
        for name, update in lora.modules.items()
        if (problem := check_shapes(lora, name, _info(base, name), update))
    ]
    same: Mapping[str, str] = {name: key for name, (key, _) in lora.biases.items()} | dict(lora.replaced)
    for name, key in same.items():
        theirs, ours = lora.weights.info(key).shape, _info(base, name).shape
        if theirs != ours:
            problems.append(f"{shown(name)}: the adapter has shape {list(theirs)}, the base {list(ours)}")
    for name, scaling in lora.scalings.items():
        shape, count = _info(base, name).shape, lora.weights.info(scaling.key).numel
        if len(shape) < 2 or count != shape[scaled_axis(lora, shape, scaling)]:
            problems.append(f"{shown(name)}: {count} factors of (IA)³ do not fit the base's {list(shape)}")
    problems += [
        f"{shown(name)} of the base is {_info(base, name).dtype} and cannot be changed by an update"
        for name in (*lora.modules, *lora.biases, *lora.scalings)
        if not is_mergeable(_info(base, name).dtype)
    ]
    return problems


def check_shapes(lora: Lora, name: str, base: TensorInfo, update: Update) -> str | None:
    """Why an update cannot be added to a weight of this shape, or None."""
    if problem := update.problem(lora.weights):
        return f"{shown(name)}: {problem}"
    if len(base.shape) < 2:
        return f"{shown(name)}: the base's {list(base.shape)} is no matrix"
    made = update.dims(lora.weights)
    shape = base.shape[1:] if isinstance(update, Experts) else base.shape
    stored = made[::-1] if is_transposed(lora, base, update) else made
    flat = (shape[0], prod(shape[1:]))
    # LoHa and LoKr of a convolution may be stored as those of a matrix, kernels flattened
    if _plain(stored) != _plain(shape) and not (isinstance(update, Hadamard | Kronecker) and stored == flat):
        return f"{shown(name)}: the update has shape {list(stored)}, the base {list(shape)}"
    if update.magnitude and (count := lora.weights.info(update.magnitude).numel) != made[0]:
        return f"{shown(name)}: DoRA's magnitude has {count} entries, not {made[0]}"
    return None


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1×1 convolution counts as a matrix: trainers store its factors either way."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def is_transposed(lora: Lora, base: TensorInfo, update: Update) -> bool:
    """True where the weight is stored `[in, out]`: embeddings, and Conv1D by flag or by its shape."""
    if isinstance(update, Experts):
        return update.turned
    made = update.dims(lora.weights)
    if update.embedding or len(made) != 2:
        return update.embedding
    plain, turned = _plain(base.shape) == made, base.shape == made[::-1]
    return turned and (lora.transposed or not plain)


def scaled_axis(lora: Lora, shape: tuple[int, ...], scaling: Scaling) -> int:
    """The axis of the stored weight that an (IA)³ vector runs along."""
    turned = lora.transposed and len(shape) == 2
    return int(scaling.inner != turned)
