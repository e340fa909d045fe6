"""Statistics of inputs and outputs: what a layer sees, for every kind of layer, against sums written by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft.errors import DataError, UsageError, WeftWarning
from weft.statistics import measure

EVERY = ("gram", "mean", "abs_mean", "out_mean", "out_var", "cov")


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def close(a: Tensor, b: Tensor, tol: float = 1e-6) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol)


def values(module: nn.Module, data, what=EVERY, **kw) -> dict[str, Tensor]:
    found = measure(module, data, what, dtype=torch.float64, **kw)
    return {k: found.tensor(k) for k in found}


def gram(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1]).double()
    return x.T @ x / len(x)


def test_linear_layers_in_sequence():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x = torch.randn(30, 4, 5, dtype=torch.float64, generator=seeded())
    got = values(net, x.split(8))
    hidden = net[1](net[0](x)).detach()
    for name, seen, out in (("0.weight", x, net[0](x)), ("2.weight", hidden, net(x))):
        flat, y = seen.reshape(-1, seen.shape[-1]), out.detach().reshape(-1, out.shape[-1])
        close(got[f"gram/{name}"], gram(seen), 1e-12)
        close(got[f"mean/{name}"], flat.mean(0), 1e-12)
        close(got[f"abs_mean/{name}"], flat.abs().mean(0), 1e-12)
        close(got[f"out_mean/{name}"], y.mean(0), 1e-12)
        close(got[f"out_var/{name}"], y.var(0, correction=0), 1e-10)
        close(got[f"cov/{name}"], torch.cov(y.T, correction=0), 1e-10)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("settings", [
    {}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}, {"padding": "same"},
    {"padding": 1, "padding_mode": "circular", "groups": 4},
], ids=str)  # fmt: skip
def test_convolutions_see_their_windows(dims, settings):
    """The Gram matrix of the unfolded inputs: ‖W X‖² = tr(W G Wᵀ) n, and y is W times a window."""
    torch.manual_seed(1)
    conv = getattr(nn, f"Conv{dims}d")(4, 8, 3, bias=False, **settings).double()
    x = torch.randn(2, 4, *[7] * dims, dtype=torch.float64)
    got = values(conv, [x], ("gram", "mean", "cov"))["gram/weight"]
    y = conv(x).detach()
    n = y.numel() // 8
    groups = settings.get("groups", 1)
    blocks = got if got.dim() == 3 else got[None]
    assert len(blocks) == groups
    w = conv.weight.detach().reshape(groups, 8 // groups, -1)
    # second moments of the outputs follow from those of the inputs
    second = torch.stack([wi @ gi @ wi.T for wi, gi in zip(w, blocks, strict=True)])
    rows = y.movedim(1, -1).reshape(n, groups, -1)
    want = torch.einsum("ngi,ngj->gij", rows, rows) / n
    close(second, want, 1e-10)
    if dims == 2 and settings.get("padding") != "same" and "padding_mode" not in settings and groups == 1:
        unfolded = F.unfold(
            x, 3, settings.get("dilation", 1), settings.get("padding", 0), settings.get("stride", 1)
        )
        close(got, gram(unfolded.transpose(1, 2)), 1e-12)


def test_transposed_weights():
    """transformers' Conv1D stores [in, out]; a transposed convolution maps each position."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    layer, x = Conv1D(6, 4), torch.randn(9, 3, 4)
    found = measure(layer, [x], "gram")
    close(found.tensor("gram/weight"), gram(x))
    assert found.config["weft_statistics"]["transposed"] == ["weight"]
    up = nn.ConvTranspose2d(4, 6, 3, groups=2)
    image = torch.randn(2, 4, 5, 5)
    found = measure(up, [image], "gram")
    rows = image.movedim(1, -1).reshape(-1, 2, 2).double()
    close(found.tensor("gram/weight"), torch.einsum("ngi,ngj->gij", rows, rows) / len(rows))
    assert found.config["weft_statistics"]["transposed"] == ["weight"]


