"""Fisher information and its kin, against formulas of logistic regression and plain loops of backward passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import DataError, UsageError
from weft.statistics import examples, measure


def close(a: Tensor, b: Tensor, tol: float = 1e-8) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol * 1e-2)


def values(module, data, what, **kw) -> dict[str, Tensor]:
    found = measure(module, data, what, dtype=torch.float64, **kw)
    return {k: found.tensor(k) for k in found}


@pytest.fixture
def regression():
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(40, 4).double(), torch.randint(0, 3, (40,))
    return net, x, y, net(x).detach().softmax(-1)


def net_with(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


def test_exact_fisher_of_logistic_regression(regression):
    """F[c, j] = E xⱼ² p_c (1 − p_c), and the same without x for the bias."""
    net, x, y, p = regression
    got = values(net, list(zip(x.split(16), y.split(16), strict=True)), "fisher", labels="exact")
    close(got["fisher/weight"], torch.einsum("nj,nc->cj", x.square(), p * (1 - p)) / len(x))
    close(got["fisher/bias"], (p * (1 - p)).mean(0))


def test_empirical_fisher_of_logistic_regression(regression):
    """(p − y)² x², by example; the square of a batch's mean gradient is another number."""
    net, x, y, p = regression
    error = p - F.one_hot(y, 3)
    got = values(net, [(x, y)], ("fisher", "gradient", "sensitivity"), labels="given")
    close(got["fisher/weight"], torch.einsum("nj,nc->cj", x.square(), error.square()) / len(x))
    close(got["gradient/weight"], error.T @ x / len(x))
    close(
        got["sensitivity/weight"], (torch.einsum("nj,nc->ncj", x, error) * net.weight).abs().mean(0).detach()
    )
    assert not torch.allclose(got["fisher/weight"], got["gradient/weight"].square(), rtol=0.2)


def test_sampled_fisher_tends_to_the_exact_one(regression):
    net, x, _, p = regression
    exact = torch.einsum("nj,nc->cj", x.square(), p * (1 - p)) / len(x)
    drawn = [values(net, [x], "fisher", seed=s)["fisher/weight"] for s in range(60)]
    assert not torch.equal(drawn[0], drawn[1])
    assert (torch.stack(drawn).mean(0) / exact - 1).abs().max() < 0.25
    again = values(net, list(x.split(7)), "fisher", seed=0)["fisher/weight"]
    close(again, drawn[0])  # the draws belong to the examples, not to the batches


def reference(net, x, y) -> list[dict[str, Tensor]]:
    """Gradients of the loss of every example, one backward pass each."""
    found = []
    for xi, yi in zip(x, y, strict=True):
        net.zero_grad()
        F.cross_entropy(net(xi[None]), yi[None]).backward()
        found.append({n: p.grad.clone() for n, p in net.named_parameters()})
    return found


@pytest.mark.parametrize("way", ["together", "one by one"])
def test_convolutional_network_by_example(way, monkeypatch):
    torch.manual_seed(1)
    net = net_with(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(48, 4)).eval()
    x, y = torch.randn(6, 1, 6, 6).double(), torch.randint(0, 4, (6,))
    calls = []
    plain = examples.one_by_one
    if way == "one by one":
        monkeypatch.setattr("weft.statistics.gradients.together", lambda *a: None)
    monkeypatch.setattr("weft.statistics.gradients.one_by_one", lambda *a: calls.append(1) or plain(*a))
    got = values(net, [(x, y)], "fisher", labels="given")
    assert bool(calls) == (way == "one by one")
    every = reference(net, x, y)
    for name, _ in net.named_parameters():
        close(got[f"fisher/{name}"], torch.stack([g[name].square() for g in every]).mean(0))


