"""Activation-informed merging: spare the channels that the base uses most. Nobari et al., arXiv:2502.02421.

    s_c = mean |x_c| of the base, over calibration data, divided by its maximum over c
    Δ[:, c] ← Δ[:, c] · (1 − s_c (1 − ω))

A relaxation of whatever change of the base another method arrives at: channels with large activations keep more of
the base, ω = 1 changes nothing, ω = 0 freezes the largest channel. `relax_salient` is a step that may end any
pipeline, `relaxed(method)` any method; `aim` is task arithmetic or TIES so ended. Tensors whose inputs were not
measured, and those that are no linear maps, are left as they come.
"""

from __future__ import annotations

from inspect import Parameter as Argument
from inspect import signature
from typing import Any, Literal

from weft.errors import UsageError
from weft.late import Tensor, torch
from weft.methods.averages import task_arithmetic
from weft.methods.params import Density, Fraction, Weight
from weft.methods.registry import Method, method
from weft.methods.step import At, Pipeline, step
from weft.methods.ties import ties


@step(grain="tensor", needs=("base_abs_mean",))
def relax_salient(x: Tensor, *, base_abs_mean: Tensor | None, at: At, omega: Fraction = 0.4) -> Tensor:
    """Δ[:, c] (1 − s_c (1 − ω)); x: [*shape] or [k, *shape], base_abs_mean: [in] or [blocks, in]."""
    if base_abs_mean is None or len(at.shape) < 2:
        return x
    largest = base_abs_mean.max()
    s = base_abs_mean.to(x) / torch.where(largest > 0, largest, 1.0).to(x)
    blocks, width = (s.shape[0], s.shape[1]) if s.dim() == 2 else (1, s.shape[0])
    if width * blocks == 0 or at.numel % (width * blocks):  # of a scale or a table: no linear map's inputs
        return x
    factor = (1 - s * (1 - omega)).reshape(blocks, width)
    factor = factor[:, :, None] if at.transposed else factor[:, None, :]
    models, outputs = x.numel() // max(1, at.numel), at.numel // (width * blocks)
    rows = (blocks, width, outputs) if at.transposed else (blocks, outputs, width)
    return (x.reshape(models, *rows) * factor).reshape(x.shape)


def relaxed(inner: Method) -> Method:
    """The method, with the activation-informed relaxation after it and one more parameter, `omega`.

    For `weft.merge(models, relaxed(METHODS["dare_ties"]), base=…, base_statistics=…)`. Raises UsageError for a
    method that does not work on changes of a base.
    """
    if inner.space != "deltas" and inner.base != "optional":
        raise UsageError(f"{inner.name} has no base, so there is no change of one to relax")

    def build(*, omega: Fraction = 0.4, **params: Any) -> Pipeline:
        return inner.build_fn(**params) | relax_salient(omega=omega)

    own = signature(inner.build_fn, eval_str=True)
    omega = Argument("omega", Argument.KEYWORD_ONLY, default=0.4, annotation=Fraction)
    arguments = [*own.parameters.values(), omega]
    build.__name__, build.__doc__ = f"aim_{inner.name}", inner.__doc__
    build.__annotations__ = {a.name: a.annotation for a in arguments}
    build.__signature__ = own.replace(parameters=arguments)  # type: ignore[attr-defined]
    made = Method(
        build, space=inner.space, models=inner.models, paper=inner.paper, base="required", compat=inner.compat,
        per_task=inner.per_task,
    )  # fmt: skip
    made.needs = (*inner.needs, *relax_salient.needs)
    return made


@method(
    space="deltas",
    paper="Nobari et al., Activation-informed merging of large language models, arXiv:2502.02421",
    needs=("base_abs_mean",),
)
def aim(
    *,
    weight: Weight = 1.0,
    of: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    density: Density = 0.2,
    scale: float = 1.0,
    omega: Fraction = 0.4,
) -> Pipeline:
    """Merge by task arithmetic or TIES, and spare the channels that the base uses most.

    Needs `weft measure --what abs_mean` of the base. `density` is that of TIES. Other methods: `relaxed`, or
    the step `relax_salient` at the end of a recipe's steps.
    """
    if of == "ties":
        change = ties.pipeline(weight=weight, density=density, scale=scale)
    else:
        change = task_arithmetic.pipeline(weight=weight, scale=scale)
    return change | relax_salient(omega=omega)
