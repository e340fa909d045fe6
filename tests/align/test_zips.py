"""Zips: the greedy merging of units, maps that come of it, and models that share some of their tensors."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from test_transport import F64, Attention, distance, mlp, noisy, rand, tokens, vectors

import weft
from weft.align.mudsc import correlation_of_weights, mudsc
from weft.align.networks import opened
from weft.align.zipping import zip_models, zipped
from weft.errors import Problems, UsageError


def test_the_most_similar_are_merged_first_and_repeats_count_less() -> None:
    s = torch.tensor(
        [[1, 0.1, 0.9, 0.3], [0.1, 1, 0.2, 0.8], [0.9, 0.2, 1, 0.0], [0.3, 0.8, 0.0, 1]], dtype=F64
    )
    owner = torch.tensor([0, 0, 1, 1])
    assert torch.equal(zipped(s, owner, 2), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=F64))
    assert torch.equal(zipped(s, owner, 1), torch.ones(1, 4, dtype=F64))
    assert torch.equal(zipped(s, owner, 4), torch.eye(4, dtype=F64))


def test_the_budget_bounds_merges_within_a_model() -> None:
    s = torch.full((6, 6), 0.1, dtype=F64)
    s[0, 1] = s[1, 0] = s[1, 2] = s[2, 1] = s[0, 2] = s[2, 0] = 0.9  # all of model 0 alike
    owner = torch.tensor([0, 0, 0, 1, 1, 1])
    free, bound = zipped(s, owner, 3, repeat=1.0), zipped(s, owner, 3, budget=0.0)
    assert bool((free[:, :3].sum(1) == 3).any())
    assert bool((bound[:, :3].sum(1) <= 1).all()) or bool((bound[:, 3:].sum(1) > 0).any())
    assert torch.equal(free.sum(0), torch.ones(6, dtype=F64)) and torch.equal(
        bound.sum(0), torch.ones(6, dtype=F64)
    )


@pytest.mark.parametrize("count", [2, 3])
def test_permuted_copies_are_zipped_into_the_original(count: int) -> None:
    a, data = mlp(6, 8, 7, 3), vectors()
    spec = opened([a], data)[0].spec
    copies = [weft.materialize(spec.apply(a, spec.random(s)), deepcopy(a)) for s in range(1, count)]
    made = zip_models([a, *copies], data)
    assert distance(made.merged(), a, data) < 1e-5
    partial = zip_models([a, *copies], data, private="4.*")
    assert all(distance(c, a, data) < 1e-5 for c in partial.checkpoints)
    with pytest.raises(UsageError, match=r"take \.checkpoints"):
        partial.merged()


def test_heads_are_permuted_and_residual_streams_are_zipped_once() -> None:
    a, data = noisy(Attention(), 0), tokens()
    spec = opened([a], data)[0].spec
    b = weft.materialize(spec.apply(a, spec.random(1)), deepcopy(a))
    made = zip_models([a, b], data)
    assert distance(made.merged(), a, data) < 1e-4
    with pytest.raises(Problems, match="cut where no unit passes by"):
        zip_models([a, b], data, private=["down.*", "head.*"])


def test_other_widths_and_bad_requests() -> None:
    a, b, data = mlp(6, 8, 3), mlp(6, 5, 3, seed=1), vectors()
    made = zip_models([a, b], data).merged()
    assert {n: i.shape for n, i in made.tensors.items()} == {
        n: tuple(t.shape) for n, t in a.state_dict().items()
    }
    with pytest.raises(Problems, match=r"no tensor is called so(?s:.)*'9\.\*'"):
        zip_models([a, b], data, private="9.*")
    with pytest.raises(Problems, match=r"(?s)other lengths: make them private.*2.weight axis 0: 3 in"):
        zip_models([a, mlp(6, 8, 4)], data)
    assert len(zip_models([a, mlp(6, 8, 4)], data, private="2.*").checkpoints) == 2
    with pytest.raises(UsageError, match="at least two"):
        zip_models([a], data)
    with pytest.raises(UsageError, match="between 0 and 1"):
        zip_models([a, b], data, repeat=2)
    with pytest.raises(UsageError, match="needs data"):
        zip_models([a, b], None)  # type: ignore[arg-type]


def test_the_correlation_of_weights_is_the_definition() -> None:
    a, b = mlp(4, 5, 6, 2), mlp(4, 5, 6, 2, seed=1)
    net = opened([a])[0]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    states = [{n: t.double() for n, t in m.state_dict().items()} for m in (a, b)]
    found = correlation_of_weights(net, *states, "layer.0", {"layer.2": order})
    x = torch.cat([states[0]["0.weight"], states[0]["0.bias"][:, None], states[0]["2.weight"].T], 1)
    y = torch.cat([states[1]["0.weight"], states[1]["0.bias"][:, None], states[1]["2.weight"][order].T], 1)
    assert found is not None and torch.allclose(found, torch.corrcoef(torch.cat([x, y]))[:5, 5:], rtol=1e-9)


def test_mudsc_brings_a_permuted_copy_back_at_any_weight() -> None:
    a, data = noisy(Attention(), 0), tokens()
    spec = opened([a], data)[0].spec
    b = weft.materialize(spec.apply(a, spec.random(1)), deepcopy(a))
    for weight in (0.0, 0.5, 1.0):
        assert distance(mudsc(b, a, data, weight=weight).checkpoint, a, data) < 1e-6
        assert distance(mudsc(b, a, data, weight=weight).merged(), a, data) < 1e-5
    c = weft.materialize(spec.apply(a, spec.random(2)), deepcopy(a))
    assert distance(zip_models([a, b, c], data, weight=0.5).merged(), a, data) < 1e-5
    with pytest.raises(UsageError, match="weight must"):
        mudsc(b, a, data, weight=2)
    with pytest.raises(UsageError, match="weight must"):
        zip_models([a, b], data, weight=-1)
    with pytest.raises(Problems, match="MuDSC's zip"):
        zip_models([mlp(6, 8, 3), mlp(6, 5, 3)], vectors(), weight=0.5)
    assert rand(1).dtype == F64
