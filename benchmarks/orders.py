"""`alignment.py order`: weight matching that begins with the groups in the most tensors, against a drawn order.

Pairs of small networks: of independent random starts, one and itself in another order with noise (half as much,
or twice as much as weights), and language models that are trained here for 250 steps on a text of WEFT_DATA. CPU
time of one ascent, and the cosine of the weights that it reaches.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import weft
from weft.align.weights import Ascent, Pair
from weft.bench.suites.data import data_folder

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attn_implementation": "eager",
}
TOKENS = torch.arange(16).reshape(2, 8)


def network(kind: str, seed: int) -> nn.Module:
    import transformers as tf

    from alignment import ResNet20

    torch.manual_seed(seed)
    if kind == "resnet20":
        return ResNet20(16).eval()
    bodies = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    made: nn.Module
    if kind == "llama":
        made = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **bodies, num_key_value_heads=2))
    elif kind == "gpt2":
        made = tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, n_embd=64, n_layer=4, n_head=4, n_positions=64))
    else:
        made = tf.BertForMaskedLM(tf.BertConfig(**SMALL, **bodies, max_position_embeddings=64))
    return made.eval()


def trained(net: Any) -> Any:
    """250 steps on the characters of Shakespeare."""
    path = data_folder() / "lm" / "shakespeare.train.txt.gz"
    text = torch.tensor([min(ord(c), 127) for c in gzip.decompress(path.read_bytes()).decode()])
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(250):
        x = torch.stack([text[i : i + 32] for i in torch.randint(len(text) - 32, (16,)).tolist()])
        optimiser.zero_grad()
        net(input_ids=x, labels=x).loss.backward()
        optimiser.step()
    return net


def pairs(kind: str, how: str, count: int, spec: Any) -> Iterator[tuple[nn.Module, Any]]:
    if how == "trained":
        nets = [trained(network(kind, s)) for s in range(count + 1)]
        yield from pairwise(nets)
        return
    for s in range(count):
        a = network(kind, 2 * s)
        if how == "random":
            yield a, network(kind, 2 * s + 1)
            continue
        moved = spec.apply(a, spec.random(s)).state_dict()
        g = torch.Generator().manual_seed(s)
        noise = float(how.removeprefix("noise "))
        yield (
            a,
            {
                n: t + noise * t.std() * torch.randn(t.shape, generator=g) if t.ndim > 1 else t
                for n, t in moved.items()
            },
        )


def orders(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for kind in options.nets.split(","):
        inputs = torch.randn(2, 3, 16, 16) if kind == "resnet20" else TOKENS
        spec = weft.align.discover(network(kind, 0), inputs)
        language = kind in ("llama", "gpt2")
        for how in ("random", "noise 0.5", "noise 2.0", *(("trained",) if language else ())):
            found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for a, b in pairs(kind, how, options.pairs, spec):
                pair = Pair(spec, weft.load(a), weft.load(b))
                ascent = Ascent(spec, pair)
                norm = ascent.scale(pair.names)
                ascent.climb(spec.identity())  # what is looked up once is not either order's
                for seed in range(options.seeds):
                    for first in found:
                        at, began = spec.identity(), time.process_time()
                        ascent.climb(at, torch.Generator().manual_seed(seed), widest_first=first)
                        found[first].append((time.process_time() - began, ascent.value(at) / norm))
            gain = [a[1] - b[1] for a, b in zip(found[True], found[False], strict=True)]
            share = sum(t for t, _ in found[True]) / sum(t for t, _ in found[False])
            rows.append({"net": kind, "pairs": how, "time": share, "gain": mean(gain), "deviation": stdev(gain),
                         "cosine": mean(c for _, c in found[False]), "runs": len(gain)})  # fmt: skip
            print(f"{kind:9} {how:10} time {share:.2f}, cosine {rows[-1]['cosine']:.4f} {mean(gain):+.4f} "
                  f"± {stdev(gain) / len(gain) ** 0.5:.4f} ({len(gain)} runs)", flush=True)  # fmt: skip
    return rows
