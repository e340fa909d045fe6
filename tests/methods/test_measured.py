"""Statistics reach the steps that ask for them: the right ones, of the right models, streamed, or an error."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.errors import DataError, DataProblems, UsageError
from weft.methods.aim import relaxed
from weft.methods.fingerprint import Fingerprint
from weft.methods.measured import maps, unmatrices
from weft.methods.registry import METHODS, Method, pipeline_method
from weft.methods.step import STEPS, At, step
from weft.statistics import measure

ABOUT = "weft_statistics"


@pytest.fixture
def probe():
    """A step that solves Σ G (W − Wᵢ) = 0 and notes what it gets; forgotten afterwards."""
    seen: dict[str, tuple[Tensor, At]] = {}

    def probe_gram(x: Tensor, *, gram: Tensor | None, at: At) -> Tensor:
        if gram is None or gram.dim() < 3:
            return x.mean(0)
        seen[at.name] = (gram, at)
        g = gram.double().reshape(len(x), -1, *gram.shape[-2:])
        above = (maps(x, gram, at.transposed) @ g).sum(0)
        return unmatrices(torch.linalg.solve(g.sum(0), above, left=False), at.shape, at.transposed)

    probe_gram.__annotations__ = {
        "x": Tensor,
        "gram": Tensor | None,
        "at": At,
        "return": Tensor,
    }
    made = step(grain="tensor", needs=("gram",), reduces=True)(probe_gram)
    method = pipeline_method(made(), "probe")
    method.space, method.base = "weights", "forbidden"
    yield method, seen
    del STEPS["probe_gram"]


class Odd(nn.Module):
    """A linear map, a grouped convolution, one stored [in, out], stacks of experts of both kinds, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.turned = nn.Parameter(torch.randn(6, 5))
        self.experts = nn.Parameter(torch.randn(2, 4, 5))
        self.backs = nn.Parameter(torch.randn(2, 4, 3))
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x):
        h = (self.conv(x).transpose(1, 2) @ self.turned).tanh()
        each = torch.stack([nn.functional.linear(h, w) for w in self.experts]).flatten(1, 2)
        return self.head(self.norm(torch.bmm(each, self.backs)).tanh())


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    nets = [Odd().double() for _ in range(3)]
    return nets, [measure(n, [torch.randn(30, 4, 9).double()], "gram", dtype=torch.float64) for n in nets]


def solved(ws: list[Tensor], gs: list[Tensor]) -> Tensor:
    """[out, in] by the normal equations."""
    total = sum(w @ g for w, g in zip(ws, gs, strict=True))
    return torch.linalg.solve(sum(gs), total, left=False)


def test_every_layout_reaches_the_step(probe, odd):
    method, seen = probe
    nets, stats = odd
    merged = weft.merge(nets, method, statistics=stats)
    got = {n: t.detach() for n, t in merged.state_dict().items()}
    g = {n: [s.tensor(f"gram/{n}") for s in stats] for n in ("conv.weight", "turned", "experts", "backs")}
    for name, value in g.items():
        assert torch.equal(seen[name][0], torch.stack(value)) and seen[name][0].dtype == torch.float64
    assert {n for n, (_, at) in seen.items() if at.transposed} == {"turned", "backs"}
    w = [{n: t.detach() for n, t in net.state_dict().items()} for net in nets]
    torch.testing.assert_close(got["turned"].T, solved([s["turned"].T for s in w], g["turned"]))
    for e in range(2):
        torch.testing.assert_close(
            got["experts"][e], solved([s["experts"][e] for s in w], [v[e] for v in g["experts"]])
        )
        torch.testing.assert_close(
            got["backs"][e].T, solved([s["backs"][e].T for s in w], [v[e] for v in g["backs"]])
        )
        rows = slice(3 * e, 3 * e + 3)
        torch.testing.assert_close(
            got["conv.weight"][rows].flatten(1),
            solved([s["conv.weight"][rows].flatten(1) for s in w], [v[e] for v in g["conv.weight"]]),
        )
    for name in ("conv.bias", "norm.weight", "norm.bias", "head.bias"):
        torch.testing.assert_close(got[name], torch.stack([s[name] for s in w]).mean(0))
    assert merged.notes == ("probe: no gram measured of conv.bias, norm.bias, head.bias",)


def test_direct_calls_take_them_by_keyword(probe):
    method, _ = probe
    x, g = torch.randn(2, 3, 4).double(), torch.eye(4).double().expand(2, 4, 4)
    torch.testing.assert_close(method(x, statistics={"gram": g}), x.mean(0))
    torch.testing.assert_close(method(x, statistics={"gram": None}), x.mean(0))
    with pytest.raises(UsageError, match=r"probe_gram needs statistics: pass statistics=\{'gram'"):
        method(x)


