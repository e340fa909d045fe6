"""`weft.evaluate`: a model on the data of each task, where a gate sent them, and what an answer costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.analysis.finding import COLOURS, Finding, figure, graphs
from weft.analysis.network import LOSSES, Loss, error_rate, weight
from weft.api import Model
from weft.calibrate.adapted import FILE as MAPS
from weft.calibrate.adapted import Adapted, load_adapted
from weft.errors import DataError, Problems, UsageError, did_you_mean
from weft.learn.data import Feed
from weft.routing.cost import Cost
from weft.routing.format import FILE as ROUTED
from weft.routing.routed import Routed
from weft.statistics.batches import Batch, logits_of
from weft.statistics.placed import placed

BATCH = 256
"""Examples of a pass, where data come as whole tensors."""
UNNAMED = "data"
"""The task of data that name none."""


@dataclass(frozen=True)
class TaskScore:
    """One task: means over its targets, −100 left out."""

    task: str
    examples: int
    targets: int
    loss: float
    accuracy: float | None
    """A share of 1, where the loss is the cross-entropy of classes."""
    perplexity: float | None
    """exp of the loss, where that is of the next token."""
    sent: Mapping[str, float] | None = None
    """Routed models: the share of examples (or tokens) that each expert got (see `weft.routing.sent`)."""
    weights: Mapping[str, float] | None = None
    """Routed models: the experts' mean weights."""

    @property
    def score(self) -> float:
        """Accuracy, else perplexity, else the loss."""
        return next(v for v in (self.accuracy, self.perplexity, self.loss) if v is not None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluation(Finding):
    """A model's scores by task, with its size, the time of an answer and, if it is routed, its cost."""

    model: str
    metric: str
    """accuracy, perplexity or loss."""
    tasks: tuple[TaskScore, ...]
    told: bool
    """Whether the model was told the task of each example."""
    parameters: int
    bytes: int
    seconds: float
    """Of one example here, gates included, in batches as the data came."""
    cost: Cost | None = None

    about: ClassVar[str] = (
        "Each task's score, the mean and the worst of them; for a routed model also the share of a task's examples "
        "that each expert got, by its largest weight."
    )

    @property
    def mean(self) -> float:
        """Of the tasks' scores, each counting alike."""
        return math.fsum(t.score for t in self.tasks) / len(self.tasks)

    @property
    def worst(self) -> TaskScore:
        """The task with the lowest accuracy, or the highest perplexity or loss."""
        sign = 1.0 if self.metric == "accuracy" else -1.0
        return min(self.tasks, key=lambda t: sign * t.score)

    @property
    def title(self) -> str:
        return f"{self.model} by task"

    @property
    def headline(self) -> str:
        def told(value: float) -> str:
            return f"{100 * value:.2f} %" if self.metric == "accuracy" else f"{value:.4g}"

        return (
            f"mean {self.metric} {told(self.mean)}, worst {told(self.worst.score)} on {self.worst.task}; "
            f"{self.parameters:,} parameters"
        )

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"mean": self.mean, "worst": self.worst.task}

    def plot(self) -> Any:
        names = [t.task for t in self.tasks]
        experts = list(self.tasks[0].sent or ())
        if not experts:
            made = figure("", self.metric)
            made.add_trace(graphs().Bar(x=names, y=[t.score for t in self.tasks]))
            return made
        made = figure("", f"share of examples, {self.metric} above", barmode="stack")
        for i, expert in enumerate(experts):
            shares = [(t.sent or {})[expert] for t in self.tasks]
            made.add_trace(graphs().Bar(x=names, y=shares, name=f"to {expert}", marker_color=COLOURS[i % 8]))
        for t in self.tasks:
            made.add_annotation(x=t.task, y=1.0, text=f"{t.score:.4g}", showarrow=False, yshift=12)
        return made


