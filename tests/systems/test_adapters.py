"""Systems that combine adapters, on small LoRA and (IA)³ experts: PEM, AdaMergeX, LoraHub and their kin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lab import UPRIGHT, Data, average, correct, only, score, tuned
from language import CONTEXT, Language, corpus, encode, follows_format, windows
from language import loss as surprise
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("peft")

from loras import LAYERS, drawn, ia3_config, lora_config, over, trained_adapter

from weft.adapters.arithmetic import Combined, transferred
from weft.adapters.factors import Adapter
from weft.adapters.hub import lorahub
from weft.adapters.merge import merge_adapters
from weft.adapters.output import AdapterCheckpoint
from weft.demo.evaluate import as_network
from weft.demo.network import DigitNet
from weft.demo.tasks import TASKS, examples
from weft.demo.train import joined
from weft.systems.continual import add_then_replay
from weft.systems.fewshot import language_and_task, learned_composition

Library = tuple[DigitNet, dict[str, Adapter]]
LOWER_HALF, UPPER_HALF = (lambda y: y < 5), (lambda y: y >= 5)


@pytest.fixture(scope="session")
def libraries(bases: dict[int, DigitNet], tmp_path_factory: pytest.TempPathFactory) -> list[Library]:
    """Two bases, each with a LoRA of rank 8 for every task."""
    folder = tmp_path_factory.mktemp("loras")
    return [
        (base, {
            t: trained_adapter(base, lora_config(LAYERS), drawn(examples(t, "train")),
                               folder / f"{t}{seed}", seed=i)
            for i, t in enumerate(TASKS)
        })
        for seed, base in list(bases.items())[:2]
    ]  # fmt: skip


def few(task: str, count: int, seed: int, split: str = "train") -> Data:
    """`count` examples of each class."""
    x, y = examples(task, split)  # type: ignore[arg-type]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    chosen = torch.cat([(y == c).nonzero().flatten()[:count] for c in range(10)])
    return x[chosen], y[chosen]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("kind", "rate"), [("lora", 3e-3), ("ia3", 3e-2)])
def test_adapters_add_and_negate_as_lora_and_as_ia3(
    bases: dict[int, DigitNet], tmp_path: Path, kind: str, rate: float, seed: int
) -> None:
    base, settings = bases[seed], lora_config(LAYERS) if kind == "lora" else ia3_config(LAYERS)

    def trained(task: str, half: Callable[[Tensor], Tensor], name: str) -> Adapter:
        data = only(examples(task, "train"), half)  # type: ignore[arg-type]
        return trained_adapter(base, settings, drawn(data), tmp_path / name, seed=seed, rate=rate)

    a, b = trained("rotated", LOWER_HALF, "a"), trained("rotated", UPPER_HALF, "b")
    both = 0.5 * a + 0.5 * b
    assert isinstance(both, Combined)
    alone = max(score(over(base, one), "rotated") for one in (a, b))
    assert score(over(base, both), "rotated") > max(alone, score(base, "rotated")) + 0.1

    test = examples(UPRIGHT, "test")
    bad = trained(UPRIGHT, UPPER_HALF, "bad")
    forgetful = over(base, -bad)
    assert correct(forgetful, only(test, UPPER_HALF)) < 0.3
    assert correct(forgetful, only(test, LOWER_HALF)) > correct(base, only(test, LOWER_HALF)) - 0.05
    assert correct(over(base, bad - bad), test) == correct(base, test)


@pytest.mark.parametrize("which", [0, 1])
def test_loras_of_all_tasks_and_a_replay_nearly_reach_joint_training(
    libraries: list[Library], which: int
) -> None:
    base, library = libraries[which]
    memory = joined([few(t, 10, i) for i, t in enumerate(TASKS)])
    added = average(over(base, merge_adapters(list(library.values()), 0.25, how="concat")))
    made = add_then_replay(
        base, list(library.values()), lambda m: tuned(as_network(m), memory, which, epochs=12)
    )
    joint = tuned(base, joined([examples(t, "train") for t in TASKS]), which, epochs=12)
    assert average(made) > 0.9 * average(joint)
    assert average(made) > average(tuned(base, memory, which, epochs=12)) + 0.02
    assert average(base) + 0.05 < added < average(made) - 0.05


def test_exact_sums_serve_tasks_that_sums_of_factors_do_not(libraries: list[Library]) -> None:
    """Adapters of different starts: cross-terms are noise, which grows with the weights."""
    for base, library in libraries:
        adapters = list(library.values())
        exact = average(over(base, merge_adapters(adapters, 0.4, how="concat")))
        assert exact > average(base) + 0.08
        assert exact > average(over(base, merge_adapters(adapters, 0.4, how="linear"))) + 0.2
        cut = merge_adapters(adapters, 0.4, how="svd", rank=16)
        assert average(over(base, cut)) > average(base) + 0.05


@pytest.mark.parametrize("which", [0, 1])
def test_lorahub_finds_the_adapters_that_an_unseen_mixture_needs(
    libraries: list[Library], which: int
) -> None:
    pytest.importorskip("optuna")
    base, library = libraries[which]
    adapters, pair = list(library.values()), ("swapped", "mirrored")
    x, y = joined([few(t, 5, i, "validation") for i, t in enumerate(pair)])
    test = joined([examples(t, "test") for t in pair])  # type: ignore[arg-type]

    def loss(adapter: AdapterCheckpoint) -> float:
        with torch.inference_mode():
            return float(F.cross_entropy(as_network(over(base, adapter))(x), y))

    def accuracy(adapter: Adapter | AdapterCheckpoint) -> float:
        return correct(over(base, adapter), test)

    exact = lorahub(adapters, loss, how="concat", budget=60)
    named = dict(zip(library, exact.weights, strict=True))
    assert min(named[t] for t in pair) > max(w for t, w in named.items() if t not in pair)
    single = max(accuracy(a) for a in adapters)
    rivals = single, accuracy(merge_adapters(adapters, how="concat")), correct(base, test)
    assert accuracy(exact.adapter) > max(rivals) + 0.05
    faithful = lorahub(adapters, loss, how="factorwise", budget=60)
    assert accuracy(faithful.adapter) > correct(base, test) + 0.08
    assert accuracy(exact.adapter) > accuracy(faithful.adapter), "cross-terms make the search harder"


def test_a_learned_composition_beats_a_lora_from_scratch_with_few_examples(
    libraries: list[Library], tmp_path: Path
) -> None:
    """The shift of domain only: images of two views, unlabelled as to which, of which there are few."""
    for seed, (base, library) in enumerate(libraries):
        adapters, pair = list(library.values()), ("swapped", "mirrored")
        test = joined([examples(t, "test") for t in pair])  # type: ignore[arg-type]
        even = correct(over(base, merge_adapters(adapters, how="concat")), test)
        assert even > correct(base, test) + 0.05
        gains = []
        for shots in (1, 5, 20):
            data = joined([few(t, shots, i) for i, t in enumerate(pair)])
            soup = learned_composition(base, adapters, lambda m, d: F.cross_entropy(m(d[0]), d[1]), data)
            assert all(sum(w) == pytest.approx(1.0) for w in soup.weights.values())
            scratch = trained_adapter(
                base, lora_config(LAYERS), drawn(data, 20), tmp_path / f"{seed}{shots}", seed=7, steps=100
            )
            learned = correct(over(base, soup.adapter), test)
            assert learned > even + 0.05
            gains.append(learned - correct(over(base, scratch), test))
        assert gains[0] > gains[1] > gains[2], "the fewer examples, the more the library is worth"
        assert gains[0] > 0.05 and gains[1] > 0.01


# -- languages ----------------------------------------------------------------------------------------


Trio = tuple[Language, dict[str, Adapter]]


def trio(made: Language, kind: str, folder: Path) -> dict[str, Adapter]:
    """Adapters for both languages, and for the format in one of them."""
    text = corpus()
    parts = {
        "lower": encode(text[:120_000]), "upper": encode(text[120_000:250_000].upper()),
        "chat": encode(text[250_000:325_000].replace(" ", "_")),
    }  # fmt: skip
    layers = ["layers.0", "layers.1", "lm_head"]
    settings = lora_config([*layers, "embed_tokens"], r=12) if kind == "lora" else ia3_config(layers)

    def batches(data: Tensor) -> Callable[[torch.Generator], Data]:
        return lambda g: windows(data, torch.randint(len(data) - CONTEXT, (128,), generator=g))

    return {
        n: trained_adapter(made.base, settings, batches(data), folder / f"{kind}-{n}", steps=200, seed=i,
                           rate=4e-3 if kind == "lora" else 2e-2)
        for i, (n, data) in enumerate(parts.items())
    }  # fmt: skip


@pytest.fixture(scope="session")
def loras(languages: list[Language], tmp_path_factory: pytest.TempPathFactory) -> list[Trio]:
    return [(made, trio(made, "lora", tmp_path_factory.mktemp("l"))) for made in languages]


def test_adapters_of_a_task_and_of_a_language_make_one_for_both(loras: list[Trio]) -> None:
    for made, known in loras:
        text = made.held_out.formatted_upper
        alone = [surprise(over(made.base, known[n]), text) for n in ("chat", "upper")]
        start = surprise(made.base, text)
        added = over(made.base, language_and_task(known["chat"], known["upper"], scale=0.5))
        assert surprise(added, text) < min(start, *alone) - 0.2
        assert follows_format(added, text) > follows_format(over(made.base, known["upper"]), text) + 0.2
        moved = over(made.base, language_and_task(known["chat"], known["upper"], known["lower"]))
        assert surprise(moved, text) < alone[0] - 0.5
        assert follows_format(moved, text) > 0.7


def test_what_a_reference_task_differs_by_moves_a_task_as_lora_and_as_ia3(
    loras: list[Trio], tmp_path: Path
) -> None:
    vectors = [(made, trio(made, "ia3", tmp_path / str(i))) for i, (made, _) in enumerate(loras)]
    for made, known in (*loras, *vectors):
        text, plain = made.held_out.formatted_upper, made.held_out.upper
        moved = over(made.base, transferred(known["chat"], known["upper"], known["lower"], 0.7))
        task = over(made.base, known["chat"])
        assert surprise(moved, text) < surprise(task, text) - 0.1
        assert surprise(moved, plain, letters=True) < surprise(task, plain, letters=True) - 0.2
        assert follows_format(moved, text) > follows_format(over(made.base, known["upper"]), text) + 0.4
        # a reference that does not differ moves nothing
        still = over(made.base, transferred(known["chat"], known["upper"], known["upper"]))
        assert surprise(still, text) == pytest.approx(surprise(task, text), abs=1e-4)
