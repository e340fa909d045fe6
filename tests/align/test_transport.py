"""Activations watched side by side, plans, and units mixed lazily: against definitions, and on permuted copies."""

from __future__ import annotations

import sys
import warnings
from copy import deepcopy
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.align.activations import Joint, activations
from weft.align.cca import cca_merge
from weft.align.correlate import activation_matching, neuron_alignment
from weft.align.maps import Mix, Transported, mixed
from weft.align.networks import Net, opened
from weft.align.pieces import apart, together
from weft.align.plans import assigned, entropic, exact
from weft.align.spec import PermutationSpec
from weft.align.terms import parsed
from weft.align.transport import ot_fusion
from weft.errors import DataError, DataProblems, MissingExtra, Problems, UsageError

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return noisy(nn.Sequential(*layers[:-1]), seed)


def noisy(net: nn.Module, seed: int) -> nn.Module:
    """Every value drawn, norms and their statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn.abs() + 0.5 if tensor.dim() == 1 else drawn * 2 / tensor[0].numel() ** 0.5)
    return net.eval()


def convolutional(seed: int = 0) -> nn.Module:
    """Groups within a grouped convolution, BatchNorm, and units with a run of positions each."""
    return noisy(nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 3),
    ), seed)  # fmt: skip


class Attention(nn.Module):
    """A block of a transformer: two heads, a residual stream, norms, a classifier."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(3, width)
        self.norm1, self.norm2, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        z = self.norm1(h)
        q, k, v = (m(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mix = ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1) @ v
        h = h + self.o(mix.transpose(1, 2).flatten(2))
        h = h + self.down(torch.relu(self.up(self.norm2(h))))
        return self.head(self.last(h).mean(1))


def images(n: int = 64) -> list[tuple[Tensor]]:
    return [(rand(n // 2, 1, 8, 8, seed=s).float(),) for s in (1, 2)]


def tokens(n: int = 64) -> list[tuple[Tensor]]:
    return [(rand(n // 2, 5, 3, seed=s).float(),) for s in (1, 2)]


def vectors(d: int = 6, n: int = 64) -> list[tuple[Tensor]]:
    return [(rand(n // 2, d, seed=s).float(),) for s in (1, 2)]


class Tied(nn.Module):
    """A table of tokens that also classifies: along its width one tensor is written and read."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 12), nn.Linear(12, 9, bias=False)
        self.up, self.down, self.norm = nn.Linear(12, 20), nn.Linear(20, 12), nn.LayerNorm(12)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(self.norm(h + self.down(torch.relu(self.up(h)))))


def encoder() -> nn.Module:
    """Attention in one module, which hooks do not see into."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0)
    return noisy(nn.Sequential(nn.Linear(3, 16), layer, nn.Linear(16, 3)), 0)


def words() -> list[tuple[Tensor]]:
    return [(torch.randint(0, 9, (16, 5), generator=torch.Generator().manual_seed(s)),) for s in (1, 2)]


NETWORKS = {
    "mlp": (lambda: mlp(6, 8, 7, 3), vectors),
    "grouped convolution": (convolutional, images),
    "attention": (lambda: noisy(Attention(), 0), tokens),
    "encoder": (encoder, tokens),
    "tied": (lambda: noisy(Tied(), 0), words),
}


def distance(a: object, b: nn.Module, data: list[tuple[Tensor]]) -> float:
    with torch.no_grad():
        x = data[0][0]
        return float((weft.materialize(a, deepcopy(b))(x) - b(x)).abs().max() / b(x).abs().max())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "how", ["moment", "correlation", "cca", "weights", "activations", "normalised", "soft"],
)  # fmt: skip
def test_a_permuted_copy_is_brought_back(name: str, how: str) -> None:
    make, inputs = NETWORKS[name]
    a, data = make(), inputs()
    net = opened([a], data)[0]
    b = weft.materialize(net.spec.apply(a, net.spec.random(3)), deepcopy(a))
    assert (
        max(float((x - y).abs().max()) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
        > 0.1
    )
    found = {
        "moment": lambda: activation_matching(b, a, data),
        "correlation": lambda: neuron_alignment(b, a, data),
        "cca": lambda: cca_merge(b, a, data, gamma=1e-2),
        "weights": lambda: ot_fusion(b, a, data, by="weights"),
        "activations": lambda: ot_fusion(b, a, data, by="activations"),
        "normalised": lambda: ot_fusion(b, a, data, by="activations", normalise=True),
        "soft": lambda: ot_fusion(b, a, data, by="activations", normalise=True, reg=1e-3),
    }[how]()
    assert distance(found.checkpoint, a, data) < 1e-3
    if how not in ("cca", "soft"):
        worst = max(float((found.checkpoint.tensor(n) - t).abs().max()) for n, t in a.state_dict().items())
        assert worst < 1e-6
        assert distance(found.merged(0.3), a, data) < 1e-5


def test_wider_networks_that_compute_the_same_are_brought_back() -> None:
    """Every unit twice, each copy read by half: sums must stay sums."""
    a = mlp(6, 5, 4, 3)
    b = mlp(6, 10, 8, 3)
    with torch.no_grad():
        for i in (0, 2, 4):
            w = a[i].weight
            w = w if i == 0 else w.repeat(1, 2) / 2
            b[i].weight.copy_(w if i == 4 else w.repeat(2, 1))
            b[i].bias.copy_(a[i].bias if i == 4 else a[i].bias.repeat(2))
    assert distance(ot_fusion(b, a, vectors()).checkpoint, a, vectors()) < 1e-6
    assert distance(ot_fusion(b, a, vectors(), by="activations").checkpoint, a, vectors()) < 1e-6
    back = ot_fusion(a, b, vectors()).checkpoint  # and narrow to wide: each unit is spread over its copies
    assert distance(back, b, vectors()) < 1e-6


def test_joint_statistics_do_not_depend_on_batches_and_are_the_definition() -> None:
    x = rand(50, 6) + 1e3
    one, many = Joint(), Joint()
    one.add(x)
    for part in x.split(7):
        many.add(part)
    assert torch.allclose(one.scatter, many.scatter, rtol=1e-9)
    assert torch.allclose(many.covariance, torch.cov(x.T), rtol=1e-9)
    assert torch.allclose(many.moment, x.T @ x / 50, rtol=1e-12)
    assert torch.allclose(many.correlation, torch.corrcoef(x.T), rtol=1e-7)


def test_dead_and_constant_units_correlate_with_nothing() -> None:
    x = rand(40, 3)
    x[:, 1] = 0
    x[:, 2] = 1e6 + 1e-9 * x[:, 2]
    found = Joint()
    found.add(x)
    assert torch.allclose(found.correlation, torch.diag(torch.tensor([1.0, 0, 0], dtype=F64)), atol=1e-14)
    assert float(found.correlation[1:].abs().max()) == 0


def test_padding_is_left_out() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(self.table(ids))))

    net = noisy(Embedded(), 0)
    ids = torch.randint(0, 9, (8, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 5, dtype=torch.long)
    mask[:, 3:] = 0
    found = activations(
        opened([net], [{"ids": ids, "attention_mask": mask}]), [{"ids": ids, "attention_mask": mask}]
    )
    assert {j.count for j in found.joint.values()} == {24}
    hidden = torch.relu(net.up(net.table(ids[:, :3]))).flatten(0, 1).double()
    cross = found.cross("up", 0, 0, "moment")
    assert cross is not None and torch.allclose(cross, hidden.T @ hidden / 24, rtol=1e-6)


# -- maps ----------------------------------------------------------------------------------------


def test_pieces_go_together_again() -> None:
    row = tuple(parsed(t) for t in ("h*(q|q|v)", "c*3|2"))
    sizes = {"h": 2, "q": 3, "v": 4, "c": 5}
    x = rand(20, 17)
    found = list(apart(x, row, sizes))
    assert len(found) == 6 and {p.labels for p in found} >= {("h", "q", "c", 3), ("h", "v", 2)}
    assert torch.equal(together((p.values for p in found), row), x)


def test_mixing_is_the_product_of_the_maps() -> None:
    spec = PermutationSpec.of({"a": 4, "b": 3}, {"w": ("a*2", "b"), "u": (5, "a*2")})
    t = {"a": Mix(rand(6, 4), rand(6, 4, seed=1)), "b": Mix(rand(2, 3), rand(2, 3, seed=1))}
    eye = torch.eye(2, dtype=F64)
    w, u = rand(8, 3), rand(5, 8)
    made = mixed(w, spec.axes["w"], spec, t, frozenset({1}))
    assert torch.allclose(made, torch.kron(t["a"].into, eye) @ w @ t["b"].out.T)
    assert torch.allclose(
        mixed(u, spec.axes["u"], spec, t, frozenset({1})), u @ torch.kron(t["a"].out, eye).T
    )
    p = {"a": torch.tensor([2, 0, 3, 1]), "b": torch.tensor([1, 2, 0])}
    same = mixed(w, spec.axes["w"], spec, {g: Mix.of(v) for g, v in p.items()}, frozenset({1}))
    assert torch.equal(same, spec.apply({"w": w, "u": u}, p).tensor("w"))


def test_a_transported_checkpoint_reads_in_ranges_saves_and_resumes_alike(tmp_path: Path) -> None:
    spec = PermutationSpec.of({"c": 400}, {"w": (400, "c"), "v": ("c", 400), "n": ("c",)})
    state = {"w": rand(400, 400).float(), "v": rand(400, 400, seed=1).float(), "n": rand(400).bfloat16()}
    weft.save(state, tmp_path / "in")
    mix = Mix.of_plan(torch.rand(300, 400, dtype=F64, generator=torch.Generator().manual_seed(0)))
    node = Transported(weft.load(tmp_path / "in"), spec, {"c": mix}, frozenset({("w", 1)}))
    assert node.grain("w") == 300 and node.grain("v") == 300 * 400
    whole = node.tensor("w")
    assert whole.shape == (400, 300)
    assert torch.equal(node.read("w", 900, 2100), whole.reshape(-1)[900:2100])
    assert torch.allclose(whole, state["w"].double() @ mix.out.T)
    weft.save(node, tmp_path / "out")
    out = weft.load(tmp_path / "out").state_dict()
    assert out["n"].dtype == torch.bfloat16 and torch.equal(out["v"], node.tensor("v").float())
    other = Transported(
        weft.load(tmp_path / "in"), spec, {"c": Mix(mix.out, mix.into)}, frozenset({("w", 1)})
    )
    assert node.identity() is not None and node.identity() != other.identity()


# -- plans ---------------------------------------------------------------------------------------


def test_exact_plans_are_permutations_or_have_their_marginals_and_the_least_cost() -> None:
    cost = rand(5, 5).abs()
    square = exact(cost)
    assert torch.equal(square.sum(0), torch.full((5,), 0.2, dtype=F64)) and (square > 0).sum() == 5
    for made, given in ((None, None), (torch.tensor([0.5, 0.3, 0.2]), torch.full((5,), 0.2))):
        plan = exact(cost[:3], made, given)
        wanted = torch.full((3,), 1 / 3, dtype=F64) if made is None else made.double()
        assert torch.allclose(plan.sum(1), wanted) and torch.allclose(
            plan.sum(0), torch.full((5,), 0.2, dtype=F64)
        )
        soft = entropic(cost[:3], 1e-3, made, given, steps=20000)
        assert float((plan * cost[:3]).sum()) <= float((soft * cost[:3]).sum()) + 1e-6
        assert float(((plan - soft) * cost[:3]).sum().abs()) < 1e-3


def test_entropic_plans_have_their_marginals_and_grow_softer() -> None:
    cost = rand(6, 4).abs()
    peaks = []
    for reg in (0.005, 0.05, 0.5):
        plan = entropic(cost, reg, steps=5000)
        assert (
            float((plan.sum(0) - 1 / 4).abs().max()) < 1e-6
            and float((plan.sum(1) - 1 / 6).abs().max()) < 1e-6
        )
        peaks.append(float(plan.max()))
    assert peaks == sorted(peaks, reverse=True)
    assert entropic(torch.zeros(3, 3), 0.1).allclose(torch.full((3, 3), 1 / 9, dtype=F64))
    with pytest.raises(UsageError, match="reg must be above 0"):
        entropic(cost, 0.0)
    with pytest.raises(UsageError, match="as much must be given"):
        exact(cost[:3], torch.ones(3), torch.ones(4))


def test_assignments_of_stacks_and_of_nonsense() -> None:
    score = rand(3, 4, 4)
    found = assigned(score)
    for s, p in zip(score, found):
        best = max(float(s[torch.arange(4), torch.tensor(q)].sum()) for q in permutations(range(4)))
        assert float(s[torch.arange(4), p].sum()) == pytest.approx(best)
    score[0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        assigned(score)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy", "scipy.optimize", "scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, None)
    for cost in (rand(3, 3), rand(3, 4)):
        with pytest.raises(MissingExtra, match=r"install weft\[align\]"):
            exact(cost)


# -- bad input -----------------------------------------------------------------------------------


def test_unequal_widths_are_refused_by_methods_that_permute() -> None:
    a, b = mlp(6, 8, 3), mlp(6, 9, 3)
    for method in (activation_matching, neuron_alignment, cca_merge):
        with pytest.raises(Problems, match=r"(?s)equal widths.*optimal transport.*layer.0: 8 units .*9 in"):
            method(b, a, vectors())


def test_no_data_few_data_and_broken_data_are_told() -> None:
    a, b = mlp(6, 8, 3), mlp(6, 8, 3, seed=1)
    with pytest.raises(UsageError, match="needs data"):
        ot_fusion(b, a, by="activations")
    with pytest.raises(UsageError, match="needs data"):
        activation_matching(b, a, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one"):
        activation_matching(b, a, [])
    with pytest.raises(UsageError, match="gone through more than once"):
        activation_matching(b, a, iter(vectors()))
    with pytest.raises(DataError, match=r"3 samples say nothing: give data with at least 16"):
        activation_matching(b, a, [(torch.zeros(3, 6),)])
    with pytest.raises(DataError, match=r"model 1 .*what 2 takes is NaN or infinite"):
        broken = deepcopy(b)
        with torch.no_grad():
            broken[0].bias[2] = torch.inf
        activation_matching(broken, a, vectors())
    with pytest.raises(DataError, match="cannot be run"):
        activation_matching(b, a, vectors(7))
    with pytest.raises(UsageError, match="weights alone: give module="):
        activation_matching(b.state_dict(), a, vectors())
    with pytest.raises(UsageError, match="gamma must be"):
        cca_merge(b, a, vectors(), gamma=-1)
    with pytest.raises(UsageError, match="by must be"):
        ot_fusion(b, a, vectors(), by="magic")  # type: ignore[arg-type]


def test_networks_with_other_groups_are_told_apart() -> None:
    with pytest.raises(Problems, match=r"(?s)same groups.*layer.2: in .*, not in"):
        ot_fusion(mlp(6, 8, 7, 3), mlp(6, 8, 3), vectors())


def test_weights_alone_take_their_module() -> None:
    a, b = mlp(6, 8, 3), mlp(6, 8, 3, seed=1)
    one = activation_matching(b.state_dict(), a.state_dict(), vectors(), module=a)
    assert torch.equal(
        one.permutations["layer.0"], activation_matching(b, a, vectors()).permutations["layer.0"]
    )
    wide = mlp(6, 12, 3)
    pair = ot_fusion(wide.state_dict(), a.state_dict(), vectors(), module=(a, wide))
    assert pair.checkpoint.info("0.weight").shape == (8, 6)


def test_what_holds_others_is_not_mixed_and_maps_must_fit() -> None:
    net: Net = opened([convolutional()], images())[0]
    outer = next(g for g in net.spec.movable if net.spec.inner(g))
    soft = torch.full((2, 2), 0.5, dtype=F64)
    with pytest.raises(DataProblems, match="permuted, not mixed"):
        Transported(net.checkpoint, net.spec, {outer: Mix(soft, soft)}, net.reads)
    with pytest.raises(DataProblems, match="maps of shape"):
        Transported(net.checkpoint, net.spec, {"layer.6": Mix(soft, soft)}, net.reads)


def test_the_verb_takes_all_of_them() -> None:
    a, data = mlp(6, 8, 7, 3), vectors()
    b = weft.materialize(opened([a])[0].spec.apply(a, opened([a])[0].spec.random(3)), deepcopy(a))
    for how in ("activations", "correlation", "mudsc", "cca", "ot", "transformers"):
        options = {"gamma": 1e-2} if how == "cca" else {"reg": 1e-3} if how == "transformers" else {}
        assert distance(weft.align(b, to=a, how=how, data=data, **options), a, data) < 1e-3
    wide = mlp(6, 12, 9, 3)
    moved = weft.align(wide.state_dict(), to=a.state_dict(), how="ot", module=(a, wide))
    assert moved.info("2.weight").shape == (7, 8)
    with pytest.raises(UsageError, match="give data="):
        weft.align(b, to=a, how="activations")
    with pytest.raises(UsageError, match="give module="):
        weft.align(b.state_dict(), to=a.state_dict(), how="correlation", data=data)


def test_along_tied_tensors_units_are_permuted_and_soft_maps_refused() -> None:
    a, b = noisy(Tied(), 0), noisy(Tied(), 1)
    found = ot_fusion(b, a, words(), by="activations", reg=0.05)
    assert found.target.both == {"table"}
    assert found.transport["table"].hard and not found.transport["up"].hard
    assert "head.weight" in found.checkpoint.aliases or "table.weight" in found.checkpoint.aliases
    net = found.source
    soft = torch.full((12, 12), 1 / 12, dtype=F64)
    with pytest.raises(DataProblems, match="which only a permutation satisfies"):
        Transported(net.checkpoint, net.spec, {"table": Mix(soft, soft)}, net.reads)


def test_no_warning_is_given() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ot_fusion(mlp(6, 8, 3), mlp(6, 5, 3), vectors(), by="activations", reg=0.05)