def evaluate(
    model: Model | Routed | Adapted,
    data: Any,
    *,
    module: nn.Module | None = None,
    loss: str | Loss = "cross_entropy",
    preference: Sequence[float] | None = None,
    samples: int | None = None,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Score a model on data, by task; for a routed model also which expert each task's examples went to.

    model       what `weft.load` takes, a module, or the folder of a routed or calibrated model; `module` is the
                network that its weights belong to, where that is none of transformers
    data        task → data with labels, or the data of one task: (inputs, labels) or batches of them, as
                `weft.learn` takes them
    loss        cross_entropy (also gives accuracy), next_token (perplexity), mse, or loss(outputs, labels)
    preference  a share a task, for models that are weighed by one
    samples     at most so many examples a task, the first ones

    A model that has to be told the task is told by the data's names. Raises UsageError for what cannot be meant,
    DataError for labels that do not fit the outputs, and where outputs or losses are not finite.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise UsageError(f"there is no loss {loss!r}{did_you_mean(loss, LOSSES)}; give a function")
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    net = network_of(model, module).to(device)
    told = _is_told(net)
    by_task = _by_task(data)
    _check(net, by_task, told, preference)
    more: dict[str, Any] = {} if preference is None else {"preference": list(preference)}
    rows, seconds = [], 0.0
    with _still(net):
        for task, given in by_task.items():
            call = {**more, "task": task} if told else more
            try:
                row, spent = _score(net, task, given, samples, loss, call)
            except (DataError, UsageError) as error:
                kind = DataError if isinstance(error, DataError) else UsageError
                raise kind(f"task {task!r}: {error}") from None
            rows.append(row)
            seconds += spent
    every = {id(t): t for t in (*net.parameters(), *net.state_dict(keep_vars=True).values())}.values()
    cost = net.cost() if isinstance(net, Routed) else None
    parameters = sum(t.numel() for t in every)
    held = sum(t.nbytes for t in every)
    if cost is not None:
        parameters, held = cost.dense + cost.residuals + cost.gates, cost.bytes
    metric = {"cross_entropy": "accuracy", "next_token": "perplexity"}.get(str(loss), "loss")
    return Evaluation(
        str(getattr(net, "origin", None) or _called(model)), metric, tuple(rows), told, parameters, held,
        seconds / sum(r.examples for r in rows), cost,
    )  # fmt: skip


def network_of(model: Model | Routed | Adapted, module: nn.Module | None = None) -> nn.Module:
    """A network of its own to call: plain, routed or calibrated, as what is named says."""
    if isinstance(model, Routed | Adapted):
        return copy.deepcopy(model).eval()
    if isinstance(model, str | Path) and (Path(model) / ROUTED).is_file():
        from weft.routing.stored import load

        if module is None:
            raise UsageError(
                f"{model} is a routed model, whose network's code is yours: give module= (--module PKG:FN, or "
                "--base MODEL of transformers)"
            )
        return load(model, module)
    if isinstance(model, str | Path) and (Path(model) / MAPS).is_file():
        return load_adapted(model, module)
    return placed(model, module)[0]


def _called(model: Any) -> str:
    return (
        str(model) if isinstance(model, str | Path) else str(getattr(model, "origin", type(model).__name__))
    )


def _is_told(net: nn.Module) -> bool:
    """Whether it can only be called with the task."""
    if isinstance(net, Adapted):
        return bool(net.tasks)
    return isinstance(net, Routed) and net.gating.kind == "oracle"


def _by_task(data: Any) -> dict[str, Any]:
    """Task → data; data with labels at their top are one task's."""
    if not isinstance(data, Mapping) or isinstance(data.get("labels"), Tensor):
        return {UNNAMED: data}
    if not data:
        raise UsageError("the data name no task: give some by task, or the data of one")
    return {str(k): v for k, v in data.items()}


def _check(
    net: nn.Module, by_task: Mapping[str, Any], told: bool, preference: Sequence[float] | None
) -> None:
    weighed = isinstance(net, Routed) and net.gating.kind == "preference"
    if preference is not None and not weighed:
        raise UsageError("a preference belongs to a model that is weighed by one; this one is not")
    if preference is None and weighed:
        assert isinstance(net, Routed)
        raise UsageError(
            f"this model is weighed by a preference: give one, a share of each of {', '.join(net.tasks)}"
        )
    if told:
        assert isinstance(net, Routed | Adapted)
        known = net.tasks
        unknown = [f"{t!r}: no such task{did_you_mean(t, known)}" for t in by_task if t not in known]
        if unknown:
            raise Problems(
                f"this model is told the task by the data's names, and knows {', '.join(known)}", unknown
            )


@contextmanager
def _still(net: nn.Module) -> Iterator[None]:
    """No gradients; residuals that are stored in few bits decoded once."""
    with torch.no_grad(), net.unpacked() if isinstance(net, Routed) else nullcontext():
        yield


def _score(
    net: nn.Module, task: str, data: Any, samples: int | None, loss: str | Loss, more: Mapping[str, Any]
) -> tuple[TaskScore, float]:
    """One task's score, and the seconds that its passes took."""
    of = LOSSES[loss] if isinstance(loss, str) else loss
    where = next((p.device for p in net.parameters()), torch.device("cpu"))
    lost, wrong, counts, spent, examples = [], [], [], 0.0, 0
    with net.watched() if isinstance(net, Routed) else nullcontext() as sent:
        for batch in _first(Feed(data, BATCH, 0, where).once(), samples):
            started = perf_counter()
            outputs = logits_of(net(*batch.args, **more, **batch.kwargs)).float()
            spent += perf_counter() - started
            targets = _targets(batch, outputs, loss)
            lost.append(float(of(outputs, targets)))
            wrong.append(float(error_rate(outputs, targets)) if loss == "cross_entropy" else math.nan)
            counts.append(weight(targets[:, 1:] if loss == "next_token" else targets))
            examples += batch.size
    n = sum(counts)
    if not n:
        raise DataError("the data hold no label that counts")
    mean, error = (
        math.fsum(c * v for c, v in zip(counts, each, strict=True) if c) / n for each in (lost, wrong)
    )
    if not math.isfinite(mean):
        raise DataError(f"the loss is {mean}")
    found = TaskScore(
        task, examples, n, mean, 1 - error if loss == "cross_entropy" else None,
        math.exp(min(mean, 700.0)) if loss == "next_token" else None,
        None if sent is None else sent.shares, None if sent is None else sent.weights,
    )  # fmt: skip
    return found, spent


def _first(batches: Iterator[Batch], samples: int | None) -> Iterator[Batch]:
    """Batches of `samples` examples in all."""
    left = samples
    for whole in batches:
        batch = whole if left is None else whole.first(left)
        yield batch
        left = None if left is None else left - batch.size
        if left == 0:
            return


def _targets(batch: Batch, outputs: Tensor, loss: str | Loss) -> Tensor:
    """The labels, −100 at tokens that the attention mask leaves out. Those of named losses must fit the outputs."""
    labels = batch.labels
    if labels is None:
        raise UsageError("there are no labels to score by: a batch is (inputs, labels), or has labels")
    if labels.is_floating_point() or loss not in ("cross_entropy", "next_token"):
        if isinstance(loss, str) and labels.shape != outputs.shape:
            hint = "; labels of classes are whole numbers" if loss == "cross_entropy" else ""
            raise DataError(
                f"labels {list(labels.shape)} do not fit outputs {list(outputs.shape)} for {loss}{hint}"
            )
        return labels
    for mask in batch.masks:
        labels = labels.masked_fill(~mask, -100) if labels.shape == mask.shape else labels
    classes = outputs.shape[-1]
    if labels.shape != outputs.shape[:-1] or (loss == "next_token" and labels.dim() < 2):
        wanted = "one a token, [examples, tokens]" if loss == "next_token" else "one a row"
        raise DataError(f"labels {list(labels.shape)} do not fit outputs {list(outputs.shape)}: {wanted}")
    odd = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
    if len(odd):
        raise DataError(f"a label is {int(odd[0])}, but the outputs have classes 0 to {classes - 1}")
    return labels.long()
