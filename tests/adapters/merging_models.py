"""A small module and PEFT adapters over it with random values, for the tests of merging."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

TARGETS = ["up", "down"]
NAMES = ["block.up.weight", "block.down.weight"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(torch.tanh(self.up(x)))
        return made


class Net(nn.Module):
    """12 → 20 → 8, in a part called `block`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.block(x)
        return made


def with_adapters(configs: dict[str, Any], base: nn.Module | None = None) -> PeftModel:
    """One module with several adapters whose learned values are all random."""
    names = list(configs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base or Net()), configs[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, configs[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def config(r: int = 4, alpha: float = 8, **more: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=TARGETS, **more)


def saved(model: PeftModel, folder: Path) -> dict[str, Path]:
    """Every adapter of the module as a folder of its own; path by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return {name: folder if name == "default" else folder / name for name in model.peft_config}


def delta(model: PeftModel, adapter: str, weight: str) -> Tensor:
    """PEFT's own update of a weight, float64."""
    module = model.base_model.model.get_submodule(weight.removesuffix(".weight"))
    made: Tensor = module.get_delta_weight(adapter).detach().double()
    return made


def write(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """An adapter folder of given factors (B, A) by the base's names, alpha = r unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, (b, a) in factors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        state |= {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
    rank = next(iter(factors.values()))[1].shape[0]
    ranks = {n.removesuffix(".weight"): a.shape[0] for n, (_, a) in factors.items()}
    told = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(ranks),
        "rank_pattern": ranks, "alpha_pattern": ranks, **config,
    }  # fmt: skip
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def random_factors(
    shapes: dict[str, tuple[int, int]], rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        n: (
            torch.randn(out, rank, generator=g).to(dtype) * 0.5,
            torch.randn(rank, into, generator=g).to(dtype) * 0.5,
        )
        for n, (out, into) in shapes.items()
    }
