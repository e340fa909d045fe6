"""A union of vocabularies of 128 000 tokens: weft against MergeKit, whole processes, in one run.

    python benchmarks/vocabulary.py [--folder .bench] [--tokens 128000] [--hidden 256] [--mergekit PYTHON]

Three Llama-shaped models of one layer whose size is in their embedding and head: a base, one with the same tokens
under other numbers, and one with 256 tokens more. They are merged linearly with `tokenizer_source: union`. The
planning alone (everything before the first weight is read) is timed inside one process as well. Without
--mergekit only weft is run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from compare import measure

RECIPE = """merge_method: linear
models:
  - {{model: {0}, parameters: {{weight: 0.5}}}}
  - {{model: {1}, parameters: {{weight: 0.3}}}}
  - {{model: {2}, parameters: {{weight: 0.2}}}}
base_model: {0}
tokenizer_source: union
dtype: bfloat16
"""


def byte_level_bpe(tokens: int, seed: int = 0) -> tuple[dict[str, int], list[list[str]]]:
    """A vocabulary with the merges that make it: each new token joins two that are there."""
    draw = random.Random(seed)
    names = [chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    names += [chr(256 + i) for i in range(256 - len(names))]
    known, merges = set(names), []
    while len(names) < tokens:
        a, b = names[draw.randrange(min(len(names), 4000))], names[draw.randrange(min(len(names), 4000))]
        if a + b not in known and len(a + b) < 16:
            known.add(a + b)
            names.append(a + b)
            merges.append([a, b])
    return {t: i for i, t in enumerate(names)}, merges


def tokenizer(vocab: dict[str, int], merges: list[list[str]], added: list[str]) -> str:
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": len(vocab) + i, "content": t, **entry} for i, t in enumerate(added)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    })  # fmt: skip


def write(folder: Path, rows: int, hidden: int, text: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    wide = 2 * hidden
    shapes = {
        "model.embed_tokens.weight": (rows, hidden),
        "lm_head.weight": (rows, hidden),
        "model.norm.weight": (hidden,),
    }
    p = "model.layers.0."
    shapes |= {f"{p}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
    shapes |= {f"{p}mlp.{x}_proj.weight": (wide, hidden) for x in ("gate", "up")}
    shapes |= {f"{p}mlp.down_proj.weight": (hidden, wide)}
    shapes |= {f"{p}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: (torch.randn(s, generator=g) * 0.02).bfloat16() for n, s in shapes.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": rows,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }))  # fmt: skip
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def models(folder: Path, tokens: int, hidden: int) -> list[Path]:
    vocab, merges = byte_level_bpe(tokens)
    order = list(range(tokens))
    random.Random(1).shuffle(order)
    moved = {t: order[i] for t, i in vocab.items()}
    more = [f"<|extra_{i}|>" for i in range(256)]
    paths = [folder / n for n in ("base", "moved", "more")]
    write(paths[0], tokens, hidden, tokenizer(vocab, merges, []), 0)
    write(paths[1], tokens, hidden, tokenizer(moved, merges, []), 1)
    write(paths[2], tokens + 256, hidden, tokenizer(vocab, merges, more), 2)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    parser.add_argument("--tokens", type=int, default=128_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--mergekit", type=Path, help="python of an environment that has mergekit")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.folder.absolute() / "vocabulary"
    paths = models(folder, args.tokens, args.hidden)
    recipe = folder / "union.yml"
    recipe.write_text(RECIPE.format(*paths))

    import weft

    began = time.perf_counter()
    loaded = {str(p): weft.load(p) for p in paths}
    read = time.perf_counter()
    weft.build(recipe, loader=lambda ref: loaded[str(ref)])
    planning = time.perf_counter() - read
    print(
        f"{args.tokens} tokens, hidden {args.hidden}: headers {read - began:.2f} s, planning {planning:.2f} s"
    )

    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    out, results = folder / "out", {"planning": planning}
    start = measure([sys.executable, "-c", "import torch"], env)
    print(f"{'':14} {'CPU s':>7} {'wall s':>8} {'anon MiB':>9}")
    print(f"{'import torch':14} {start.cpu:7.1f} {start.wall:8.1f} {start.anon_mib:9.0f}")
    commands = {"weft": [sys.executable, "-m", "weft.cli.main", "merge", str(recipe), str(out), "-q"]}
    if args.mergekit:
        code = "from mergekit.scripts.run_yaml import main; main()"
        commands["MergeKit"] = [
            str(args.mergekit),
            "-c",
            code,
            str(recipe),
            str(out),
            "--quiet",
            "--lazy-unpickle",
        ]
    for name, command in commands.items():
        shutil.rmtree(out, ignore_errors=True)
        run = measure(command, env)
        results[name] = {"cpu": run.cpu, "wall": run.wall, "anon_mib": run.anon_mib}  # type: ignore[assignment]
        rows = json.loads((out / "config.json").read_text())["vocab_size"]
        print(f"{name:14} {run.cpu:7.1f} {run.wall:8.1f} {run.anon_mib:9.0f}   {rows} rows", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
