"""`load`: whatever a user may call a model → a `Checkpoint`.

A folder is read by what is in it, by a fixed order of names; two answers are an error that lists them,
never a guess. Reading a reference costs its headers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.folders import Folder, LocalFolder
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import CONFIG, Model, assets_of, read_config
from weft.checkpoints.quantised import dequantised
from weft.checkpoints.refs import Kind, Ref, parse_ref
from weft.checkpoints.safetensors import SafetensorsFile
from weft.checkpoints.sharded import load_sharded
from weft.checkpoints.sources import ByteSource, LocalSource
from weft.errors import DataError, UsageError, did_you_mean

ADAPTER_CONFIG = "adapter_config.json"
DELTA_CONFIG, DELTA_WEIGHTS = "weft_delta.json", "delta.safetensors"
ROUTING_CONFIG = "weft_routing.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_PREFERRED = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("*.safetensors",),
    ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ("diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model.bin"),
    ("*.torch",),
)
_NO_WEIGHTS = {
    "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt",
    "rng_state.pth", "adapter_model.safetensors", "adapter_model.bin",
}  # fmt: skip
PROBED = (
    CONFIG, ADAPTER_CONFIG, "adapter_model.safetensors", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", DELTA_CONFIG, DELTA_WEIGHTS,
    *(name for names in _PREFERRED for name in names if "*" not in name),
)  # fmt: skip
"""What is asked for, name by name, where a server cannot list a folder."""


def load(source: object, *, base: object = None, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """A checkpoint from a path, Hub id, URL, `Ref`, module, state dict, tensor or checkpoint.

    `base` is the model an adapter (or delta) folder belongs to, where its own config does not say or says wrongly.
    Raises UsageError where nothing is meant by `source`, DataError where it cannot be read.
    """
    if isinstance(source, Path):
        ref = Ref(str(source))  # a Path is a path: its `@` and `+` mean nothing, nor is it a Hub id
        source = ref if ref.kind is Kind.LOCAL else Ref(f"./{source}")
    if isinstance(source, str):
        source = parse_ref(source)
    if not isinstance(source, Ref):
        if base is not None:
            raise UsageError("base= belongs to an adapter folder; this source is no folder")
        return source if isinstance(source, Checkpoint) else StateDict(source)  # type: ignore[arg-type]
    if source.lora is None:
        return _load_place(source, base, limits)
    if base is not None:
        raise UsageError(f"{source} names both a model and an adapter, so base= cannot be given too")
    from weft.checkpoints.adapted import Adapted
    from weft.checkpoints.adapters import load_adapter

    model = _load_place(Ref(source.path, source.revision), None, limits)
    return Adapted(model, load_adapter(source.lora, limits=limits), origin=str(source))


def open_folder(ref: Ref) -> Folder:
    """The folder that a reference means: local, in the Hub's cache, on the Hub, at a URL."""
    if ref.kind is Kind.URL:
        from weft.checkpoints.remote import RemoteFolder

        if ref.revision is not None:
            raise UsageError(f"{ref.path} is a URL and has no revision; write @@ for an @ in it")
        return RemoteFolder(ref.path, probed=PROBED)
    path = Path(ref.path)
    if ref.revision is not None and (path.exists() or ref.kind is Kind.LOCAL):
        raise UsageError(
            f"{path} is a local path and has no revision {ref.revision!r}; write @@ for an @ in a path"
        )
    if path.is_dir():
        return LocalFolder(path)
    if ref.kind is Kind.HUB and not path.exists():
        from weft.checkpoints.hub import hub_folder

        return hub_folder(ref.path, ref.revision)
    raise (_missing(path) if not path.exists() else DataError(f"{path} is no folder; pass its folder"))


def _load_place(ref: Ref, base: object, limits: Limits) -> Checkpoint:
    if ref.kind is Kind.URL:
        from weft.checkpoints.remote import RemoteSource, remote_parent

        if ref.path.split("?")[0].endswith((".safetensors", *TORCH_SUFFIXES)):
            return dequantised(open_weights(RemoteSource(ref.path, limits), limits))
        if ref.path.endswith(_INDEX_SUFFIXES):
            parent, name = remote_parent(ref.path, PROBED)
            return _with_company(parent, _load_index(parent, name, limits), limits)
    path = Path(ref.path)
    if ref.kind is not Kind.URL and path.exists() and not path.is_dir():
        if ref.revision is not None:
            raise UsageError(f"{path} is a file and has no revision; write @@ for an @ in a path")
        return _load_file(path, limits)
    return load_folder(open_folder(ref), base=base, limits=limits)


