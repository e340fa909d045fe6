"""Networks of many clients matched into one that may be wider than each: `pfnm` at once, `fedma` layer by layer.

Units are matched by `bbp_map` (atoms.py) on the weights that belong to them, as far as what stands at the other end
is fixed or matched already; variances count in mean squares of these weights. What writes a global unit is the mean
over the clients that have it; what reads it reads nothing for a client that lacks it. So the merge is a mean of
transported models, lazily, as a zip is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from weft.align.atoms import bbp_map
from weft.align.maps import Mix, mixed
from weft.align.networks import Net, comparable, opened
from weft.align.pieces import apart, in_front
from weft.align.spec import PermutationSpec
from weft.align.terms import groups_in
from weft.align.zipping import Zipped
from weft.api import Model
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, Problems, UsageError

Retrain = Callable[[nn.Module, int, frozenset[str]], Any]
"""`retrain(module, client, frozen)` trains a client's network in place; the frozen tensors take no gradient."""


def pfnm(
    models: Sequence[Model], *, counts: Sequence[Tensor] | None = None, sigma: float = 3.0, prior: float = 3.0,
    gamma: float = 7.0, sweeps: int = 5, seed: int = 0, module: nn.Module | Sequence[nn.Module] | None = None,
    spec: PermutationSpec | None = None, example_inputs: Any = None,
) -> Zipped:  # fmt: skip
    """Matches clients' networks from the last hidden layer down (Yurochkin et al., arXiv:1905.12022).

    `counts`: how many examples of each class every client has, [classes] each: what it says of a class counts by
    its share of the examples. `bbp_map` tells of `sigma`, `prior` (variances), `gamma` and `sweeps`. `.merged()` is
    the global model, a lazy checkpoint; `weft.align.growing.widened` makes a module of its widths.

    Raises Problems for groups within others (dimensions of heads), which cannot be added one by one.
    """
    clients = _clients(models, module, spec, example_inputs)
    clients, weights = _by_class(clients, counts)
    maps: list[dict[str, Mix]] = [{} for _ in clients]
    for group in reversed(clients[0].spec.movable):
        found = _match(
            clients, group, maps, weights, sigma=sigma, prior=prior, gamma=gamma, sweeps=sweeps, seed=seed
        )
        for made, mix in zip(maps, _places(found), strict=True):
            made[group] = mix
    return Zipped(tuple(clients), ({},) * len(clients), tuple(_averaging(maps)), frozenset())


def fedma(
    models: Sequence[Model], retrain: Retrain, *, counts: Sequence[Tensor] | None = None, sigma: float = 3.0,
    prior: float = 3.0, gamma: float = 7.0, sweeps: int = 5, seed: int = 0,
    module: nn.Module | Sequence[nn.Module] | None = None, spec: PermutationSpec | None = None,
    example_inputs: Any = None,
) -> Zipped:  # fmt: skip
    """Matches and averages one layer after the other (Wang et al., arXiv:2002.06440).

    After each, every client takes the global layers so far, frozen, and trains those above them again: one round of
    `retrain` a group of units. The classifier is averaged at the end, by class if `counts` are given.
    """
    clients = _clients(models, module, spec, example_inputs)
    frozen: frozenset[str] = frozenset()
    for group in clients[0].spec.movable:
        found = _match(clients, group, [{} for _ in clients], None, sigma=sigma, prior=prior, gamma=gamma,
                       sweeps=sweeps, seed=seed)  # fmt: skip
        maps = _averaging([{group: mix} for mix in _places(found)])
        shared = frozenset(n for n, _ in clients[0].written(group))
        own = frozenset(clients[0].checkpoint) - shared
        made = Zipped(tuple(clients), ({},) * len(clients), tuple(maps), own).checkpoints
        frozen |= shared
        modules = [widened(net.module, c) for net, c in zip(clients, made, strict=True)]
        for j, each in enumerate(modules):
            _retrained(each, j, frozen, retrain)
        clients = _clients(modules, None, None, clients[0].example.raw)
    clients, _ = _by_class(clients, counts)
    return Zipped(tuple(clients), ({},) * len(clients), ({},) * len(clients), frozenset())


