"""Calibration: what each way promises, on small networks and in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
import weft.calibrate as room
from weft.calibrate.moments import Moments, measured
from weft.calibrate.network import sites
from weft.calibrate.temperature import best_temperature
from weft.errors import DataError, Problems, UsageError, WeftError
from weft.statistics.batches import as_batch


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conv_net(seed: int, norm: bool = True, bias: bool = True) -> nn.Module:
    """[n, 2, 6, 6] → [n, 3], with BatchNorms that have seen something."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, o in ((2, 4), (4, 5)):
            layers += [
                nn.Conv2d(i, o, 3, padding=1, bias=bias),
                *([nn.BatchNorm2d(o)] if norm else []),
                nn.ReLU(),
            ]
        net = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        net = net.double().train()
        for _ in range(5):
            net(torch.randn(16, 2, 6, 6, dtype=torch.float64) * 2 + 1)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return net.eval()


def images(n: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 6, 6, generator=drawn(seed), dtype=torch.float64)


def at(net: nn.Module, name: str, x: Tensor, side: str = "output") -> Tensor:
    found: list[Tensor] = []
    hook = net.get_submodule(name).register_forward_hook(
        lambda m, a, y: found.append(y if side == "output" else a[0])
    )
    with torch.no_grad():
        net(x)
    hook.remove()
    return found[0]


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    flat = y.movedim(1, -1).reshape(-1, y.shape[1])
    return flat.mean(0), flat.std(0, correction=0)


def test_moments_do_not_depend_on_batches() -> None:
    x = torch.randn(50, 3, generator=drawn(1), dtype=torch.float64) * 5 + 100
    whole, parts = Moments(), Moments()
    whole.add(x)
    for chunk in x.split(7):
        parts.add(chunk)
    torch.testing.assert_close(parts.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.unbiased, x.var(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.var, whole.var, rtol=1e-12, atol=0)


def test_sites_know_what_is_normalised_and_what_comes_out() -> None:
    found = {s.name: s for s in sites(conv_net(0), as_batch(images(4)))}
    assert [n for n, s in found.items() if s.normed] == ["0", "3"]
    assert [n for n, s in found.items() if s.final] == ["10"]
    in_place = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4)).eval()
    assert not any(s.normed for s in sites(in_place, as_batch(torch.randn(5, 3))))


# -- BatchNorm ----------------------------------------------------------------------------------------


def test_running_statistics_are_those_of_the_activations_however_data_are_cut() -> None:
    net, x = conv_net(1), images()
    before = copy.deepcopy(net.state_dict())
    one = weft.calibrate(net, [x], "batchnorm")
    many = weft.calibrate(net, list(x.split(7)), "batchnorm")
    assert one.added == 0 and all(torch.equal(v, net.state_dict()[n]) for n, v in before.items())
    state, again = one.checkpoint.state_dict(), many.checkpoint.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            torch.testing.assert_close(again[name], value, rtol=1e-9, atol=1e-12)
    for name in ("1", "4"):  # the fixed point: what each layer gets when those before it are settled
        h = at(one.module, name, x, "input")
        flat = h.movedim(1, -1).reshape(-1, h.shape[1])
        torch.testing.assert_close(state[f"{name}.running_mean"], flat.mean(0))
        torch.testing.assert_close(state[f"{name}.running_var"], flat.var(0))


def test_one_pass_with_one_batch_is_what_torch_does() -> None:
    net, x = conv_net(2), images()
    found = weft.calibrate(net, [x], "batchnorm", schedule="joint")
    reference = copy.deepcopy(net)
    for m in reference.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    torch.optim.swa_utils.update_bn([x], reference)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(found.checkpoint.tensor(name).to(value), value, rtol=1e-6, atol=1e-9)


def test_negative_running_variances_of_task_arithmetic_are_mended() -> None:
    base, x = conv_net(3), images()
    experts = [copy.deepcopy(base) for _ in range(3)]
    for e in experts:
        e[1].running_var.mul_(0.3)  # type: ignore[union-attr, operator]
    merged = weft.merge(experts, "task_arithmetic", base=base, scale=1.0)
    assert bool((merged.tensor("1.running_var") < 0).any())
    broken = weft.materialize(merged, copy.deepcopy(base))
    assert bool(broken(x).isnan().any())
    found = weft.calibrate(merged, [x], "batchnorm", module=base)
    assert bool(found.module(x).isfinite().all()) and "negative: 1" in found.notes[0]


