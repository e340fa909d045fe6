"""Widening and deepening: the function stays, whatever the architecture; what cannot stay is refused."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import DataError, Problems, UsageError
from weft.transform import deepened, shortened, widened
from weft.transform.heterogeneous import cla_fusion
from weft.transform.layers import costs, ends_of, increasing
from weft.transform.shorten import straightened

EXACT = 1e-6


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and statistics that are not those of a fresh network."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in net.state_dict().values():
            if t.is_floating_point() and t.dim() == 1:
                t.add_(0.3 * torch.rand(t.shape, generator=g))
    return net.eval()


def mixed_net() -> nn.Module:
    torch.manual_seed(0)
    return shaken(nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1),
        nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3),
    ))  # fmt: skip


class Residual(nn.Module):
    """A residual branch, a depthwise convolution and a concatenation."""

    def __init__(self, c: int = 4, d: int = 8, blocks: int = 1) -> None:
        super().__init__()
        torch.manual_seed(c)
        self.stem = nn.Conv2d(1, c, 3, padding=1)
        self.blocks = nn.ModuleList(Block(c) for _ in range(blocks))
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.fc, self.out = nn.Linear(c, d), nn.Linear(c + d, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        for block in self.blocks:
            h = block(h)
        h = self.depthwise(h).mean((2, 3))
        out: Tensor = self.out(torch.cat([torch.tanh(self.fc(h)), h], 1))
        return out


class Block(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.b, self.norm_b = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))


def llama(**sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4,
             "num_key_value_heads": 2, "intermediate_size": 24}  # fmt: skip
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**plain, **sizes})).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
        )
    ).eval()


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = net(x)
    return out if isinstance(out, Tensor) else out.logits  # type: ignore[no-any-return]


# -- wider ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [0.0, 0.7])
@pytest.mark.parametrize(
    "to", [{"layer.0": 7}, {"layer.8": 16}, {"layer.4/2": 6}, {"layer.0": 9, "layer.8": 24}]
)
def test_widening_plain_stacks_keeps_the_function(to: dict[str, int], split: float) -> None:
    net, x = mixed_net(), inputs(5, 1, 8, 8)
    if split and "layer.0" not in to:
        pytest.skip("a norm over units wants equal shares too" if "layer.8" not in to else "as above")
    made = widened(net, to, example_inputs=x, split=split if list(to) == ["layer.0"] else 0.0)
    assert made.change < EXACT and made.told["sizes"] == to
    torch.testing.assert_close(outputs(made.module, x), outputs(net, x), rtol=1e-5, atol=1e-5)
    assert made.checkpoint.info("0.weight").shape[0] == to.get("layer.0", 4)


@pytest.mark.parametrize("to", [{"stem": 7}, {"blocks.0.a": 9}, {"fc": 20}, {"*": 11}])
def test_widening_residuals_depthwise_and_concatenations(to: dict[str, int]) -> None:
    net, x = shaken(Residual()), inputs(5, 1, 6, 6)
    made = widened(net, to, example_inputs=x, split=0.5, seed=3)
    assert made.change < EXACT
    torch.testing.assert_close(outputs(made.module, x), outputs(net, x), rtol=1e-5, atol=1e-5)


def test_a_network_of_the_wanted_widths_says_them() -> None:
    net, wide, x = shaken(Residual()), Residual(6, 11), inputs(3, 1, 6, 6)
    made = widened(net, wide, example_inputs=x)
    assert made.change < EXACT
    weft.materialize(made.checkpoint, wide)
    torch.testing.assert_close(outputs(wide.eval(), x), outputs(net, x), rtol=1e-5, atol=1e-5)


def test_copies_with_uneven_shares_get_other_gradients() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), inputs(6, 3)
    for split, same in ((0.0, True), (0.5, False)):
        made = widened(net, {"*": 8}, split=split).module.train().requires_grad_(True)
        made(x).square().sum().backward()
        grad = made[0].weight.grad  # type: ignore[index, union-attr]
        assert torch.allclose(grad[:4], grad[4:], rtol=1e-4, atol=1e-6) == same


def test_widening_language_models_and_their_configs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaForCausalLM

    net, ids = llama(), torch.arange(2, 14).reshape(2, 6)
    for to in ({"*gate_proj": 40}, {"model.embed_tokens": 32}, {"*.q_proj/2": 4}):
        made = widened(net, to)
        assert made.change < EXACT
    weft.save(made.checkpoint, tmp_path / "wide")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "wide")
    assert again.config.num_attention_heads == 8
    torch.testing.assert_close(outputs(again, ids), outputs(net, ids), rtol=1e-4, atol=1e-5)
    wide = llama(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, intermediate_size=30)
    assert widened(net, wide).change < EXACT
    assert widened(gpt2(), {"*c_fc": 100}).module.config.n_inner == 100  # type: ignore[union-attr]
    with pytest.raises(Problems, match="tied tensor"):
        widened(gpt2(), {"transformer.wte": 32})
    with pytest.raises(Problems, match="compared with others"):
        widened(gpt2(), {"transformer.h.0.attn.c_attn/2": 16})
    with pytest.raises(DataError, match=r"whole multiples: model.embed_tokens \(16 to 20\)"):
        widened(net, {"model.embed_tokens": 20})


def test_what_cannot_grow_is_refused_in_one_sentence() -> None:
    net, x = mixed_net(), inputs(2, 1, 8, 8)
    cases = [
        ({"layer.0": 4}, UsageError, "must grow.*layer.0: 4 to 4"),
        ({"layer.9": 8}, Problems, "no group of units is called so; there are layer.0 \\(4\\)"),
        ({}, Problems, "no size is given"),
        ({"layer.8": 12}, DataError, "whole multiples: layer.8 \\(8 to 12\\)"),
        (mixed_net(), UsageError, "same widths"),
        (Residual(), UsageError, "another network"),
    ]
    for to, kind, text in cases:
        with pytest.raises(kind, match=text):
            widened(net, to, example_inputs=x)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="example_inputs"):
        widened(net, {"layer.0": 8})
    with pytest.raises(DataError, match="cannot be run"):
        widened(net, {"layer.0": 8}, example_inputs=inputs(2, 5))
    fewer = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(Problems, match="cannot grow to"):
        widened(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), fewer)


# -- deeper -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [2, 0, 4, 8, [2, 2, 8]])
def test_deepening_plain_stacks_keeps_the_function(after: int | list[int]) -> None:
    net, x = mixed_net(), inputs(5, 1, 8, 8)
    made = deepened(net, after, example_inputs=x)
    assert made.change < EXACT
    torch.testing.assert_close(outputs(made.module, x), outputs(net, x), rtol=1e-5, atol=1e-5)
    assert len(made.module) > len(net)  # type: ignore[arg-type]


def test_deepening_blocks_zeroes_what_they_add_alone() -> None:
    net, x = shaken(Residual(blocks=2)), inputs(4, 1, 6, 6)
    made = deepened(net, [0, 1, 1], stack="blocks", example_inputs=x)
    assert made.change < EXACT and made.told["layers"] == 5
    weft.materialize(made.checkpoint, Residual(blocks=5))
    state = made.checkpoint.state_dict()
    assert not bool(state["blocks.1.norm_b.weight"].any()) and bool(state["blocks.1.a.weight"].any())
    # what was added can be trained
    live = made.module.train().requires_grad_(True)
    live(x).square().sum().backward()
    assert bool(live.get_parameter("blocks.1.norm_b.weight").grad.any())  # type: ignore[union-attr]


def test_deepening_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaForCausalLM

    ids = torch.arange(2, 14).reshape(2, 6)
    net = llama()
    made = deepened(net, [0, 1], stack="model.layers")
    weft.save(made.checkpoint, tmp_path / "deep")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "deep")
    assert again.config.num_hidden_layers == 4 and made.change < EXACT
    torch.testing.assert_close(outputs(again, ids), outputs(net, ids), rtol=1e-4, atol=1e-5)
    assert deepened(gpt2(), 1, stack="transformer.h").module.config.n_layer == 3  # type: ignore[union-attr]
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first, dropout=0.0)
              for first in (True, True, False)]  # fmt: skip
    pre = shaken(nn.Sequential(nn.Linear(5, 8), *layers[:2], nn.Linear(8, 2)))
    assert deepened(pre, [1, 2], example_inputs=inputs(2, 4, 5)).change < EXACT
    post = shaken(nn.Sequential(nn.Linear(5, 8), layers[2], nn.Linear(8, 2)))
    with pytest.raises(DataError, match="cannot be the identity"):
        deepened(post, 1, example_inputs=inputs(2, 4, 5))


def test_what_cannot_be_deepened_is_refused() -> None:
    net, x = mixed_net(), inputs(2, 1, 8, 8)
    for after, text in (
        (10, "GELU"),
        (3, "MaxPool2d"),
        (99, "from 0 to 11"),
        ([], "from 0 to 11"),
        (-1, "from 0"),
    ):
        with pytest.raises(UsageError, match=text):
            deepened(net, after, example_inputs=x)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no stack 'block'; did you mean 'blocks'"):
        deepened(Residual(), 0, stack="block", example_inputs=inputs(2, 1, 6, 6))


# -- layers onto layers -----------------------------------------------------------------------------------


def test_the_map_of_layers_is_the_best_of_all() -> None:
    g = torch.Generator().manual_seed(0)
    for m, n in ((1, 1), (2, 2), (2, 5), (3, 6), (4, 7), (5, 7)):
        cost = torch.rand(m, n, generator=g, dtype=torch.float64)
        every = [
            [0, *inner, n - 1] for inner in combinations(range(1, n - 1), max(0, m - 2))
        ] if m > 1 else [[0]]  # fmt: skip
        best = min(float(sum(cost[i, k] for i, k in enumerate(p))) for p in every)
        path = increasing(cost)
        assert float(sum(cost[i, k] for i, k in enumerate(path))) == pytest.approx(best)
        assert path[0] == 0 and path[-1] == n - 1 and all(a < b for a, b in pairwise(path))
    with pytest.raises(UsageError, match="shallower network first"):
        increasing(torch.rand(4, 3))


def test_layers_that_are_the_same_are_found() -> None:
    x = inputs(50, 6)
    layers = [torch.relu(x @ inputs(6, 9, seed=i)) for i in range(1, 5)]
    assert increasing(costs([layers[0], layers[2], layers[3]], layers)) == [0, 2, 3]
    images = [inputs(8, 3, 4, 4), inputs(8, 3, 2, 2)]
    assert bool(costs(images[:1], images)[0, 1].isinf())
    with pytest.raises(DataError, match="NaN"):
        costs([x * torch.nan], [x])
    assert ends_of(
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), ""
    ) == [1, 3]
    with pytest.raises(UsageError, match="cannot be told"):
        ends_of(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2)), "")


def test_fusion_keeps_the_shallow_network_and_gives_the_deep_shape() -> None:
    def mlp(*w: int) -> nn.Module:
        torch.manual_seed(sum(w))
        pairs = [m for i, o in pairwise(w) for m in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*pairs, nn.Linear(w[-1], 3)).eval()

    small, big, x = mlp(5, 6, 6), mlp(5, 12, 12, 12), inputs(40, 5)
    found = cla_fusion(small, big, [x])
    assert found.layers == [0, 2] and found.change < EXACT
    moved = weft.materialize(found.alignment.checkpoint, copy.deepcopy(big))
    torch.testing.assert_close(outputs(moved, x), outputs(small, x), rtol=1e-4, atol=1e-5)
    assert {n: i.shape for n, i in found.merged().tensors.items()} == {
        n: tuple(t.shape) for n, t in big.state_dict().items()
    }
    same = cla_fusion(small, mlp(5, 8, 9), [x])
    assert same.layers == [0, 1] and same.change == 0
    with pytest.raises(UsageError, match="shallower first"):
        cla_fusion(big, small, [x])
    with pytest.raises(DataError, match="at least two"):
        cla_fusion(small, big, [x[:1]])


def test_transformers_of_other_depth_and_width_fuse() -> None:
    def vit(depth: int, hidden: int) -> nn.Module:
        torch.manual_seed(depth)
        blocks = [nn.TransformerEncoderLayer(8, 2, hidden, batch_first=True, norm_first=True, dropout=0.0)
                  for _ in range(depth)]  # fmt: skip
        return shaken(nn.Sequential(nn.Linear(5, 8), nn.Sequential(*blocks), nn.Linear(8, 3)))

    x = inputs(12, 4, 5)
    zipped = cla_fusion(vit(2, 12), vit(4, 20), [x], stack="1", units="zip")
    assert outputs(weft.materialize(zipped.merged(), vit(4, 20)), x).shape == (12, 4, 3)
    with pytest.raises(UsageError, match="means of both"):
        zipped.merged(0.3)
    with pytest.raises(UsageError, match="grow the shallow network"):
        cla_fusion(vit(2, 12), vit(4, 20), [x], stack="1", balance="merge")
    found = cla_fusion(vit(2, 12), vit(4, 20), [x], stack="1")
    assert len(found.layers) == 2 and found.change < EXACT
    assert outputs(weft.materialize(found.merged(), vit(4, 20)), x).shape == (12, 4, 3)


def test_layers_are_merged_exactly_where_their_activations_are_linear() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = inputs(50, 4).double()
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([9.0, 9, 9, -9, -9, -9]))  # always on, or always off
    for line in ("average", "majority", "fit"):
        short = shortened(net, [1], [x], line=line)
        assert [type(m) for m in short.module] == [nn.Linear, nn.ReLU, nn.Linear] and short.change < EXACT
        torch.testing.assert_close(outputs(short.module, x), outputs(net, x))
    torch.manual_seed(3)
    nn.init.normal_(net[0].bias)
    both = shortened(net, [1, 3], [x])
    assert both.change > 0.01 and {n: i.shape for n, i in both.checkpoint.tensors.items()} == {
        "0.weight": (3, 4), "0.bias": (3,)
    }  # fmt: skip
    z = net[0](x).detach()  # the fitted line is the nearest one
    slope, intercept = straightened(z, z.relu(), "fit")
    best = torch.linalg.lstsq(torch.stack([z[:, 0], torch.ones(50)], 1), z[:, :1].relu()).solution[:, 0]
    torch.testing.assert_close(torch.stack([slope[0], intercept[0]]), best)
    for away in ([0], [4], [7]):
        with pytest.raises(UsageError, match="no activation between two linear layers"):
            shortened(net, away, [x])
    with pytest.raises(UsageError, match="there is no line 'mean'"):
        shortened(net, [1], [x], line="mean")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="balance is grow or merge"):
        cla_fusion(net, net, [x], balance="shrink")  # type: ignore[arg-type]