def family(k: int = 2, sizes: tuple[int, ...] = (40, 300, 10)) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(1)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    base = nn.Sequential(*layers)
    tuned = []
    for _ in range(k):
        net = nn.Sequential(*[nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else nn.Tanh()
                              for m in layers])  # fmt: skip
        net.load_state_dict({n: t + 0.1 * torch.randn_like(t) for n, t in base.state_dict().items()})
        tuned.append(net)
    return base, tuned


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A base, two models and their statistics, as files."""
    folder = tmp_path_factory.mktemp("measured")
    base, tuned = family()
    for name, net in (("base", base), ("a", tuned[0]), ("b", tuned[1])):
        weft.save(net, folder / name)
        what = ("fisher", "gram", "kfac", "node", "abs_mean")
        weft.save(measure(net, [torch.randn(12, 40)], what), folder / f"{name}-stats")
    return folder


def merged(folder: Path, method: str | Method, swap: bool = False, **more) -> Checkpoint:
    names = ["b", "a"] if swap else ["a", "b"]
    made = METHODS[method] if isinstance(method, str) else method
    base = folder / "base" if made.base == "required" else None
    if any(not n.of_base for n in made.needs):
        more.setdefault("statistics", [folder / f"{n}-stats" for n in names])
    if any(n.of_base and not n.optional for n in made.needs):
        more.setdefault("base_statistics", folder / "base-stats")
    return weft.merge([folder / n for n in names], made, base=more.pop("base", base), **more)


METHODS_OF_DATA = [n for n in METHODS if METHODS[n].needs]


@pytest.mark.parametrize("method", METHODS_OF_DATA)
def test_saved_in_pieces_equals_the_direct_call(method, known, tmp_path):
    """By the engine, in small ranges and any order, the bytes are those of the method on whole tensors."""
    node = merged(known, method)
    small = weft.save(node, tmp_path / "small", memory="64MiB", threads=2)
    weft.save(merged(known, method), tmp_path / "large", threads=1)
    files = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("small", "large")]
    assert files[0] == files[1] and small.path
    made, got = METHODS[method], weft.load(tmp_path / "small")
    stats = [weft.load(known / f"{n}-stats") for n in "ab"]
    of_base = weft.load(known / "base-stats")
    models = [weft.load(known / n) for n in "ab"]
    names = list(got)
    for name in names:
        x = torch.stack([m.tensor(name).double() for m in models])
        base = weft.load(known / "base").tensor(name).double() if made.base == "required" else None
        values: dict[str, Tensor | None] = {}
        for need in made.needs:
            if need.samples:
                values[need.source] = torch.tensor([12.0, 12.0]).double()
                continue
            key = f"{need.kind}/{name}"
            if need.of_base:
                given = need.tensorwise and key in of_base and not need.optional
                values[need.source] = of_base.tensor(key).double() if given else None
            elif not need.norm:
                held = all(key in s for s in stats)
                values[need.source] = torch.stack([s.tensor(key).double() for s in stats]) if held else None
        if any(n.norm and not n.optional for n in made.needs) and "normalize" in made.params:
            continue  # norms are over the whole model: see test_norms_are_over_the_whole_model
        want = made(x, base=base, at=At(name=name), statistics=values)
        torch.testing.assert_close(got.tensor(name).double(), want, rtol=1e-5, atol=1e-6)


def test_norms_are_over_the_whole_model(known):
    """F / ‖F‖ with the norm over all tensors, not each tensor's own."""
    got = merged(known, "fisher").state_dict()
    stats = [weft.load(known / f"{n}-stats") for n in "ab"]
    f = [{n: s.tensor(f"fisher/{n}").double() for n in got} for s in stats]
    norms = [sum(float(v.square().sum()) for v in one.values()) ** 0.5 for one in f]
    for name, value in got.items():
        w = [(one[name] / n).clamp(min=1e-6) for one, n in zip(f, norms, strict=True)]
        x = [weft.load(known / n).tensor(name).double() for n in "ab"]
        want = (w[0] * x[0] + w[1] * x[1]) / (w[0] + w[1])
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-7)


def test_model_that_does_not_take_part_brings_no_statistics(known):
    """With missing='available' the statistics are those of the models that have the tensor."""
    a, b = (weft.load(known / n).state_dict() for n in "ab")
    b = {n: t for n, t in b.items() if not n.startswith("2.")}
    stats = [weft.load(known / f"{n}-stats") for n in "ab"]
    made = weft.merge([a, b], "fisher", statistics=stats, missing="available")
    torch.testing.assert_close(made.tensor("2.weight").float(), a["2.weight"])


