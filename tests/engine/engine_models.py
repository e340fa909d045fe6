"""Small models on disk, for the engine's tests."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import weft

State = dict[str, Tensor]
SOURCE = str(Path(weft.__file__).parents[1])


def state(seed: int = 0, dtype: torch.dtype = torch.bfloat16, like: State | None = None) -> State:
    """Matrices longer than several tiles, with a row length that no tile is a multiple of; vectors; a scalar."""
    g = torch.Generator().manual_seed(seed)
    if like is not None:
        noise = {n: torch.randn(t.shape, generator=g) * 1e-2 for n, t in like.items()}
        return {
            n: (t.float() + noise[n]).to(t.dtype) if t.is_floating_point() else t for n, t in like.items()
        }
    shapes = {
        "embed.weight": (211, 300),
        "layers.0.mlp.weight": (130, 260),
        "layers.0.norm.weight": (300,),
        "layers.1.mlp.weight": (130, 260),
        "layers.1.norm.weight": (300,),
        "scale": (),
    }
    return {n: (torch.randn(s, generator=g) * 0.1).to(dtype) for n, s in shapes.items()}


def write_model(
    folder: Path, tensors: State, config: Mapping[str, Any] | None = None, **files: str
) -> str:  # fmt: skip
    """A model folder as the safetensors library writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(text)
    return str(folder)


def family(folder: Path, k: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[str, list[str]]:
    """A base and k fine-tunes of it, on disk."""
    base = state(0, dtype)
    tuned = [write_model(folder / f"tuned{i}", state(i + 1, like=base)) for i in range(k)]
    return write_model(folder / "base", base), tuned


def sha(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Relative name → sha256 of every file."""
    return {str(f.relative_to(folder)): sha(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def python(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    path = os.pathsep.join(p for p in (SOURCE, os.environ.get("PYTHONPATH", "")) if p)
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
