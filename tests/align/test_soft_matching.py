"""Soft permutations and what is learned with them: against the hard ones, finite differences and brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from networks import KINDS, made, mlp
from torch import Tensor, nn

import weft
from weft.align import (
    PermutationSpec,
    annealed,
    c2m3,
    discover,
    hardened,
    merge_many,
    reordered,
    sinkhorn_matching,
    softened,
    softly_reordered,
    straight_through,
    together,
)  # fmt: skip
from weft.align.many import shared
from weft.align.sinkhorn import sinkhorn
from weft.analysis.network import Network
from weft.errors import DataError, DataProblems, UsageError


def experts() -> tuple[PermutationSpec, dict[str, Tensor]]:
    """A group within another that stands along another axis: the hidden units of each expert."""
    spec = PermutationSpec.of(
        {"e": 3, "f": weft.align.Group(4, ("e",))},
        {"router": ("e", 2), "up": ("e", "f", 2), "bias": ("e*f",), "down": ("e", 2, "f")},
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"router": (3, 2), "up": (3, 4, 2), "bias": (12,), "down": (3, 2, 4)}
    return spec, {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


@pytest.mark.parametrize("kind", [*KINDS, "experts"])
def test_a_matrix_of_ones_does_what_its_permutation_does(kind: str) -> None:
    if kind == "experts":
        spec, state = experts()
    else:
        net = made(kind)
        spec = discover(net, KINDS[kind].inputs)
        state = {n: t for n, t in net.state_dict().items() if t.is_floating_point()}
    p = spec.random(1)
    soft = softened(spec, p, torch.float64)
    hard, mixed = reordered(state, spec, p), softly_reordered(state, spec, soft)
    assert all(torch.equal(hard[n], mixed[n]) for n in state)
    again = hardened(spec, {n: m + 0.3 * torch.rand_like(m) for n, m in soft.items()})
    assert all(torch.equal(again[n], p[n]) for n in p)


def test_sinkhorn_gives_doubly_stochastic_matrices_and_the_gradient_of_its_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    for sums in (sinkhorn(z, 0.5, 200).sum(-1), sinkhorn(z, 0.5, 200).sum(-2)):
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-9, rtol=0)
    implicit, unrolled = (
        torch.autograd.grad((sinkhorn(z, 0.7, 300, g) * w).sum(), z)[0] for g in ("implicit", "unrolled")
    )
    torch.testing.assert_close(implicit, unrolled, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda z: sinkhorn(z, 0.7, 300), z)  # type: ignore[no-untyped-call]
    with pytest.raises(UsageError, match="tau must be positive"):
        sinkhorn(z, 0.0)


def test_many_models_that_are_one_collapse_into_it() -> None:
    for kind in ("mlp", "resnet"):
        net = made(kind)
        spec = discover(net, KINDS[kind].inputs)
        copies = [spec.apply(net, spec.random(s)) for s in range(3)]
        for how in ("merge_many", "c2m3"):
            first, *others = together(copies, how, spec=spec)
            assert all(torch.equal(first.tensor(n), o.tensor(n)) for n in first for o in others)


def test_no_round_lowers_what_the_models_share() -> None:
    nets = [mlp((9, 12, 12, 4), s).double() for s in range(4)]
    spec = discover(nets[0])
    states = [dict(n.state_dict()) for n in nets]

    def f(orders: list[dict[str, Tensor]]) -> float:
        return float(shared(spec, states, [softened(spec, p, torch.float64) for p in orders]))

    values = [f([spec.identity()] * 4), *(f(merge_many(spec, nets, rounds=r, sweeps=1)) for r in (1, 2, 4))]
    assert values == sorted(values) and values[-1] > values[0]
    many = merge_many(spec, nets)
    assert f(c2m3(spec, nets, start=many)) >= f(many)  # a start is never made worse
    assert f(c2m3(spec, nets, tries=3)) >= f(c2m3(spec, nets))
    assert f(c2m3(spec, nets, polish=True)) >= f(c2m3(spec, nets))
    assert f(merge_many(spec, nets, start=c2m3(spec, nets))) >= f(c2m3(spec, nets))
    pairs = sum(
        float((a[n] * b[n]).sum())
        for i, a in enumerate(states) for b in states[i + 1 :] for n in a
    )  # fmt: skip
    assert f([{}] * 4) == pytest.approx(pairs)


def classifier(units: int = 4) -> tuple[nn.Sequential, nn.Sequential, Network]:
    """Two networks and data that the first one explains."""
    a, b = (mlp((3, units, 2), s).double() for s in (0, 1))
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return a, b, Network(a, (x, a(x).argmax(-1)))


def test_learned_matchings_come_near_the_best_of_all_permutations() -> None:
    a, b, net = classifier()
    spec = discover(a)
    (group,) = spec.movable

    def middle(p: dict[str, Tensor]) -> float:
        moved = reordered(dict(b.state_dict()), spec, p)
        return net.measure({n: (t + moved[n]) / 2 for n, t in a.state_dict().items()}).loss

    every = sorted(middle({group: torch.tensor(p)}) for p in permutations(range(4)))
    assert middle(annealed(spec, a, b, net, steps=150)) == pytest.approx(every[0])
    assert middle(sinkhorn_matching(spec, a, b, net, objective="midpoint", steps=60, lr=0.3)) <= every[2]
    assert middle(straight_through(spec, a, b, net, steps=60, lr=1.0)) <= every[3]


def test_a_planted_order_is_recovered_by_each() -> None:
    a, _, data = classifier(6)
    x = data.batches[0][0]
    net = Network(a, (x, a(x).detach()), loss="mse")  # zero halfway in the right order alone
    spec = discover(a)
    planted = spec.random(3)
    b = spec.apply(a, planted)
    for found in (
        annealed(spec, a, b, net, steps=600),
        sinkhorn_matching(spec, a, b),
        straight_through(spec, a, b, net, steps=2),
    ):
        assert all(torch.equal(v, spec.identity()[n]) for n, v in spec.compose(planted, found).items())


def test_what_cannot_be_meant_is_refused() -> None:
    a, b, net = classifier()
    spec = discover(a)
    for call, told in (
        (lambda: sinkhorn_matching(spec, a, b, objective="loss"), "no objective 'loss'"),  # type: ignore[arg-type]
        (lambda: sinkhorn_matching(spec, a, b, objective="midpoint"), "give net="),
        (lambda: straight_through(spec, a, b, net, lr=0), "lr positive"),
        (lambda: annealed(spec, a, b, net, hot=1, cold=2), "temperatures must fall"),
        (lambda: c2m3(spec, [a]), "at least two models"),
        (lambda: c2m3(spec, [a, b], start=[{}]), "for each of 2 models"),
        (lambda: together([a, b], "pairs", spec=spec), "called 'pairs'"),
    ):
        with pytest.raises(UsageError, match=told):
            call()
    with pytest.raises(DataProblems, match="shapes differ"):
        sinkhorn_matching(spec, a, mlp((3, 5, 2)))
    broken = {n: t * float("inf") for n, t in b.state_dict().items()}
    with pytest.raises(DataError, match="NaN or infinite"):
        c2m3(spec, [a, broken])


def test_networks_with_batch_norm_are_settled_before_their_loss_counts() -> None:
    """The loss halfway is that with statistics measured there; none of the ways ends above where it began."""
    from networks import IMAGE, shaken

    a = made("resnet")
    torch.manual_seed(3)
    b = shaken(KINDS["resnet"].make().double(), 5)
    net = Network(a, (IMAGE, a(IMAGE).argmax(-1)))
    spec = discover(a, IMAGE)

    def middle(p: dict[str, Tensor]) -> float:
        moved = reordered(dict(b.state_dict()), spec, p)
        mixed = {n: (t + moved[n]) / 2 if t.is_floating_point() else t for n, t in a.state_dict().items()}
        return net.measure(net.settled(mixed)).loss

    start, matched = middle(spec.identity()), middle(weft.align.weight_matching(spec, a, b))
    assert middle(annealed(spec, a, b, net, steps=30)) < start
    assert middle(sinkhorn_matching(spec, a, b, net, steps=10)) <= start
    assert middle(straight_through(spec, a, b, net, steps=5)) <= matched
