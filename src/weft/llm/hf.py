"""A checkpoint as a module of transformers, and its tokenizer; without a network and without anyone's code.

The class comes from config.json (`architectures`, else `model_type`), is built on the meta device and takes
its tensors one at a time from the lazy checkpoint, by transformers' own loading: so names that differ between
disk and module, tied weights, and experts stored one by one or fused are all read as transformers reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import EllipsisType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.limits import shown
from weft.engine.record import without_code
from weft.errors import DataError, DataProblems, MissingExtra, UsageError, WeftError

_HALF_AT_LEAST = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TOKENIZER_FILES = (
    "tokenizer", "vocab", "merges", "spiece", "sentencepiece", "special_tokens", "added_tokens",
)  # fmt: skip


def to_transformers(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    architecture: str | None = None,
) -> nn.Module:
    """The checkpoint as the `transformers` model its config names, in evaluation mode.

    Values are those that `weft.save` followed by `from_pretrained` would give: rounded once to the dtype they
    are stored in, then to `dtype` (by default the one that most of them are stored in). The module shares no
    memory with the checkpoint. `architecture` names another class, e.g. "LlamaModel" for the trunk alone.

    Raises UsageError without a config or for a class that transformers does not have, DataProblems naming
    every tensor that is missing, unknown to the class or of another shape, MissingExtra without transformers.
    """
    module, unused = load_module(checkpoint, dtype=dtype, device=device, architecture=architecture)
    if unused:
        raise DataProblems(
            f"{checkpoint.origin}: {type(module).__name__} has no place for tensors of the checkpoint, "
            "so its config contradicts them or another class is meant (architecture=…)",
            unused,
        )
    return module


def load_module(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    architecture: str | None = None,
) -> tuple[nn.Module, list[str]]:
    """As `to_transformers`, but tensors that the class has no place for are named, not refused."""
    made, config = model_class(checkpoint, architecture), config_of(checkpoint)
    checkpoint.survey()
    stored = {name: _Stored(checkpoint, name) for name in [*checkpoint.tensors, *checkpoint.aliases]}
    wanted = dtype or usual_dtype(checkpoint)
    module, unused = _from_pretrained(made, checkpoint, None, config=config, state_dict=stored, dtype=wanted)
    _generation_settings(checkpoint, module)
    # a name that the config ties may belong to a class without that part (a trunk has no head)
    return module.to(device), [n for n in unused if n not in checkpoint.aliases]


def written_module(
    folder: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, list[str]]:
    """As `load_module`, but transformers reads the folder's own files, as those who use the model will."""
    from weft.checkpoints.load import load

    checkpoint = load(folder)
    made, config = model_class(checkpoint), config_of(checkpoint)
    wanted = dtype or usual_dtype(checkpoint)
    module, unused = _from_pretrained(made, checkpoint, str(folder), config=config, dtype=wanted)
    return module.to(device), unused


def _from_pretrained(
    made: Any, checkpoint: Checkpoint, folder: str | None, **settings: Any
) -> tuple[nn.Module, list[str]]:
    """A whole model and the tensors it has no place for; DataProblems where it would not be whole."""
    with quiet():
        try:
            module, found = made.from_pretrained(
                folder,
                ignore_mismatched_sizes=True,  # they are reported below, all of them
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                **settings,
            )
        except WeftError:
            raise
        except Exception as error:  # a config may lead any code of the class astray
            raise DataError(
                f"{checkpoint.origin} cannot be loaded as {made.__name__}: {_reason(error)}; "
                "its config.json contradicts its tensors"
            ) from error
    _complain(checkpoint, made.__name__, found)
    assert isinstance(module, nn.Module)
    return module.eval(), sorted(found["unexpected_keys"])


def config_of(checkpoint: Checkpoint) -> Any:
    """The checkpoint's config as the class of transformers for its `model_type`; no code of others is run."""
    transformers = import_transformers(f"reading the config of {checkpoint.origin}")
    data = checkpoint.config
    if data is None:
        raise UsageError(
            f"{checkpoint.origin} has no config.json, so there is no telling which model it is; "
            "put the model's config.json beside the weights"
        )
    kind = data.get("model_type")
    known = transformers.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        said = f"the model_type {shown(kind)}" if kind is not None else "no model_type"
        raise UsageError(
            f"{checkpoint.origin}/config.json has {said}, which transformers {transformers.__version__} does "
            "not have; weft runs no model code from a checkpoint"
        )
    # the values are weft's to dequantise, so transformers must not look for codes
    plain = without_code({k: v for k, v in data.items() if k != "quantization_config"}, [])
    with quiet():
        try:
            return known[kind].from_dict(plain)
        except Exception as error:
            raise DataError(
                f"{checkpoint.origin}/config.json is no {kind} config: {_reason(error)}"
            ) from error


