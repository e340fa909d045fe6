"""Different models into one, on real data: generators, other tokenizers, other depths and widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from lab import UPRIGHT, Data, joined
from language import corpus
from torch import Tensor, nn

import weft
from weft.demo.tasks import examples
from weft.transform.cocktail import Gan, cocktail, train
from weft.transform.fuse import fuse, fusechat, fusellm
from weft.transform.heterogeneous import cla_fusion

# -- GAN Cocktail -----------------------------------------------------------------------------------------


def digits(*which: int) -> Tensor:
    """Images of some digits in their first four principal components, [n, 4]."""
    parts = [examples(UPRIGHT, s) for s in ("pretrain", "train", "test")]  # type: ignore[arg-type]
    x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    x = x - x.mean(0)
    v = torch.linalg.svd(x, full_matrices=False).Vh[:4]
    z = x @ v.T
    return z[torch.isin(y, torch.tensor(which))] / z.std()


def perceptron(out: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2), nn.Linear(48, out)
    )


def gan(data: Tensor, seed: int) -> Gan:
    made = Gan(perceptron(4, seed), perceptron(1, seed + 50), 4)
    torch.manual_seed(seed)
    train(made.generator, made.discriminator, 4, lambda n: (data[torch.randint(len(data), (n,))], None), 400,
          lr=2e-3, r1=0.5)  # fmt: skip
    return made


def apart(a: Tensor, b: Tensor) -> float:
    """Energy distance of two samples."""
    d = torch.cdist
    return float(2 * d(a, b).mean() - d(a, a).mean() - d(b, b).mean())


def test_a_cocktail_of_generators_covers_what_each_made() -> None:
    with torch.random.fork_rng([]):
        one, two = digits(0, 1), digits(7, 8)
        root, other = gan(one, 10), gan(two, 11)
        both = torch.cat([one, two])
        found = cocktail(root, {"other": other}, rooting=250, steps=250, lr=2e-3, r1=0.5)
        torch.manual_seed(0)
        assert apart(found.rooted["other"].sample(500), two) < 0.1 * apart(one, two)
        mean = weft.merge([root.generator, other.generator], "linear")
        naive = Gan(weft.materialize(mean, perceptron(4, 0)), root.discriminator, 4)
        wrong, mixed, tuned = (apart(s.sample(500), both) for s in (naive, found.mixed, found))  # type: ignore[attr-defined]
        assert mixed < 0.5 * wrong and tuned < 0.2 * wrong and tuned < mixed
        for name, own, foreign in (("root", one, two), ("other", two, one)):
            drawn = found.sample(500, name)
            assert apart(drawn, own) < 0.3 * apart(drawn, foreign)


# -- language models --------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A causal transformer of one block."""

    def __init__(self, vocabulary: int, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(160, width)
        self.block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        h = self.embed_tokens(ids) + self.positions.weight[:n]
        h = self.block(h, src_mask=torch.full((n, n), float("-inf")).triu(1))
        out: Tensor = self.lm_head(self.norm(h))
        return out


def tokenizer(size: int, text: str) -> Any:
    """Byte pairs of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    made.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def spoken(net: nn.Module, words: Any, text: str, steps: int, seed: int) -> nn.Module:
    ids = torch.tensor(words.encode(text))

    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(ids) - 48, (16,), generator=g)
        x = torch.stack([ids[i : i + 48] for i in at])
        return x, x

    found = weft.finetune(net, batch, loss="causal_lm", steps=steps, lr=4e-3, seed=seed)
    return weft.materialize(found.checkpoint, copy.deepcopy(net)).eval()


@torch.no_grad()
def nats(net: nn.Module, words: Any, text: str) -> float:
    """Negative log likelihood a character."""
    ids, total = torch.tensor(words.encode(text)), 0.0
    for x in ids[: len(ids) // 48 * 48].split(48):
        total += float(nn.functional.cross_entropy(net(x[None])[0, :-1], x[1:], reduction="sum"))
    return total / len(text)


@dataclass(frozen=True)
class Speakers:
    """A pivot that knows lower case, and one that knows upper case, with tokenizers of their own."""

    pivot: nn.Module
    words: Any
    sources: Mapping[str, tuple[nn.Module, Any]]
    few: Mapping[str, str]
    held: Mapping[str, str]

    def score(self, net: nn.Module) -> dict[str, float]:
        return {d: nats(net, self.words, t) for d, t in self.held.items()}

    def tiny(self) -> nn.Module:
        return Tiny(len(self.words), 32)


@pytest.fixture(scope="module")
def speakers() -> Speakers:
    pytest.importorskip("transformers")
    text = corpus()
    forms = {"upper": str.upper, "marked": lambda t: t.replace(" ", "_").replace("e", "3")}
    lower = text[:120_000]
    heard = {d: f(text[120_000:240_000]) for d, f in forms.items()}
    mixed = lower + "".join(h[:60_000] for h in heard.values())
    with torch.random.fork_rng([]):
        words = tokenizer(320, mixed)
        pivot = spoken(Tiny(len(words), 32, 1), words, lower, 150, 1)
        sources = {}
        for i, (d, t) in enumerate(heard.items()):
            theirs = tokenizer(350 + 10 * i, mixed)
            sources[d] = spoken(Tiny(len(theirs), 48, 2 + i), theirs, t, 250, 2 + i), theirs
    few = {d: f(text[250_000:253_000]) for d, f in forms.items()}
    held = {d: f(text[330_000:338_000]) for d, f in forms.items()}
    return Speakers(pivot, words, sources, few, held)


def test_a_language_model_learns_more_from_another_than_from_the_text_alone(speakers: Speakers) -> None:
    s = speakers
    found = fuse((s.pivot, s.words), [s.sources["upper"]], [s.few["upper"]], length=128)
    assert found.covered[1] > 0.8  # other numbers and other pieces of words, yet most tokens find each other
    assert bool(
        (found.loss.gather(1, found.chosen.argmax(1, keepdim=True))[:, 0] == found.loss.min(1).values).all()
    )
    after = {}
    for weight in (1.0, 0.3):  # the text alone, and with the other's distributions
        taught = fusellm((s.pivot, s.words), [], found, weight=weight, steps=120, lr=3e-3, batch=16)
        after[weight] = s.score(weft.materialize(taught.checkpoint, s.tiny()))["upper"]
    assert after[0.3] < after[1.0] - 0.03, after
    assert after[1.0] < s.score(s.pivot)["upper"] - 1


def test_chats_taught_by_several_merge_by_how_far_they_moved(speakers: Speakers) -> None:
    s = speakers
    found = fusechat(
        (s.pivot, s.words),
        s.sources,
        list(s.few.values()),
        weight=0.3,
        length=128,
        steps=60,
        lr=2e-3,
        batch=16,
    )
    before = sum(s.score(s.pivot).values())
    each = {d: s.score(weft.materialize(t.checkpoint, s.tiny())) for d, t in found.taught.items()}
    merged = s.score(weft.materialize(found.merged, s.tiny()))
    assert (
        each["upper"]["upper"] < each["marked"]["upper"]
        and each["marked"]["marked"] < each["upper"]["marked"]
    )
    best = min(sum(e.values()) for e in each.values())
    assert sum(merged.values()) < best < before, (merged, each)


# -- CLAFusion --------------------------------------------------------------------------------------------


def mlp(*widths: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def fitted(start: nn.Module, data: Data, epochs: int, rate: float, seed: int) -> nn.Module:
    net, generator = copy.deepcopy(start).train().requires_grad_(True), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for _ in range(epochs):
        for i in torch.randperm(len(data[0]), generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data[0][i]), data[1][i]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def right(net: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((net(data[0]).argmax(1) == data[1]).double().mean())


def test_networks_of_other_depth_and_width_fuse_without_training() -> None:
    data = joined([examples(UPRIGHT, "pretrain"), examples(UPRIGHT, "train")])
    test = examples(UPRIGHT, "test")
    for seed in (1, 2):
        with torch.random.fork_rng([]):
            small = fitted(mlp(64, 48, 48, seed=seed), data, 12, 2e-3, seed)
            big = fitted(mlp(64, 96, 96, 96, 96, seed=seed + 50), data, 12, 2e-3, seed)
        found = cla_fusion(small, big, [data[0]], samples=300)
        assert found.change < 1e-5 and found.layers == [0, 3] and min(found.cka) > 0.8
        like = copy.deepcopy(big)
        moved = weft.materialize(found.alignment.checkpoint, copy.deepcopy(like))
        assert right(moved, test) == right(small, test)  # four layers of 96 that compute what two of 48 do
        fused = weft.materialize(found.merged(), copy.deepcopy(like))
        shuffled = moved.state_dict()  # the same network with its units in another order
        order = torch.randperm(96, generator=torch.Generator().manual_seed(seed))
        for i in (0, 2, 4, 6):
            shuffled[f"{i}.weight"] = shuffled[f"{i}.weight"][order]
            shuffled[f"{i}.bias"] = shuffled[f"{i}.bias"][order]
            shuffled[f"{i + 2}.weight"] = shuffled[f"{i + 2}.weight"][:, order]
        unmatched = weft.materialize(weft.merge([like, shuffled], "linear"), copy.deepcopy(like))
        assert right(fused, test) > right(unmatched, test) + 0.15
        tuned = fitted(fused, data, 1, 1e-3, seed)
        assert right(tuned, test) > right(small, test) - 0.01
        zipped = cla_fusion(small, big, [data[0]], samples=300, units="zip")  # the alike with the alike
        assert right(weft.materialize(zipped.merged(), copy.deepcopy(big)), test) > right(small, test) - 0.02
        short = cla_fusion(small, big, [data[0]], samples=300, balance="merge")  # two of its four layers away
        assert right(short.balanced, test) > right(big, test) - 0.03
        tuned = fitted(weft.materialize(short.merged(), copy.deepcopy(small)), data, 1, 1e-3, seed)
        assert right(tuned, test) > right(small, test) - 0.02