def test_statistics_of_other_models(known):
    _, other = family(1, (40, 200, 10))
    foreign = measure(other[0], [torch.randn(5, 40)], ("fisher", "gram"))
    right = [known / "a-stats", known / "b-stats"]
    with pytest.raises(DataProblems, match=r"fisher of 0\.weight in .*shape \[200, 40\]") as told:
        merged(known, "fisher", statistics=[foreign, foreign])
    assert "measured on other values" in str(told.value)
    with pytest.raises(DataProblems, match="are they in the order of the models"):
        merged(known, "fisher", statistics=right[::-1])
    with pytest.raises(DataProblems, match="measured on other values than those of"):
        merged(known, "fisher", statistics=[right[0], known / "base-stats"])
    with pytest.raises(DataProblems, match=r"shapes differ|shape \[200, 40\]"):
        merged(known, "fisher", statistics=[right[0], foreign])


def test_wrong_number_or_kind(known):
    stats = [known / "a-stats", known / "b-stats"]
    with pytest.raises(UsageError, match="there are 2 models, and statistics of 1"):
        merged(known, "fisher", statistics=stats[:1])
    with pytest.raises(UsageError, match=r"fisher needs statistics of every model \(fisher\)"):
        merged(known, "fisher", statistics=None)
    with pytest.raises(UsageError, match="linear takes no statistics of the models"):
        merged(known, "linear", statistics=stats)
    with pytest.raises(UsageError, match=r"aim needs statistics of the base \(abs_mean\)"):
        merged(known, "aim", base_statistics=None)
    with pytest.raises(UsageError, match="given statistics of a base, but no base"):
        merged(known, "fisher", base_statistics=known / "base-stats")
    with pytest.raises(UsageError, match="holds no statistics"):
        merged(known, "fisher", statistics=[known / "a", known / "b"])


def altered(path: Path, change) -> Model:
    found = weft.load(path)
    values = {k: found.tensor(k).clone() for k in found}
    change(values)
    return Model(StateDict(values), found.config, (), "altered")


def test_bad_values_are_told_before_they_spread(known):
    def spoil(key, value):
        def change(values):
            values[key].view(-1)[0] = value

        return change

    for key, value, why in (
        ("fisher/0.weight", float("nan"), "fisher of '0.weight' has NaN"),
        ("fisher/0.weight", -1.0, "fisher of '0.weight' is negative"),
        ("fisher/2.bias", float("inf"), "fisher of '2.bias' has NaN or infinite"),
    ):
        bad = altered(known / "b-stats", spoil(key, value))
        with pytest.raises(DataError, match=why):
            merged(known, "fisher", statistics=[known / "a-stats", bad]).state_dict()
    bad = altered(known / "b-stats", spoil("kfac_a/0.weight", -1.0))
    with pytest.raises(DataError, match=r"kfac_a of '0\.weight' is negative"):
        merged(known, "mats", statistics=[known / "a-stats", bad]).state_dict()


def test_statistics_of_some_models_only(known):
    less = altered(known / "b-stats", lambda v: v.pop("fisher/2.bias"))
    with pytest.raises(DataProblems, match=r"fisher of 2\.bias: not in altered, but in"):
        merged(known, "fisher", statistics=[known / "a-stats", less])
    none = [altered(known / f"{n}-stats", lambda v: v.pop("fisher/2.bias")) for n in "ab"]
    made = merged(known, "fisher", statistics=none)
    assert made.notes == ("fisher: no fisher measured of 2.bias",)
    mean = (weft.load(known / "a").tensor("2.bias") + weft.load(known / "b").tensor("2.bias")) / 2
    torch.testing.assert_close(made.tensor("2.bias"), mean.double(), check_dtype=False)
    empty = [
        altered(known / f"{n}-stats", lambda v: [v.pop(k) for k in list(v) if k.startswith("fisher")])
        for n in "ab"
    ]
    with pytest.raises(DataError, match="no fisher of any merged tensor: measure with --what fisher"):
        merged(known, "fisher", statistics=empty)


def test_what_was_merged_without_is_kept_in_the_record(known, tmp_path):
    """Also where the merge lies inside other nodes."""
    saved = weft.save(merged(known, "mats") * 1.0, tmp_path / "out")
    assert saved.notes == ("mats: no kfac_a and no kfac_g measured of 0.bias, 2.bias",)
    assert saved.manifest["notes"] == list(saved.notes)


