"""GAN Cocktail: generators trained apart become one, without their data (Avrahami et al., ECCV 2022).

    rooting   a copy of the root's generator and discriminator is tuned on what another generator makes, until it
              imitates it: it then has the root's architecture and lies in its basin
    mixing    the rooted pairs are averaged
    tuning    the average learns, as a generator by class, from what all generators make, so much of each

Nothing but samples of the others is needed, so they may be of any architecture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import weft
from weft.calibrate.network import sites
from weft.errors import DataError, UsageError
from weft.learn.loop import seeded
from weft.statistics.batches import as_batch

Sampler = Callable[[int], Tensor]
"""n → n samples [n, …]."""


@dataclass(frozen=True)
class Gan:
    """A generator of latents [n, latent] and the discriminator it was trained against, samples → [n] or [n, 1]."""

    generator: nn.Module
    discriminator: nn.Module
    latent: int

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n samples, drawn by torch's own random state."""
        p = next(self.generator.parameters())
        made: Tensor = self.generator(torch.randn(n, self.latent, device=p.device, dtype=p.dtype))
        return made


class ByClass(nn.Module):
    """A generator of (latents, classes): the latent is moved by a vector of the class, zero at the start."""

    def __init__(self, inner: nn.Module, classes: int, latent: int) -> None:
        super().__init__()
        self.inner, self.classes = inner, nn.Embedding(classes, latent)
        nn.init.zeros_(self.classes.weight)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        made: Tensor = self.inner(z + self.classes(c))
        return made


class Judge(nn.Module):
    """A discriminator of (samples, classes): D(x) + e_c · h(x), h what D's last layer reads, e 0 at first."""

    def __init__(self, inner: nn.Module, classes: int, head: str, width: int) -> None:
        super().__init__()
        self.inner, self.classes, self.head = inner, nn.Embedding(classes, width), head
        nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = self.inner.get_submodule(self.head).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        try:
            made: Tensor = self.inner(x)
        finally:
            hook.remove()
        judged: Tensor = made.reshape(len(x)) + (self.classes(c) * seen[-1]).sum(1)
        return judged


@dataclass(frozen=True)
class Cocktail:
    """What became of several generators."""

    generator: ByClass
    """The one that makes samples of every class (one a source): generator(z, c)."""
    discriminator: Judge
    rooted: Mapping[str, Gan]
    """The root, and the copies of it that imitate the others."""
    mixed: Gan
    """Their average, before it was tuned."""
    names: tuple[str, ...]
    """The class numbers' sources, the root first."""

    @torch.no_grad()
    def sample(self, n: int, source: str | None = None) -> Tensor:
        """n samples of one source, or of all in equal parts."""
        if source is not None and source not in self.names:
            raise UsageError(f"there is no source {source!r}; there are {', '.join(self.names)}")
        c = (
            torch.arange(n) % len(self.names)
            if source is None
            else torch.full((n,), self.names.index(source))
        )
        made: Tensor = self.generator(torch.randn(n, self.mixed.latent), c)
        return made


def cocktail(
    root: Gan, others: Mapping[str, Sampler | Gan], *, rooting: int = 500, steps: int = 500, batch: int = 64,
    lr: float = 1e-3, r1: float = 1.0, shares: Sequence[float] | None = None, name: str = "root", seed: int = 0,
) -> Cocktail:  # fmt: skip
    """One generator for the root and the `others` (GANs, or functions n → samples), of the root's architecture.

    `rooting` and `steps` are steps of rooting and of tuning; `shares` how much of each source is seen in tuning,
    the root first. UsageError for what cannot be meant, DataError where samples do not fit or training
    is not finite.
    """
    if not isinstance(others, Mapping) or not others or name in others:
        raise UsageError(f"others must be generators by name, at least one and none called {name!r}")
    names = (name, *others)
    portions = [1 / len(names)] * len(names) if shares is None else [float(s) for s in shares]
    if len(portions) != len(names) or min(portions) <= 0:
        raise UsageError(f"shares must be {len(names)} positive numbers, the root's first, not {shares!r}")
    if rooting < 0 or steps < 0:
        raise UsageError(f"steps cannot be fewer than 0: rooting={rooting}, steps={steps}")
    samplers = {n: s.sample if isinstance(s, Gan) else s for n, s in others.items()}
    with seeded(seed, torch.device("cpu")):
        _check(root, samplers)
        rooted = {name: root} | {n: imitated(root, s, rooting, batch, lr, r1) for n, s in samplers.items()}
        mixed = Gan(
            _mean([g.generator for g in rooted.values()]), _mean([g.discriminator for g in rooted.values()]),
            root.latent,
        )  # fmt: skip
        sources = [root.sample, *samplers.values()]
        generator = ByClass(copy.deepcopy(mixed.generator), len(names), root.latent)
        discriminator = _judge(copy.deepcopy(mixed.discriminator), len(names), root.sample(2))
        weights = torch.tensor(portions)

        def draw(n: int) -> tuple[Tensor, Tensor]:
            counts = torch.multinomial(weights, n, replacement=True).bincount(minlength=len(names)).tolist()
            parts = [s(k) for s, k in zip(sources, counts, strict=True) if k]
            return torch.cat(parts), torch.arange(len(names)).repeat_interleave(torch.tensor(counts))

        train(generator, discriminator, root.latent, draw, steps, batch, lr, r1)
    return Cocktail(generator, discriminator, rooted, mixed, names)


