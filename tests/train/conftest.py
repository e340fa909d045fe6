"""Data for the tests of fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from charted_nets import Data


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def blobs() -> Data:
    """240 points of three overlapping classes in six dimensions."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    return torch.randn(240, 6, generator=generator) + 1.5 * torch.eye(3, 6)[y], y
