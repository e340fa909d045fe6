"""Tangent weights on disk: an ordinary checkpoint of θ, and a note of the θ0 that it was trained around.

θ of a linearised model in the plain network is another function; the note, in config.json under
`weft_tangent`, lets `load_linearised` refuse a base that is not θ0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.dtypes import is_mergeable
from weft.errors import DataError, UsageError
from weft.train.chart import Direct
from weft.train.forward import Output, logits_of
from weft.train.model import Charted, Engine, Linearised
from weft.train.select import Which, chosen

NOTE = "weft_tangent"


def digest_of(state: Mapping[str, Tensor]) -> str:
    """blake2b over names and values (as float32, exact for narrower ones) of the floating tensors."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(n for n, t in state.items() if is_mergeable(t.dtype)):
        values = state[name].detach().cpu().to(torch.promote_types(state[name].dtype, torch.float32))
        found.update(name.encode())
        found.update(values.contiguous().numpy().tobytes())
    return found.hexdigest()


def note_of(model: Charted) -> dict[str, Any]:
    """What the config of a tangent model's checkpoint says; empty for plain models."""
    if not isinstance(model, Linearised):
        return {}
    about = {"parameters": list(model.chart.names), "base_digest": digest_of(model.inner.state_dict())}
    return {NOTE: about}


def load_linearised(
    checkpoint: Any,
    module: nn.Module,
    base: Any = None,
    *,
    which: Which | None = None,
    engine: Engine = "jvp",
    output: Output = logits_of,
) -> Linearised:
    """f_lin(x; θ) for tangent weights θ, single or merged: f(x; θ0) + ∂f/∂θ f(x; θ0) (θ − θ0).

    `checkpoint` is what was saved, or any lazy expression of such checkpoints over their common θ0 (task
    arithmetic of tangent models is arithmetic in this module). θ0 is `base`, or the weights that `module` holds.
    The parameters come from the checkpoint's note, or `which`, or are all that differ from θ0.

    DataError where the note names another θ0, or where parameters outside those differ.
    """
    from weft.api import load, materialize

    source = load(checkpoint)
    made = materialize(base, _copied(module)) if base is not None else _copied(module)
    note = (source.config or {}).get(NOTE)
    start = made.state_dict()
    if isinstance(note, Mapping) and note.get("base_digest") != digest_of(start):
        raise DataError(
            f"{source.origin} holds tangent weights around another θ0 than "
            f"{'base' if base is not None else 'the weights of the module'}: give the model that fine-tuning "
            "started from (base=…)"
        )
    materialize(source, tuned := _copied(made))
    theta = tuned.state_dict()
    moved = [n for n, p in made.named_parameters() if not torch.equal(theta[n], p)]
    if isinstance(note, Mapping) and which is None:
        names = [n for n in note.get("parameters", ()) if n in start]
    else:
        names = chosen(made, which) if which is not None else moved or chosen(made)
    strange = sorted(set(moved) - set(names))
    if strange:
        raise DataError(
            f"{source.origin}: {', '.join(strange)} differ from θ0 but are not among the linearised parameters"
        )
    model = Linearised(made, chart=Direct(made, names), engine=engine, output=output)
    model.take({n: theta[n] for n in names})
    return model


def _copied(module: nn.Module) -> nn.Module:
    import copy

    if isinstance(module, Charted):
        raise UsageError("give the network itself, not a model to train it: model.inner")
    return copy.deepcopy(module)
