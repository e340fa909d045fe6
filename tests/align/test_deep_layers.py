"""Deep-Align's encoder commutes with the symmetries of every kind of network that they are found in."""

from __future__ import annotations

import pytest
import torch
from networks import KINDS, made

from weft.align import discover, reordered
from weft.align.deep import Encoder
from weft.align.pair import STATISTICS
from weft.align.spec import _grid


@pytest.mark.parametrize("kind", KINDS)
def test_features_move_with_the_units(kind: str) -> None:
    net = made(kind)
    spec = discover(net, KINDS[kind].inputs)
    kept = [n for n, t in net.state_dict().items() if t.is_floating_point() and n not in spec.ties]
    state = {n: net.state_dict()[n] for n in kept if not n.endswith(tuple(s[1:] for s in STATISTICS))}
    torch.manual_seed(0)
    encoder = Encoder(spec, {n: t.shape for n, t in state.items()}, width=8, layers=2).double()
    order = spec.random(1)
    before, after = (
        {g: f[0] for g, f in encoder({n: t[None] for n, t in s.items()}).items()}
        for s in (state, reordered(state, spec, order))
    )
    for g, f in before.items():
        within = spec.groups[g].within
        rows = f[tuple(_grid(spec, within, order))] if within else f  # of the outer units, moved
        expected = rows.gather(-2, order[g][..., None].expand(*order[g].shape, f.shape[-1]))
        assert torch.allclose(after[g], expected, atol=1e-9)
        assert float((f - f.mean(-2, keepdim=True)).detach().abs().max()) > 1e-3  # units are told apart
    scores = encoder.logits(before, after)
    for g, s in scores.items():
        assert s.shape == tuple(n for size in spec.shape(g) for n in (size, size))
