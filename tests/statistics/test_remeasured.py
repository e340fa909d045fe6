"""RegMean++ and IterIS: measured on the merged model's own inputs. References by hand, in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import DataError, UsageError
from weft.statistics.blockwise import without_weights

D = torch.float64


class Block(nn.Module):
    real: list[int] = []  # noqa: RUF012

    def __init__(self, d: int, every: list[Any]) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.every = every
        every.append(self)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        Block.real.append(sum(not b.up.weight.is_meta for b in self.every))
        return x + scale * self.down(self.up(self.norm(x)).tanh())


class Deep(nn.Module):
    def __init__(self, n: int = 3, d: int = 8) -> None:
        super().__init__()
        every: list[Any] = []
        self.start, self.head = nn.Linear(5, d), nn.Linear(d, 3)
        self.layers = nn.ModuleList(Block(d, every) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for layer in self.layers:
            h = layer(h, scale=0.5)
        return self.head(h)


class Plain(nn.Module):
    """Activations between the layers, so that no list of blocks can be run by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 6)])
        self.shift = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return self.head(x + self.shift)


def near(make: type[nn.Module], k: int = 2, seed: int = 0, far: float = 0.3) -> list[nn.Module]:
    """k networks not far from one."""
    torch.manual_seed(seed)
    first = make()
    nets = []
    for _ in range(k):
        net = make()
        net.load_state_dict(
            {n: v + far * v.std() * torch.randn_like(v) for n, v in first.state_dict().items()}
        )
        nets.append(net.eval().requires_grad_(False))
    return nets


def datas(k: int = 2, n: int = 40) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [[torch.randn(n, 5, generator=g) * (i + 1), torch.randn(3, 5, generator=g)] for i in range(k)]


def fit(layers: list[nn.Module], inputs: list[Tensor], alpha: float = 0.9) -> Tensor:
    grams = [x.double().T @ x.double() / len(x) for x in inputs]
    grams = [torch.where(torch.eye(len(g)).bool(), g, alpha * g) for g in grams]
    above = sum(m.weight.double() @ g for m, g in zip(layers, grams, strict=True))
    return above @ torch.linalg.inv(sum(grams))  # type: ignore[arg-type]


def averaged(make: type[nn.Module], nets: list[nn.Module]) -> nn.Module:
    merged = make().requires_grad_(False)
    merged.load_state_dict(
        {n: sum(net.state_dict()[n] for net in nets) / len(nets) for n in nets[0].state_dict()}
    )
    return merged


def close(found: Any, module: nn.Module, tol: float = 1e-4) -> None:
    for name, value in module.state_dict().items():
        torch.testing.assert_close(found.tensor(name), value, rtol=tol, atol=tol)


@torch.no_grad()
def deep_by_hand(nets: list[Any], xs: list[Tensor]) -> nn.Module:
    merged: Any = averaged(Deep, nets)
    merged.start.weight.copy_(fit([n.start for n in nets], xs))
    hidden = [merged.start(x) for x in xs]
    for i, layer in enumerate(merged.layers):
        theirs = [n.layers[i] for n in nets]
        ups = [b.norm(h) for b, h in zip(theirs, hidden, strict=True)]
        downs = [b.up(u).tanh() for b, u in zip(theirs, ups, strict=True)]
        layer.up.weight.copy_(fit([b.up for b in theirs], ups))
        layer.down.weight.copy_(fit([b.down for b in theirs], downs))
        hidden = [layer(h, scale=0.5) for h in hidden]
    merged.head.weight.copy_(fit([n.head for n in nets], hidden))
    return merged


def test_by_block_is_the_papers_loop_with_one_block_in_memory(tmp_path: Path) -> None:
    nets, data = near(Deep), datas()
    want = deep_by_hand(nets, [torch.cat(d) for d in data])
    close(weft.regmean_pp(nets, data), want)
    paths = [tmp_path / "a", tmp_path / "b"]
    for net, path in zip(nets, paths, strict=True):
        weft.save(net, path)
    with without_weights():
        empty = Deep()
    Block.real.clear()
    found = weft.regmean_pp(paths, data, module=empty, by_block=True)
    close(found, want)
    assert set(Block.real) == {1} and all(p.is_meta for p in empty.parameters())
    weft.save(found, tmp_path / "merged")
    close(weft.load(tmp_path / "merged"), want)


def test_by_module_where_there_are_no_blocks() -> None:
    nets, data = near(Plain), datas()
    xs = [torch.cat(d) for d in data]
    with torch.no_grad():
        merged: Any = averaged(Plain, nets)
        for i, layer in enumerate(merged.layers):
            layer.weight.copy_(fit([n.layers[i] for n in nets], xs))
            xs = [torch.nn.functional.gelu(layer(x)) for x in xs]
        merged.head.weight.copy_(fit([n.head for n in nets], [x + merged.shift for x in xs]))
    found = weft.regmean_pp(nets, data)
    close(found, merged)
    with pytest.raises(UsageError, match="not run one after the other"):
        weft.regmean_pp(nets, data, by_block=True)
    with pytest.raises(UsageError, match="no stack of blocks"):
        weft.regmean_pp([nn.Linear(5, 2), nn.Linear(5, 2)], data, by_block=True)


