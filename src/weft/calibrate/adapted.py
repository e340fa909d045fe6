"""`Adapted`: a network with small maps behind some of its layers, for all tasks or for one each.

What cannot be folded into weights stays a map: a scale and shift where a layer has no bias, the adapters of
representation surgery. Maps are kept as safetensors beside the weights and put back by `load_adapted`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.calibrate.network import hooked
from weft.errors import DataError, Problems, UsageError, did_you_mean
from weft.statistics.placed import placed

FILE = "calibration/maps.safetensors"
"""Where an output folder keeps the maps."""
NOTE = "weft_calibration"
ANY = "*"
"""The task of maps that are for every input."""
INPUT = "<"
"""A place `<name` is before the layer `name`; `name` alone is behind it."""


class Scaled(nn.Module):
    """y ↦ s ⊙ y + t by channel."""

    def __init__(self, scale: Tensor, shift: Tensor, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = (y.movedim(self.axis, -1) * self.scale.to(y.dtype) + self.shift.to(y.dtype)).movedim(
            -1, self.axis
        )
        return out


class Surgery(nn.Module):
    """z ↦ z − U ReLU(D z), D [r, d], U [d, r] (arXiv:2402.02705); U starts at zero, so it changes nothing."""

    def __init__(self, down: Tensor, up: Tensor, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, z: Tensor) -> Tensor:
        x = z.movedim(self.axis, -1)
        out: Tensor = (x - torch.relu(x @ self.down.to(x.dtype).T) @ self.up.to(x.dtype).T).movedim(
            -1, self.axis
        )
        return out


KINDS: dict[str, tuple[type[Scaled] | type[Surgery], tuple[str, str]]] = {
    "scaled": (Scaled, ("scale", "shift")),
    "surgery": (Surgery, ("down", "up")),
}
Maps = Mapping[str, Mapping[str, nn.Module]]
"""Task (or `ANY`) → place → map."""


class Adapted(nn.Module):
    """`inner`, whose layers' outputs (or inputs, at `<name`) go through the maps of the task that is asked for.

    `private`: parameters of `inner` that are a task's own (its classifier), by task.
    """

    def __init__(
        self, inner: nn.Module, maps: Maps, private: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        super().__init__()
        known = dict(inner.named_modules())
        places = {p for by_place in maps.values() for p in by_place}
        lost = [p for p in sorted(places) if p.removeprefix(INPUT) not in known]
        if lost:
            raise Problems("there are no such layers", [f"{p!r}{did_you_mean(p, known)}" for p in lost])
        self.inner = inner
        self.maps = nn.ModuleDict(
            {_key(t): nn.ModuleDict({_key(p): m for p, m in by.items()}) for t, by in maps.items()}
        )
        self.private = nn.ModuleDict(
            {
                _key(t): nn.ParameterDict(
                    {_key(n): nn.Parameter(v, requires_grad=False) for n, v in own.items()}
                )
                for t, own in (private or {}).items()
            }
        )

    @property
    def tasks(self) -> list[str]:
        """The tasks that have something of their own."""
        return [t for t in dict.fromkeys(map(_name, [*self.maps, *self.private])) if t != ANY]

    @property
    def added(self) -> int:
        """How many numbers there are beside the weights of `inner`."""
        return sum(p.numel() for part in (self.maps, self.private) for p in part.parameters())

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        with self.at(task):
            return functional_call(self.inner, self.own(task), args, kwargs)

    def own(self, task: str | None) -> dict[str, Tensor]:
        if task is None or _key(task) not in self.private:
            return {}
        own = self.private[_key(task)]
        assert isinstance(own, nn.ParameterDict)
        return {_name(k): v for k, v in own.items()}

    @contextmanager
    def at(self, task: str | None) -> Iterator[None]:
        """While inside, `inner` runs with the maps of a task. UsageError where the task is unknown or unsaid."""
        if task is None and self.tasks:
            raise UsageError(f"say for which task the network is called (task=…): {', '.join(self.tasks)}")
        if task is not None and task not in self.tasks:
            raise UsageError(
                f"there is no task {task!r}{did_you_mean(task, self.tasks)}; known: {', '.join(self.tasks)}"
            )
        found: dict[str, nn.Module] = {}
        for t in (ANY, task):
            if t is not None and _key(t) in self.maps:
                by_place = self.maps[_key(t)]
                assert isinstance(by_place, nn.ModuleDict)
                found |= {_name(k): m for k, m in by_place.items()}
        modules = dict(self.inner.named_modules())
        with hooked(_hook(modules[p.removeprefix(INPUT)], p, m) for p, m in found.items()):
            yield

    # -- text and bytes ----------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every added number by task, place and part."""
        found: dict[str, Tensor] = {}
        for task, by_place in self.maps.items():
            assert isinstance(by_place, nn.ModuleDict)
            for key, m in by_place.items():
                found |= {
                    f"{_name(task)}/{_name(key)}/{leaf}": p.detach() for leaf, p in m.named_parameters()
                }
        for task, own in self.private.items():
            assert isinstance(own, nn.ParameterDict)
            found |= {f"{_name(task)}/private/{_name(k)}": v.detach() for k, v in own.items()}
        return found

    def to_bytes(self) -> bytes:
        """The maps as one safetensors file."""
        from safetensors.torch import save

        about = [
            {"task": _name(t), "place": _name(k), "kind": _kind(m), "axis": m.axis}
            for t, by_place in self.maps.items()
            for k, m in by_place.items()  # type: ignore[operator, union-attr]
        ]
        state = {n: t.cpu().contiguous() for n, t in self.tensors().items()}
        return save(state, {NOTE: json.dumps(about, sort_keys=True)})


