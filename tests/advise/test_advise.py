"""Advice: what is seen of real and made-up models, what is proposed, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weft
from weft.advise.look import TENSORS, look
from weft.advise.propose import advise
from weft.errors import DataError, UsageError, WeftError
from weft.recipes import check

State = dict[str, Tensor]


def base(seed: int = 0, blocks: int = 3, width: int = 48) -> State:
    generator = torch.Generator().manual_seed(seed)
    made = {f"layers.{i}.mlp.weight": torch.randn(width, width, generator=generator) for i in range(blocks)}
    return made | {"norm.weight": torch.ones(width)}


def tuned(start: State, seed: int, size: float = 0.05, rank: int = 0, share: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for n, w in start.items():
        if rank and w.ndim == 2:
            noise = torch.randn(w.shape[0], rank, generator=generator) @ torch.randn(
                rank, w.shape[1], generator=generator
            )
            noise /= rank**0.5
        else:
            noise = torch.randn(w.shape, generator=generator)
        made[n] = w + size * noise * (torch.rand(w.shape, generator=generator) < share)
    return made


def test_facts_are_those_of_the_models() -> None:
    start = base()
    a = tuned(start, 1)
    b = {n: start[n] - (a[n] - start[n]) for n in start}
    seen = look([a, b], start)
    assert seen.cosine == pytest.approx(-1, abs=1e-6) and seen.conflict == pytest.approx(1)
    assert seen.norms[0] == pytest.approx(0.05, rel=0.1) and seen.changed[0] == pytest.approx(1, abs=0.01)
    assert seen.likeness > 0.99 and seen.blocks == 3 and not seen.batchnorm and not seen.shapes_differ
    thin = look([tuned(start, 1, rank=2), tuned(start, 2, rank=2)], start)
    assert max(thin.ranks) < 0.1 < min(seen.ranks)
    assert look([tuned(start, 1, share=0.1), a], start).changed[0] == pytest.approx(0.1, abs=0.02)


def test_a_sample_is_read_and_no_more() -> None:
    start = base(blocks=40)
    read: list[int] = []

    class Counting(weft.Checkpoint):
        def __init__(self, state: State) -> None:
            self.inner = weft.load(state)

        @property
        def tensors(self):  # type: ignore[no-untyped-def]
            return self.inner.tensors

        def read(self, name, start=0, stop=None, *, dtype=None):  # type: ignore[no-untyped-def]
            made = self.inner.read(name, start, stop, dtype=dtype)
            read.append(made.numel())
            return made

    look([Counting(tuned(start, 1)), tuned(start, 2)], start)
    assert len(read) == TENSORS < 40


@pytest.mark.parametrize("data", ["none", "unlabelled", "labelled"])
def test_every_proposal_passes_the_check_and_merges(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = base()
    models = {"base": start, "a": tuned(start, 1), "b": tuned(start, 2), "c": tuned(start, 3)}
    sparse = {"s": tuned(start, 4, share=0.1), "t": tuned(start, 5, share=0.1)}
    alike = {"x": tuned(start, 1), "y": tuned(tuned(start, 1), 9, 0.01)}
    for name, state in {**models, **sparse, **alike}.items():
        save_file(state, f"{name}.safetensors")
    cases = {
        ("a", "b", "c"): {"none": "tsv"}.get(data, "gram"), ("s", "t"): "ram_plus", ("x", "y"): "linear",
    }  # fmt: skip
    for names, method in cases.items():
        found = advise([f"{n}.safetensors" for n in names], "base.safetensors", data)  # type: ignore[arg-type]
        assert found.method == method and found.reasons and "weft merge" in " ".join(found.commands)
        if "weft measure" in found.commands[0]:
            assert all(f"statistics-{i}" in found.recipe for i in range(1, len(names) + 1))
            continue
        report = check(found.recipe, headers=True)
        assert report.ok, str(report)
        weft.build(found.recipe).state_dict()


def test_statistics_measured_as_told_make_the_recipe_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    from weft.demo.experts import expert_paths
    from weft.demo.network import network
    from weft.demo.tasks import examples

    monkeypatch.chdir(tmp_path)
    paths = expert_paths()
    names = ("rotated", "mirrored")
    found = advise([str(paths[n]) for n in names], str(paths["base"]), "unlabelled")
    assert found.method == "gram"
    for i, n in enumerate(names, 1):
        net = network(weft.load(paths[n]).state_dict())
        weft.save(weft.measure(net, [examples(n, "train")[0][:64]], "gram"), f"statistics-{i}")
    report = check(found.recipe, headers=True)
    assert report.ok, str(report)
    from weft.demo.evaluate import accuracy

    merged = weft.build(found.recipe)
    mean = weft.merge([paths[n] for n in names], "linear")
    assert sum(accuracy(merged, n) for n in names) > sum(accuracy(mean, n) for n in names) + 0.05


def test_what_has_no_ancestor_is_aligned_and_what_has_no_base_is_told_to_name_it() -> None:
    strangers = advise([base(1), base(2)])
    assert strangers.method == "align" and not strangers.recipe and "weft align" in strangers.commands[0]
    start = base()
    kin = advise([tuned(start, 1), tuned(start, 2)])
    assert kin.method == "slerp" and "--base" in kin.instead[0]
    assert advise([tuned(start, i) for i in range(3)]).method == "linear"


def test_batchnorm_heads_and_wrong_bases_are_told() -> None:
    start = base() | {"bn.running_var": torch.ones(48), "head.weight": torch.randn(3, 48)}
    a, b = tuned(start, 1), tuned(start, 2) | {"head.weight": torch.randn(5, 48)}
    found = advise([a, b], {n: t for n, t in start.items() if n != "head.weight"})
    assert any("calibrate" in c for c in found.commands) and any("BatchNorm" in r for r in found.reasons)
    assert found.look.shapes_differ == ("head.weight",) and any("head.weight" in w for w in found.warnings)
    far = advise([a, tuned(start, 2)], base(7) | {k: start[k] for k in ("bn.running_var", "head.weight")})
    assert any("really the base" in w for w in far.warnings)
    twins = advise([a, dict(a)], start)
    assert any("same values" in w for w in twins.warnings)


def test_large_language_models_of_unknown_making_get_task_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from weft.advise import propose as module

    start = base()
    seen = look([tuned(start, 1), tuned(start, 2)], start)
    large = replace(seen, kind="llama", parameters=8 * 10**9, bytes=16 * 10**9)
    found = module.propose(large)
    assert found.method == "task_arithmetic" and "2511.21437" in " ".join(found.reasons)
    assert found.cost.startswith("48 GB read")


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    start = base()
    with pytest.raises(UsageError, match="two models"):
        advise([start])
    with pytest.raises(UsageError, match="data are"):
        advise([start, start], start, "some")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="NaN"):
        advise([start, {n: t * torch.nan for n, t in start.items()}], start)
    with pytest.raises(DataError, match="share no matrix"):
        advise([start, {"other": torch.ones(2, 2)}])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from weft.cli.main import app

    monkeypatch.chdir(tmp_path)
    start = base()
    for n, s in {"base": start, "a": tuned(start, 1), "b": tuned(start, 2)}.items():
        save_file(s, f"{n}.safetensors")
    run = CliRunner().invoke
    line = ["advise", "a.safetensors", "b.safetensors", "--base", "base.safetensors"]
    told = run(app, line)
    assert told.exit_code == 0 and "because" in told.output and "merge_method: tsv" in told.output
    made = run(app, [*line, "--out", "recipe.yml", "--json"])
    assert json.loads(made.output)["method"] == "tsv"
    assert run(app, ["check", "recipe.yml"]).exit_code == 0
    assert isinstance(run(app, [*line, "--out", "recipe.yml"]).exception, WeftError)
