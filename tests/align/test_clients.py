"""Matchings over many clients: BBP-MAP, PFNM, FedMA and graph matching, against definitions and planted copies."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import permutations

import pytest
import torch
from test_transport import F64, Attention, convolutional, distance, images, mlp, noisy, rand, tokens, vectors
from torch import Tensor, nn

import weft
from weft.align.atoms import bbp_map
from weft.align.graphs import graph_matching, kernel_features
from weft.align.growing import fedma, pfnm, widened
from weft.align.networks import opened
from weft.errors import DataError, Problems, UsageError


def copies(a: nn.Module, data: Sequence[object], count: int = 2) -> list[nn.Module]:
    """The network and others that have its units in another order."""
    spec = opened([a], data)[0].spec
    return [a, *(weft.materialize(spec.apply(a, spec.random(s)), deepcopy(a)) for s in range(1, count + 1))]


# -- BBP-MAP -------------------------------------------------------------------------------------


def posterior(vectors: Sequence[Tensor], found: Sequence[Tensor], gamma: float, prior: float = 10.0) -> float:
    """Twice the logarithm of the posterior up to a constant, of one client's matching given the others', summed
    over the data terms of all: with the best θ, −Σ|v − θ|²/σ² − Σ|θ|²/σ₀² (σ² = 1)."""
    n = max(int(f.max()) for f in found) + 1
    value = 0.0
    for i in range(n):
        mine = torch.cat([v[f == i] for v, f in zip(vectors, found)])
        theta = mine.sum(0) / (1 / prior + len(mine))
        value -= float(((mine - theta) ** 2).sum() + (theta**2).sum() / prior)
    return value


def test_planted_units_are_found_and_new_ones_added() -> None:
    atoms = rand(9, 12) * 5
    have = [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [8, 0, 6, 7]]
    clients = [atoms[h] + 0.1 * rand(len(h), 12, seed=i + 1) for i, h in enumerate(have)]
    found = bbp_map(clients, gamma=5)
    named = {}
    for h, f in zip(have, found):
        for atom, unit in zip(h, f.tolist()):
            assert named.setdefault(atom, unit) == unit
    assert len(set(named.values())) == 9 and max(int(f.max()) for f in found) == 8


def test_one_step_is_the_best_assignment_of_its_equation() -> None:
    """Two clients: the second's matching, by trying all, given that the first has three units."""
    a, b, gamma = rand(3, 4) * 2, rand(2, 4, seed=1) * 2, 3.0
    found = bbp_map([a, b], gamma=gamma, sweeps=1)
    best, chosen = -float("inf"), None
    for places in permutations(range(5), 2):
        if 4 in places and 3 not in places:
            continue
        here = torch.tensor(places)
        value = posterior([a, b], [torch.arange(3), here], gamma)
        known = sum(1 for x in places if x < 3)
        for rank in range(1, 2 - known + 1):
            value -= 2 * float(torch.tensor(rank * 2 / gamma).log())
        best, chosen = (value, here) if value > best else (best, chosen)  # m/(J − m) = 1: its logarithm is 0
    value = posterior([a, b], found, gamma)
    known = int((found[1] < 3).sum())
    for rank in range(1, 2 - known + 1):
        value -= 2 * float(torch.tensor(rank * 2 / gamma).log())
    assert value == pytest.approx(best) and chosen is not None


def test_no_client_has_a_unit_twice_and_mass_lets_the_model_grow() -> None:
    clients = [rand(6, 5, seed=s) for s in range(4)]
    sizes = []
    for gamma in (1e-6, 1.0, 1e6):
        found = bbp_map(clients, gamma=gamma)
        assert all(len(f.unique()) == 6 for f in found)
        assert torch.cat(found).unique().tolist() == list(range(max(int(f.max()) for f in found) + 1))
        sizes.append(max(int(f.max()) for f in found) + 1)
    assert sizes[0] == 6 and sizes == sorted(sizes) and sizes[-1] > 12
    assert all(torch.equal(a, b) for a, b in zip(bbp_map(clients), bbp_map(clients)))
    with pytest.raises(UsageError, match="gamma must be above 0"):
        bbp_map(clients, gamma=0)
    with pytest.raises(DataError, match="NaN"):
        bbp_map([clients[0], clients[1] * torch.nan])


# -- networks that grow ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: mlp(6, 8, 3), lambda: mlp(6, 8, 7, 3)])
def test_pfnm_of_permuted_copies_is_the_original_and_no_wider(make: object) -> None:
    a = make()  # type: ignore[operator]
    made = pfnm(copies(a, vectors()), gamma=1).merged()
    assert {n: i.shape for n, i in made.tensors.items()} == {
        n: tuple(t.shape) for n, t in a.state_dict().items()
    }
    assert distance(made, a, vectors()) < 1e-5


def test_a_global_network_of_strangers_computes_the_mean_of_their_outputs() -> None:
    a, b = mlp(6, 5, 3), mlp(6, 4, 3, seed=1)
    made = pfnm([a, b], gamma=1e12).merged()  # so that all is new
    assert made.info("0.weight").shape == (9, 6)
    x = vectors()[0][0]
    both = (a(x) + b(x)) / 2
    assert torch.allclose(widened(a, made)(x), both, atol=1e-5)


