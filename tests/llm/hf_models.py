"""Tiny models of the real classes of transformers, written as their owners write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

torch.set_num_threads(1)  # threads only cost time on matrices this small
TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip
BYTES = TEXT | {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}


def tiny(kind: str, seed: int = 0, /, **config: Any) -> Any:
    """A random model: `tiny("LlamaForCausalLM", **TEXT)`; its config class is the model's."""
    made = getattr(transformers, kind)
    torch.manual_seed(seed)
    return made(made.config_class(**config)).eval()


def written(model: Any, folder: Path, **how: Any) -> Path:
    """The model's folder, by its own `save_pretrained`."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **how)
    return folder


def taught(model: Any, text: str, steps: int = 60) -> Any:
    """The model after some steps of next-byte prediction on `text`."""
    ids = torch.tensor(list(text.encode())).clamp(max=model.config.vocab_size - 1)
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,), generator=generator)]
        optimiser.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimiser.step()
    return model.eval()