def test_a_model_that_vmap_cannot_run_is_taken_one_by_one():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.a(x) if float(x.sum()) > 0 else self.b(x)

    torch.manual_seed(2)
    net = Branching().double()
    x, y = torch.randn(5, 3).double(), torch.randint(0, 2, (5,))
    got = values(net, [(x, y)], "fisher", labels="given")
    total = torch.zeros(2, 3).double()
    for xi, yi in zip(x, y, strict=True):
        if xi.sum() > 0:
            total += torch.autograd.grad(F.cross_entropy(net.a(xi[None]), yi[None]), net.a.weight)[0].square()
    close(got["fisher/a.weight"], total / 5)


def test_a_loss_of_ones_own(regression):
    net, x, _, _ = regression
    target = torch.randn(40, 3).double()
    got = values(
        net,
        [(x, target)],
        ("fisher", "gradient"),
        labels="given",
        loss=lambda out, b: (out - b[1]).square().sum(1),
    )
    error = 2 * (net(x) - target).detach()
    close(got["gradient/weight"], error.T @ x / 40)
    close(got["fisher/weight"], torch.einsum("nj,nc->cj", x.square(), error.square()) / 40)


def test_node_fisher_is_that_of_a_mask_of_ones():
    """∂L/∂m of a mask on a layer's outputs equals Σ θ g over the unit, for units and for heads."""
    torch.manual_seed(3)
    net = net_with(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))
    x, y = torch.randn(7, 5).double(), torch.randint(0, 3, (7,))
    for size in (1, 3):
        got = values(net, [(x, y)], "node", labels="given", units={"0.weight": size})
        total = torch.zeros(6 // size).double()
        for xi, yi in zip(x, y, strict=True):
            mask = torch.ones(6 // size).double().requires_grad_()
            hidden = net[1](net[0](xi[None]) * mask.repeat_interleave(size))
            F.cross_entropy(net[2](hidden), yi[None]).backward()
            total += mask.grad.square()
        close(got["node/0.weight"], total / 7)
        close(got["node/0.bias"], total / 7)
    with pytest.raises(UsageError, match=r"units of 4 rows do not fit .0\.weight., which has 6"):
        measure(net, [(x, y)], "node", units={"0.weight": 4})
    with pytest.raises(UsageError, match="no weight is called q"):
        measure(net, [(x, y)], "node", units={"q": 2})


def test_kfac_factors_by_token():
    """A = mean xxᵀ and B = mean ggᵀ over tokens, g the gradient of the log-likelihood at the layer's output."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, input_ids, attention_mask):
            return self.head(self.mid(self.embed(input_ids)).tanh())

    torch.manual_seed(4)
    net = Tagger().double()
    ids, y = torch.randint(0, 9, (4, 6)), torch.randint(0, 3, (4, 6))
    mask = (torch.arange(6) < torch.tensor([[6], [4], [3], [1]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": y}
    got = values(net, [batch], "kfac", labels="given")
    kept = mask.bool()
    x = net.embed(ids)
    z = net.mid(x).detach().requires_grad_()
    logits = net.head(z.tanh())
    out = logits.detach().requires_grad_()
    F.cross_entropy(logits[kept], y[kept], reduction="sum").backward()
    F.cross_entropy(out[kept], y[kept], reduction="sum").backward()
    for name, a, g in (("mid", x, z.grad), ("head", z.detach().tanh(), out.grad)):
        a, g = a.detach()[kept], g[kept]
        close(got[f"kfac_a/{name}.weight"], a.T @ a / len(a))
        close(got[f"kfac_g/{name}.weight"], g.T @ g / len(g))


def test_kfac_is_exact_where_kronecker_is(regression):
    """One example: the Fisher block of a linear map is A ⊗ B, so its diagonal is diag B diag Aᵀ."""
    net, x, _, _ = regression
    one = [x[:1]]
    got = values(net, one, "kfac", labels="exact")
    fisher = values(net, one, "fisher", labels="exact")["fisher/weight"]
    close(torch.outer(got["kfac_g/weight"].diagonal(), got["kfac_a/weight"].diagonal()), fisher)


def test_kfac_of_convolutions_and_attention():
    torch.manual_seed(5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 3, groups=2)
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            h = self.conv(x).transpose(1, 2)
            return self.head(self.attn(h, h, h)[0].mean(1))

    net = Net().double().eval()
    x, y = torch.randn(5, 2, 6).double(), torch.randint(0, 3, (5,))
    got = values(net, [(x, y)], "kfac", labels="given")
    h = net.conv(x).detach().requires_grad_()
    hh = h.transpose(1, 2)
    F.cross_entropy(net.head(net.attn(hh, hh, hh)[0].mean(1)), y, reduction="sum").backward()
    g = h.grad.transpose(1, 2).reshape(-1, 2, 2)
    close(got["kfac_g/conv.weight"], torch.einsum("ngi,ngj->gij", g, g) / len(g))
    assert got["kfac_g/attn.in_proj_weight"].shape == (12, 12) and got[
        "kfac_g/attn.out_proj.weight"
    ].shape == (4, 4)
    m = net.attn(hh.detach(), hh.detach(), hh.detach())[0].detach().requires_grad_()
    F.cross_entropy(net.head(m.mean(1)), y, reduction="sum").backward()
    gm = m.grad.reshape(-1, 4)
    close(got["kfac_g/attn.out_proj.weight"], gm.T @ gm / len(gm))


def test_causal_language_model_of_transformers():
    """Empirical Fisher with labels = input_ids is that of the next token; transformers' own loss agrees."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    net = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(0, 13, (3, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    got = values(net, [batch], ("fisher", "gradient", "gram", "kfac"), labels="given")
    total = torch.zeros_like(net.model.layers[0].mlp.down_proj.weight)
    for row in ids:
        net.zero_grad()
        (
            net(input_ids=row[None], labels=row[None]).loss * 4
        ).backward()  # its mean is over the 4 predicted tokens
        total += net.model.layers[0].mlp.down_proj.weight.grad.square()
    close(got["fisher/model.layers.0.mlp.down_proj.weight"], total / 3, 1e-5)
    names = {n for n, _ in net.named_parameters()}
    assert {f"fisher/{n}" for n in names} <= set(got)
    assert {f"gram/{n}" for n in names} <= set(got)  # norms and embeddings included
    sampled = values(net, [{k: v for k, v in batch.items() if k != "labels"}], "fisher")
    assert all(bool((v >= 0).all()) and bool(v.isfinite().all()) for v in sampled.values())


def test_bad_input(regression):
    net, x, y, _ = regression
    with pytest.raises(UsageError, match="the data have no labels"):
        measure(net, [x], "gradient")
    with pytest.raises(UsageError, match=r"one number an example, \[1\], not \[\]"):
        measure(net, [(x, y)], "fisher", labels="given", loss=lambda out, b: out.sum())
    with pytest.raises(UsageError, match="no logits"):
        measure(net, [(x, y)], "fisher", forward=lambda m, b: None)
    with pytest.raises(UsageError, match="labels are no classes"):
        measure(net, [(x, torch.randn(40, 3))], "fisher", labels="given")
    with pytest.raises(UsageError, match="weighs every class"):
        measure(nn.Linear(4, 3), [torch.randn(2, 5, 4)], "fisher", labels="exact")
    with torch.no_grad():
        net.weight[0, 0] = float("inf")
    with pytest.raises(DataError, match="logits have NaN or infinite"):
        measure(net, [(x, y)], "fisher")


def test_units_of_weights_stored_the_other_way():
    """transformers' Conv1D keeps [in, out]: its units are columns, as the rows of the same Linear are."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(7)
    turned, plain = net_with(Conv1D(4, 3), nn.Linear(4, 2)), net_with(nn.Linear(3, 4), nn.Linear(4, 2))
    state = turned.state_dict() | {"0.weight": turned[0].weight.detach().T}
    plain.load_state_dict(state)
    x, y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    for units in ({}, {"0.weight": 2}):
        got, want = (values(n, [(x, y)], "node", labels="given", units=units) for n in (turned, plain))
        assert set(got) == set(want) and got["node/0.weight"].shape == (4 // units.get("0.weight", 1),)
        for name in want:
            close(got[name], want[name])
