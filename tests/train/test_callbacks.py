"""The trainers of others: hooks, penalties and linearised models in transformers' Trainer and in Lightning."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from charted_nets import Data, perceptron
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.errors import UsageError
from weft.train import Charted, Linearised, load_linearised
from weft.train.callbacks import WithLoss, lightning_callback, trainer_callback
from weft.train.hooks import State
from weft.train.objectives import l2_sp, supervised


class Plain(nn.Module):
    """A model that answers as transformers' do, and is no chart of weft's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, input: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(input), labels)}


def run_trainer(
    model: nn.Module, data: Data, folder: Path, callback: Any, resume: bool = False, late: bool = False,
    **settings: Any,
) -> Any:  # fmt: skip
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    x, y = data
    rows = [{"input": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=48, report_to=[],
        disable_tqdm=True, use_cpu=True, max_grad_norm=0.0, logging_steps=1, seed=0,
        **{"max_steps": 6, "save_strategy": "no", "learning_rate": 1e-2, **settings},
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8],
        callbacks=None if late else [callback],
    )  # fmt: skip
    if late:
        trainer.add_callback(callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def test_a_linearised_model_in_transformers_trainer(blobs: Data, tmp_path: Path) -> None:
    net = perceptron()
    seen: list[State] = []
    model = WithLoss(Linearised(net))
    trainer = run_trainer(model, blobs, tmp_path, trainer_callback(
        on_step=seen.append, on_checkpoint=lambda s: seen.append(s)
    ), save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=2)  # fmt: skip
    assert [s.step for s in seen] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert not any(s.loss != s.loss for s in seen[1:]), "the loss that was logged last"
    assert set(seen[0].parameters) == set(net.state_dict())
    assert not torch.equal(seen[-1].parameters["0.weight"], seen[-1].start["0.weight"])
    x = blobs[0][:5]
    with torch.no_grad():
        expected = trainer.model(input=x)["logits"]
    last = tmp_path / "checkpoint-6"
    assert set(weft.load(last)) == set(net.state_dict()), "an ordinary checkpoint of the network"
    assert torch.allclose(load_linearised(last, net)(x), expected, atol=1e-6)


def test_a_penalty_in_transformers_trainer_is_the_objectives(blobs: Data, tmp_path: Path) -> None:
    """Plain SGD on L + penalty, by weft's loop and by the Trainer with the penalty as a callback."""
    x, y = blobs[0][:48], blobs[1][:48]
    net = perceptron()
    model = WithLoss(Charted(net))
    stop = {"at": 0}

    def count(state: State) -> None:
        stop["at"] = state.step
        state.stop = state.step == 4

    run_trainer(model, (x, y), tmp_path, trainer_callback(penalty=2.0 * l2_sp(), on_step=count),
                optim="sgd", lr_scheduler_type="constant")  # fmt: skip
    assert stop["at"] == 4
    mine = weft.finetune(net, [(x, y)], objective=supervised() + 2.0 * l2_sp(), steps=4, schedule="constant",
                         optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))  # fmt: skip
    for name, value in model.model.weights().items():
        assert torch.allclose(value, mine.checkpoint.tensor(name), atol=1e-5)
    free = weft.finetune(net, [(x, y)], steps=4, schedule="constant",
                         optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))  # fmt: skip
    assert not torch.allclose(
        free.checkpoint.tensor("0.weight"), mine.checkpoint.tensor("0.weight"), atol=1e-5
    )


def test_a_penalty_on_a_plain_model_of_transformers_trainer(blobs: Data, tmp_path: Path) -> None:
    moved = []
    for strength in (0.0, 5.0):
        model = Plain()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        run_trainer(model, blobs, tmp_path, trainer_callback(penalty=strength * l2_sp()), max_steps=20)
        moved.append(sum(float((p - start[n]).square().sum().detach()) for n, p in model.named_parameters()))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("made", [Plain, lambda: WithLoss(Charted(perceptron()))])
def test_a_penalty_holds_a_resumed_run_to_the_base_it_started_from(
    made: Callable[[], nn.Module], blobs: Data, tmp_path: Path
) -> None:
    """Six steps at once, and three with three more by `resume_from_checkpoint`, end at the same weights."""
    how: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1}
    whole, half, starts = made(), made(), []
    base = dict(perceptron().named_parameters())

    def look(state: State) -> None:
        starts.append({n: t.clone() for n, t in state.start.items()})

    def callback() -> Any:
        return trainer_callback(penalty=l2_sp(), on_step=look)

    run_trainer(whole, blobs, tmp_path / "whole", callback(), **how)
    run_trainer(
        half, blobs, tmp_path / "parts", callback(), max_steps=3, save_strategy="steps", save_steps=3, **how
    )
    resumed = made()
    run_trainer(resumed, blobs, tmp_path / "parts", callback(), resume=True, **how)
    assert len(starts) == 6 + 3 + 3
    for start in starts:
        assert {n.removeprefix("net.") for n in start} == set(base)
        assert all(torch.equal(t, base[n.removeprefix("net.")]) for n, t in start.items())
    check_resumed(whole, half, resumed)


