"""Whether a config fits the tensors beside it, and in what the architectures of models differ.

Both are read off names, shapes and configs, before anything is merged, so that one sentence can say what a list
of hundreds of tensors cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.llm.layout import ConfigPath, Layout, Stack, fields, layout
from weft.recipes.kinds import kinds_of

_WIDTHS = ("hidden_size", "d_model", "n_embd", "embedding_size", "dim", "word_embed_proj_dim", "embed_dim")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SHAPE = (
    "model_type", "hidden_size", "d_model", "n_embd", "num_hidden_layers", "num_layers", "num_decoder_layers",
    "n_layer", "encoder_layers", "decoder_layers", "num_attention_heads", "num_heads", "n_head",
    "num_key_value_heads", "head_dim", "d_kv", "intermediate_size", "d_ff", "moe_intermediate_size", *_EXPERTS,
    "vocab_size", "max_position_embeddings", "patch_size", "image_size", "state_size", "conv_kernel",
)  # fmt: skip
"""Fields of a config that decide the names and shapes of tensors."""


def contradictions(model: Checkpoint, found: Layout | None = None) -> list[str]:
    """What the config says that the tensors belie: numbers of layers and experts, width, vocabulary."""
    config = model.config
    if not config:
        return []
    found = found or layout(model)
    return [
        f"{model.origin}: {text}"
        for text in (
            *_layers(config, found),
            *_rows(config, model),
            *_projections(config, model, found),
            *_expert_counts(config, found),
        )
    ]


def _layers(config: Mapping[str, Any], found: Layout) -> list[str]:
    main = found.main()
    if main is None:
        return []
    told = []
    if main.miscounted_by and not main.counted_by and prediction_layers(config, main) == 0:
        path = main.miscounted_by[0]
        told.append(f"its config has {_dotted(path)} {_value(config, path)}, its tensors {main.count} blocks "
                    f"({main.prefix}0 to {main.count - 1})")  # fmt: skip
    if main.holes:
        holes = ", ".join(map(str, main.holes[:8])) + (" …" if len(main.holes) > 8 else "")
        told.append(f"there is no tensor of block{'s' * (len(main.holes) > 1)} {holes} of {main.prefix}")
    return told


def prediction_layers(config: Mapping[str, Any], stack: Stack) -> int:
    """Blocks behind the last, that predict further tokens (DeepSeek-V3), which no counter counts; mostly 0."""
    extra = [v for p, v in fields(config) if p[-1] == "num_nextn_predict_layers" and type(v) is int]
    stated = [_value(config, p) for p in stack.miscounted_by]
    return next((e for e in extra if e > 0 and stack.count - e in stated), 0)


def _rows(config: Mapping[str, Any], model: Checkpoint) -> list[str]:
    """Token embeddings and heads whose two axes are not what the config says."""
    sizes = _all(config, ("vocab_size",))
    widths = _all(config, _WIDTHS)
    told = []
    for name, info in model.tensors.items():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if (
            last not in ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in")
            or len(info.shape) != 2
        ):
            continue
        rows, width = info.shape
        if "embedding" not in kinds_of(name) and last != "shared":
            continue
        if sizes and rows not in sizes:
            told.append(f"{name} has {rows} rows, its config vocab_size {_listed(sizes)}")
        if widths and width not in widths:
            told.append(f"{name} has rows of {width}, its config a width of {_listed(widths)}")
    return told


def _projections(config: Mapping[str, Any], model: Checkpoint, found: Layout) -> list[str]:
    """MLPs and keys of the main stack whose rows no product of the config's sizes makes; one line a projection.

    A config may state several sizes (of shared experts, of global layers), and any of them will do.
    """
    main = found.main()
    inner = _all(config, ("intermediate_size", "shared_expert_intermediate_size", "moe_intermediate_size",
                          "intermediate_size_mlp"))  # fmt: skip
    shared = _all(config, ("n_shared_experts", "num_shared_experts"))
    keys = _ending(config, "key_value_heads")
    heads = [*keys, *_all(config, ("num_attention_heads",))]
    widths = _all(config, ("hidden_size",))
    sizes = _ending(config, "head_dim") + [w // h for w in widths for h in heads if w % h == 0]
    right = {
        "gate_proj": ("intermediate_size", inner, {i * f for i in inner for f in (1, 2, *shared)}),
        "k_proj": ("num_key_value_heads", keys, {h * d for h in heads for d in sizes}),
    }
    told: dict[str, str] = {}
    for name, info in model.tensors.items():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if main is None or last not in right or not name.startswith(main.prefix) or "expert" in name:
            continue
        field, stated, rows = right[last]
        if len(info.shape) == 2 and stated and rows and info.shape[0] not in rows:
            told.setdefault(last, f"{name} has {info.shape[0]} rows, its config {field} {_listed(stated)}")
    return list(told.values())


def _ending(config: Mapping[str, Any], end: str) -> list[int]:
    return list(
        dict.fromkeys(v for p, v in fields(config) if p[-1].endswith(end) and type(v) is int and v > 0)
    )


def _expert_counts(config: Mapping[str, Any], found: Layout) -> list[str]:
    stated = _all(config, _EXPERTS)
    wrong = [e for e in found.experts.values() if stated and e.count not in stated and not e.fused]
    return [f"{e.prefix} has {e.count} experts, its config {_listed(stated)}" for e in wrong[:1]]


def strangers(models: Sequence[Checkpoint]) -> str | None:
    """The `model_type` of each model, where they are not all one though the tensors' names agree; else None.

    Such classes may compute something else with the same tensors: Gemma adds one to its norms' weights, Llama
    does not.
    """
    kinds = {m.origin: (m.config or {}).get("model_type") for m in models}
    known = {k for k in kinds.values() if isinstance(k, str)}
    if len(known) < 2 or any(m.tensors.keys() != models[0].tensors.keys() for m in models):
        return None
    return ", ".join(f"{kind} in {origin}" for origin, kind in kinds.items() if isinstance(kind, str))


def differing(models: Sequence[Checkpoint]) -> list[str]:
    """The fields that decide shapes in which configs differ, each with every model's value."""
    configs = [(m.origin, dict(fields(m.config))) for m in models if m.config]
    told = []
    for path in dict.fromkeys(p for _, config in configs for p in config):
        if path[-1] not in _SHAPE:
            continue
        values = [(origin, config[path]) for origin, config in configs if path in config]
        if len({repr(v) for _, v in values}) > 1:
            told.append(f"{_dotted(path)}: {', '.join(f'{v} in {origin}' for origin, v in values)}")
    return told


def _all(config: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    return list(dict.fromkeys(v for p, v in fields(config) if p[-1] in names and type(v) is int))


def _listed(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))


def _dotted(path: ConfigPath) -> str:
    return ".".join(path)


def _value(config: Mapping[str, Any], path: ConfigPath) -> Any:
    value: Any = config
    for part in path:
        value = value[part]
    return value