def test_misshapen_matrices(known):
    bad = [altered(known / f"{n}-stats", lambda v: v.update({"gram/0.weight": torch.eye(7)})) for n in "ab"]
    with pytest.raises(
        DataProblems, match=r"gram of 0\.weight in altered: shape \[7, 7\], which does not fit"
    ):
        merged(known, "mats", statistics=bad, curvature="gram")
    bad = [
        altered(known / f"{n}-stats", lambda v: v.update({"kfac_g/0.weight": torch.eye(40)})) for n in "ab"
    ]
    with pytest.raises(DataProblems, match=r"kfac_g of 0\.weight in altered: shape \[40, 40\]"):
        merged(known, "mats", statistics=bad)
    wide = altered(known / "base-stats", lambda v: v.update({"abs_mean/0.weight": torch.ones(41)}))
    with pytest.raises(DataProblems, match=r"abs_mean of 0\.weight in altered: shape \[41\]"):
        merged(known, "aim", base_statistics=wide)


def test_relaxed_is_any_method_and_then_aim(known):
    """Δ (1 − s (1 − ω)) of what TIES gives."""
    made = relaxed(METHODS["ties"])
    node = weft.merge([known / "a", known / "b"], made, base=known / "base", density=0.4, omega=0.1,
                      base_statistics=known / "base-stats")  # fmt: skip
    plain = weft.merge([known / "a", known / "b"], "ties", base=known / "base", density=0.4)
    base = weft.load(known / "base")
    for name in base:
        before, after = base.tensor(name).double(), node.tensor(name).double()
        change = plain.tensor(name).double() - before
        if name.endswith("weight"):
            s = weft.load(known / "base-stats").tensor(f"abs_mean/{name}").double()
            change = change * (1 - s / s.max() * 0.9)
        torch.testing.assert_close(after, before + change, rtol=1e-5, atol=1e-7)
    with pytest.raises(UsageError, match="slerp has no base"):
        relaxed(METHODS["slerp"])


def test_a_recipe_names_them(known, tmp_path, monkeypatch):
    monkeypatch.chdir(known)
    text = """
merge_method: fisher
models:
  - {model: ./a, statistics: ./a-stats}
  - {model: ./b, statistics: ./b-stats, parameters: {weight: 2.0}}
"""
    made = weft.build(text)
    want = merged(known, "fisher", weight=[1.0, 2.0])
    for name in want:
        assert torch.equal(made.tensor(name), want.tensor(name))
    with pytest.raises(UsageError, match="has no statistics, though other models have"):
        weft.build(text.replace(", statistics: ./b-stats", ""))
    weft.build("merge_method: aim\nbase_model: ./base\nmodels: [./a, ./b]\nbase_statistics: ./base-stats\n")
    with pytest.raises(UsageError, match="needs statistics of the base"):
        weft.build("merge_method: aim\nbase_model: ./base\nmodels: [./a, ./b]\n")
    steps = weft.build(
        "base_model: ./base\nmodels: [./a, ./b]\nbase_statistics: ./base-stats\n"
        "steps: [trim: {density: 0.5}, weighted_sum, relax_salient]\n"
    )
    plain = weft.build(
        "base_model: ./base\nmodels: [./a, ./b]\nsteps: [trim: {density: 0.5}, weighted_sum]\n"
    )
    assert not torch.equal(steps.tensor("0.weight"), plain.tensor("0.weight"))
    assert torch.equal(steps.tensor("0.bias"), plain.tensor("0.bias"))


def test_an_interrupted_merge_starts_over_with_other_statistics(known):
    """What the values depend on includes the statistics, so a journal of others is not taken up."""
    one = merged(known, "fisher")
    assert one.identity() == merged(known, "fisher").identity()
    other = [known / "a-stats", known / "b-stats"]
    prior = merged(known, "fisher", statistics=other, prior=0.5)
    assert one.identity() != prior.identity()
    loaded = weft.load(known / "a-stats")
    assert str(loaded.identity()) in str(one.identity())
    assert {f.path for f in one.files} >= {f.path for f in loaded.files}


def test_fingerprints_survive_rounding_and_merges(known):
    a = weft.load(known / "a")
    mark = Fingerprint.of(a)
    assert Fingerprint.read(json.loads(json.dumps(mark.data()))) == mark
    rounded = StateDict({n: a.tensor(n).bfloat16() for n in a})
    gap, slack = mark.distance(rounded) or (1.0, 0.0)
    assert 0 < gap <= slack
    stats = [known / "a-stats", known / "b-stats"]
    halves = [{n: weft.load(known / m).tensor(n).bfloat16() for n in a} for m in "ab"]
    weft.merge(halves, "fisher", statistics=stats)  # measured in float32, merged in bfloat16
    computed = [weft.load(known / m) * 1.0 for m in "ab"]
    weft.merge(computed, "fisher", statistics=stats)
    assert Fingerprint.read({"digest": 3}) is None and Fingerprint.read("") is None