def imitated(
    root: Gan, sampler: Sampler, steps: int, batch: int = 64, lr: float = 1e-3, r1: float = 1.0
) -> Gan:
    """A copy of the root tuned on samples of another generator (model rooting)."""
    made = Gan(copy.deepcopy(root.generator), copy.deepcopy(root.discriminator), root.latent)
    train(made.generator, made.discriminator, root.latent, lambda n: (sampler(n), None), steps, batch, lr, r1)
    return made


def train(
    generator: nn.Module, discriminator: nn.Module, latent: int,
    draw: Callable[[int], tuple[Tensor, Tensor | None]], steps: int, batch: int = 64, lr: float = 1e-3,
    r1: float = 1.0,
) -> None:  # fmt: skip
    """Both in place, by Adam.

    L_D = softplus(−D(x)) + softplus(D(G(z))) + r1/2 ‖∇D(x)‖²,  L_G = softplus(−D(G(z)))
    """
    both = [m.train().requires_grad_(True) for m in (generator, discriminator)]
    best_g, best_d = (torch.optim.Adam(m.parameters(), lr=lr, betas=(0.0, 0.99)) for m in both)
    for step in range(1, steps + 1):
        x, c = draw(batch)
        given = () if c is None else (c,)
        x = x.detach().requires_grad_(r1 > 0)
        fake = generator(torch.randn(len(x), latent, dtype=x.dtype), *given)
        real = discriminator(x, *given)
        loss = softplus(-real).mean() + softplus(discriminator(fake.detach(), *given)).mean()
        if r1 > 0:
            (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
            loss = loss + r1 / 2 * slope.flatten(1).square().sum(1).mean()
        if not math.isfinite(float(loss.detach())):
            raise DataError(f"the discriminator's loss is {float(loss.detach())} at step {step}: lower lr")
        best_d.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        best_d.step()
        again = generator(torch.randn(len(x), latent, dtype=x.dtype), *given)
        fooled = softplus(-discriminator(again, *given)).mean()
        best_g.zero_grad()
        fooled.backward()  # type: ignore[no-untyped-call]
        best_g.step()
    for m in both:
        m.eval().requires_grad_(False)


def _mean(nets: Sequence[nn.Module]) -> nn.Module:
    made = weft.materialize(weft.merge(list(nets), "linear"), copy.deepcopy(nets[0]))
    return made.eval().requires_grad_(False)


def _judge(discriminator: nn.Module, classes: int, x: Tensor) -> Judge:
    linear = [s for s in sites(discriminator, as_batch(x)) if s.axis == -1]
    if not linear:
        raise UsageError(
            "the discriminator has no linear layer at its end, which the classes could be told to"
        )
    head: Any = discriminator.get_submodule(linear[-1].name)
    return Judge(discriminator, classes, linear[-1].name, head.in_features)


def _check(root: Gan, samplers: Mapping[str, Sampler]) -> None:
    like = root.sample(2)
    for name, sampler in samplers.items():
        made = sampler(2)
        if not isinstance(made, Tensor) or made.shape != like.shape or not bool(made.isfinite().all()):
            told = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise DataError(
                f"{name} makes samples {told} where the root makes {list(like.shape)}, finite ones"
            )


__all__ = ["ByClass", "Cocktail", "Gan", "Judge", "cocktail", "imitated", "train"]
