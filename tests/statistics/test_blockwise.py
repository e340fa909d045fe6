"""One block in memory at a time gives what the whole model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems, UsageError
from weft.statistics import measure
from weft.statistics.blockwise import stack_of, without_weights

EVERY = ("gram", "mean", "abs_mean", "out_mean", "out_var", "cov")


def same(a: Checkpoint, b: Checkpoint, tol: float = 1e-6) -> None:
    assert set(a) == set(b)
    for key in a:
        torch.testing.assert_close(a.tensor(key), b.tensor(key), rtol=tol, atol=tol)
    told, again = (dict(c.config["weft_statistics"]) for c in (a, b))
    assert told == again


class Block(nn.Module):
    """A layer that says how many of its kind have values when it runs."""

    real: list[int] = []  # noqa: RUF012

    def __init__(self, d: int, every: list[Any]) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.LayerNorm(d)
        self.every = every
        every.append(self)

    def forward(self, x, scale=1.0):
        Block.real.append(sum(not b.up.weight.is_meta for b in self.every))
        return x + scale * self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    def __init__(self, n: int = 4, d: int = 6) -> None:
        super().__init__()
        every: list[Any] = []
        self.start = nn.Linear(3, d)
        self.layers = nn.ModuleList(Block(d, every) for _ in range(n))
        self.head = nn.Linear(d, 2)

    def forward(self, x):
        h = self.start(x)
        for i, layer in enumerate(self.layers):
            h = layer(h, scale=1.0 / (i + 1))
        return self.head(h)


def test_stack_with_parts_around_it(tmp_path: Path):
    torch.manual_seed(0)
    net, data = Net(), [torch.randn(5, 3), torch.randn(2, 3)]
    weft.save(net, tmp_path / "net")
    with without_weights():
        empty = Net()
    whole = measure(net, data, EVERY)
    Block.real.clear()
    same(measure(tmp_path / "net", data, EVERY, module=empty, by_block=True), whole)
    assert set(Block.real) == {1}  # never two blocks with values
    assert len(Block.real) == 4 * 2 + 1  # once a block and batch, and once to see what a block returns
    assert all(p.is_meta for p in empty.parameters())
    same(measure(tmp_path / "net", data, EVERY, module=Net()), whole)


def test_sequence_of_layers_of_many_shapes(tmp_path: Path):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)
    ).eval()
    net[1].running_mean.normal_()
    data = [torch.randn(4, 1, 6, 6)]
    weft.save(net, tmp_path / "net")
    with without_weights():
        empty = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)
        )
    same(
        measure(tmp_path / "net", data, ("gram", "cov"), module=empty, by_block=True),
        measure(net, data, ("gram", "cov")),
    )


TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip
KINDS = {
    "LlamaForCausalLM": TEXT,
    "Qwen2ForCausalLM": {**TEXT, "tie_word_embeddings": True},
    "Gemma3ForCausalLM": {**TEXT, "head_dim": 8, "sliding_window": 4, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]},
    "GPT2LMHeadModel": {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "BertForSequenceClassification": {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
                                      "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the attention mask could not be applied")  # to tables of positions
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers(kind: str, tmp_path: Path):
    import transformers

    torch.manual_seed(2)
    made = getattr(transformers, kind)
    net = made(made.config_class(**KINDS[kind])).eval()
    transformers.utils.logging.disable_progress_bar()
    net.save_pretrained(tmp_path / "m")
    mask = (torch.arange(7) < torch.tensor([[7], [4], [6]])).long()
    data = [{"input_ids": torch.randint(0, 32, (3, 7)), "attention_mask": mask}]
    whole = measure(tmp_path / "m", data, EVERY)
    same(measure(tmp_path / "m", data, EVERY, by_block=True), whole, 1e-5)
    assert sum(k.startswith("gram/") for k in whole) > 15


def test_reads_every_tensor_once_and_the_first_block_twice(tmp_path: Path, monkeypatch):
    torch.manual_seed(3)
    net = Net()
    weft.save(net, tmp_path / "net")
    source = weft.load(tmp_path / "net")
    seen: list[str] = []
    plain = type(source).tensor
    monkeypatch.setattr(type(source), "tensor", lambda s, n, **k: (seen.append(n), plain(s, n, **k))[1])
    with without_weights():
        empty = Net()
    measure(source, [torch.randn(2, 3)], "gram", module=empty, by_block=True)
    fingerprint = [n for n in seen if seen.count(n) > 2]
    assert not fingerprint
    assert {n for n in seen if seen.count(n) == 2} == {n for n in source if n.startswith("layers.0.")}


def test_bad_input(tmp_path: Path):
    class Skips(Net):
        def forward(self, x):
            h = first = self.layers[0](self.start(x))
            for layer in list(self.layers)[1:]:
                h = layer(h + first)
            return self.head(h)

    class Backwards(Net):
        def forward(self, x):
            h = self.start(x)
            for layer in reversed(self.layers):
                h = layer(h)
            return self.head(h)

    data = [torch.randn(2, 3)]
    weft.save(Net(), tmp_path / "net")
    for kind in (Skips, Backwards):
        with pytest.raises(UsageError, match="not run one after the other on one tensor"):
            measure(tmp_path / "net", data, "gram", module=kind(), by_block=True)
    with pytest.raises(UsageError, match="fisher needs gradients of the whole model"):
        measure(tmp_path / "net", data, ("gram", "fisher"), module=Net(), by_block=True)
    with pytest.raises(UsageError, match="give a checkpoint, and the module apart"):
        measure(Net(), data, "gram", by_block=True)
    with pytest.raises(DataProblems, match=r"layers\.4\.up\.weight: not in"):
        measure(tmp_path / "net", data, "gram", module=Net(5), by_block=True)
    with pytest.raises(UsageError, match="no stack of blocks"):
        stack_of(nn.Linear(2, 2))
    with without_weights():
        empty = Net()
    with pytest.raises(UsageError, match="no values for"):
        measure(empty, data, "gram")
