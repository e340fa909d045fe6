"""`measure`: what data say of a model, in one or few passes, as a checkpoint of statistics.

    weft.measure(model, batches, what=("gram",))
    weft.save(weft.measure(model, loader, what=("fisher", "gram"), samples=256), "expert-statistics")

A statistic of the parameter `name` is the tensor `"{kind}/{name}"`; the config says of which model, how many
examples and what else is worth knowing. Kinds: see sums.py (of inputs and outputs) and examples.py (of gradients).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.errors import DataError, UsageError, WeftWarning, did_you_mean
from weft.methods.fingerprint import Fingerprint
from weft.methods.kinds import ABOUT
from weft.statistics import examples, sums
from weft.statistics.batches import Data, Forward, batches, outputs_of
from weft.statistics.gradients import Asked, LossOf, add_examples, add_factors
from weft.statistics.labels import Labels
from weft.statistics.observe import Observer, slow_attention
from weft.statistics.uses import Parameters

FORWARD = (*sums.OF_INPUTS[:3], *sums.OF_OUTPUTS)
FACTORS = {"kfac": ("kfac_a", "kfac_g")}
KINDS = (*FORWARD, *examples.KINDS, *FACTORS)
"""What can be asked for; "kfac" gives two kinds, kfac_a and kfac_g."""


def measure(
    model: nn.Module | Checkpoint | str | Path,
    data: Data,
    what: str | Sequence[str] = ("fisher",),
    *,
    samples: int | None = None,
    labels: Labels = "model",
    loss: LossOf | None = None,
    forward: Forward | None = None,
    only: str | Sequence[str] = "*",
    units: Mapping[str, int] | None = None,
    seed: int = 0,
    precision: sums.Precision = "float64",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    about: str = "",
) -> Model:
    """Statistics of a model on data: a checkpoint to save, and to give to `weft.merge(…, statistics=[…])`.

    `model` is a module, or a checkpoint or path of a transformers model. `data` is an iterable of batches: tensors,
    tuples that end with labels, or mappings (`labels` and `attention_mask` are understood); it is gone through once
    a pass, so give a list or a loader, no generator, where several passes are needed. `samples` bounds the number
    of examples. `labels` says for which labels Fisher information is taken (labels.py); `loss(outputs, batch)`,
    one number an example, replaces the cross-entropy with the given labels; `forward(model, batch)` replaces the
    call. `only` selects parameters by pattern; `units` groups rows into heads for "node". Values are stored as
    `dtype`; sums are float64.

    The model is measured in evaluation mode and left as it was. Raises UsageError for kinds, labels or data that
    make no sense, DataError naming the layer where something is not finite. What could not be measured (layers
    never called, inputs always zero, fewer examples than asked for) is told by a WeftWarning and in the config.
    """
    kinds = _kinds(what)
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    module, origin = _module(model)
    where = torch.device(device) if device is not None else _device_of(module)
    module.to(where)
    found = Measurement(module, kinds, only, units, precision, Asked(labels, loss, forward, seed))
    with evaluating(module), slow_attention():
        for which in found.passes():
            found.run(which, data, where, samples)
    return found.checkpoint(origin, samples, dtype, about)


def _kinds(what: str | Sequence[str]) -> list[str]:
    asked = [w.strip() for w in what.split(",")] if isinstance(what, str) else list(what)
    for kind in asked:
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS) or f"; there are {', '.join(KINDS)}"
            raise UsageError(f"there is no statistic {kind!r}{hint}")
    if not asked:
        raise UsageError(f"say what to measure: {', '.join(KINDS)}")
    return list(dict.fromkeys(asked))


def _module(model: nn.Module | Checkpoint | str | Path) -> tuple[nn.Module, str]:
    if isinstance(model, nn.Module):
        return model, type(model).__name__
    from weft.checkpoints.load import load
    from weft.llm.hf import to_transformers

    checkpoint = load(model)
    return to_transformers(checkpoint), checkpoint.origin


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and parameters that take gradients; afterwards all as before."""
    modes = {m: m.training for m in module.modules()}
    wants = {p: p.requires_grad for p in module.parameters()}
    try:
        module.eval()
        for p in wants:
            p.requires_grad_(p.is_floating_point())
        yield
    finally:
        for m, training in modes.items():
            m.training = training
        for p, wanted in wants.items():
            p.requires_grad_(wanted)