# -- REPAIR -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_units_get_the_mean_and_spread_of_their_parents(norm: bool, schedule: str) -> None:
    a, b, x = conv_net(4, norm), conv_net(5, norm), images(80)
    mid = weft.merge([a, b], "linear")
    found = weft.calibrate(
        mid, [x], "repair", parents=[a, b], weights=[0.3, 0.7], module=a, schedule=schedule
    )
    assert found.added == 0
    fused = weft.materialize(found.checkpoint, copy.deepcopy(a))
    layers = ["1", "4", "8"] if norm else ["0", "2", "6"]
    for name in layers:
        (ma, sa), (mb, sb), (m, s) = (moments(at(net, name, x)) for net in (a, b, fused))
        torch.testing.assert_close(m, 0.3 * ma + 0.7 * mb, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(s, 0.3 * sa + 0.7 * sb, rtol=2e-3, atol=1e-4)


def test_a_parent_alone_is_left_as_it_is() -> None:
    for norm in (False, True):
        a, b, x = conv_net(6, norm), conv_net(7, norm), images()
        found = weft.calibrate(a, [x], "repair", parents=[a, b], weights=[1, 0])
        torch.testing.assert_close(found.module(x), a(x), rtol=1e-9, atol=1e-10)


def test_without_a_bias_the_map_stays_beside_the_weights_and_is_saved(tmp_path: Path) -> None:
    a, b, x = conv_net(8, norm=False, bias=False), conv_net(9, norm=False, bias=False), images()
    found = weft.calibrate(weft.merge([a, b]), [x], "repair", parents=[a, b], module=a)
    assert found.added == 2 * (4 + 5) and "kept as maps" in found.notes[0]
    assert isinstance(found.module, room.Adapted)
    with found.module.at(None):
        (ma, sa), (mb, sb), (m, s) = (moments(at(net, "2", x)) for net in (a, b, found.module.inner))
    torch.testing.assert_close((m, s), ((ma + mb) / 2, (sa + sb) / 2), rtol=1e-4, atol=1e-5)
    weft.save(found.checkpoint, tmp_path / "out")
    again = room.load_adapted(tmp_path / "out", a)
    torch.testing.assert_close(again(x), found.module(x), rtol=1e-6, atol=1e-7)
    assert again.added == found.added
    weft.materialize(str(tmp_path / "out"), copy.deepcopy(a))  # and the weights are an ordinary checkpoint


class Odd(nn.Module):
    """A grouped transposed convolution, transformers' Conv1D in shape, and a layer that runs twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(seed)
        self.up = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.mix = Conv1D(5, 6)
        self.twice = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)
        nn.init.normal_(self.mix.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.up(x).transpose(1, 2).relu().contiguous())
        out: Tensor = self.head(self.twice(torch.tanh(self.twice(h))).mean(1))
        return out


def test_odd_layers_fold_exactly() -> None:
    pytest.importorskip("transformers")
    a, b = Odd(0).double(), Odd(1).double()
    x = torch.randn(40, 4, 7, generator=drawn(2), dtype=torch.float64)
    found = weft.calibrate(weft.merge([a, b]), [x], "repair", parents=[a, b], module=a)
    assert found.added == 0
    net = weft.materialize(found.checkpoint, copy.deepcopy(a))
    (ma, sa), (mb, sb), (m, s) = (moments(at(n, "up", x)) for n in (a, b, net))
    torch.testing.assert_close((m, s), ((ma + mb) / 2, (sa + sb) / 2))
    flat = [at(n, "mix", x).flatten(0, 1) for n in (a, b, net)]
    torch.testing.assert_close(flat[2].std(0), (flat[0].std(0) + flat[1].std(0)) / 2)


def test_units_that_never_move_get_the_mean_alone() -> None:
    a, x = conv_net(10, norm=False), images()
    dead = copy.deepcopy(a)
    with torch.no_grad():
        dead[0].weight[1] = 0  # type: ignore[index, operator]
    found = weft.calibrate(dead, [x], "repair", parents=[a], only="0")
    assert "given their parents' mean alone: 0 (1)" in found.notes[0]
    assert all(bool(v.isfinite().all()) for v in found.checkpoint.state_dict().values())
    torch.testing.assert_close(at(found.module, "0", x)[:, 1].mean(), at(a, "0", x)[:, 1].mean())


# -- head, temperature --------------------------------------------------------------------------------


def labelled(n: int = 200, seed: int = 3) -> tuple[Tensor, Tensor]:
    x = images(n, seed)
    return x, (x.mean((1, 2, 3)) > 0).long() + (x[:, 0].mean((1, 2)) > 0.1).long()


def test_ridge_is_the_closed_form() -> None:
    net, (x, y) = conv_net(11), labelled()
    found = weft.calibrate(net, [(x[:120], y[:120]), (x[120:], y[120:])], "head", ridge=0.01)
    h = at(net, "10", x, "input")
    hc, t = h - h.mean(0), nn.functional.one_hot(y, 3).double()
    cov = hc.T @ hc / len(h)
    w = torch.linalg.solve(
        cov + 0.01 * cov.trace() / 8 * torch.eye(8).double(), hc.T @ (t - t.mean(0)) / len(h)
    ).T
    torch.testing.assert_close(found.checkpoint.tensor("10.weight"), w)
    torch.testing.assert_close(found.module(x).mean(0), t.mean(0))
    assert found.told["loss_after"] < found.told["loss_before"] and set(found.moved) == {
        "10.weight",
        "10.bias",
    }


def test_logistic_finds_the_stationary_point_and_balanced_counts_classes_alike() -> None:
    net, (x, y) = conv_net(12), labelled()
    found = weft.calibrate(net, [(x, y)], "head", fit="logistic", ridge=0.1)
    head = copy.deepcopy(found.module[10])  # type: ignore[index]
    head.requires_grad_(True)
    h = at(net, "10", x, "input")
    start = net.state_dict()["10.weight"]
    loss = nn.functional.cross_entropy(head(h), y) + 0.05 * (head.weight - start).square().sum()
    loss.backward()
    assert float(head.weight.grad.norm()) < 1e-5 and float(head.bias.grad.norm()) < 1e-5
    even = weft.calibrate(net, [(x, y)], "head", balanced=True, ridge=0.0).module(x)
    per_class = torch.stack([even[y == c].mean(0) for c in range(3)]).mean(0)
    torch.testing.assert_close(per_class, torch.full((3,), 1 / 3).double())


def test_a_teacher_takes_the_place_of_labels() -> None:
    net, x = conv_net(13), images(300)
    expert = copy.deepcopy(net)
    with torch.no_grad():
        expert[10].weight.copy_(torch.randn(3, 8, generator=drawn(4)))  # type: ignore[operator, union-attr]
    found = weft.calibrate(net, [x], "head", teacher=expert, ridge=0.0)
    torch.testing.assert_close(found.module(x), expert(x), rtol=1e-5, atol=1e-5)


def test_temperature_undoes_a_scale_and_keeps_predictions() -> None:
    net, (x, y) = conv_net(14), labelled()
    fitted = weft.calibrate(net, [(x, y)], "head", fit="logistic", ridge=1e-3).module
    sharp = copy.deepcopy(fitted)
    with torch.no_grad():
        for p in sharp[10].parameters():  # type: ignore[union-attr]
            p *= 7
    found = weft.calibrate(sharp, [(x, y)], "temperature")
    plain = weft.calibrate(fitted, [(x, y)], "temperature")
    assert found.told["temperature"] == pytest.approx(7 * plain.told["temperature"], rel=1e-6)
    assert found.added == 0 and torch.equal(found.module(x).argmax(1), sharp(x).argmax(1))
    assert found.told["nll_after"] < found.told["nll_before"]
    assert found.told["ece_after"] < found.told["ece_before"]
    grid = torch.linspace(0.2, 20, 4000, dtype=torch.float64)
    z = sharp(x)
    best = min(grid, key=lambda t: float(nn.functional.cross_entropy(z / t, y)))
    assert best_temperature(z, y) == pytest.approx(float(best), abs=0.01)


def test_calibration_error_by_hand() -> None:
    p = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.25, 0.75]])
    y = torch.tensor([0, 1, 0, 1])
    # bins of 1/10: at 0.95 two examples, one right; at 0.65 one, right; at 0.75 one, right
    assert room.calibration_error(p, y, 10) == pytest.approx((2 * 0.45 + 0.35 + 0.25) / 4, abs=1e-6)
    with pytest.raises(UsageError, match=r"\[n, classes\]"):
        room.calibration_error(p[:, 0], y)


# -- surgery, magnitude -------------------------------------------------------------------------------


def pair() -> tuple[nn.Module, dict[str, nn.Module], dict[str, list[Tensor]]]:
    base = conv_net(15, norm=False).requires_grad_(False)
    experts = {}
    for i, task in enumerate("ab"):
        e = copy.deepcopy(base)
        with torch.no_grad():
            for p in e.parameters():
                p += 0.2 * torch.randn(p.shape, generator=drawn(20 + i), dtype=torch.float64)
        experts[task] = e
    return base, experts, {t: list(images(64, 30 + i).split(16)) for i, t in enumerate("ab")}


def test_surgery_changes_nothing_before_the_first_step_and_counts_what_it_adds(tmp_path: Path) -> None:
    base, experts, data = pair()
    merged = weft.merge(list(experts.values()), "task_arithmetic", base=base, scale=0.4)
    plain = weft.materialize(merged, copy.deepcopy(base))
    start = weft.calibrate(merged, data, "surgery", experts=experts, module=base, steps=0, rank=2)
    torch.testing.assert_close(start.module(data["a"][0], task="a"), plain(data["a"][0]))
    assert start.added == 2 * (2 * 8 + 8 * 2)
    deep = weft.calibrate(
        merged, data, "surgery", experts=experts, module=base, at=["0", "2", "<8"], rank=4, steps=100, lr=1e-2,
        private=["8.*"],
    )  # fmt: skip
    for first, last in deep.told["losses"].values():
        assert last < 0.95 * first
    assert deep.added == 2 * (2 * 4 * (4 + 5 + 8) + 27)
    x = data["a"][1]
    with pytest.raises(UsageError, match="which task"):
        deep.module(x)
    with pytest.raises(UsageError, match="no task 'c'"):
        deep.module(x, task="c")
    weft.save(deep.checkpoint, tmp_path / "out")
    again = room.load_adapted(tmp_path / "out", base)
    torch.testing.assert_close(again(x, task="b"), deep.module(x, task="b"), rtol=1e-6, atol=1e-7)
    assert deep.told["test_time"] and not torch.equal(again(x, task="a"), again(x, task="b"))


def test_magnitude_restores_what_an_average_shrinks() -> None:
    base, experts, data = pair()
    merged = weft.merge(list(experts.values()), "linear")
    found = weft.calibrate(merged, None, "magnitude", experts=experts, base=base, module=base)
    for name, xi in found.told["coefficients"]["weights"].items():
        start = base.get_parameter(f"{name}.weight")
        sizes = [float((e.get_parameter(f"{name}.weight") - start).norm()) for e in experts.values()]
        now = float((found.checkpoint.tensor(f"{name}.weight") - start).norm())
        assert now == pytest.approx(sum(sizes) / 2, rel=1e-9) and 1 < xi < 3
    felt = weft.calibrate(
        merged, data, "magnitude", experts=experts, base=base, module=base, space="features"
    )
    assert all(xi >= 0.5 for xi in felt.told["coefficients"]["features"].values())
    held = weft.calibrate(
        merged,
        data,
        "magnitude",
        experts=experts,
        base=base,
        module=base,
        space="both",
        sensitive=["0", "8"],
    ).told["coefficients"]
    assert held["weights"]["0"] == 1.0 and max(held["features"]["8"], held["weights"]["8"]) <= 1.0


# -- what cannot be meant -----------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    net, plain, x = conv_net(16), conv_net(17, norm=False), images(8)
    y = torch.zeros(8).long()
    cases: list[tuple[str, type[WeftError], object]] = [
        ("no calibration 'repiar'; did you mean 'repair'", UsageError, lambda: weft.calibrate(net, [x], "repiar")),
        ("has no BatchNorm", UsageError, lambda: weft.calibrate(plain, [x], "batchnorm")),
        ("sequential or joint", UsageError, lambda: weft.calibrate(net, [x], "batchnorm", schedule="other")),
        ("hold no examples", DataError, lambda: weft.calibrate(net, [], "batchnorm")),
        ("iterable of batches", UsageError, lambda: weft.calibrate(net, 3, "batchnorm")),
        ("NaN or infinite", DataError, lambda: weft.calibrate(net, [x * torch.nan], "batchnorm")),
        ("NaN or infinite", DataError, lambda: weft.calibrate(net, [x * torch.nan], "batchnorm", schedule="joint")),
        ("must be a list", UsageError, lambda: weft.calibrate(net, [x], "repair", parents=net)),
        ("sum to 1", UsageError, lambda: weft.calibrate(net, [x], "repair", parents=[net, net], weights=[1, 1])),
        ("called so", Problems, lambda: weft.calibrate(net, [x], "repair", parents=[net], only="12")),
        ("another network", DataError, lambda: weft.calibrate(net, [x], "repair", parents=[plain])),
        ("give the network", UsageError, lambda: weft.calibrate(net.state_dict(), [x], "batchnorm")),
        ("no labels", UsageError, lambda: weft.calibrate(net, [x], "head")),
        ("linear layer '3'", UsageError, lambda: weft.calibrate(net, [(x, y)], "head", head="3")),
        ("no temperature is best", DataError,
         lambda: weft.calibrate(weft.calibrate(net, [(x, y)], "head").module, [(x, y)], "temperature")),
        ("mappings by task", UsageError, lambda: weft.calibrate(net, [x], "surgery", experts={"a": net})),
        ("give both for every task", UsageError,
         lambda: weft.calibrate(net, {"b": [x]}, "surgery", experts={"a": net})),
        ("no such layers", Problems,
         lambda: weft.calibrate(net, {"a": [x]}, "surgery", experts={"a": net}, at="99")),
        ("same tasks", UsageError,
         lambda: weft.calibrate(net, None, "magnitude", experts=[net], base=net, space="features")),
        ("enclose 1", UsageError,
         lambda: weft.calibrate(net, None, "magnitude", experts=[net], base=net, limits=(2.0, 3.0))),
    ]  # fmt: skip
    for text, kind, call in cases:
        with pytest.raises(kind, match=text.replace("[", r"\[")):
            call()  # type: ignore[operator]


def test_a_tied_head_is_not_changed_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids))
            return out

    net = Tied()
    ids = torch.randint(7, (50,), generator=drawn(5))
    with pytest.raises(UsageError, match="shares its weight"):
        weft.calibrate(net, [(ids, ids.roll(1))], "head")
    noisy = torch.randint(7, (50,), generator=drawn(6))
    with torch.no_grad():
        net.embed.weight.mul_(3)
    found = weft.calibrate(net, [(ids, torch.where(noisy > 3, ids, noisy))], "temperature")
    assert found.added == 14 and torch.equal(found.module.inner.head.weight, found.module.inner.embed.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(found.module(ids) * found.told["temperature"], net(ids), rtol=1e-5, atol=1e-5)


def test_padding_does_not_count() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 5, 3, generator=drawn(7), dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 2, 4, 1, 5])[:, None]
    batch = as_batch({"input": x, "attention_mask": mask})

    def forward(m: nn.Module, raw: dict[str, Tensor]) -> Tensor:
        out: Tensor = m(raw["input"])
        return out

    found = measured(net, [batch], [s for s in sites(net, batch, forward) if s.name == "0"], forward)["0"]
    torch.testing.assert_close(found.mean, net[0](x)[mask].mean(0))
    assert found.n == int(mask.sum())