def test_both_ways_agree_where_every_block_is_one_layer() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv1d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))

    nets = near(make)  # type: ignore[arg-type]
    data = [[x[:, None] for x in d] for d in datas()]
    one, other = (weft.regmean_pp(nets, data, by_block=b) for b in (True, False))
    for name in one:
        torch.testing.assert_close(one.tensor(name), other.tensor(name), rtol=1e-5, atol=1e-6)
    plain = weft.merge(
        nets, "regmean", statistics=[weft.measure(n, d, "gram") for n, d in zip(nets, data, strict=True)]
    )
    first, last = "0.weight", "4.weight"
    torch.testing.assert_close(one.tensor(first), plain.tensor(first).float(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one.tensor(last), plain.tensor(last).float(), rtol=1e-3)


@pytest.mark.parametrize("make", [Deep, Plain])
def test_identical_models_and_single_ones_are_themselves(make: type[nn.Module]) -> None:
    net, data = near(make, 1)[0], datas()
    for k in (1, 2):
        close(weft.regmean_pp([net] * k, data[:k]), net)
        close(weft.iteris([net] * k, data[:k], rounds=2), net)


def test_other_methods_bases_and_weights() -> None:
    nets, data = near(Plain), datas()
    base = averaged(Plain, nets)
    for method in ("lot", "gram"):
        found = weft.regmean_pp(nets, data, base=base, method=method, weight=[2.0, 1.0])
        moved = found.tensor("layers.1.weight") - base.layers[1].weight  # type: ignore[union-attr,index]
        assert 0 < float(moved.norm()) < 3 * float(base.layers[1].weight.norm())  # type: ignore[union-attr,index]
    alone = weft.regmean_pp(nets, data, weight=[1.0, 0.0])
    close(alone, nets[0])


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        up = x[:, 0] > 0
        y = torch.zeros_like(x)
        for expert, rows in zip(self.experts, (up, ~up), strict=True):
            if bool(rows.any()):
                y[rows] = expert(x[rows])
        return y


def test_a_part_that_one_task_never_used_is_the_others() -> None:
    nets = near(Routed)
    x = torch.randn(60, 5)
    data = [[x[x[:, 0] > 0]], [x]]  # the first task never chooses the second expert
    found = weft.regmean_pp(nets, data)
    torch.testing.assert_close(
        found.tensor("experts.1.weight"), nets[1].experts[1].weight, rtol=1e-4, atol=1e-5
    )  # type: ignore[union-attr,index]
    with pytest.raises(UsageError, match="cannot be paired"):
        weft.iteris(near(Routed, far=0.0), [[x], [x * torch.tensor([-1.0, 1, 1, 1, 1])]], forward=_shifted)


def _shifted(model: nn.Module, x: Tensor, seen: list[int] = []) -> Any:  # noqa: B006
    """Each second call sees other rows, as routing by values does."""
    seen.append(1)
    return model(x if len(seen) % 2 else -x + 0.1)


def test_wrong_input_is_said() -> None:
    nets, data = near(Plain), datas()
    for verb in (weft.regmean_pp, weft.iteris):
        with pytest.raises(UsageError, match="2 models, and data of 1"):
            verb(nets, data[:1])
        with pytest.raises(DataError, match="no examples for Plain"):
            verb(nets, [data[0], []])
    with pytest.raises(UsageError, match=r"ties does not merge by Gram matrices.*regmean"):
        weft.regmean_pp(nets, data, method="ties")
    with pytest.raises(UsageError, match="no parameter 'alpha'"):
        weft.regmean_pp(nets, data, alpha=1.0)
    with pytest.raises(UsageError, match="rounds must be at least 1"):
        weft.iteris(nets, data, rounds=0)


# -- IterIS -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def iteris_by_hand(nets: list[Any], xs: list[Tensor], rounds: int, mix: float) -> nn.Module:
    merged: Any = averaged(Plain, nets)
    for _ in range(rounds):
        layers = [[*n.layers, n.head] for n in (*nets, merged)]
        solved = []
        for at in range(3):
            above, below = torch.zeros(1, dtype=D), torch.zeros(1, dtype=D)
            for i, x in enumerate(xs):
                own, other = (_reached(n, x, at).double() for n in (nets[i], merged))
                other = (1 - mix) * other + mix * own
                w = layers[i][at].weight.double()
                lam = 1 / (own @ w.T).square().sum()
                above, below = above + lam * w @ own.T @ other, below + lam * other.T @ other
            solved.append(above @ torch.linalg.inv(below))
        for layer, w in zip(layers[-1], solved, strict=True):
            layer.weight.copy_(w)
    return merged


def _reached(net: Any, x: Tensor, at: int) -> Tensor:
    """The input of the at-th layer."""
    for layer in list(net.layers)[:at]:
        x = torch.nn.functional.gelu(layer(x))
    return x + net.shift if at == 2 else x


def test_iteris_is_the_papers_iteration() -> None:
    nets, data = near(Plain), datas()
    told: list[tuple[int, float]] = []
    for rounds in (1, 3):
        want = iteris_by_hand(nets, [torch.cat(d) for d in data], rounds, 5e-4)
        found = weft.iteris(nets, data, rounds=rounds, ridge=0.0, told=lambda i, c: told.append((i, c)))
        close(found, want, 1e-3)
    assert [i for i, _ in told] == [1, 1, 2, 3]
    told.clear()
    weft.iteris(nets, data, rounds=30, tol=0.5, told=lambda i, c: told.append((i, c)))
    assert len(told) < 30 and told[-1][1] < 0.5  # stops where little changes


def test_one_layer_has_the_same_inputs_in_every_model_so_that_iteris_is_regmean() -> None:
    nets, data = near(lambda: nn.Linear(5, 4)), datas()  # type: ignore[arg-type]
    stats = [weft.measure(n, d, "gram") for n, d in zip(nets, data, strict=True)]
    plain = weft.merge(nets, "regmean", statistics=stats, off_diagonal=1.0, normalize="outputs")
    found = weft.iteris(nets, data, ridge=0.0)
    torch.testing.assert_close(found.tensor("weight"), plain.tensor("weight").float(), rtol=1e-4, atol=1e-5)
