"""Many fine-tunes of one base: a shared difference at more bits, and each one's own at fewer.

RTVQ (Kim et al., ICCV 2025, arXiv:2503.06921): Q_s(τ̄) of the mean task vector, and Q_b(τᵢ − Q_s(τ̄)) of each model;
the residual is from the quantised mean, so that its error is corrected too. The shared pack is a delta like any
other, and the base of the others, which are no different either: a delta of a delta.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.lazy import Affine
from weft.checkpoints.load import load
from weft.checkpoints.refs import Kind, parse_ref
from weft.deltas.groups import Group
from weft.deltas.pack import pack_delta
from weft.engine.save import Saved, save
from weft.engine.staging import refuse_existing
from weft.errors import Problems, UsageError

SHARED = "shared"


def pack_family(
    models: Mapping[str, object],
    base: object,
    out: str | Path,
    *,
    bits: int = 2,
    shared_bits: int = 3,
    group: Group | None = None,
    include: str | None = None,
    exclude: str | None = None,
    **settings: Any,
) -> dict[str, Saved]:
    """Write `out/shared` and one pack a model, `out/<name>`; what each save did, by name.

    `models` maps the packs' names to models of one architecture. `settings` are those of `weft.save`. Raises
    UsageError for fewer than two models, a name that is no folder's, or an output that is there already.
    """
    place = Path(out)
    _check_names(models, place, bool(settings.get("overwrite")))
    ours = {name: load(model) for name, model in models.items()}
    how: dict[str, Any] = {"scheme": "quantised", "group": group, "include": include, "exclude": exclude}
    mean = Affine([(1 / len(ours), model) for model in ours.values()])
    shared = pack_delta(mean, base, bits=shared_bits, base_ref=reference(base, place / SHARED), **how)
    saved = {SHARED: save(shared, place / SHARED, **settings)}
    under: Checkpoint = load(place / SHARED, base=base)
    for name, model in ours.items():
        made = pack_delta(model, under, bits=bits, base_ref=f"../{SHARED}", **how)
        saved[name] = save(made, place / name, **settings)
    return saved


def _check_names(models: Mapping[str, object], out: Path, overwrite: bool) -> None:
    if len(models) < 2:
        raise UsageError("a family shares a difference, so it takes at least two models; pack one by itself")
    problems = [
        f"{name!r} cannot be a pack's name" for name in models
        if name in ("", ".", "..", SHARED) or "/" in name or "\\" in name or "\0" in name
    ]  # fmt: skip
    if problems:
        raise Problems(f"no folders of {out}", problems)
    for name in (SHARED, *models):
        refuse_existing(out / name, overwrite)


def reference(base: object, pack: Path) -> str | None:
    """What a pack calls its base: the path from the pack's folder for a local one, else as it was given."""
    if not isinstance(base, str | Path):
        return None
    if Path(base).exists():
        return os.path.relpath(Path(base).resolve(), pack.resolve())
    ref = parse_ref(str(base))
    if ref.kind is Kind.LOCAL and ref.lora is not None and Path(ref.path).exists():
        return None  # a base with an adapter has two places; it has to be given again
    return str(base)