def load_adapted(folder: Any, module: nn.Module | None = None) -> Adapted:
    """A calibrated network from the folder that it was saved in.

    `module` is the plain network (copied); without it the folder's config names a model of transformers.
    DataError where the folder holds no maps or they do not fit the network.
    """
    from pathlib import Path

    from weft.checkpoints.safetensors import SafetensorsFile, read_header
    from weft.checkpoints.sources import LocalSource
    from weft.checkpoints.strictjson import parse_json

    path = Path(folder) / FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no {FILE}: it is an ordinary checkpoint, which weft.load reads")
    net, _ = placed(str(folder), module)
    source = LocalSource(path)
    header = read_header(source)
    values = SafetensorsFile(source).state_dict()
    about = parse_json(
        b'{"maps": ' + header.metadata.get(NOTE, "[]").encode() + b"}", str(path), "config-json", depth=8
    )["maps"]
    maps: dict[str, dict[str, nn.Module]] = {}
    private: dict[str, dict[str, Tensor]] = {}
    try:
        for row in about:
            made, leaves = KINDS[row["kind"]]
            task, place = str(row["task"]), str(row["place"])
            given = [values.pop(f"{task}/{place}/{leaf}") for leaf in leaves]
            maps.setdefault(task, {})[place] = made(given[0], given[1], int(row["axis"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no file of maps that weft wrote: {error!s:.80}") from None
    for name, value in values.items():
        task, _, rest = name.partition("/private/")
        private.setdefault(task, {})[rest] = value
    return Adapted(net, maps, private).eval().requires_grad_(False)


def _hook(layer: nn.Module, place: str, m: nn.Module) -> Any:
    if place.startswith(INPUT):
        return layer.register_forward_pre_hook(lambda _, args: (m(args[0]), *args[1:]))
    return layer.register_forward_hook(lambda _, args, y: _first(y, m))


def _first(y: Any, m: nn.Module) -> Any:
    """The map on an output, or on the first of several."""
    return (m(y[0]), *y[1:]) if isinstance(y, tuple) else m(y)


def _kind(m: nn.Module) -> str:
    return next(k for k, (made, _) in KINDS.items() if type(m) is made)


def _key(name: str) -> str:
    """A name as that of a module: without dots, and none of ModuleDict's own attributes."""
    return ":" + name.replace(".", "/")


def _name(key: str) -> str:
    return key.removeprefix(":").replace("/", ".")