def test_products_written_by_hand():
    """No module of a known class: weights used by @, transposed views, one expert of a stack."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stored_in_out = nn.Parameter(torch.randn(4, 5))
            self.stored_out_in = nn.Parameter(torch.randn(3, 5))
            self.experts = nn.Parameter(torch.randn(4, 2, 3))

        def forward(self, x):
            h = x @ self.stored_in_out
            h = torch.matmul(h, self.stored_out_in.T)
            near, far = h[: len(h) // 2], h[len(h) // 2 :]
            return F.linear(near, self.experts[1]), F.linear(far, self.experts[3])

    torch.manual_seed(3)
    net, x = Own(), torch.randn(10, 4)
    with pytest.warns(WeftWarning, match=r"always zero|zero in every example: experts"):
        found = measure(net, [x], "gram", dtype=torch.float64)
    h1 = (x @ net.stored_in_out).detach()
    h2 = (h1 @ net.stored_out_in.T).detach()
    close(found.tensor("gram/stored_in_out"), gram(x))
    close(found.tensor("gram/stored_out_in"), gram(h1))
    assert found.config["weft_statistics"]["transposed"] == ["stored_in_out"]
    experts = found.tensor("gram/experts")
    close(
        experts,
        torch.stack([torch.zeros(3, 3).double(), gram(h2[:5]), torch.zeros(3, 3).double(), gram(h2[5:])]),
    )


def test_stacked_products():
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Parameter(torch.randn(3, 4, 2))  # [E, in, out]
            self.up = nn.Parameter(torch.randn(3, 5, 2))  # [E, out, in]

        def forward(self, x):
            return torch.bmm(torch.bmm(x, self.down), self.up.transpose(1, 2))

    torch.manual_seed(4)
    net, x = Batched(), torch.randn(3, 7, 4)
    got = values(net, [x], "gram")
    close(got["gram/down"], torch.stack([gram(xi) for xi in x]))
    close(got["gram/up"], torch.stack([gram(hi) for hi in torch.bmm(x, net.down).detach()]))


def test_embeddings_and_ties():
    """A tied embedding is counted as a table under its name, and as a head under the other."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids).tanh())

    torch.manual_seed(5)
    net, ids = Tied(), torch.tensor([[1, 1, 2], [5, 1, 0]])
    found = measure(net, [ids], ("gram", "cov"), dtype=torch.float64)
    close(found.tensor("gram/embed.weight"), torch.tensor([1, 3, 1, 0, 0, 1]) / 6)
    close(found.tensor("gram/head.weight"), gram(net.embed(ids).tanh().detach()))
    assert found.config["weft_statistics"]["tied"] == {"head.weight": "embed.weight"}


def test_scales_of_norms_see_normalised_values():
    class Rms(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(d))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    torch.manual_seed(6)
    net = nn.Sequential(nn.LayerNorm(5), Rms(5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    nn.init.normal_(net[0].weight)
    net[2].running_mean.normal_()
    x = torch.randn(20, 5, dtype=torch.float64) * 3 + 1
    before = net[2].running_mean.clone()
    got = values(net, [x], ("gram", "mean", "abs_mean", "out_mean"))
    assert torch.equal(before, net[2].running_mean)
    normal = F.layer_norm(x, (5,))
    close(got["gram/0.weight"], normal.square().mean(0), 1e-10)
    close(got["abs_mean/0.weight"], normal.abs().mean(0), 1e-10)
    h = net[0](x).detach()
    rms = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    close(got["gram/1.weight"], rms.square().mean(0), 1e-10)
    out = net[1](h).detach()
    z = (out - net[2].running_mean) / (net[2].running_var + 1e-5).sqrt()
    close(got["mean/2.weight"], z.mean(0), 1e-10)
    close(got["out_mean/2.weight"], net[2].eval()(out).detach().mean(0), 1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_in_one_call(batch_first):
    """in_proj and out_proj of nn.MultiheadAttention, whose weights no forward hook of a Linear sees."""
    torch.manual_seed(7)
    net = nn.MultiheadAttention(6, 2, batch_first=batch_first).double().eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)

    def run(module, batch):
        return module(batch["x"], batch["x"], batch["x"], need_weights=False)[0]

    got = values(net, [{"x": x}], "gram", forward=run)
    close(got["gram/in_proj_weight"], gram(x), 1e-12)
    q, k, v = F.linear(x, net.in_proj_weight, net.in_proj_bias).detach().chunk(3, -1)
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    heads = [t.reshape(t.shape[0], t.shape[1], 2, 3).transpose(1, 2) for t in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    close(got["gram/out_proj.weight"], gram(mixed), 1e-12)
    # the module computes what it computes when nobody watches
    with torch.no_grad():
        plain = run(net, {"x": x})
    seen = []
    measure(net, [{"x": x}], "gram", forward=lambda m, b: seen.append(run(m, b)) or seen[-1])
    close(seen[0], plain, 1e-12)


def test_cross_attention_has_a_gram_for_each_projection():
    torch.manual_seed(8)
    net = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    q, kv = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double()
    got = values(net, [(q, kv)], "gram", forward=lambda m, b: m(b[0], b[1], b[1])[0])
    close(got["gram/in_proj_weight"], torch.stack([gram(q), gram(kv), gram(kv)]), 1e-12)
    apart = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True).double().eval()
    k, v = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 5).double()
    got = values(apart, [(q, k, v)], "gram", forward=lambda m, b: m(*b)[0])
    for name, x in (("q", q), ("k", k), ("v", v)):
        close(got[f"gram/{name}_proj_weight"], gram(x), 1e-12)


def test_transformer_encoder_without_its_fast_path():
    torch.manual_seed(9)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(40, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeftWarning)
        got = values(net, [x], "gram")
    assert {k for k in got if "in_proj" in k or "linear" in k or "out_proj" in k} == {
        f"gram/layers.{i}.{n}" for i in (0, 1)
        for n in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    }  # fmt: skip
    close(got["gram/layers.0.self_attn.in_proj_weight"], gram(x))
    assert not net.training and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_does_not_count(batch_first):
    """With a mask the statistics are those of the tokens alone, whichever axis is time."""
    torch.manual_seed(10)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids, attention_mask):
            h = self.embed(input_ids)
            h = h if batch_first else h.transpose(0, 1)
            h = self.layer(h, src_key_padding_mask=attention_mask == 0)
            return self.head(h if batch_first else h.transpose(0, 1))

    net = Net().double()
    lengths = (
        [3, 5, 1, 4, 5] if batch_first else [3, 5]
    )  # as many examples as tokens, where that is told apart
    ids = torch.randint(0, 11, (len(lengths), 5), generator=seeded(3))
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    padded = values(net, [{"input_ids": ids, "attention_mask": mask}], ("gram", "out_mean", "abs_mean"))
    alone = [
        {"input_ids": ids[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]}
        for i, n in enumerate(lengths)
    ]
    for name, value in values(net, alone, ("gram", "out_mean", "abs_mean")).items():
        close(padded[name], value, 1e-10)