def _load_file(path: Path, limits: Limits) -> Checkpoint:
    folder = LocalFolder(path.parent)
    if path.name.endswith(_INDEX_SUFFIXES):
        weights: Checkpoint = _load_index(folder, path.name, limits)
    else:
        weights = open_weights(LocalSource(path), limits)
    if folder.exists(CONFIG):
        return _with_company(folder, weights, limits, str(path))
    return dequantised(weights)


def load_folder(folder: Folder, *, base: object = None, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """The checkpoint in a folder: its weights with config and assets, or its adapter over a base."""
    names = folder.files()
    whole = {name for group in _PREFERRED for name in group}
    if ADAPTER_CONFIG in names and whole.isdisjoint(names):
        from weft.checkpoints.adapters import adapted_folder

        return adapted_folder(folder, base=base, limits=limits)
    if DELTA_CONFIG in names and whole.isdisjoint(names):
        from weft.deltas.opening import open_delta  # a room below, for these folders alone

        return open_delta(folder, base=base, limits=limits)
    if ROUTING_CONFIG in names and whole.isdisjoint(names):
        raise UsageError(
            f"{folder.name} holds a routed model, which needs its module: weft.routing.load(path, module), and "
            "checkpoint(…) of that for one static model"
        )
    if base is not None:
        raise UsageError(
            f"base= belongs to an adapter folder, but {folder.name} has no {ADAPTER_CONFIG} or {DELTA_CONFIG}"
        )
    chosen = _choose(folder, names)
    if chosen.endswith(_INDEX_SUFFIXES):
        weights: Checkpoint = _load_index(folder, chosen, limits)
    else:
        weights = open_weights(folder.open(chosen), limits)
    return _with_company(folder, weights, limits)


def _with_company(
    folder: Folder, weights: Checkpoint, limits: Limits, origin: str | None = None
) -> Checkpoint:
    config = read_config(folder, limits=limits) if folder.exists(CONFIG) else None
    model = Model(weights, config, assets_of(folder, limits), origin or folder.name)
    return dequantised(model)


def _load_index(folder: Folder, name: str, limits: Limits) -> Checkpoint:
    return load_sharded(folder, name, lambda part: open_weights(folder.open(part), limits), limits)


def open_weights(source: ByteSource, limits: Limits) -> Checkpoint:
    name = source.name.split("?")[0]
    if name.endswith(".safetensors"):
        return SafetensorsFile(source, limits)
    if name.endswith(TORCH_SUFFIXES):
        from weft.checkpoints.torchfile import TorchFile

        return TorchFile(source, limits)
    raise UsageError(
        f"{source.name} is no weight file weft reads: pass .safetensors, {', '.join(TORCH_SUFFIXES)}, "
        "an index.json or a folder"
    )


def _candidates(names: Sequence[str]) -> list[str]:
    """The names of the first kind in the order of preference that the folder has."""
    for group in _PREFERRED:
        if group == ("*.safetensors",):
            found = [n for n in names if n.endswith((".safetensors", _INDEX_SUFFIXES[0]))]
            found = [n for n in found if not n.startswith("diffusion_pytorch_model.")]
            indexes = [n for n in found if n.endswith(_INDEX_SUFFIXES[0])]
            found = indexes or found
        elif group == ("*.torch",):
            found = [n for n in names if n.endswith(TORCH_SUFFIXES)]
        else:
            found = [n for n in names if n in group]
        found = [n for n in found if n not in _NO_WEIGHTS]
        if found:
            return found
    return []


def _choose(folder: Folder, names: Sequence[str]) -> str:
    found = _candidates(names)
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(found[:20])
        raise UsageError(f"{folder.name} holds several weight files; pass the one meant: {listed}")
    there = ", ".join(shown(n) for n in [*names, *(f"{s}/" for s in folder.subfolders())][:20])
    raise DataError(
        f"{folder.name} holds no weights (model.safetensors, its index, or a .bin/.pt file); "
        f"it holds: {there or 'nothing'}"
    )


def _missing(path: Path) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        return DataError(f"{path} does not exist, nor does its folder; check the path")
    hint = did_you_mean(path.name, (p.name for p in parent.iterdir()))
    return DataError(f"{path} does not exist{hint or '; check the path'}")
