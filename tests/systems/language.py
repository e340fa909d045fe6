"""Tiny real language models: characters of Python's own manual, in two "languages" and two formats.

The languages are lower and upper case, whose letters share no token. The format, which an assistant is
taught in lower case only, is an underscore between words instead of a space.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.checkpoints.base import Checkpoint

TOKENS = " _" + "".join(map(chr, range(97, 123))) + "".join(map(chr, range(65, 91)))
SPACE, MARK = 0, 1
CONTEXT = 5

Model = Checkpoint | nn.Module


class CharacterLM(nn.Module):
    """The next character from the five before it; the parts are named as a transformer's."""

    def __init__(self, seed: int = 0, tokens: int = len(TOKENS)) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(tokens, 12)
        self.layers = nn.ModuleList([nn.Linear(12 * CONTEXT, 96), nn.Linear(96, 96)])
        self.lm_head = nn.Linear(96, tokens)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed_tokens(x).flatten(1)
        for layer in self.layers:
            h = F.gelu(layer(h))
        out: Tensor = self.lm_head(h)
        return out


def encode(text: str) -> Tensor:
    """Token ids [n]."""
    index = {c: i for i, c in enumerate(TOKENS)}
    return torch.tensor([index[c] for c in text])


def windows(text: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts [n, CONTEXT] that start at `at` [n], and what follows them [n]."""
    return torch.stack([text[at + j] for j in range(CONTEXT)], 1), text[at + CONTEXT]


def trained(
    start: nn.Module, parts: Sequence[tuple[Tensor, int]], *, steps: int, rate: float, seed: int
) -> nn.Module:
    """A copy trained on batches made of so many windows of each text."""
    net = copy.deepcopy(start).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    for _ in range(steps):
        drawn = [windows(t, torch.randint(len(t) - CONTEXT, (n,), generator=generator)) for t, n in parts]
        x, y = (torch.cat(v) for v in zip(*drawn, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class HeldOut:
    """Text that no model was trained on."""

    upper: Tensor
    formatted_upper: Tensor


@dataclass(frozen=True)
class Language:
    """Models of one seed that share a base."""

    base: nn.Module
    lower: nn.Module
    """Trained on in lower case."""
    upper: nn.Module
    """Trained on in upper case: the other language."""
    chat: nn.Module
    """Taught the format, in lower case."""
    held_out: HeldOut


def corpus() -> str:
    """Words of the topics of Python's `help()`, in lower case."""
    from pydoc_data.topics import topics

    words = "".join(c if c.isascii() and c.isalpha() else " " for c in " ".join(topics.values()).lower())
    return " ".join(words.split())


def family(seed: int) -> Language:
    """A base that has seen little of the format, and its three descendants."""
    text = corpus()
    lower, upper = encode(text[:120_000]), encode(text[120_000:250_000].upper())
    chat = encode(text[250_000:325_000].replace(" ", "_"))
    hint = encode(text[325_000:340_000].upper().replace(" ", "_"))
    held = text[345_000:355_000].upper()
    mixture = [(lower, 90), (upper, 30), (chat, 5), (hint, 3)]
    base = trained(CharacterLM(seed), mixture, steps=450, rate=4e-3, seed=seed)
    a, b, c = (
        trained(base, [(data, 128)], steps=200, rate=1.2e-3, seed=10 * i + seed)
        for i, data in enumerate((lower, upper, chat), start=1)
    )
    return Language(base, a, b, c, HeldOut(encode(held), encode(held.replace(" ", "_"))))


def as_module(model: Model) -> nn.Module:
    """A module to run."""
    if isinstance(model, nn.Module):
        return model
    tokens = model.info("embed_tokens.weight").shape[0]
    return weft.materialize(model, CharacterLM(tokens=tokens))


@torch.no_grad()
def loss(model: Model, text: Tensor, *, letters: bool = False) -> float:
    """Mean negative log likelihood of every character, or of the letters only."""
    x, y = windows(text, torch.arange(len(text) - CONTEXT))
    if letters:
        x, y = x[y > MARK], y[y > MARK]
    return float(F.cross_entropy(as_module(model)(x), y))


@torch.no_grad()
def follows_format(model: Model, text: Tensor) -> float:
    """Where a word ends, the share of the underscore among underscore and space."""
    x, y = windows(text, torch.arange(len(text) - CONTEXT))
    p = as_module(model)(x[y == MARK]).softmax(1)
    return float((p[:, MARK] / (p[:, MARK] + p[:, SPACE])).mean())
