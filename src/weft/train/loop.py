"""The loop: `Training` goes step by step and can be fed merged weights; `finetune` runs it to the end.

Several `Training`s that advance in turn, with a merge between, are training in rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError, did_you_mean
from weft.train.batches import Batches, Data, as_batch
from weft.train.hooks import Hook, Hooks, State, as_hooks, call
from weft.train.model import Charted, Engine, lowrank_of
from weft.train.modes import MODES, charted
from weft.train.objectives import Loss, Objective, Point, supervised
from weft.train.optimise import Factor, MakeOptimizer, make_optimizer, make_schedule
from weft.train.select import Which
from weft.train.stored import note_of


@dataclass
class Finetuned:
    """What fine-tuning gave."""

    model: Charted
    """The trained model, in evaluation mode, for calling: linearised where it was trained so."""
    losses: list[float]
    """The objective at every step, before it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    """The network's own config, for models of transformers."""

    @property
    def checkpoint(self) -> Checkpoint:
        """θ as an ordinary checkpoint. Tangent weights say so in their config (see `load_linearised`)."""
        note = note_of(self.model)
        config = {**(self.config or {}), **note}
        state = StateDict(self.model.weights(), "fine-tuned weights")
        return InCompany(state, config) if config else state

    @property
    def adapter(self) -> Checkpoint:
        """The low-rank update alone, which `weft.save` writes as a PEFT folder. UsageError for other modes."""
        chart = lowrank_of(self.model)
        if chart is None:
            raise UsageError("only mode='lora' and mode='tangent_lora' give an adapter: take .checkpoint")
        return chart.adapter(self.model.phi, (self.config or {}).get("_name_or_path") or None)