class Measurement:
    """One measurement under way: sums, counts, and what should be told."""

    def __init__(
        self, module: nn.Module, kinds: Sequence[str], only: str | Sequence[str],
        units: Mapping[str, int] | None, precision: sums.Precision, asked: Asked,
    ) -> None:  # fmt: skip
        self.module, self.kinds, self.asked = module, kinds, asked
        self.parameters = Parameters(module)
        patterns = [only] if isinstance(only, str) else list(only)
        self.chosen: dict[str, Tensor] = {
            n: p for n, p in self.parameters.named.items() if any(fnmatch(n, o) for o in patterns)
        }
        if not self.chosen:
            raise UsageError(f"no parameter is called {' or '.join(patterns)}")
        self.parameters.named = {n: self.parameters.named[n] for n in self.chosen}
        wanted = {k for kind in kinds for k in FACTORS.get(kind, (kind,))}
        self.sums = sums.Sums(wanted, precision)
        # gradients and sensitivities are those of the data's labels; the labels' choice is the Fisher's
        self.fisher = examples.Examples(self.chosen, wanted & {"fisher", "node"}, units)
        self.slopes = examples.Examples(self.chosen, wanted & {"gradient", "sensitivity"})
        self.samples, self.unmasked = 0, set[str]()

    def passes(self) -> list[str]:
        """Which passes over the data are needed: "factors" sees all that "forward" does."""
        wanted = set(self.kinds)
        forward = "factors" if "kfac" in wanted else "forward" if wanted & set(FORWARD) else ""
        fisher = "fisher" if wanted & {"fisher", "node"} else ""
        slopes = "slopes" if wanted & {"gradient", "sensitivity"} else ""
        return [p for p in (forward, fisher, slopes) if p]

    def run(self, which: str, data: Data, device: torch.device, limit: int | None) -> None:
        """One pass over the data."""
        seen = 0
        slopes = Asked("given", self.asked.loss, self.asked.forward, self.asked.seed)
        for batch in batches(data, device, limit):
            if which == "forward":
                watch = Observer(self.parameters, self.sums.seen, batch.masks)
                with torch.no_grad(), watch:
                    outputs_of(self.module, batch, self.asked.forward)
                self.unmasked |= watch.unmasked
            elif which == "factors":
                self.unmasked |= add_factors(self.module, batch, self.asked, self.parameters, self.sums, seen)
            elif which == "fisher":
                add_examples(self.module, batch, self.asked, self.fisher, seen, self.chosen)
            else:
                add_examples(self.module, batch, slopes, self.slopes, seen, self.chosen)
            seen += batch.size
        if seen == 0 and self.samples:
            raise UsageError("the data ended with the first pass: give a list or a loader, which starts anew")
        if seen == 0:
            raise DataError("the data hold no examples")
        self.samples = seen

    def values(self) -> dict[str, Tensor]:
        """Every statistic by its full name, float64."""
        return {**self.sums.results(self.parameters.tied), **self.fisher.results(), **self.slopes.results()}

    def checkpoint(self, origin: str, asked: int | None, dtype: torch.dtype, about: str) -> Model:
        """The statistics and what they are of."""
        values = self.values()
        notes = self._notes(values, asked)
        for note in notes:
            warnings.warn(note, WeftWarning, stacklevel=3)
        rows = {use.name: n for use, n in self.sums.rows.items()}
        told = {
            "samples": self.samples,
            "what": sorted({k.partition("/")[0] for k in values}),
            "labels": self.asked.labels,
            "seed": self.asked.seed,
            "data": about,
            "rows": rows,
            "transposed": sorted({u.name for u in self.sums.rows if u.transposed}),
            "tied": self.parameters.tied,
            "notes": notes,
            "model": Fingerprint.of(StateDict(self.module), list(self.chosen)).data(),
        }
        stored = {k: v.to(dtype).cpu() for k, v in values.items()}
        return Model(StateDict(stored), {ABOUT: told}, (), f"statistics of {origin}")

    def _notes(self, values: Mapping[str, Tensor], asked: int | None) -> list[str]:
        notes = []
        if asked is not None and self.samples < asked:
            notes.append(f"{asked} examples were asked for, but the data hold {self.samples}")
        if set(self.kinds) & {*FORWARD, "kfac"}:
            seen = {u.name for u, n in self.sums.rows.items() if n}
            never = [n for n, p in self.chosen.items() if p.dim() > 1 and n not in seen]
            if never:
                notes.append(f"never seen in use, so not measured: {', '.join(never)}")
        dead = {
            k.partition("/")[2]: n for k, v in values.items() if k.startswith("gram/") and (n := _dead(v))
        }
        if dead:
            told = ", ".join(f"{name} ({n})" for name, n in dead.items())
            notes.append(f"inputs that were zero in every example: {told}")
        if self.unmasked:
            notes.append(f"the attention mask could not be applied to: {', '.join(sorted(self.unmasked))}")
        return notes


def _dead(gram: Tensor) -> int:
    """How many inputs were always zero; rows of a table that were never looked up are no surprise."""
    return 0 if gram.dim() == 1 else int((gram.diagonal(dim1=-2, dim2=-1) == 0).sum())


__all__ = ["KINDS", "measure"]
