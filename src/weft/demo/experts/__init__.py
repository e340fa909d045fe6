"""The shipped models: a base, an expert a task, and a jointly trained reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weft.demo.tasks import TASKS, fingerprint
from weft.errors import DataError

EXPERTS_FOLDER = Path(__file__).parent
METADATA_KEY = "weft.demo"


def expert_paths(folder: Path = EXPERTS_FOLDER) -> dict[str, Path]:
    """`base`, every task and `joint` → file. DataError if a file is missing or was trained on other splits.

    The second would make a test score meaningless: the images it is measured on might have been trained on.
    """
    paths = {name: folder / f"{name}.safetensors" for name in ("base", *TASKS, "joint")}
    for name, path in paths.items():
        if not path.is_file():
            raise DataError(
                f"the demo's model {name!r} is missing: {path}; `python -m weft.demo.train` makes it"
            )
        if record(path).get("data") != fingerprint():
            raise DataError(
                f"{path} was trained on other data or splits than scikit-learn's digits give here, so its "
                "test images may have been trained on: run `python -m weft.demo.train`"
            )
    return paths


def record(path: Path) -> dict[str, Any]:
    """What training wrote about a model: task, seed, settings, accuracies, the data's fingerprint."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    known: dict[str, Any] = json.loads(metadata.get(METADATA_KEY, "{}"))
    return known