class Training:
    """One run of optimisation of a `Charted` model, which can be advanced, looked at and given other weights.

    `data`: (inputs, targets) or a mapping of tensors with `labels`, cut into batches of `batch` here, shuffled
    by `seed`; an iterable of batches (a DataLoader), walked again each epoch; or a function of a generator that
    gives one batch. `engine` may be an Accelerator or a Fabric: it then places the data, scales and averages
    the gradients over processes, each with its share of every batch of tensors.

    Dropout draws from a stream of the run's own, so that runs that take turns do not disturb one another.
    Raises UsageError for what cannot be meant and DataError when the objective is no longer finite.
    """

    def __init__(
        self,
        model: Charted,
        data: Data,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        objective: Objective | None = None,
        batch: int = 32,
        lr: float = 1e-3,
        optimizer: str | MakeOptimizer = "adamw",
        weight_decay: float = 0.0,
        schedule: str | Factor = "linear",
        warmup: int = 0,
        clip: float | None = None,
        seed: int = 0,
        engine: Any = None,
        on_gradient: Hooks = (),
        on_step: Hooks = (),
    ) -> None:
        self.model, self.clip, self.engine = model, clip, engine
        self.objective = supervised() if objective is None else objective
        if engine is not None:
            model.to(engine.device)
        self.device = next(iter(model.phi.values())).device
        self.batches = Batches(data, batch, seed, _share(engine))
        self.steps = _number_of_steps(steps, epochs, self.batches.per_epoch)
        self.optimizer = make_optimizer(optimizer, list(model.phi.values()), lr, weight_decay)
        self.schedule = make_schedule(self.optimizer, schedule, warmup, self.steps)
        self.on_gradient, self.on_step = as_hooks(on_gradient), as_hooks(on_step)
        self.losses: list[float] = []
        self.stopped = False
        self._source: Iterator[Any] = iter(self.batches)
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(seed)
            self._random = self._random_state()

    @property
    def done(self) -> bool:
        return self.stopped or len(self.losses) >= self.steps

    def advance(self, count: int | None = None) -> int:
        """Make up to `count` steps, or all that remain; returns how many were made."""
        before = len(self.losses)
        wanted = self.steps if count is None else before + count
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._random[0])
            for device, drawn in zip(self._devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(drawn, device)
            self.model.train()
            while not self.done and len(self.losses) < wanted:
                self._step(next(self._source))
            self.model.eval()
            self._random = self._random_state()
        return len(self.losses) - before

    @property
    def _devices(self) -> list[torch.device]:
        """Devices with a random stream of their own."""
        return [self.device] if self.device.type == "cuda" else []

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    def _step(self, item: Any) -> None:
        phi = self.model.phi
        with nullcontext() if self.engine is None else self.engine.autocast():
            loss = self.objective(Point(self.model, phi, as_batch(item, self.device)))
        told = float(loss.detach())
        if not math.isfinite(told):
            raise DataError(
                f"the objective is {told} at step {len(self.losses) + 1}: lower lr, clip the gradients, or look "
                "for values in the data or the weights that are not finite"
            )
        self.optimizer.zero_grad()
        if self.engine is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.engine.backward(loss)
            _average_gradients(self.engine, phi)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(list(phi.values()), self.clip)
        self.losses.append(told)
        call(self.on_gradient, self.state())
        self.optimizer.step()
        self.schedule.step()
        state = self.state()
        call(self.on_step, state)
        self.stopped = self.stopped or state.stop

    def state(self) -> State:
        """The run as hooks see it."""
        done, per_epoch = len(self.losses), self.batches.per_epoch
        return State(
            done, self.steps, done / per_epoch if per_epoch else 0.0, self.losses[-1] if done else math.nan,
            self.model.phi, self.model.chart.start, self.optimizer, self.model,
        )  # fmt: skip

    def replace(self, weights: Any, optimizer: Literal["keep", "reset"] = "keep") -> None:
        """Go on from other weights (anything `weft.load` takes); moments of the optimiser are kept or dropped."""
        from weft.api import load

        source = load(weights)
        source.survey()
        self.model.take({n: source.tensor(n) for n in (*source, *source.aliases)})
        if optimizer == "reset":
            self.optimizer.state.clear()


def finetune(
    module: nn.Module,
    data: Data,
    *,
    mode: str = "full",
    loss: str | Loss = "cross_entropy",
    objective: Objective | None = None,
    which: Which | None = None,
    freeze: Sequence[str] = (),
    scope: Literal["network", "module"] = "network",
    lora: Mapping[str, Any] | None = None,
    tangent: Engine = "jvp",
    output: Any = None,
    on_gradient: Hooks = (),
    on_step: Hooks = (),
    on_checkpoint: Hooks = (),
    checkpoint_every: int | None = None,
    on_round: Hooks = (),
    round_every: int | None = None,
    **training: Any,
) -> Finetuned:
    """Fine-tune a copy of `module` so that it merges well; the module stays as it is.

    `mode`:
      full          all parameters
      linear_layers the linear layers of attention only (arXiv:2407.07089)
      lora          W0 + s·B A of linear layers (arXiv:2106.09685); `lora` holds LowRank's settings (rank, …)
      tangent       f(x; θ0) + ∂f/∂θ (θ − θ0), of all parameters (arXiv:2305.12827)
      tangent_lora  the same of the factors A, B (scope="network") or of each adapted layer by itself, which is
                    A held at its start (scope="module") (arXiv:2310.04742)
    `which` names other parameters than the mode's (see `select.chosen`), `freeze` patterns of some to leave.
    `loss` is a name or a function of (output, targets); `objective` takes its place (objectives.py).
    `tangent` chooses how derivatives are carried, "jvp" or "closed" (see `Linearised`).

    Hooks get a `State`: on_gradient before, on_step after each step; on_checkpoint every `checkpoint_every` steps
    and at the end; on_round every `round_every` steps, and what it returns (weights, as `weft.load` takes them, or
    None) is gone on from. Everything else is `Training`'s: steps or epochs, batch, lr, optimizer, schedule, seed …

    The same module, data, settings and seed on the same machine give the same weights.
    """
    if mode not in MODES:
        raise UsageError(f"there is no mode {mode!r}{did_you_mean(mode, MODES)}; known: {', '.join(MODES)}")
    for name, hooks, every in (
        ("on_checkpoint", on_checkpoint, checkpoint_every), ("on_round", on_round, round_every),
    ):  # fmt: skip
        if every is not None and every < 1:
            raise UsageError(f"{name.removeprefix('on_')}_every must be 1 or more, not {every}")
        if name == "on_round" and as_hooks(hooks) and every is None:
            raise UsageError("on_round needs round_every: the number of steps of a round")
    model = charted(
        module, mode, which=which, freeze=freeze, scope=scope, lora=lora or {}, engine=tangent, output=output
    )
    goal = supervised(loss) if objective is None else objective
    run = Training(model, data, objective=goal, on_gradient=on_gradient, on_step=on_step, **training)
    _run(run, as_hooks(on_checkpoint), checkpoint_every, as_hooks(on_round), round_every)
    config = getattr(module, "config", None)
    plain = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
    return Finetuned(model.eval(), run.losses, {"mode": mode, "steps": run.steps}, plain)


def _run(
    run: Training,
    checkpoints: tuple[Hook, ...],
    every: int | None,
    rounds: tuple[Hook, ...],
    length: int | None,
) -> None:
    """To the end, with a stop wherever a checkpoint or a round is due."""
    while not run.done:
        at = len(run.losses)
        run.advance(min([n - at % n for n in (every, length) if n] or [run.steps]))
        at = len(run.losses)
        if length and at % length == 0:
            for weights in call(rounds, run.state()):
                if weights is not None:
                    run.replace(weights)
        if run.done or (every and at % every == 0):
            call(checkpoints, run.state())


def _number_of_steps(steps: int | None, epochs: int | None, per_epoch: int | None) -> int:
    if (steps is None) == (epochs is None):
        raise UsageError("say how long to train: steps= or epochs=, and not both")
    if epochs is not None:
        if per_epoch is None:
            raise UsageError("these data do not tell how long an epoch is: give steps= instead of epochs=")
        steps = epochs * per_epoch
    assert steps is not None
    if steps < 0:
        raise UsageError(f"there cannot be {steps} steps")
    return steps


def _share(engine: Any) -> tuple[int, int]:
    """(rank, processes) of an Accelerator or a Fabric."""
    if engine is None:
        return 0, 1
    if hasattr(engine, "process_index"):
        return engine.process_index, engine.num_processes
    return engine.global_rank, engine.world_size


def _average_gradients(engine: Any, phi: Mapping[str, Tensor]) -> None:
    if _share(engine)[1] == 1:
        return
    for p in phi.values():
        if p.grad is not None:
            if hasattr(engine, "reduce"):
                p.grad = engine.reduce(p.grad, reduction="mean")
            else:
                p.grad = engine.all_reduce(p.grad, reduce_op="mean")
