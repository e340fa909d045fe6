"""Which parameters of a module are meant: by kind of layer, or by patterns on names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from weft.errors import Problems, UsageError, did_you_mean

Which = str | Sequence[str]
KINDS = ("all", "linear", "attention", "lora")


def chosen(module: nn.Module, which: Which = "all", freeze: Sequence[str] = ()) -> list[str]:
    """Names of the floating parameters that `which` means and no pattern of `freeze` matches, in order.

    "all"; "linear": weights of linear layers (transformers' Conv1D and the fused input projection of
    nn.MultiheadAttention are linear layers); "attention": those inside attention modules (arXiv:2407.07089);
    "lora": adapter factors of a module that peft has wrapped. Else shell patterns on names.
    A tied parameter has the first of its names. UsageError where nothing is chosen or a pattern means nothing.
    """
    known = [n for n, p in module.named_parameters() if p.is_floating_point()]
    patterns = [which] if isinstance(which, str) else list(which)
    lost = [p for p in (*patterns, *freeze) if p not in KINDS and not _matching(known, [p])]
    if lost:
        raise Problems(
            f"no parameter of {type(module).__name__} is called so",
            (f"{p!r}{did_you_mean(p, (*KINDS, *known))}" for p in lost),
        )
    kinds = {kind: _of_kind(module, kind, known) for kind in patterns if kind in KINDS}
    wanted = set(_matching(known, [p for p in patterns if p not in KINDS])).union(*kinds.values())
    frozen = set(_matching(known, freeze))
    found = [n for n in known if n in wanted and n not in frozen]
    if not found:
        hint = "; it has no attention: choose which='linear'" if "attention" in patterns else ""
        raise UsageError(f"{type(module).__name__} has no parameters that are {which!r} and not frozen{hint}")
    return found


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return [n for n in names if any(fnmatchcase(n, p) for p in patterns)]


def _of_kind(module: nn.Module, kind: str, known: Sequence[str]) -> set[str]:
    if kind == "all":
        return set(known)
    if kind == "lora":
        return {n for n in known if "lora_" in n}
    return set(linear_weights(module, attention=kind == "attention")).intersection(known)


def linear_weights(module: nn.Module, attention: bool = False) -> list[str]:
    """Names of the weights of linear layers; with `attention` only of those inside attention modules."""
    inside = [path for path, m in module.named_modules() if is_attention(m)]
    found = []
    for path, layer in module.named_modules():
        if attention and not any(path == a or path.startswith(f"{a}.") for a in inside if a):
            continue
        if isinstance(layer, nn.MultiheadAttention):
            leaves = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
            found += [f"{path}.{leaf}".lstrip(".") for leaf in leaves if getattr(layer, leaf) is not None]
        elif isinstance(layer, nn.Linear) or is_conv1d(layer):
            found.append(f"{path}.weight".lstrip("."))
    return found


def is_attention(module: nn.Module) -> bool:
    """By the class's name, as in torch and in transformers (LlamaAttention, BertSelfAttention)."""
    return "attention" in type(module).__name__.lower()


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D"