def test_batches_do_not_matter_and_samples_are_exact():
    torch.manual_seed(11)
    net, x = nn.Linear(4, 2), torch.randn(25, 4)
    whole = values(net, [x[:17]], "gram")["gram/weight"]
    found = measure(net, list(x.split(7)), "gram", samples=17, dtype=torch.float64)
    close(found.tensor("gram/weight"), whole, 1e-12)
    assert found.config["weft_statistics"]["samples"] == 17
    low = values(net, [x[:17]], "gram", precision="float32")["gram/weight"]
    close(low, whole, 1e-6)
    assert not torch.equal(low, whole)


def test_what_cannot_be_measured_is_told():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    net, x = Odd(), torch.randn(4, 3)
    x[:, 1] = 0
    with pytest.warns(WeftWarning) as told:
        found = measure(net, [x], "gram", samples=9)
    text = "\n".join(str(w.message) for w in told)
    assert "9 examples were asked for, but the data hold 4" in text
    assert "never seen in use, so not measured: idle.weight" in text
    assert "zero in every example: used.weight (1)" in text
    assert found.config["weft_statistics"]["notes"] == [str(w.message) for w in told]
    assert "gram/idle.weight" not in found


def test_data_that_come_whole_are_cut():
    """Tensors, inputs with labels, keywords; a tuple of tensors that are alike holds batches, as split gives."""
    net, x = nn.Linear(3, 2).double(), torch.randn(600, 3, dtype=torch.float64, generator=seeded())
    wanted = values(net, list(x.split(7)), "gram", samples=500)["gram/weight"]
    close(wanted, gram(x[:500]), 1e-12)
    for data in (x, (x, torch.zeros(600, dtype=torch.int64)), {"input": x}, x.split(200), x.split(7)):
        close(values(net, data, "gram", samples=500)["gram/weight"], wanted, 1e-12)


def test_bad_input():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(UsageError, match="no statistic 'grams'; did you mean 'gram'"):
        measure(net, [x], "grams")
    with pytest.raises(UsageError, match="iterable of batches, such as a DataLoader, not a int"):
        measure(net, 3, "gram")
    with pytest.raises(UsageError, match=r"different lengths: \[3, 4\]"):
        measure(net, (x, torch.zeros(3, dtype=torch.int64)), "gram")
    with pytest.raises(UsageError, match="samples must be at least 1"):
        measure(net, [x], "gram", samples=0)
    with pytest.raises(UsageError, match="no parameter is called nothing"):
        measure(net, [x], "gram", only="nothing")
    with pytest.raises(DataError, match="hold no examples"):
        measure(net, [], "gram")
    bad = x.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(DataError, match="inputs of the layer with 'weight' have NaN"):
        measure(net, [bad], "gram")
    with pytest.raises(UsageError, match="ended with the first pass"):
        measure(net, iter([(x, torch.zeros(4, dtype=torch.long))]), ("gram", "fisher"))


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    net[0].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    measure(net, [torch.randn(4, 3)], ("gram", "fisher"))
    assert net.training and all(m.training for m in net) and not net[0].weight.requires_grad
    assert net[0].bias.requires_grad and net[0].bias.grad is None
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_saved_and_loaded(tmp_path):
    net = nn.Linear(4, 3)
    found = measure(net, [torch.randn(5, 4)], "gram", about="noise")
    weft.save(found, tmp_path / "s")
    again = weft.load(tmp_path / "s")
    assert torch.equal(again.tensor("gram/weight"), found.tensor("gram/weight"))
    assert again.config["weft_statistics"] == found.config["weft_statistics"]
    assert again.config["weft_statistics"]["data"] == "noise"