def widened(module: nn.Module, model: Model) -> nn.Module:
    """A copy of `module` with a model's values, its layers as wide as those are."""
    from weft.checkpoints.load import load

    source = load(model)
    made = deepcopy(module)
    for name in made.state_dict():
        if source.aliases.get(name, name) not in source:
            raise DataError(f"{name}: not in {source.origin}")
        owner = made.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        before = getattr(owner, last)
        values = source.tensor(name).to(before.dtype)
        if values.shape == before.shape:
            with torch.no_grad():
                before.copy_(values)
            continue
        if last == "weight":
            _resize(owner, tuple(values.shape))
        parameter = isinstance(before, nn.Parameter)
        setattr(owner, last, nn.Parameter(values, before.requires_grad) if parameter else values)
    return made


def _resize(owner: nn.Module, shape: tuple[int, ...]) -> None:
    """What a layer says of its own widths, from its weight's shape."""
    if isinstance(owner, nn.modules.conv._ConvNd):
        if owner.groups > 1 and owner.groups == owner.in_channels:  # a filter a channel
            owner.groups = owner.groups * shape[0] // owner.weight.shape[0]
        first, second = shape[0], shape[1] * owner.groups
        turned = isinstance(owner, nn.modules.conv._ConvTransposeNd)
        owner.in_channels, owner.out_channels = (first, second) if turned else (second, first)
    elif isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = shape
    elif isinstance(owner, nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = shape
    elif isinstance(owner, nn.modules.batchnorm._NormBase):
        owner.num_features = shape[0]
    elif isinstance(owner, nn.LayerNorm | nn.RMSNorm):
        owner.normalized_shape = shape


def _clients(
    models: Sequence[Model], module: nn.Module | Sequence[nn.Module] | None, spec: PermutationSpec | None,
    example: Any,
) -> list[Net]:  # fmt: skip
    if len(models) < 2:
        raise UsageError("federated matching takes at least two clients")
    nets = opened(models, module=module, spec=spec, example_inputs=example)
    comparable(nets)
    first = nets[0].spec
    nested = [
        f"{g}: within {', '.join(first.groups[g].within)}" for g in first.movable if first.groups[g].within
    ]
    if nested:
        heading = "units within others (heads, groups) cannot be added one by one: match with graph_matching"
        raise Problems(heading, nested)
    return nets


def _match(
    clients: Sequence[Net], group: str, maps: Sequence[Mapping[str, Mix]], shares: Sequence[Tensor] | None,
    **settings: Any,
) -> list[Tensor]:  # fmt: skip
    """The global unit of each unit of a group, by client."""
    vectors, precisions = [], []
    for j, (net, known) in enumerate(zip(clients, maps, strict=True)):
        rows, weight = _vectors(net, group, known, None if shares is None else shares[j])
        vectors.append(rows)
        precisions.append(weight)
    square = sum(float(v.square().sum()) for v in vectors) / sum(v.numel() for v in vectors)
    vectors = [v / max(square, 1e-300) ** 0.5 for v in vectors]
    try:
        return bbp_map(vectors, precisions=precisions, **settings)
    except DataError as error:
        raise DataError(f"{group}: {error}") from None


def _vectors(net: Net, group: str, known: Mapping[str, Mix], share: Tensor | None) -> tuple[Tensor, Tensor]:
    """[units, everything that belongs to them and is comparable], and how much each coordinate counts."""
    spec, found, weights = net.spec, [], []
    done = {*known, group, *(g for g in spec.groups if g not in spec.movable)}
    for name in dict.fromkeys(n for n, _ in spec.uses(group) if n in net.checkpoint):
        reads = frozenset(k for n, k in net.reads if n == name)
        row = spec.axes[name]
        values = mixed(net.checkpoint.tensor(name).double(), row, spec, known, reads)
        sizes = net.sizes | {g: m.into.shape[-2] for g, m in known.items()}
        counted = _counted(net, name, share).expand(values.shape)
        pairs = zip(apart(values, row, sizes), apart(counted, row, sizes), strict=True)
        for piece, mass in pairs:
            if group in piece.labels and all(x in done for x in piece.labels if isinstance(x, str)):
                found.append(in_front(piece, (group,)))
                weights.append(in_front(mass, (group,))[0])
    return torch.cat(found, 1), torch.cat(weights)


def _counted(net: Net, name: str, share: Tensor | None) -> Tensor:
    """How much each entry of a tensor counts: those that write a class by the client's share of it."""
    one = torch.ones((), dtype=torch.float64)
    axis = None if share is None else _class_axis(net, name, len(share))
    if share is None or axis is None:
        return one
    return share.reshape([-1 if k == axis else 1 for k in range(len(net.checkpoint.info(name).shape))])


def _class_axis(net: Net, name: str, classes: int) -> int | None:
    """The axis along which a tensor writes classes: the network's outputs, which stay where they are."""
    row, shape = net.spec.axes[name], net.checkpoint.info(name).shape
    free = [
        k for k, t in enumerate(row)
        if (name, k) not in net.reads and not list(groups_in(t)) and shape[k] == classes
    ]  # fmt: skip
    return free[0] if free else None


def _by_class(
    clients: Sequence[Net], counts: Sequence[Tensor] | None
) -> tuple[list[Net], list[Tensor] | None]:
    """Clients whose outputs count by their share of each class, so that a mean over clients is that by class."""
    if counts is None:
        return list(clients), None
    if len(counts) != len(clients) or len({len(c) for c in counts}) > 1:
        raise UsageError("counts must be one tensor [classes] for each client, all of one length")
    table = torch.stack([c.double() for c in counts])
    first = clients[0]
    if not any(_class_axis(first, n, table.shape[1]) is not None for n in first.checkpoint):
        raise UsageError(
            f"counts are of {table.shape[1]} classes, but no tensor of the clients writes so many outputs"
        )
    if not bool((table >= 0).all()) or not bool((table.sum(0) > 0).all()):
        raise DataError("counts must not be negative, and every class must have an example at some client")
    shares = table / table.sum(0) * len(clients)
    made = []
    for net, share in zip(clients, shares, strict=True):
        state = {
            n: net.checkpoint.tensor(n) if _class_axis(net, n, len(share)) is None
            else net.checkpoint.tensor(n).double() * _counted(net, n, share)
            for n in net.checkpoint
        }  # fmt: skip
        made.append(
            Net(net.module, StateDict(state, f"{net.origin} by class"), net.spec, net.example, net.forward)
        )
    return made, list(shares)


def _places(found: Sequence[Tensor]) -> list[Mix]:
    """Each client's units at their global places, nothing at those it lacks."""
    n = max(int(f.max()) + 1 for f in found)
    hard = [torch.nn.functional.one_hot(f, n).double().T.contiguous() for f in found]
    return [Mix(h, h) for h in hard]


def _averaging(maps: Sequence[Mapping[str, Mix]]) -> list[dict[str, Mix]]:
    """Maps whose mean over clients is, for each global unit, the mean over those that have it."""
    made: list[dict[str, Mix]] = [{} for _ in maps]
    for group in maps[0]:
        have = sum((m[group].into.sum(1) for m in maps[1:]), maps[0][group].into.sum(1))
        for one, m in zip(made, maps, strict=True):
            one[group] = Mix(m[group].into * (len(maps) / have)[:, None], m[group].out)
    return made


def _retrained(module: nn.Module, client: int, frozen: frozenset[str], retrain: Retrain) -> None:
    for name, p in module.named_parameters():
        p.requires_grad_(name not in frozen)
    before = {n: t.clone() for n, t in module.state_dict().items() if n in frozen}
    retrain(module, client, frozen)
    changed = [n for n, t in module.state_dict().items() if n in before and not torch.equal(t, before[n])]
    if changed:
        raise UsageError(f"retrain changed {changed[0]}, which is frozen: train what requires gradients only")
    module.eval().requires_grad_(False)
