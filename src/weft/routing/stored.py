"""Routed models on disk: `routing.safetensors` with `weft_routing.json` beside it; no pickle, nothing executed.

Tensors: `net.<name>` (θs, under the module's own names), `residual.<t>.<name>.<part>`, `over.<name>` (the vector
that masks are over), `gate.<key>.<name>`. The network's code is the caller's: its weights are all in the file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Asset, TensorInfo
from weft.checkpoints.company import asset
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.folders import Folder
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown
from weft.checkpoints.load import open_folder
from weft.checkpoints.memory import StateDict
from weft.checkpoints.refs import parse_ref
from weft.checkpoints.safetensors import SafetensorsFile
from weft.deltas.exact import Whole
from weft.deltas.format import Entry
from weft.deltas.scheme import Scheme
from weft.deltas.sparse import Sparse
from weft.engine.save import Saved
from weft.engine.save import save as save_files
from weft.errors import DataError, DataProblems, UsageError
from weft.routing.blocks import Block
from weft.routing.format import FILE, WEIGHTS, Document, parse_document
from weft.routing.gates import Directions, Prototypes, Router
from weft.routing.gating import Gating
from weft.routing.masked import Masked
from weft.routing.residuals import Residual
from weft.routing.routed import Routed

WIDEST = 1 << 24
"""No gate looks at more features."""


class _Parts(StateDict):
    """All tensors of a routed model, and its description."""

    stem = WEIGHTS.removesuffix(".safetensors")

    def __init__(self, tensors: Mapping[str, Tensor], document: bytes, origin: str) -> None:
        super().__init__({n: t.detach().contiguous() for n, t in tensors.items()}, origin)
        self.document = document

    @property
    def assets(self) -> tuple[Asset, ...]:
        return (asset(FILE, self.document),)


def save(routed: Routed, path: str | Path, *, overwrite: bool = False) -> Saved:
    """Write the folder; it appears under its name when it is whole."""
    tensors = {f"net.{n}": routed.value(n) for n in routed.names}
    entries: dict[str, tuple[Entry | None, ...]] = {}
    for name, residual in zip(routed.residual_names, routed.residuals, strict=True):
        assert isinstance(residual, Residual)
        listed: list[Entry | None] = []
        for t, scheme in enumerate(residual.schemes):
            whole = residual.part(t, "whole").dtype if isinstance(scheme, Whole) else None
            listed.append(None if scheme is None else Entry(scheme, whole))
        entries[name] = tuple(listed)
        for task, part, value in residual.stored():
            tensors[f"over.{name}" if task is None else f"residual.{task}.{name}.{part}"] = value
    for key, gate in routed.gates.items():
        tensors |= {f"gate.{key}.{n}": t for n, t in gate.state_dict().items()}
    document = Document(
        routed.kind, tuple(routed.tasks), tuple(routed.blocks), routed.gating,
        tuple(routed.rest_row.tolist()), routed.combining, routed.parts[0].how, entries, tuple(routed.fitted),
    )  # fmt: skip
    # each tensor by itself: parts of one expert may be the very same as another's
    apart = {n: t.clone() for n, t in tensors.items()}
    return save_files(_Parts(apart, document.to_json(), routed.origin), path, overwrite=overwrite)


def load(path: str | Path, module: nn.Module, *, limits: Limits = DEFAULT_LIMITS) -> Routed:
    """The routed model in a folder, in a copy of `module`, whose weights it replaces.

    Raises UnsafeFile and DataProblems for a damaged or forged folder, UsageError for what is none.
    """
    folder = open_folder(parse_ref(str(path)))
    if FILE not in folder.files():
        raise UsageError(f"{folder.name} is no routed model: it has no {FILE}")
    document = parse_document(
        folder.read(FILE, limits.index_bytes, "routing-size"), f"{folder.name}/{FILE}", limits
    )
    return _Reading(folder, document, module, limits).routed()


class _Reading:
    """One folder held against its description and the module."""

    def __init__(self, folder: Folder, document: Document, module: nn.Module, limits: Limits) -> None:
        self.where, self.document = folder.name, document
        self.parts = SafetensorsFile(folder.open(WEIGHTS), limits)
        self.net = copy.deepcopy(module).eval().requires_grad_(False)
        self.problems: list[str] = []
        self.claimed: set[str] = set()

    def routed(self) -> Routed:
        document = self.document
        targets = self._net()
        self._blocks(targets)
        wanted = self._residual_parts(targets)
        gates = self._gates()
        self.problems += [f"{shown(n)} belongs to nothing" for n in self.parts if n not in self.claimed]
        self._raise()
        residuals = {n: self._residual(n, targets[n], wanted[n]) for n in document.residuals}
        made = {key: self._gate(key, gate) for key, gate in gates.items()}
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(self._read(f"net.{name}"))
        self._raise()
        return Routed(
            self.net, document.blocks, residuals, document.gating, document.tasks,
            rest=torch.tensor(document.rest), how=document.how, combining=document.combining,  # type: ignore[arg-type]
            gates=made, fitted=document.fitted, origin=self.where,
        )  # fmt: skip

    def _raise(self) -> None:
        if self.problems:
            listed = self.problems if len(self.problems) <= 50 else [*self.problems[:50], "…"]
            raise DataProblems(
                f"the routed model {self.where} cannot be read into this {type(self.net).__name__}", listed
            )

    def _claim(self, name: str, info: TensorInfo) -> None:
        """A stored tensor that must be there, of this shape and dtype."""
        self.claimed.add(name)
        if name not in self.parts:
            self.problems.append(f"{shown(name)} is missing")
        elif self.parts.info(name) != info:
            own = self.parts.info(name)
            self.problems.append(
                f"{shown(name)} is {own.dtype} {list(own.shape)}, not {info.dtype} {list(info.shape)}"
            )

    def _read(self, name: str) -> Tensor:
        values = self.parts.tensor(name)
        if values.is_floating_point() and not bool(values.isfinite().all()):
            self.problems.append(f"{shown(name)} has NaN or infinite values")
        return values.clone()

    def _net(self) -> dict[str, Tensor]:
        """What of the module is filled; every stored `net.` tensor has its place."""
        own = {id(p): n for n, p in reversed(list(self.net.named_parameters(remove_duplicate=False)))}
        state = self.net.state_dict(keep_vars=True)
        targets = {n: t for n, t in state.items() if own.get(id(t), n) == n}
        if self.document.module != type(self.net).__name__:
            self.problems.append(f"it was made of a {shown(self.document.module)}")
        for name, target in targets.items():
            self._claim(f"net.{name}", TensorInfo(tuple(target.shape), target.dtype))
        return targets

    def _blocks(self, targets: Mapping[str, Tensor]) -> None:
        modules = dict(self.net.named_modules())
        names = [b.name for b in self.document.blocks]
        at = self.document.gating.at
        if at is not None and at not in modules:
            self.problems.append(f"gating: the module has no part {shown(at)} to look at")
        for block in self.document.blocks:
            if block.name not in modules:
                self.problems.append(f"the module has no part {shown(block.name)}")
                continue
            inside = [m for m in names if m != block.name and (not m or block.name.startswith(f"{m}."))]
            if inside or names.count(block.name) > 1:
                self.problems.append(f"the part {shown(block.name)} lies in another")
            dot = f"{block.name}." if block.name else ""
            for name in (*block.parameters, *block.buffers):
                if name not in targets or not name.startswith(dot) or not is_mergeable(targets[name].dtype):
                    self.problems.append(f"{shown(name)} is no weight of the part {shown(block.name)}")

    def _residual_parts(self, targets: Mapping[str, Tensor]) -> dict[str, list[dict[str, TensorInfo]]]:
        routed = {n for b in self.document.blocks for n in (*b.parameters, *b.buffers)}
        wanted: dict[str, list[dict[str, TensorInfo]]] = {}
        for name, entries in self.document.residuals.items():
            if name not in routed or name not in targets:
                self.problems.append(f"{shown(name)} has residuals but is not routed")
                continue
            shape = tuple(targets[name].shape)
            listed = []
            for t, entry in enumerate(entries):
                found = {} if entry is None else self._entry(name, entry, shape)
                for part, info in found.items():
                    self._claim(f"residual.{t}.{name}.{part}", info)
                listed.append(found)
            wanted[name] = listed
            if any(e is not None and isinstance(e.scheme, Masked) for e in entries):
                self._claim(f"over.{name}", TensorInfo(shape, torch.float32))
        return wanted

    def _entry(self, name: str, entry: Entry, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        info = TensorInfo(shape, entry.dtype or torch.float32)
        whole = isinstance(entry.scheme, Whole)
        problem = entry.scheme.problem(info)
        if problem is None and (whole != (entry.dtype is not None) or not is_mergeable(info.dtype)):
            problem = f"values of dtype {info.dtype}"
        if problem is not None:
            self.problems.append(f"{shown(name)} {list(shape)}: {entry.scheme.kind} cannot hold {problem}")
            return {}
        return entry.scheme.parts(info)

    def _residual(self, name: str, target: Tensor, parts: list[dict[str, TensorInfo]]) -> Residual:
        schemes: list[Scheme | None] = [
            None if e is None else e.scheme for e in self.document.residuals[name]
        ]
        values = [{p: self._read(f"residual.{t}.{name}.{p}") for p in each} for t, each in enumerate(parts)]
        over = self._read(f"over.{name}") if any(isinstance(s, Masked) for s in schemes) else None
        made = Residual(target.shape, schemes, values, over)
        for t, scheme in enumerate(schemes):
            if isinstance(scheme, Sparse) and not self.problems:  # positions may contradict one another
                try:
                    made.of(t)
                except DataError as error:
                    self.problems.append(f"residual.{t}.{name}: {error}")
        return made

    # -- gates ---------------------------------------------------------------------------------------

    def _gates(self) -> dict[str, nn.Module]:
        """Empty gates as wide as what is stored; their tensors are claimed."""
        gating, count = self.document.gating, len(self.document.tasks)
        keys = (
            ["all"]
            if gating.scope == "model" or gating.tied
            else [str(i) for i in range(len(self.document.blocks))]
        )
        if gating.kind in ("oracle", "entropy"):
            return {}
        stored = [n for n in self.parts if n.startswith("gate.")]
        if not stored and gating.kind == "router":
            return {}  # saved before it was trained
        made: dict[str, nn.Module] = {}
        for key in keys:
            gate = self._empty(key, gating, count)
            if gate is None:
                continue
            made[key] = gate
            for name, value in gate.state_dict().items():
                self._claim(f"gate.{key}.{name}", TensorInfo(tuple(value.shape), value.dtype))
        return made

    def _empty(self, key: str, gating: Gating, count: int) -> nn.Module | None:
        """A gate of the stored sizes, held against the number of experts; None with a problem told."""
        sizing = {"prototype": "centres", "energy": "rows", "residue": "rows"}.get(gating.kind, "shift")
        name = f"gate.{key}.{sizing}"
        shape = self.parts.info(name).shape if name in self.parts else ()
        axes = {"centres": 2, "rows": 3, "shift": 1}[sizing]
        if len(shape) != axes or not all(0 < s <= WIDEST for s in shape) or (axes > 1 and shape[0] != count):
            self.problems.append(
                f"{shown(name)} of shape {list(shape)} is no part of a gate of {count} experts"
            )
            return None
        if gating.kind == "preference" and shape[0] != count:
            self.problems.append(f"{shown(name)}: a preference has {count} numbers, not {shape[0]}")
            return None
        with torch.device("meta"):
            if sizing == "centres":
                return Prototypes(torch.zeros(shape))
            if sizing == "rows":
                return Directions(torch.zeros(shape), gating.kind == "residue")
        width = gating.width or 2 * shape[0]
        if max(width, shape[0]) * max(width, count) > WIDEST * 64:
            self.problems.append(f"{shown(name)}: a gate {width} wide is larger than weft reads")
            return None
        stored = sum(self.parts.info(n).numel for n in self.parts if n.startswith(f"gate.{key}."))
        needed = shape[0] * (width if gating.hidden else count)
        if stored < needed:  # before anything of that size is made
            self.problems.append(
                f"gate.{key} holds {stored} numbers where its first layer alone has {needed}"
            )
            return None
        return Router(shape[0], count, gating)

    def _gate(self, key: str, gate: nn.Module) -> nn.Module:
        state = {n: self._read(f"gate.{key}.{n}") for n in gate.state_dict()}
        return gate.to_empty(device="cpu").requires_grad_(False) if self.problems else _with(gate, state)


def _with(gate: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    gate = gate.to_empty(device="cpu") if any(b.is_meta for b in gate.buffers()) else gate
    gate.load_state_dict(dict(state))
    return gate.requires_grad_(False)


__all__ = ["Block", "load", "save"]
