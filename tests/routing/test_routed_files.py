"""Routed models on disk: what is loaded is what was saved, and a file that lies is refused with one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_nets import Conv, Perceptron, Reader, family, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft.errors import DataError, UnsafeFile, UsageError
from weft.routing import Gating, Routed, fit_router, load, train

DATA = {f"task{t}": inputs(Perceptron, 12, t) + t for t in range(3)}
FILE, WEIGHTS = "weft_routing.json", "routing.safetensors"


def made(kind: type[nn.Module], **how: Any) -> tuple[Routed, nn.Module]:
    base, experts = family(kind)
    return weft.route(base, base, experts, **how), base


SETTINGS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "full": (Conv, {}),
    "sixteen bits": (Perceptron, {"dtype": torch.bfloat16}),
    "lowrank": (Reader, {"residual": "lowrank:2"}),
    "sparse": (Perceptron, {"residual": "sparse:0.3"}),
    "sign": (Perceptron, {"residual": "sign"}),
    "quantised": (Conv, {"residual": "quantised:3"}),
    "emr": (Perceptron, {"residual": "emr", "shared": "base"}),
    "tall": (Reader, {"residual": "tall:0.5", "shared": "base"}),
    "prototype": (Perceptron, {"gate": "prototype", "data": DATA}),
    "energy": (Perceptron, {"gate": "energy", "where": "linear"}),
    "entropy": (Perceptron, {"gate": "entropy"}),
    "preference": (Perceptron, {"gate": "preference", "where": "mlp", "rests_on": "base"}),
    "combined": (Perceptron, {"combine": {"method": "tsv", "scale": 0.9}, "gate": "residue", "rest": 1.0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    kind, how = SETTINGS[name]
    routed, _ = made(kind, **how)
    routed.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".json", ".safetensors")) == [
        WEIGHTS, "weft-manifest.json", FILE,
    ]  # fmt: skip
    blank = kind()
    again = load(tmp_path / "out", blank)
    x = inputs(kind)
    told = {"preference": [0.2, 0.3, 0.5]} if name == "preference" else {}
    given = {"task": "task1"} if routed.gating.kind == "oracle" else told
    assert torch.equal(routed(x, **given), again(x, **given))
    assert again.cost() == routed.cost()
    assert again.tasks == routed.tasks and again.gating == routed.gating


def test_a_trained_router_and_what_it_learned_from_are_kept(tmp_path: Path) -> None:
    routed, _ = made(Perceptron, gate=Gating.of("router", scope="layer", hidden=1), where="mlp")
    routed.save(tmp_path / "untrained")
    with pytest.raises(UsageError, match="has not been made"):
        load(tmp_path / "untrained", Perceptron())(inputs(Perceptron))
    fit_router(routed, DATA, steps=5, split="test-time")
    routed.save(tmp_path / "out")
    again = load(tmp_path / "out", Perceptron())
    assert torch.equal(routed(inputs(Perceptron)), again(inputs(Perceptron)))
    assert again.cost().test_time and again.fitted == routed.fitted


def test_experts_are_left_out_in_training_alone(tmp_path: Path) -> None:
    gating = Gating.of("router", scope="layer", normed=True, drop=0.5, spread=1.0)
    routed, _ = made(Perceptron, gate=gating, where="linear")
    labelled = {t: (x, torch.arange(len(x)) % 4) for t, x in DATA.items()}
    train(routed, "cross_entropy", labelled, steps=2, what="all")
    routed.save(tmp_path / "out")
    again = load(tmp_path / "out", Perceptron())
    x = inputs(Perceptron)
    assert torch.equal(routed(x), routed(x)) and torch.equal(routed(x), again(x))


def test_a_mask_takes_a_bit_and_a_thin_residual_its_factors() -> None:
    routed, base = made(Perceptron, residual="emr", shared="base")
    numbers = sum(p.numel() for p in base.parameters())
    packed = sum(-(-p.numel() // 8) + 4 for p in base.parameters())
    assert routed.cost().bytes == 4 * numbers * 2 + 3 * packed
    thin, _ = made(Perceptron, residual="lowrank:2", where=["blocks.0.mlp.0"])
    assert thin.cost().residuals == 3 * (2 * (8 + 16) + 16)


def test_a_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    routed, _ = made(Perceptron)
    routed.save(tmp_path / "out")
    with pytest.raises(UsageError, match="overwrite"):
        routed.save(tmp_path / "out")
    routed.save(tmp_path / "out", overwrite=True)


def test_a_routed_folder_is_no_model_and_a_model_no_routed_folder(tmp_path: Path) -> None:
    weft.save(Perceptron(), tmp_path / "model")
    with pytest.raises(UsageError, match=r"no routed model: it has no weft_routing\.json"):
        load(tmp_path / "model", Perceptron())
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "nowhere", Perceptron())
    made(Perceptron)[0].save(tmp_path / "routed")
    with pytest.raises(UsageError, match=r"routed model, which needs its module"):
        weft.load(tmp_path / "routed")


# -- files that lie -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    routed, _ = made(Perceptron, residual="lowrank:2", gate="prototype", data=DATA)
    out = tmp_path_factory.mktemp("routed") / "out"
    routed.save(out)
    return out


def told(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / FILE).read_text())
        change(found)
        (folder / FILE).write_text(json.dumps(found))

    return apply


def stored(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return apply


ENTRY = "blocks.0.mlp.0.weight"
LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "format": (told(lambda d: d.update(format="weft-delta")), "no routed model"),
    "version": (told(lambda d: d.update(version=2)), "update weft"),
    "version true": (told(lambda d: d.update(version=True)), "update weft"),
    "unknown key": (told(lambda d: d.update(more=1)), "'more' is not known"),
    "missing key": (told(lambda d: d.pop("rest")), "rest is missing"),
    "class": (told(lambda d: d.update(module="Other")), "made of a 'Other'"),
    "no tasks": (told(lambda d: d.update(tasks=[])), "different names"),
    "many tasks": (told(lambda d: d.update(tasks=[str(i) for i in range(5000)])), "1 to 4096"),
    "twice a task": (told(lambda d: d.update(tasks=["a", "a", "b"])), "different names"),
    "rest": (told(lambda d: d.update(rest=[0, 1e40, 0])), "one number a task"),
    "gate kind": (told(lambda d: d["gating"].update(kind="magic")), "gating"),
    "gate setting": (told(lambda d: d["gating"].update(hidden=10**6)), "hidden"),
    "gate type": (told(lambda d: d["gating"].update(top="1")), "wrong kind"),
    "gate true": (told(lambda d: d["gating"].update(seed=True)), "wrong kind"),
    "gate extra": (told(lambda d: d["gating"].update(more=1)), "just the settings"),
    "at": (told(lambda d: d["gating"].update(at="nowhere")), "no part 'nowhere'"),
    "how": (told(lambda d: d.update(how="magic")), "how must be"),
    "combine": (told(lambda d: d.update(combine={"method": "os.system", "params": {}})), "no method"),
    "combine stats": (told(lambda d: d.update(combine={"method": "fisher", "params": {}})), "no method"),
    "combine params": (told(lambda d: d.update(combine={"method": "tsv", "params": {"x": 1}})), "combine"),
    "no part": (told(lambda d: d["blocks"][0].update(name="gone")), "no part 'gone'"),
    "no weight": (told(lambda d: d["blocks"][0]["parameters"].append("gone")), "is no weight"),
    "nested": (told(lambda d: d["blocks"].append({"name": "head", "parameters": [], "buffers": []})), "lies in"),
    "rank": (told(lambda d: d["residuals"][ENTRY][0].update(rank=10**9)), "rank 1000000000"),
    "rank one more": (told(lambda d: d["residuals"][ENTRY][0].update(rank=3)), r"not torch.float32 \[1, 16, 3\]"),
    "scheme": (told(lambda d: d["residuals"][ENTRY][0].update(scheme="exact")), "'exact' is not known"),
    "entries": (told(lambda d: d["residuals"][ENTRY].pop()), "one entry a task"),
    "no entry": (told(lambda d: d["residuals"][ENTRY].__setitem__(0, None)), "belongs to nothing"),
    "unrouted": (told(lambda d: d["residuals"].update({"other": [None] * 3})), "is not routed"),
    "name": (told(lambda d: d["residuals"].update({"../../x": [None] * 3})), "leaves its folder"),
    "json": (lambda f: (f / FILE).write_text("{"), "not JSON"),
    "duplicate": (lambda f: (f / FILE).write_text('{"a": 1, "a": 2}'), "appears twice"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "does not exist"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]), "truncated|ends"),
    "more": (stored(lambda s: s.update(extra=torch.zeros(1))), "'extra' belongs to nothing"),
    "less": (stored(lambda s: s.pop("net.head.bias")), r"'net\.head\.bias' is missing"),
    "shape": (stored(lambda s: s.update({"net.head.bias": torch.zeros(5)})), r"\[5\], not"),
    "dtype": (stored(lambda s: s.update({"net.head.bias": torch.zeros(4).half()})), "float16"),
    "nan": (stored(lambda s: s["net.head.bias"].fill_(torch.nan)), "NaN"),
    "nan residual": (stored(lambda s: s[f"residual.0.{ENTRY}.left"].fill_(torch.inf)), "NaN or infinite"),
    "gate experts": (stored(lambda s: s.update({"gate.all.centres": torch.zeros(2, 8)})), "gate of 3 experts"),
    "no gate": (stored(lambda s: s.pop("gate.all.centres")), "no part of a gate"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(lie: str, folder: Path, tmp_path: Path) -> None:
    change, message = LIES[lie]
    shutil.copytree(folder, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises((DataError, UnsafeFile), match=message):
        load(tmp_path / "out", Perceptron())


def test_a_gate_larger_than_its_file_is_never_made(tmp_path: Path) -> None:
    routed, _ = made(Perceptron, gate=Gating.of("router", hidden=2))
    fit_router(routed, DATA, steps=1)
    routed.save(tmp_path / "out")
    told(lambda d: d["gating"].update(width=1 << 20))(tmp_path / "out")
    with pytest.raises(DataError, match=r"wide|numbers where"):
        load(tmp_path / "out", Perceptron())


def test_positions_that_contradict_one_another_are_found_when_they_are_loaded(tmp_path: Path) -> None:
    routed, _ = made(Perceptron, residual="sparse:0.1")
    routed.save(tmp_path / "out")
    name = f"residual.1.{ENTRY}."
    stored(lambda s: s.update({name + "blocks": torch.tensor([0, 3])}))(tmp_path / "out")
    with pytest.raises(DataError, match=r"residual\.1.*add up"):
        load(tmp_path / "out", Perceptron())


def test_another_module_is_told_by_everything_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(DataError) as error:
        load(folder, Perceptron(width=10))
    assert str(error.value).count("\n") > 5 and "net.embed.weight" in str(error.value)
    with pytest.raises(DataError, match="made of a 'Perceptron'"):
        load(folder, Conv())