def model_class(checkpoint: Checkpoint, architecture: str | None = None) -> Any:
    """The class: the one asked for, else the one the config names, else the one for its model_type.

    Only classes of transformers that are made for that config count; UsageError where there is none.
    """
    transformers = import_transformers(f"building a model from {checkpoint.origin}")
    config = config_of(checkpoint)
    if architecture is not None:
        names = [architecture]
    else:
        listed = (checkpoint.config or {}).get("architectures")
        names = [n for n in listed if isinstance(n, str)] if isinstance(listed, list) else []
    for name in names:
        made = getattr(transformers, name, None)
        if (
            isinstance(made, type)
            and issubclass(made, transformers.PreTrainedModel)
            and isinstance(config, getattr(made, "config_class", None) or ())
        ):
            return made
    if names:
        raise UsageError(
            f"transformers {transformers.__version__} has no model {', '.join(map(shown, names))} for the "
            f"model_type {config.model_type!r} of {checkpoint.origin}; correct architectures in its config.json"
        )
    for family in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        made = family.get(type(config), None)
        if made is not None:
            return made[0] if isinstance(made, tuple) else made
    raise UsageError(
        f"transformers {transformers.__version__} has no model for the model_type {config.model_type!r} of "
        f"{checkpoint.origin}; state architectures in its config.json"
    )


def tokenizer_of(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer among the files that travel with the checkpoint, or None where there is none.

    DataError where there are tokenizer files that transformers cannot read.
    """
    if not any(asset.name.startswith(_TOKENIZER_FILES) for asset in checkpoint.assets):
        return None
    transformers = import_transformers(f"reading the tokenizer of {checkpoint.origin}")
    with TemporaryDirectory(prefix="weft-tokenizer-") as folder, quiet():
        write_files(checkpoint, Path(folder))
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise DataError(
                f"the tokenizer of {checkpoint.origin} cannot be read: {_reason(error)}; "
                "compare its tokenizer files with those of the model it was made from"
            ) from error


def write_files(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json, without what could run code, and every file that travels with the weights."""
    if checkpoint.config is not None:
        plain = without_code(dict(checkpoint.config), [])
        (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    for asset in checkpoint.assets:
        target = folder / asset.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(asset.read())


def usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most elements are stored in; bfloat16 where that has 8 bits only."""
    counts: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if is_mergeable(info.dtype):
            counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
    most = max(counts, key=lambda d: counts[d], default=torch.float32)
    return most if most in _HALF_AT_LEAST else torch.bfloat16


def import_transformers(purpose: str) -> ModuleType:
    """The library, imported when it is first needed."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "llm", purpose) from None
    module: ModuleType = transformers
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars and warnings: what matters of them is raised or reported by weft."""
    from transformers.utils import logging as log

    logging: Any = log
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class _Stored:
    """One tensor of a checkpoint, read when transformers asks for all of it, as it does of a file's slices."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, checkpoint.aliases.get(name, name)

    def get_shape(self) -> list[int]:
        return list(self.checkpoint.info(self.name).shape)

    def __getitem__(self, index: EllipsisType) -> Tensor:
        source = self.checkpoint
        source.ready(self.name)
        values = source.tensor(self.name, dtype=source.info(self.name).dtype)
        copy = values.clone(
            memory_format=torch.contiguous_format
        )  # inputs in memory must not be trained with it
        source.release(self.name)
        return copy[index]


def _complain(checkpoint: Checkpoint, name: str, found: Mapping[str, Any]) -> None:
    problems = [f"{shown(n)}: missing" for n in sorted(found["missing_keys"])]
    problems += [
        f"{shown(n)}: shape {list(stored)}, where the config makes it {list(wanted)}"
        for n, stored, wanted in sorted(found["mismatched_keys"])
    ]
    problems += [str(message) for message in found["error_msgs"]]
    if problems:
        raise DataProblems(f"{checkpoint.origin} does not hold a whole {name}", problems)


def _generation_settings(checkpoint: Checkpoint, module: Any) -> None:
    """generation_config.json, where it travels with the weights and the model can generate."""
    asset = next((a for a in checkpoint.assets if a.name == "generation_config.json"), None)
    if asset is None or not module.can_generate():
        return
    from transformers import GenerationConfig

    from weft.checkpoints.strictjson import parse_json

    data = parse_json(asset.read(), f"{checkpoint.origin}/{asset.name}", "config-json")
    with quiet():
        module.generation_config = GenerationConfig.from_dict(data)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {shown(lines[0])[1:-1]}" if lines else type(error).__name__
