"""Hooks, regularisers and linearised models in the trainers of others: transformers' Trainer and Lightning.

Trainer(model=WithLoss(Linearised(network)), callbacks=[trainer_callback(on_step=keep, penalty=l2_sp())], …)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import MissingExtra, UsageError
from weft.train.chart import wide
from weft.train.hooks import Hooks, State, as_hooks, call
from weft.train.model import Charted
from weft.train.objectives import Batch, Loss, Objective, Point, cross_entropy


class _Signed:
    """A method whose signature is the network's: the Trainer drops columns that `forward` does not name."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __get__(self, model: WithLoss | None, _: type) -> Callable[..., Any]:
        if model is None:
            return self.method
        bound: Any = partial(self.method, model)
        known = inspect.signature(model.model.inner.forward).parameters.values()
        own = [p for p in known if p.name != "labels"]
        labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        rest = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD]
        bound.__signature__ = inspect.Signature([*(p for p in own if p not in rest), labels, *rest],
                                                __validate_parameters__=False)  # fmt: skip
        return bound  # type: ignore[no-any-return]


class WithLoss(nn.Module):
    """A `Charted` model that answers as transformers' models do: {"loss", "logits"} from keywords with `labels`.

    `loss(logits, labels)` is cross-entropy by default; for language models give `objectives.causal_lm`. The
    state dict is the network's own, with θ in it.
    """

    accepts_loss_kwargs = False
    """The Trainer then averages over accumulated batches itself."""

    def __init__(self, model: Charted, loss: Loss = cross_entropy) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.register_state_dict_post_hook(_own_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_inner_names)  # type: ignore[no-untyped-call]

    @_Signed
    def forward(self, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        logits = self.model(**inputs)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def _own_names(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [n for n in state if n.startswith(f"{prefix}model.")]:
        state[prefix + name.removeprefix(f"{prefix}model.")] = state.pop(name)


def _inner_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [n for n in state if n.startswith(prefix)]:
        state[f"{prefix}model.{name.removeprefix(prefix)}"] = state.pop(name)


class _Watch:
    """What both trainers' callbacks do: keep φ0, add a penalty's gradient, call hooks with a `State`."""

    def __init__(
        self, on_gradient: Hooks, on_step: Hooks, on_checkpoint: Hooks, penalty: Objective | None
    ) -> None:
        self.hooks = {
            "gradient": as_hooks(on_gradient), "step": as_hooks(on_step), "checkpoint": as_hooks(on_checkpoint),
        }  # fmt: skip
        self.penalty = penalty
        self.start: dict[str, Tensor] = {}
        self.charted: Charted | None = None

    def begin(self, model: nn.Module, resumed: bool = False) -> None:
        """Remember where training starts. That of a resumed run was seen before its weights were loaded.

        UsageError where it was not, since a penalty would hold the weights where they were interrupted.
        """
        found = [m for m in model.modules() if isinstance(m, Charted)]
        if len(found) > 1:
            raise UsageError(
                "there are several models with a chart in the one that is trained: hooks see one"
            )
        self.charted = found[0] if found else None
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if self.charted is not None:
            self.start = dict(self.charted.chart.start)
        elif not resumed:
            self.start = {n: wide(p) for n, p in trained.items()}
        elif unseen := [n for n in trained if n not in self.start]:
            raise UsageError(
                f"where {unseen[0]} started is not known, since the run is resumed: let the callback see the model "
                "before (Trainer(model, callbacks=[…]), a LightningModule that makes its network in __init__)"
            )

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """φ, live: of the model's chart, or its parameters themselves."""
        if self.charted is not None:
            return self.charted.phi
        return {n: p for n, p in model.named_parameters() if n in self.start}

    def before_step(self, model: nn.Module, state: State) -> None:
        """Add the penalty's gradient to what backward left, outside any loss scaling or clipping of it."""
        if self.penalty is not None:
            phi = self.parameters(model)
            around = self.charted or _Plain(self.start)
            point = Point(around, phi, Batch((), {}, None))  # type: ignore[arg-type]
            with torch.enable_grad():
                slopes = torch.autograd.grad(self.penalty(point), list(phi.values()), allow_unused=True)
            for p, slope in zip(phi.values(), slopes, strict=True):
                if slope is not None:
                    p.grad = slope if p.grad is None else p.grad + slope
        call(self.hooks["gradient"], state)


class _Plain:
    """As much of a `Charted` as a penalty on θ − θ0 asks for."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.start = start

    def delta(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: p - self.start[n].to(p) for n, p in phi.items()}


def trainer_callback(
    *,
    on_gradient: Hooks = (),
    on_step: Hooks = (),
    on_checkpoint: Hooks = (),
    penalty: Objective | None = None,
) -> Any:
    """A TrainerCallback that calls weft's hooks, and adds the gradient of `penalty` (of θ − θ0) to every step.

    on_checkpoint comes when the Trainer saves; `state.loss` is what it logged last. A hook that sets
    `state.stop` ends training. The penalty is added after the Trainer's clipping, decoupled from the loss.
    θ0 is what the model held when the Trainer was made, also for a run that `resume_from_checkpoint` goes on with:
    make it with the base, as for the first part. MissingExtra without transformers.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise MissingExtra("transformers", "train", "a callback for its Trainer") from None
    watch = _Watch(on_gradient, on_step, on_checkpoint, penalty)

    def state_of(state: Any, model: nn.Module, optimizer: Any) -> State:
        logged = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
        loss = next(logged, math.nan)  # the evaluations are logged between
        return State(
            state.global_step, state.max_steps, state.epoch or 0.0, loss, watch.parameters(model), watch.start,
            optimizer, watch.charted or model,
        )  # fmt: skip

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if model is not None:  # there is none yet where model_init makes it
                watch.begin(model)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            watch.begin(model, resumed=state.global_step > 0)

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            watch.before_step(model, state_of(state, model, optimizer))

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> Any:
            seen = state_of(state, model, optimizer)
            call(watch.hooks["step"], seen)
            control.should_training_stop = control.should_training_stop or seen.stop
            return control

        def on_save(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            call(watch.hooks["checkpoint"], state_of(state, model, optimizer))

    return Callback()


def lightning_callback(
    *,
    on_gradient: Hooks = (),
    on_step: Hooks = (),
    on_checkpoint: Hooks = (),
    penalty: Objective | None = None,
) -> Any:
    """The same for a Lightning Trainer, under `lightning` or `pytorch_lightning`. MissingExtra without either.

    θ0 is what the module holds as `fit` is called, before it restores a `ckpt_path`.
    """
    callback = _lightning_base()
    watch = _Watch(on_gradient, on_step, on_checkpoint, penalty)
    last = {"loss": math.nan, "step": -1}

    def state_of(trainer: Any, module: nn.Module, optimizer: Any = None) -> State:
        most = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else None
        return State(
            trainer.global_step, most, float(trainer.current_epoch), last["loss"], watch.parameters(module),
            watch.start, optimizer or (trainer.optimizers or [None])[0], watch.charted or module,
        )  # fmt: skip

    class Callback(callback):  # type: ignore[misc, valid-type]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            watch.begin(pl_module)  # before weights are restored

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            watch.begin(pl_module, resumed=trainer.ckpt_path is not None)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            watch.before_step(pl_module, state_of(trainer, pl_module, optimizer))

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            last["loss"] = float(found) if found is not None else math.nan
            if trainer.global_step == last["step"]:  # gradients are still being gathered
                return
            last["step"] = trainer.global_step
            seen = state_of(trainer, pl_module)
            call(watch.hooks["step"], seen)
            trainer.should_stop = trainer.should_stop or seen.stop

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            call(watch.hooks["checkpoint"], state_of(trainer, pl_module))

    return Callback()


def _lightning_base() -> Any:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback  # type: ignore[assignment]
        except ImportError:
            raise MissingExtra("lightning", "train", "a callback for its Trainer") from None
    return Callback


__all__ = ["WithLoss", "lightning_callback", "trainer_callback"]
