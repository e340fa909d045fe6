"""Every architecture: merged, stacked anew, loaded by transformers and run.

The models are the real classes with random weights (zoo.py). No file of weft names any of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from zoo import MIXTURES, TWO_SIDED, ZOO, answer, born, housed, woken

import weft
from weft.llm.consistency import contradictions
from weft.llm.layout import layout

pytest.importorskip("transformers")
House = Callable[..., Path]
STACKS = {n: a for n, a in ZOO.items() if n not in TWO_SIDED and a.layers >= 3}


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Models saved when first asked for: `house(name, seed)`."""
    root = tmp_path_factory.mktemp("zoo")

    def find(name: str, seed: int, in_memory_names: bool = False, layers: int | None = None) -> Path:
        folder = root / f"{name}-{seed}-{in_memory_names}-{layers}"
        if not folder.exists():
            housed(born(name, seed, layers), folder, in_memory_names)
        return folder

    return find


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ZOO)
def test_layout(name: str, house: House) -> None:
    model = weft.load(house(name, 0))
    found = layout(model)
    main = found.main()
    assert main is not None and main.counted_by and not main.holes
    assert main.count == ZOO[name].layers or name in TWO_SIDED
    assert contradictions(model) == []
    assert bool(found.rivals) == (name in TWO_SIDED)
    assert bool(found.vocabulary) == (name != "vit")
    assert bool(found.experts) == (name in MIXTURES or name == "gpt_oss")


@pytest.mark.parametrize("name", ZOO)
def test_linear(name: str, house: House, tmp_path: Path) -> None:
    merged = weft.merge([house(name, 0), house(name, 1)], weight=[0.25, 0.75])
    out = weft.save(merged, tmp_path / "out").path
    left, right = born(name, 0), born(name, 1)
    with torch.no_grad():
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            a.copy_((0.25 * a.double() + 0.75 * b.double()).float())
    torch.testing.assert_close(answer(name, woken(name, out)), answer(name, left), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_ties(name: str, house: House, tmp_path: Path) -> None:
    base, experts = house(name, 0), [house(name, 1), house(name, 2)]
    out = weft.save(weft.merge(experts, "ties", base=base, density=0.5), tmp_path / "out").path
    made, before = answer(name, woken(name, out)), answer(name, woken(name, base))
    assert (made - before).abs().max() > 1e-3
    assert stored(out).keys() == stored(base).keys()


@pytest.mark.parametrize("name", STACKS)
def test_frankenmerge(name: str, house: House, tmp_path: Path) -> None:
    n = ZOO[name].layers
    a, b = house(name, 0), house(name, 1)
    picks = [(a, i) for i in range(n - 1)] + [(b, i) for i in range(1, n)]
    recipe = {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": str(a), "layer_range": [0, n - 1]}]},
        {"sources": [{"model": str(b), "layer_range": [1, n]}]},
    ]}  # fmt: skip
    out = weft.save(weft.build(recipe), tmp_path / "out").path
    _check_stack(name, a, b, picks, out)


def _check_stack(name: str, a: Path, b: Path, picks: list[tuple[Path, int]], out: Path) -> None:
    """Names, values and config of a stack of layers, worked out from the files alone."""
    main = layout(weft.load(a)).main()
    assert main is not None
    block = re.compile(re.escape(main.prefix) + r"(\d+)\.(.+)")
    made, files = stored(out), {a: stored(a), b: stored(b)}
    seen = set()
    for i, (folder, index) in enumerate(picks):
        for old, tensor in files[folder].items():
            if (found := block.fullmatch(old)) and int(found[1]) == index:
                new = f"{main.prefix}{i}.{found[2]}"
                assert torch.equal(made[new], tensor), new
                seen.add(new)
    for new in made.keys() - seen:
        assert not block.fullmatch(new)
        last = re.search(r"norm|lm_head|score|classifier|embed_out|cls|ln_f|head", new)
        tower = re.search(r"vision|visual|projector|embeddings|pooler", new)
        torch.testing.assert_close(made[new], files[b if last and not tower else a][new], rtol=0, atol=0, msg=new)
    config = config_of(out)
    text = config.get("text_config", config)
    assert len(picks) in (text.get("num_hidden_layers"), text.get("n_layer"))
    if "layer_types" in text:
        sources = [config_of(f).get("text_config", config_of(f))["layer_types"][i] for f, i in picks]
        assert text["layer_types"] == sources
    answer(name, woken(name, out))


@pytest.mark.parametrize("name", TWO_SIDED)
def test_encoder_and_decoder(name: str, house: House, tmp_path: Path) -> None:
    a, b = house(name, 0), house(name, 1)
    first, second = {"model": str(a), "layer_range": [0, 2]}, {"model": str(b), "layer_range": [1, 2]}
    recipe = {"merge_method": "passthrough", "modules": {
        "encoder": {"slices": [{"sources": [first]}, {"sources": [second]}]}, "decoder": {"models": [str(b)]},
    }}  # fmt: skip
    out = weft.save(weft.build(recipe), tmp_path / "out").path
    config = config_of(out)
    counts = {k: config[k] for k in ("num_layers", "encoder_layers") if k in config}
    assert set(counts.values()) == {3}
    decoders = {k: config[k] for k in ("num_decoder_layers", "decoder_layers") if k in config}
    assert set(decoders.values()) == {2}
    made, mine, theirs = stored(out), stored(a), stored(b)
    for new, tensor in made.items():
        if match := re.match(r"(.*encoder\.(?:block|layers)\.)(\d)(\..*)", new):
            assert torch.equal(tensor, theirs[f"{match[1]}1{match[3]}"] if match[2] == "2" else mine[new])
        elif "decoder." in new:
            assert torch.equal(tensor, theirs[new])
    answer(name, woken(name, out))


@pytest.mark.parametrize("name", MIXTURES)
def test_both_layouts_of_experts(name: str, house: House, tmp_path: Path) -> None:
    """Fused tensors (transformers 5 in memory) merge to the same model as one tensor an expert (4, and files)."""
    split = weft.save(weft.merge([house(name, 0), house(name, 1)]), tmp_path / "split").path
    fused = weft.save(weft.merge([house(name, 0, True), house(name, 1, True)]), tmp_path / "fused").path
    assert any(".experts.gate_up_proj" in n for n in stored(fused))
    assert not any(".experts.gate_up_proj" in n for n in stored(split))
    found = layout(weft.load(fused)).experts
    assert {e.count for e in found.values()} == {e.count for e in layout(weft.load(split)).experts.values()}
    torch.testing.assert_close(answer(name, woken(name, fused)), answer(name, woken(name, split)), rtol=0, atol=1e-6)