def test_a_resumed_run_whose_start_was_not_seen_is_refused(blobs: Data, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run_trainer(Plain(), blobs, tmp_path, trainer_callback(penalty=l2_sp()), late=True, **settings)
    with pytest.raises(UsageError, match=r"net\.0\.weight started is not known"):
        run_trainer(Plain(), blobs, tmp_path, trainer_callback(penalty=l2_sp()), resume=True, late=True)


def test_a_penalty_holds_a_run_that_lightning_resumes_to_its_base(blobs: Data, tmp_path: Path) -> None:
    lightning = lightning_of()
    batches = torch.utils.data.DataLoader([(a, b) for a, b in zip(*blobs, strict=True)], batch_size=48)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(epochs: int, path: Path | None = None) -> tuple[Any, Any]:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(tmp_path), enable_checkpointing=False,
            callbacks=[lightning_callback(penalty=l2_sp())],
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, batches, ckpt_path=path)
        return module, trainer

    whole, _ = run(4)
    half, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(4, tmp_path / "half.ckpt")
    check_resumed(whole, half, resumed)


def check_resumed(whole: nn.Module, half: nn.Module, resumed: nn.Module) -> None:
    """In two parts all parameters came to where they came in one, and the second part has moved them."""
    end, there = dict(whole.named_parameters()), dict(half.named_parameters())
    for name, p in resumed.named_parameters():
        torch.testing.assert_close(p, end[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(p, there[n], atol=1e-3) for n, p in resumed.named_parameters())


def lightning_of() -> Any:
    """Lightning under either of its names."""
    try:
        return importlib.import_module("lightning.pytorch")
    except ImportError:
        return pytest.importorskip("pytorch_lightning")


def test_hooks_and_penalties_in_lightning(blobs: Data, tmp_path: Path) -> None:
    lightning = lightning_of()
    x, y = blobs[0][:48], blobs[1][:48]
    net = perceptron()

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Linearised(net)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    module, steps, kept = Module(), [], []
    trainer = lightning.Trainer(
        max_epochs=9, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(tmp_path), enable_checkpointing=False,
        callbacks=[lightning_callback(
            penalty=2.0 * l2_sp(), on_checkpoint=lambda s: kept.append(s.step),
            on_step=lambda s: (steps.append((s.step, s.loss)), setattr(s, "stop", s.step == 4)),
        )],
    )  # fmt: skip
    trainer.fit(
        module, torch.utils.data.DataLoader([(a, b) for a, b in zip(x, y, strict=True)], batch_size=48)
    )
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert [s for s, _ in steps] == [1, 2, 3, 4] and all(loss == loss for _, loss in steps) and kept == [4]
    mine = weft.finetune(net, [(x, y)], mode="tangent", objective=supervised() + 2.0 * l2_sp(), steps=4,
                         schedule="constant", optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))  # fmt: skip
    for name, value in module.net.weights().items():
        assert torch.allclose(value, mine.checkpoint.tensor(name), atol=1e-5)


def test_an_accelerator_may_carry_the_loop(blobs: Data) -> None:
    accelerate = pytest.importorskip("accelerate")
    engine = accelerate.Accelerator(cpu=True)
    carried = weft.finetune(perceptron(), blobs, mode="tangent", steps=5, engine=engine)
    plain = weft.finetune(perceptron(), blobs, mode="tangent", steps=5)
    assert all(
        torch.equal(carried.checkpoint.tensor(n), plain.checkpoint.tensor(n)) for n in plain.checkpoint
    )


def test_the_trainer_keeps_the_columns_that_the_network_takes(blobs: Data, tmp_path: Path) -> None:
    """By default it drops what `forward` does not name; others, such as the text itself, still go."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = WithLoss(Charted(perceptron()))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    assert arguments.remove_unused_columns
    rows = [{"input": a, "text": "a", "labels": b} for a, b in zip(blobs[0], blobs[1], strict=True)]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input", "labels"}
    assert trainer.label_names == ["labels"]
    assert torch.equal(copy.deepcopy(model)(**batch)["loss"], model(**batch)["loss"])


def test_a_fabric_may_carry_the_loop(blobs: Data) -> None:
    fabric = pytest.importorskip("lightning.fabric")
    engine = fabric.Fabric(accelerator="cpu", devices=1)
    engine.launch()
    carried = weft.finetune(perceptron(), blobs, mode="tangent", steps=5, engine=engine)
    plain = weft.finetune(perceptron(), blobs, mode="tangent", steps=5)
    assert all(
        torch.equal(carried.checkpoint.tensor(n), plain.checkpoint.tensor(n)) for n in plain.checkpoint
    )
