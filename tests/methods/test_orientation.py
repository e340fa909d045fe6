"""Weights stored [in, out]: what is merged is the linear map, whichever way it lies in the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model

METHODS = ("actmat", "swudi", "swudi_a", "wudi", "ace", "gram", "tsv", "iso_c")
LAYERS = {
    "h.0.attn.c_attn": (24, 8),
    "h.0.attn.c_proj": (8, 8),
    "h.0.mlp.c_fc": (32, 8),
    "h.0.mlp.c_proj": (8, 32),
}


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Of one GPT-2 block, [out, in]."""
    g = torch.Generator().manual_seed(seed)
    return {f"{n}.weight": torch.randn(s, generator=g, dtype=torch.float64) for n, s in LAYERS.items()}


def plain(state: dict[str, torch.Tensor]) -> Checkpoint:
    return StateDict(state)


def gpt2(state: dict[str, torch.Tensor]) -> Checkpoint:
    """As transformers' files of GPT-2 have them."""
    stored = {f"transformer.{n}": t.T.contiguous() for n, t in state.items()}
    return Model(StateDict(stored), {"model_type": "gpt2"}, (), "gpt2")


def conv1d(state: dict[str, torch.Tensor]) -> Checkpoint:
    """A module in memory, which has no config."""

    class Conv1D(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.T.contiguous())

    root = nn.Module()
    for name, t in state.items():
        *path, leaf = name.removesuffix(".weight").split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(leaf, Conv1D(t))
    return weft.load(root)


def lazily(state: dict[str, torch.Tensor]) -> Checkpoint:
    """A node over such files."""
    made = gpt2(state)
    return made + 1.0 * (made - made)


@pytest.mark.parametrize("stored", [gpt2, conv1d, lazily])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_stored_inputs_first_gives_the_transpose_of_the_same_map(
    method: str, stored: Callable[[dict[str, torch.Tensor]], Checkpoint]
) -> None:
    base, *tuned = (weights(s) for s in range(4))
    want = weft.merge([plain(t) for t in tuned], method, base=plain(base))
    found = weft.merge([stored(t) for t in tuned], method, base=stored(base))
    names = list(found)
    assert len(names) == len(LAYERS) and all(found.at(n).transposed for n in names)  # type: ignore[attr-defined]
    for name in names:
        t = want.tensor(name.removeprefix("transformer."))
        torch.testing.assert_close(found.tensor(name), t.T, rtol=1e-7, atol=1e-9)


def test_the_rows_of_inputs_are_not_those_of_outputs() -> None:
    """What the merges above would give if orientation were not known."""
    base, *tuned = (weights(s) for s in range(4))
    seen = [
        Model(StateDict({n: t.T.contiguous() for n, t in w.items()}), {}, (), "x") for w in (*tuned, base)
    ]
    blind = weft.merge(seen[:3], "actmat", base=seen[3])
    want = weft.merge([plain(t) for t in tuned], "actmat", base=plain(base))
    a, b = blind.tensor("h.0.mlp.c_fc.weight"), want.tensor("h.0.mlp.c_fc.weight").T
    assert float((a - b).norm() / b.norm()) > 0.1


def test_stacks_of_experts_by_the_side_of_the_hidden_size() -> None:
    g = torch.Generator().manual_seed(0)
    config: dict[str, Any] = {"model_type": "anything", "hidden_size": 16}
    up, down = "layers.0.experts.gate_up_proj", "layers.0.experts.down_proj"

    def mixture(turned: bool) -> Checkpoint:
        state = {up: torch.randn(2, 24, 16, generator=g), down: torch.randn(2, 16, 24, generator=g)}
        return Model(
            StateDict({n: t.mT.contiguous() if turned else t for n, t in state.items()}), config, (), "m"
        )

    made = []
    for turned in (False, True):
        g.manual_seed(0)
        base, *tuned = (mixture(turned) for _ in range(4))
        made.append(weft.merge(tuned, "swudi", base=base))
        assert made[-1].inputs_first(up) is turned and made[-1].inputs_first(down) is turned
    for name in (up, down):
        torch.testing.assert_close(made[1].tensor(name), made[0].tensor(name).mT, rtol=1e-6, atol=1e-8)


def test_what_was_seen_while_measuring_counts_before_names() -> None:
    """Linear layers under GPT-2's names and config: statistics say how they are stored."""
    torch.manual_seed(0)
    nets = [nn.ModuleDict({"c_fc": nn.Linear(6, 6, bias=False)}) for _ in range(2)]
    known = [
        weft.measure(m, [torch.randn(50, 6)], "gram", forward=lambda model, batch: model["c_fc"](batch))
        for m in nets
    ]
    models = [Model(StateDict(m), {"model_type": "gpt2"}, (), "linear") for m in nets]
    assert models[0].inputs_first("c_fc.weight")
    merged = weft.merge(models, "regmean", statistics=known)
    assert not merged.inputs_first("c_fc.weight")
