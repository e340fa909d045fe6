"""The verb: `weft.calibrate(model, data, how, …)`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

from weft.api import Model
from weft.calibrate.result import Calibrated
from weft.errors import Problems, UsageError, did_you_mean

HOWS = {
    "batchnorm": "batchnorm:reestimate", "repair": "repair:repair", "head": "head:refit_head",
    "surgery": "surgery:surgery", "magnitude": "magnitude:magnitude", "temperature": "temperature:temperature",
}  # fmt: skip
"""Way of calibrating → the function that does it."""


def calibrate(model: Model, data: Any, how: str, **settings: Any) -> Calibrated:
    """Mend a merged model with data. `settings` are those of the way chosen:

      batchnorm    running statistics, measured anew                         reestimate
      repair       units' mean and spread as in the parents                  repair(…, parents)
      head         the last linear layer, fitted anew                        refit_head
      surgery      adapters that bring features back to the experts'         surgery(…, experts)
      magnitude    layers' updates as large as the experts'                  magnitude(…, experts, base)
      temperature  logits divided by the T of least cross-entropy            temperature

    `model` is a module, or a checkpoint or path that fits `module=` or is of a model of transformers; it stays as
    it is. Raises UsageError for what cannot be meant and DataError where data or values do not serve.
    """
    made = way(how)
    known = signature(made).parameters
    problems = [f"{n!r}{did_you_mean(n, known)}" for n in settings if n not in known]
    if problems:
        raise Problems(f"{how} has no such settings (it has {', '.join(list(known)[2:])})", problems)
    lost = [n for n, p in list(known.items())[2:] if p.default is p.empty and n not in settings]
    if lost:
        raise UsageError(f"{how} needs {', '.join(lost)}")
    return made(model, data, **settings)


def way(how: str) -> Callable[..., Calibrated]:
    """The function behind a name; UsageError for others."""
    if how not in HOWS:
        raise UsageError(
            f"there is no calibration {how!r}{did_you_mean(how, HOWS)}; known: {', '.join(HOWS)}"
        )
    room, _, name = HOWS[how].partition(":")
    found: Callable[..., Calibrated] = getattr(import_module(f"weft.calibrate.{room}"), name)
    return found
