"""How the suites' models are made: a base on a mixture of all tasks, an expert a task from it; seeded and cached.

The base sees a little of every task, so that it is no stranger to any of them and has room to specialise; the head
is trained with it and frozen afterwards, as a zero-shot head is in the merging literature. What every model was
trained with (settings, data, code, seed) is the name under which it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.bench.cache import code, stored
from weft.bench.suite import device

Say = Callable[[str], None]
Pair = tuple[Any, Tensor]


@dataclass(frozen=True)
class Fit:
    """Settings of one training."""

    epochs: int
    lr: float
    batch: int = 64
    warmup: int = 50
    weight_decay: float = 0.01
    smoothing: float = 0.0
    optimizer: str = "adamw"


def fit(
    module: nn.Module, data: Pair, how: Fit, seed: int, freeze: Sequence[str] = (),
    groups: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights after training, on the CPU. With `groups` [classes] the loss sees the target's group alone."""
    import weft

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if groups is not None:
            of = groups.to(outputs.device)
            outputs = outputs.masked_fill(of[targets][:, None] != of[None], -1e4)
        flat, t = outputs.flatten(0, -2), targets.flatten()
        if not how.smoothing or groups is None:
            return F.cross_entropy(flat, t, label_smoothing=how.smoothing)
        logs = flat.log_softmax(-1)  # smoothing over the group's columns alone
        inside = of[t][:, None] == of[None]
        spread = -(logs * inside).sum(-1) / inside.sum(-1)
        return (1 - how.smoothing) * F.nll_loss(logs, t) + how.smoothing * spread.mean()

    steps = how.epochs * -(-len(data[1]) // how.batch)
    found = weft.finetune(
        module.to(device()), data, mode="full", loss=loss, freeze=freeze, epochs=how.epochs, batch=how.batch,
        lr=how.lr, weight_decay=how.weight_decay, optimizer=how.optimizer, warmup=min(how.warmup, steps), seed=seed,
    )  # fmt: skip
    return {n: t.detach().cpu() for n, t in found.checkpoint.state_dict().items()}


@dataclass(frozen=True)
class Family:
    """A base and experts that share a network and a head over all tasks' classes.

    `make` builds the network for (classes); `about` is all else that the weights depend on: digests of the data.
    `few`, `train`: task → examples, targets in columns of the joint head.
    """

    kind: str
    make: Callable[[int], nn.Module]
    classes: Mapping[str, tuple[int, int]]
    base: Fit
    expert: Fit
    about: Mapping[str, Any]
    code: Sequence[Any]
    frozen: Sequence[str] = ("head.*",)
    grouped: bool = True
    """Whether a task has columns of its own."""

    @property
    def width(self) -> int:
        return max(stop for _, stop in self.classes.values())

    @property
    def groups(self) -> Tensor | None:
        """[classes]: which task a column belongs to; None where all tasks share them."""
        if not self.grouped:
            return None
        found = torch.full((self.width,), -1, dtype=torch.int64)
        for i, (start, stop) in enumerate(self.classes.values()):
            found[start:stop] = i
        return found

    def pretrained(self, few: Callable[[], Mapping[str, Pair]], seed: int, say: Say) -> dict[str, Tensor]:
        """The base of a seed: from random weights on a few examples of all tasks together."""
        about = self._about("base", seed, asdict(self.base))

        def make() -> dict[str, Tensor]:
            say(f"training the base of seed {seed}")
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                module = self.make(self.width)
            return fit(module, joined(list(few().values())), self.base, seed, groups=self.groups)

        return stored(f"{self.kind}-base", about, make)

    def tuned(
        self, base: Mapping[str, Tensor], name: str, data: Callable[[], Pair], seed: int, say: Say,
        how: Fit | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The expert of one task (or of several, joined): from the base, its head frozen."""
        how = how or self.expert
        about = self._about(name, seed, [asdict(self.base), asdict(how)])

        def make() -> dict[str, Tensor]:
            say(f"training {name} of seed {seed}")
            module = self.make(self.width)
            module.load_state_dict(base)
            order = 1000 * (seed + 1) + 1 + [*self.classes, "joint"].index(name)
            return fit(module, data(), how, order, self.frozen, self.groups)

        return stored(f"{self.kind}-{name}", about, make)

    def _about(self, name: str, seed: int, settings: Any) -> dict[str, Any]:
        return {
            "name": name, "seed": seed, "settings": settings, "classes": dict(self.classes), "data": self.about,
            "frozen": list(self.frozen), "code": code(fit, *self.code),
        }  # fmt: skip


def joined(parts: Sequence[Pair]) -> Pair:
    """Several sets of examples as one."""
    inputs, targets = zip(*parts, strict=True)
    if isinstance(inputs[0], Mapping):
        return {k: torch.cat([x[k] for x in inputs]) for k in inputs[0]}, torch.cat(targets)
    return torch.cat(inputs), torch.cat(targets)
