"""`measure`: what data say of a model, in one or few passes, as a checkpoint of statistics.

    weft.measure(model, batches, what=("gram",))
    weft.save(weft.measure(model, loader, what=("fisher", "gram"), samples=256), "expert-statistics")

A statistic of the parameter `name` is the tensor `"{kind}/{name}"`; the config says of which model, how many
examples and what else is worth knowing. Kinds: see sums.py (of inputs and outputs) and examples.py (of gradients).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.errors import DataError, UsageError, WeftWarning, did_you_mean
from weft.methods.fingerprint import Fingerprint
from weft.methods.kinds import ABOUT
from weft.statistics import examples, sums
from weft.statistics.batches import Batch, Data, Forward, batches, outputs_of
from weft.statistics.gradients import Asked, LossOf, add_examples, add_factors
from weft.statistics.labels import Labels
from weft.statistics.observe import Observer, slow_attention
from weft.statistics.uses import Parameters, Use

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
    module: nn.Module | None = None,
    by_block: bool = False,
    about: str = "",
) -> Model:
    """Statistics of a model on data: a checkpoint to save, and to give to `weft.merge(…, statistics=[…])`.

    `model` is a module, or a checkpoint or path: of a transformers model, or one that fits `module`, which takes
    its values. `data` is an iterable of batches: tensors, tuples that end with labels, or mappings (`labels`
    and `attention_mask` are understood), or all examples as one of these; it is gone through once a pass, so
    give a list or a loader, no generator, where several passes are needed. `samples` bounds the number of
    examples. `labels` says for which labels Fisher information is taken (labels.py); `loss(outputs, batch)`,
    one number an example, replaces the cross-entropy with the given labels; `forward(model, batch)` replaces
    the call. `only` selects parameters by pattern; `units` groups rows into heads for "node". Values are stored
    as `dtype`; sums are float64. `by_block` measures a checkpoint larger than memory one block at a time,
    without gradients (blockwise.py).

    The model is measured in evaluation mode and left as it was. Raises UsageError for kinds, labels or data that
    make no sense, DataError naming the layer where something is not finite. What could not be measured (layers
    never called, inputs always zero, fewer examples than asked for) is told by a WeftWarning and in the config.
    """
    kinds = _kinds(what)
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    asked = Asked(labels, loss, forward, seed)
    if by_block:
        return _by_block(model, module, data, kinds, samples, only, precision, asked, device, dtype, about)
    made, origin = _module(model, module)
    without = [n for n, p in made.named_parameters() if p.is_meta]
    if without:
        raise UsageError(
            f"the module has no values for {without[0]!r}: give a checkpoint of them as the model"
        )
    where = torch.device(device) if device is not None else _device_of(made)
    made.to(where)
    found = Measurement(made, kinds, only, units, precision, asked)
    with evaluating(made), slow_attention():
        for which in found.passes():
            found.run(which, data, where, samples)
    return found.checkpoint(StateDict(made), origin, samples, dtype, about)


def _by_block(
    model: nn.Module | Checkpoint | str | Path, module: nn.Module | None, data: Data, kinds: Sequence[str],
    samples: int | None, only: str | Sequence[str], precision: sums.Precision, asked: Asked,
    device: str | torch.device | None, dtype: torch.dtype, about: str,
) -> Model:  # fmt: skip
    from weft.checkpoints.load import load
    from weft.statistics.blockwise import Stack, skeleton

    if isinstance(model, nn.Module):
        raise UsageError(
            "by_block reads a checkpoint's blocks one by one: give a checkpoint, and the module apart"
        )
    beyond = [k for k in kinds if k not in FORWARD]
    if beyond:
        raise UsageError(f"{', '.join(beyond)} needs gradients of the whole model, which by_block has not")
    source = load(model)
    made = skeleton(source) if module is None else module
    where = torch.device(device or "cpu")
    found = Measurement(made, kinds, only, None, precision, asked)
    stack = Stack(made, source, where, asked.forward)
    with evaluating(made), slow_attention():
        every = list(batches(data, where, samples))
        found.count(sum(b.size for b in every))
        stack.run(every, found.watched)
    return found.checkpoint(source, source.origin, samples, dtype, about)


def _kinds(what: str | Sequence[str]) -> list[str]:
    asked = [w.strip() for w in what.split(",")] if isinstance(what, str) else list(what)
    for kind in asked:
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS) or f"; there are {', '.join(KINDS)}"
            raise UsageError(f"there is no statistic {kind!r}{hint}")
    if not asked:
        raise UsageError(f"say what to measure: {', '.join(KINDS)}")
    return list(dict.fromkeys(asked))


def _module(model: nn.Module | Checkpoint | str | Path, module: nn.Module | None) -> tuple[nn.Module, str]:
    if isinstance(model, nn.Module):
        return model, type(model).__name__
    from weft.checkpoints.load import load
    from weft.llm.hf import to_transformers

    checkpoint = load(model)
    if module is not None:
        from weft.api import materialize

        return materialize(checkpoint, module), checkpoint.origin
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
        patterns = [only] if isinstance(only, str) else list(only)
        self.chosen: dict[str, Tensor] = {
            n: p for n, p in module.named_parameters()
            if is_mergeable(p.dtype) and any(fnmatch(n, o) for o in patterns)
        }  # fmt: skip
        if not self.chosen:
            raise UsageError(f"no parameter is called {' or '.join(patterns)}")
        self.parameters = self._present()
        wanted = {k for kind in kinds for k in FACTORS.get(kind, (kind,))}
        self.sums = sums.Sums(wanted, precision)
        # gradients and sensitivities are those of the data's labels; the labels' choice is the Fisher's
        self.fisher = examples.Examples(self.chosen, wanted & {"fisher", "node"}, units)
        self.slopes = examples.Examples(self.chosen, wanted & {"gradient", "sensitivity"})
        self.samples, self.unmasked, self.tied = 0, set[str](), dict(self.parameters.tied)
        self.transposed: set[str] = set()

    def passes(self) -> list[str]:
        """Which passes over the data are needed: "factors" sees all that "forward" does."""
        wanted = set(self.kinds)
        forward = "factors" if "kfac" in wanted else "forward" if wanted & set(FORWARD) else ""
        fisher = "fisher" if wanted & {"fisher", "node"} else ""
        slopes = "slopes" if wanted & {"gradient", "sensitivity"} else ""
        return [p for p in (forward, fisher, slopes) if p]

    def _present(self) -> Parameters:
        """The chosen parameters that have values now."""
        found = Parameters(self.module)
        found.named = {n: p for n, p in found.named.items() if n in self.chosen}
        return found

    def watched(self, batch: Batch, run: Callable[[], Any]) -> Any:
        """Run something with every use of a present parameter seen; the masks are the batch's."""
        present = self._present()
        self.tied |= present.tied
        watch = Observer(present, self.sums.seen, batch.masks)
        with torch.no_grad(), watch:
            made = run()
        self.unmasked |= watch.unmasked
        return made

    def _turned(self, batch: Batch) -> set[str]:
        """The matrices that are stored [in, out]; convolutions have their kernel behind both, so not these."""
        uses: set[Use] = set()
        with torch.no_grad(), Observer(self._present(), lambda use, x, y: uses.add(use)):
            outputs_of(self.module, batch, self.asked.forward)
        found = {u.name for u in uses if u.transposed and self.chosen[u.name].dim() == 2}
        self.transposed |= found
        return found

    def count(self, seen: int) -> None:
        """Say how many examples a pass saw."""
        if seen == 0 and self.samples:
            raise UsageError("the data ended with the first pass: give a list or a loader, which starts anew")
        if seen == 0:
            raise DataError("the data hold no examples")
        self.samples = seen

    def run(self, which: str, data: Data, device: torch.device, limit: int | None) -> None:
        """One pass over the data."""
        seen = 0
        slopes = Asked("given", self.asked.loss, self.asked.forward, self.asked.seed)
        for batch in batches(data, device, limit):
            if which == "forward":
                self.watched(batch, partial(outputs_of, self.module, batch, self.asked.forward))
            elif which == "factors":
                self.unmasked |= add_factors(self.module, batch, self.asked, self.parameters, self.sums, seen)
            elif which == "fisher":
                if seen == 0 and "node" in self.kinds:
                    self.fisher.turned(self._turned(batch))
                add_examples(self.module, batch, self.asked, self.fisher, seen, self.chosen)
            else:
                add_examples(self.module, batch, slopes, self.slopes, seen, self.chosen)
            seen += batch.size
        self.count(seen)

    def values(self) -> dict[str, Tensor]:
        """Every statistic by its full name, float64."""
        return {**self.sums.results(self.tied), **self.fisher.results(), **self.slopes.results()}

    def checkpoint(
        self, model: Checkpoint, origin: str, asked: int | None, dtype: torch.dtype, about: str,
        quiet: bool = False,
    ) -> Model:  # fmt: skip
        """The statistics and what they are of: the values of `model`."""
        values = self.values()
        notes = self._notes(values, asked)
        for note in () if quiet else notes:
            warnings.warn(note, WeftWarning, stacklevel=3)
        rows = {use.name: n for use, n in self.sums.rows.items()}
        told = {
            "samples": self.samples,
            "what": sorted({k.partition("/")[0] for k in values}),
            "labels": self.asked.labels,
            "seed": self.asked.seed,
            "data": about,
            "rows": rows,
            "transposed": sorted(self.transposed | {u.name for u in self.sums.rows if u.transposed}),
            "tied": self.tied,
            "notes": notes,
            "model": Fingerprint.of(model, [n for n in self.chosen if n in model]).data(),
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
