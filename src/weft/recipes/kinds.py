"""What kind of thing a tensor is, read off its name: the vocabulary of `kind:` in a rule.

    kind        names it stands for (any dotted part of the name, in any case)
    ----        ----
    norm        …norm…, ln, ln_1, ln_f, bn1 …                 input_layernorm, q_norm, LayerNorm
    router      gate, router, gating, …expert_gate            mlp.gate.weight, block_sparse_moe.gate
    expert      expert, experts, shared_expert(s)             beside mlp, which an expert also is
    attention   …attn…, …attention…, q/k/v/o_proj, qkv        self_attn.q_proj, attn.c_attn
    mlp         mlp, ffn, feed_forward, moe, experts, fc1, …  mlp.up_proj, DenseReluDense
    conv        …conv…, downsample                            conv1.weight, features.0.conv
    embedding   …embed…, wte, wpe, cls_token, …token          model.embed_tokens, patch_embed.proj
    head        lm_head, head, classifier, score, embed_out … outside the blocks only
    bias        the last part is bias or ends in _bias        any of the above may be a bias, too
    other       none of these but, perhaps, bias

The first row that fits decides, in the order norm, router, embedding (head before it outside the blocks),
attention, mlp, conv: a norm inside an attention module is a norm. `bias` and `expert` come on top.
"""

from __future__ import annotations

import re
from functools import lru_cache

from weft.methods.layers import block_of

KINDS = ("attention", "mlp", "norm", "embedding", "head", "router", "expert", "conv", "bias", "other")
SYNONYMS = {
    "attn": "attention", "self_attn": "attention", "ffn": "mlp", "feed_forward": "mlp", "norms": "norm",
    "layernorm": "norm", "embeddings": "embedding", "embed": "embedding", "lm_head": "head", "gate": "router",
    "experts": "expert", "convolution": "conv", "biases": "bias",
}  # fmt: skip

_HEAD = re.compile(r"lm_head|heads?|classifier|score|embed_out|output|fc|qa_outputs|cls|proj_out|logits")
_MAIN = (
    ("norm", re.compile(r".*norm.*|(?:.*_)?ln(?:_.*|\d.*)?|(?:.*_)?bn\d*")),
    ("router", re.compile(r"gate|router|gating|.*expert_gate|.*router")),
    ("embedding", re.compile(r".*embed.*|wte|wpe|.*_tokens?|relative_attention_bias")),
    ("attention", re.compile(r".*attn.*|.*attention.*|[qkvo]_proj|out_proj|qkv|in_proj_(?:weight|bias)")),
    ("mlp", re.compile(
        r"mlp|ffn?|.*feed_?forward.*|.*moe|.*experts?|fc\d|w[123]|dense\w*dense|intermediate|output"
        r"|(?:gate|up|down|gate_up)_proj|linear\d"
    )),
    ("conv", re.compile(r".*conv.*|downsample")),
)  # fmt: skip
_EXPERT = re.compile(r"(?:shared_)?experts?")
_BEFORE = re.compile(r".*(?:embed|pre).*|conv1|bn1|.*stem.*|wte|wpe")


@lru_cache(maxsize=65536)
def kinds_of(name: str) -> frozenset[str]:
    """The kinds a tensor of this name is; one of them but `bias`, `expert` is its main kind."""
    parts = name.lower().split(".")
    found = {_main(parts, block_of(name) is None)}
    if any(_EXPERT.fullmatch(p) for p in parts):
        found.add("expert")
    if parts[-1] == "bias" or parts[-1].endswith("_bias"):
        found.add("bias")
    return frozenset(found)


def _main(parts: list[str], outside: bool) -> str:
    if outside and any(_HEAD.fullmatch(p) for p in parts) and not _is(parts, "norm"):
        return "head"
    return next((kind for kind, rule in _MAIN if any(rule.fullmatch(p) for p in parts)), "other")


def _is(parts: list[str], kind: str) -> bool:
    return any(dict(_MAIN)[kind].fullmatch(p) for p in parts)


def after_blocks(name: str) -> bool:
    """True for a tensor outside the blocks that comes after them: the final norm, the head.

    Data flows from the embeddings through the blocks to the head, but a name does not say when it is used.
    Heads and norms come last, unless a part of the name says that they belong to the input
    (`embeddings.LayerNorm`, `ln_pre`, a ResNet's stem `bn1`). All else comes first.
    """
    if block_of(name) is not None:
        return False
    kinds = kinds_of(name)
    if "head" in kinds:
        return True
    return "norm" in kinds and not any(_BEFORE.fullmatch(p) for p in name.lower().split("."))