def test_classes_count_by_the_clients_shares() -> None:
    a, b = mlp(6, 5, 3), mlp(6, 4, 3, seed=1)
    made = pfnm([a, b], gamma=1e12, counts=[torch.tensor([10, 0, 5]), torch.tensor([0, 7, 15])]).merged()
    x = vectors()[0][0]
    share = torch.tensor([1, 0, 0.25])
    assert torch.allclose(widened(a, made)(x), a(x) * share + b(x) * (1 - share), atol=1e-5)
    with pytest.raises(DataError, match="every class must have an example"):
        pfnm([a, b], counts=[torch.tensor([1, 0, 1])] * 2)
    with pytest.raises(UsageError, match="2 classes, but no tensor"):
        pfnm([a, b], counts=[torch.tensor([1, 1])] * 2)
    with pytest.raises(UsageError, match="one tensor"):
        pfnm([a, b], counts=[torch.tensor([1, 0, 1])])


def test_fedma_freezes_what_is_matched_and_takes_whatever_width_comes() -> None:
    nets = [noisy(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6),
                                nn.ReLU(), nn.Linear(6, 3)), s) for s in (0, 1)]  # fmt: skip
    seen: list[tuple[int, frozenset[str]]] = []

    def retrain(module: nn.Module, client: int, frozen: frozenset[str]) -> None:
        seen.append((client, frozen))
        assert all(p.requires_grad == (n not in frozen) for n, p in module.named_parameters())
        assert module(images()[0][0]).shape == (32, 3)

    made = fedma(nets, retrain, example_inputs=images()[0][0], gamma=1e9)
    assert [c for c, _ in seen] == [0, 1, 0, 1]
    assert "0.weight" in seen[0][1] and "4.weight" not in seen[0][1] and "4.weight" in seen[2][1]
    merged = made.merged()
    assert merged.info("0.weight").shape[0] == 8 and merged.info("4.weight").shape == (12, 8 * 36)
    assert widened(nets[0], merged)[0].out_channels == 8

    def cheat(module: nn.Module, client: int, frozen: frozenset[str]) -> None:
        with torch.no_grad():
            module[0].weight.add_(1)  # type: ignore[operator, union-attr]

    with pytest.raises(UsageError, match=r"retrain changed 0\.weight, which is frozen"):
        fedma(nets, cheat, example_inputs=images()[0][0])


def test_depthwise_and_transposed_convolutions_grow() -> None:
    def network(seed: int) -> nn.Module:
        return noisy(nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(125, 3),
        ), seed)  # fmt: skip

    a, b, x = network(0), network(1), images()[0][0]
    made = pfnm([a, b], example_inputs=x, gamma=1e12).merged()
    grown = widened(a, made)
    assert made.info("1.weight").shape == (8, 1, 3, 3) and grown[1].groups == 8
    assert (grown[3].in_channels, grown[3].out_channels) == (8, 10)
    with torch.no_grad():
        assert torch.allclose(grown(x), (a(x) + b(x)) / 2, atol=1e-3)


def test_units_within_others_do_not_grow() -> None:
    with pytest.raises(
        Problems, match=r"(?s)cannot be added one by one.*graph_matching.*layer.3: within layer.0"
    ):
        pfnm([convolutional(0), convolutional(1)], example_inputs=images()[0][0])
    with pytest.raises(UsageError, match="at least two clients"):
        pfnm([mlp(6, 5, 3)])
    with pytest.raises(Problems, match="same groups"):
        pfnm([mlp(6, 5, 3), mlp(6, 5, 4, 3)])


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.05, 0.5, 8.0])
def test_features_make_the_kernel(width: float) -> None:
    x = torch.linspace(-2, 3, 60, dtype=F64)
    phi = kernel_features(x, width, 5.0)
    made = phi.T @ phi
    assert float((made - torch.exp(-((x[:, None] - x) ** 2) / width)).abs().max()) < 2e-6


@pytest.mark.parametrize("name", ["mlp", "grouped convolution", "attention"])
def test_three_permuted_copies_are_matched_exactly_and_around_every_cycle(name: str) -> None:
    make, data = {
        "mlp": (lambda: mlp(6, 8, 7, 3), vectors()),
        "grouped convolution": (convolutional, images()),
        "attention": (lambda: noisy(Attention(), 0), tokens()),
    }[name]
    a = make()
    found = graph_matching(copies(a, data), example_inputs=data[0][0])
    assert found.agreement == pytest.approx(1, abs=1e-5)
    assert distance(found.merged(), found.nets[0].module, data) < 1e-5
    spec = found.nets[0].spec
    back = spec.compose(spec.compose(found.between(1, 2), found.between(0, 1)), found.between(2, 0))
    assert all(torch.equal(p, spec.identity()[g]) for g, p in back.items())


def test_cycles_close_for_networks_that_have_nothing_to_do_with_each_other() -> None:
    found = graph_matching([mlp(6, 8, 7, 3, seed=s) for s in range(3)])
    spec = found.nets[0].spec
    back = spec.compose(spec.compose(found.between(1, 2), found.between(0, 1)), found.between(2, 0))
    assert all(torch.equal(p, spec.identity()[g]) for g, p in back.items())
    hard = graph_matching([mlp(6, 8, 7, 3, seed=s) for s in range(3)], temperatures=())
    assert found.agreement >= hard.agreement
    moved = distance(found.aligned[1], found.nets[1].module, vectors())
    assert moved < 1e-5
    with pytest.raises(Problems, match="graph matching needs networks of equal widths"):
        graph_matching([mlp(6, 8, 3), mlp(6, 9, 3)])
    with pytest.raises(UsageError, match="weights with a sum above 0"):
        found.merged([1.0])
