"""Section 2.2.2.3, Deep-Align: an aligner learned from some networks puts others, never seen, into one order."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from matching_lab import digits, mlp, reader
from torch import nn

import weft
from weft.align import DeepAlign, deep_align, discover, weight_matching
from weft.analysis.barrier import barrier
from weft.analysis.network import Network
from weft.errors import DataError, UsageError

WIDTHS = (32, 32)
SEEN = 10


@lru_cache
def zoo(count: int = SEEN + 4, epochs: int = 20, rate: float = 3e-3) -> list[nn.Module]:
    """Digit networks of as many starts, trained side by side with weight decay."""
    x, y = digits()[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = [mlp(*WIDTHS) for _ in range(count)]
        stacked, _ = torch.func.stack_module_state(nets)
        free = {n: p.detach().requires_grad_() for n, p in stacked.items()}
        optimiser = torch.optim.AdamW(free.values(), lr=rate, weight_decay=1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, epochs * 12, pct_start=0.1)
        run = torch.vmap(lambda p, x: torch.func.functional_call(nets[0], p, (x,)))
        for _ in range(epochs):
            orders = torch.stack([torch.randperm(1200) for _ in range(count)])
            for batch in orders.split(100, 1):
                loss = nn.functional.cross_entropy(run(free, x[batch]).flatten(0, 1), y[batch].flatten())
                optimiser.zero_grad()
                torch.autograd.backward(loss * count)
                optimiser.step()
                schedule.step()
    for k, net in enumerate(nets):
        net.load_state_dict({n: p[k].detach() for n, p in free.items()})
    return [net.eval().requires_grad_(False) for net in nets]


@lru_cache
def aligner() -> DeepAlign:
    nets = zoo()
    return deep_align(
        discover(nets[0]), nets[:SEEN], Network(nets[0], digits()[0], batch_size=200), steps=100
    )


def test_an_aligner_trained_on_some_networks_aligns_others() -> None:
    spec, held, how = discover(zoo()[0]), zoo()[SEEN:], aligner()
    for k, net in enumerate(held):  # itself in another order, with noise
        order = spec.random(k)
        with torch.random.fork_rng():
            torch.manual_seed(k)
            other = {
                n: t + 0.3 * t.std() * torch.randn_like(t)
                for n, t in spec.apply(net, order).state_dict().items()
            }
        back = spec.compose(order, how(spec, net, other))
        right = [float((p == back[n]).double().mean()) for n, p in spec.identity().items()]
        assert sum(right) / len(right) > 0.9

    def between(match: object) -> float:
        """The mean barrier of the loss over pairs of unseen networks, on images that neither saw."""
        pairs = [(a, b) for a in held for b in held if a is not b]
        found = [
            barrier(
                Network(a, digits()[1]), a, b, align=lambda b, a: weft.align(b, to=a, spec=spec, how=match)
            )
            for a, b in pairs
        ]
        return sum(f.barrier for f in found) / len(pairs)

    naive, weights, ours = between(lambda spec, a, b: {}), between("weights"), between(how)
    assert naive > 0.8
    assert ours < 0.25 * naive
    assert ours < weights + 0.08 * naive


def test_an_aligner_keeps_in_one_file_and_refuses_what_it_was_not_trained_for(tmp_path: Path) -> None:
    a, b = zoo()[SEEN : SEEN + 2]
    spec = discover(a)
    aligner().save(tmp_path / "aligner.safetensors")
    again = DeepAlign.load(tmp_path / "aligner.safetensors")
    first, second = aligner()(spec, a, b), again(spec, a, b)
    assert all(torch.equal(p, second[n]) for n, p in first.items())
    moved = weft.align(b, to=a, how="deep", network=tmp_path / "aligner.safetensors")
    assert torch.equal(moved.tensor("0.weight"), spec.apply(b, first).tensor("0.weight"))
    other = mlp(32, 16)
    with pytest.raises(DataError, match="trained for other networks"):
        weft.align(other, to=other, how=again)
    weft.save(weft.load(a), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="no aligner that weft wrote"):
        DeepAlign.load(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="how='deep' needs network="):
        weft.align(b, to=a, how="deep")
    broken = {n: t.clone() for n, t in a.state_dict().items()}
    broken["2.weight"][0, 0] = torch.nan
    with pytest.raises(DataError, match=r"2\.weight .* NaN"):
        deep_align(spec, [a, broken])
    with pytest.raises(UsageError, match="two models or more"):
        deep_align(spec, [a])
    with pytest.raises(UsageError, match="nothing to learn"):
        deep_align(discover(nn.Linear(3, 2)), [nn.Linear(3, 2)] * 2)


def test_aligners_are_made_for_transformers_too() -> None:
    nets = [reader(1), reader(2)]
    spec = discover(nets[0], torch.randn(2, 64))
    how = deep_align(spec, nets, steps=15, width=24, layers=2)
    order = spec.random(0)
    other = {
        n: t + 0.05 * t.std() * torch.randn_like(t)
        for n, t in spec.apply(nets[0], order).state_dict().items()
    }
    back, eye = spec.compose(order, how(spec, nets[0], other)), spec.identity()
    assert sum(int((back[n] == p).sum()) for n, p in eye.items()) > 0.95 * spec.degrees
    assert weight_matching(spec, nets[0], other).keys() == eye.keys()
