"""Three tiny models on disk, and objectives whose optimum is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("optuna")

from three_models import BEST, NAMES, RECIPE

from weft.checkpoints.base import Checkpoint


@pytest.fixture(scope="session")
def states() -> dict[str, dict[str, torch.Tensor]]:
    """A base and two fine-tunes with random task vectors."""
    g = torch.Generator().manual_seed(0)

    def noise() -> dict[str, torch.Tensor]:
        return {n: torch.randn(*([8] if "norm" in n else [8, 8]), generator=g) for n in NAMES}

    base = noise()
    return {"base": base, **{k: {n: base[n] + v for n, v in noise().items()} for k in ("a", "b")}}


@pytest.fixture
def models(
    states: dict[str, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The models in the current folder, with the recipe that searches vary."""
    from safetensors.torch import save_file

    for name, state in states.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def loss(states: dict[str, dict[str, torch.Tensor]]) -> Callable[[Checkpoint], float]:
    """Mean squared distance to base + 0.7 (a − base) + 0.2 (b − base), in float64."""
    base, a, b = (states[k] for k in ("base", "a", "b"))
    target = {n: base[n] + BEST[0] * (a[n] - base[n]) + BEST[1] * (b[n] - base[n]) for n in base}

    def loss(candidate: Checkpoint) -> float:
        return sum(float((candidate.tensor(n).double() - target[n]).square().mean()) for n in NAMES)

    return loss
