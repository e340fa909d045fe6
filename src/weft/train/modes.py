"""The modes of fine-tuning by name: which parameters, through which chart, plain or in the tangent space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from weft.errors import UsageError
from weft.train.chart import Chart, Direct
from weft.train.forward import Output, logits_of
from weft.train.lowrank import LowRank
from weft.train.model import Charted, Engine, Linearised
from weft.train.select import Which, chosen


@dataclass(frozen=True)
class Mode:
    """What a mode's name stands for."""

    which: Which
    low_rank: bool = False
    tangent: bool = False


MODES = {
    "full": Mode("all"),
    "linear_layers": Mode("attention"),
    "lora": Mode("linear", low_rank=True),
    "tangent": Mode("all", tangent=True),
    "tangent_lora": Mode("linear", low_rank=True, tangent=True),
}


def charted(
    module: nn.Module,
    mode: str,
    *,
    which: Which | None = None,
    freeze: Sequence[str] = (),
    scope: Literal["network", "module"] = "network",
    lora: Mapping[str, Any] | None = None,
    engine: Engine = "jvp",
    output: Output | None = None,
) -> Charted:
    """A copy of the module, ready to be trained in a mode of `MODES`; the keywords are `finetune`'s."""
    meant, settings = MODES[mode], dict(lora or {})
    if settings and not meant.low_rank:
        raise UsageError(f"lora= belongs to mode='lora' and mode='tangent_lora', not to mode={mode!r}")
    if scope not in ("network", "module"):
        raise UsageError(f"there is no scope {scope!r}: use network or module")
    by_module = scope == "module"
    if by_module and not (meant.low_rank and meant.tangent):
        raise UsageError(f"scope='module' belongs to mode='tangent_lora', not to mode={mode!r}")
    names = chosen(module, meant.which if which is None else which, freeze)
    chart: Chart
    if meant.low_rank:
        # at B0 = 0 the derivative in A vanishes, so a linearised adapter has B alone to train
        settings.setdefault("train_a", not meant.tangent)
        if meant.tangent and settings["train_a"]:
            raise UsageError("a linearised adapter does not depend on A: leave train_a out")
        chart = LowRank(module, names, **settings)
    else:
        chart = Direct(module, names)
    if meant.tangent and not by_module:
        return Linearised(module, chart=chart, engine=engine, output=output or logits_of)
    return Charted(module, chart, output=output or logits_of)
