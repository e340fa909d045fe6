"""What cannot be routed is said in one clear error, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routed_nets import Perceptron, Reader, family, inputs
from torch import nn

import weft
from weft.errors import DataError, DataProblems, Problems, UsageError
from weft.routing import Gating, fit_router, pareto, train

BASE, EXPERTS = family(Perceptron)
DATA = {f"task{t}": inputs(Perceptron, 8, t) for t in range(3)}


def headed(classes: int) -> nn.Module:
    made = Perceptron()
    made.head = nn.Linear(8, classes)
    return made


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"gate": "prototyp"}, "did you mean 'prototype'"),
    "residual": ({"residual": "lowrnk:2"}, "did you mean 'lowrank'"),
    "number": ({"residual": "lowrank:x"}, "'x' is no number"),
    "rank": ({"residual": "lowrank:2.5"}, "cannot be the number"),
    "density": ({"residual": "sparse:2"}, "cannot be the number"),
    "no number": ({"residual": "sign:2"}, "takes no number"),
    "where": ({"where": "blokcs.*"}, "no part of Perceptron is 'blokcs"),
    "inside": ({"where": ["mlp", "linear"]}, "lies inside another"),
    "no data": ({"gate": "prototype"}, "made of inputs of each task"),
    "idle data": ({"data": DATA}, "data are for prototype gates"),
    "data of none": ({"gate": "prototype", "data": {"task0": DATA["task0"]}}, "no data of task1, task2"),
    "data unknown": ({"gate": "prototype", "data": {**DATA, "other": DATA["task0"]}}, "other"),
    "data empty": ({"gate": "prototype", "data": {**DATA, "task1": torch.zeros(0, 6)}}, "task1: .*no examples"),
    "statistics": ({"residual": "essential:4"}, "Gram matrices"),
    "statistics of none": ({"residual": "essential:4", "statistics": [BASE] * 3}, "holds no Gram matrix"),
    "statistics too few": ({"residual": "essential:4", "statistics": [BASE]}, "1 statistics are given for 3"),
    "samples": ({"gate": "prototype", "data": DATA, "samples": 0}, "samples must be at least 1"),
    "nowhere": ({"where": []}, "where names no part"),
    "rest of text": ({"rest": "a"}, "rest must be a number"),
    "method": ({"shared": "tsvv"}, "did you mean 'tsv'"),
    "parameter": ({"shared": {"method": "tsv", "shar": 1}}, "did you mean 'share'"),
    "rest": ({"rest": [0.1, 0.2]}, "3 of them"),
    "rests on": ({"rests_on": "sand"}, "shared or base"),
    "combine": ({"combine": "tsvv"}, "there is no method"),
    "combine stats": ({"combine": "fisher"}, "cannot combine"),
    "combine params": ({"combine": {"method": "tsv", "shares": 1}}, "shares"),
    "tasks": ({"tasks": ["a", "b"]}, "3 different names"),
    "how": ({"how": "fast"}, "how must be"),
    "at": ({"gate": Gating.of("prototype", at="heads"), "data": DATA}, "did you mean 'head'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    how, message = WRONG[name]
    with pytest.raises((UsageError, DataError), match=message):
        weft.route(BASE, BASE, EXPERTS, **how)


def test_settings_of_a_gate_are_refused_all_at_once() -> None:
    with pytest.raises(Problems) as error:
        Gating("oracle", scope="layer", temperature=-1.0, top=0)
    assert len(error.value.problems) >= 3


def test_experts_with_other_heads_are_named() -> None:
    with pytest.raises(DataProblems, match="different heads") as error:
        weft.route(BASE, BASE, [EXPERTS[0], headed(7)])
    assert "head.weight: shape [7, 8]" in str(error.value)


def test_experts_that_are_the_base_have_nothing_to_choose() -> None:
    with pytest.raises(UsageError, match="do not differ"):
        weft.route(BASE, BASE, [BASE, BASE], shared="base")


def test_what_is_no_module_is_told() -> None:
    with pytest.raises(UsageError, match="must be the torch module"):
        weft.route("path/to/base", BASE, EXPERTS)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one expert"):
        weft.route(BASE, BASE, {})


def test_a_missing_base_is_missed() -> None:
    with pytest.raises(UsageError, match="base"):
        weft.route(BASE, None, EXPERTS, shared="base")
    with pytest.raises(UsageError, match="base"):
        weft.route(BASE, None, EXPERTS)


def test_tokens_cannot_choose_in_a_part_that_is_not_linear_in_its_weights() -> None:
    base, experts = family(Reader)
    gating = Gating.of("router", scope="layer", per="token")
    with pytest.raises(UsageError, match="outputs are linear in their weights; attention is none"):
        weft.route(base, base, experts, where=["attention"], gate=gating)


def test_tied_weights_cannot_be_routed_in_one_place_alone() -> None:
    base, experts = family(Reader)
    with pytest.raises(
        UsageError, match=r"table\.weight is also head\.weight|head\.weight is also table\.weight"
    ):
        weft.route(base, base, experts, where=["table"])


def test_a_call_that_lacks_what_its_gate_needs_says_so() -> None:
    x = inputs(Perceptron)
    oracle = weft.route(BASE, BASE, EXPERTS)
    for call, message in (
        (lambda: oracle(x), "told the task"),
        (lambda: oracle(x, task="taks1"), "did you mean 'task1'"),
        (lambda: oracle(x, task=["task0", "task1"]), "2 tasks are named for 7 examples"),
        (lambda: oracle(x, task=torch.tensor([5])), "numbers 0 to 2"),
        (lambda: oracle(x, task=3), "there is no task 3"),
        (lambda: oracle(x, weights=[1.0, 2.0]), "one number a task"),
        (lambda: oracle(x, weights=[1.0, 2.0, torch.nan]), "NaN"),
        (lambda: oracle(x[:0], task="task0"), "no examples"),
        (lambda: oracle.checkpoint(), "give one of them"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    preferring = weft.route(BASE, BASE, EXPERTS, gate="preference", where="mlp")
    for r, message in ((None, "with preference="), ([1, 1, -1], "below 0"), ([0, 0, 0], "not all 0")):
        with pytest.raises(UsageError, match=message):
            preferring(x, preference=r)
    with pytest.raises(UsageError, match="only a preference gate"):
        pareto(oracle, lambda call, task: 0.0)


def test_training_what_cannot_be_trained_says_so() -> None:
    oracle = weft.route(BASE, BASE, EXPERTS, residual="sign")
    with pytest.raises(UsageError, match="not fitted"):
        fit_router(oracle, DATA)
    with pytest.raises(UsageError, match="not trained"):
        train(oracle, "entropy", DATA, steps=1)
    with pytest.raises(UsageError, match="few bits"):
        train(oracle, "entropy", DATA, steps=1, what="residuals")
    routed = weft.route(BASE, BASE, EXPERTS, gate="router", residual="full")
    with pytest.raises(UsageError, match="needs labels"):
        train(routed, "cross_entropy", DATA, steps=1)
    with pytest.raises(UsageError, match="there is no loss 'entropie'"):
        train(routed, "entropie", DATA, steps=1)
    with pytest.raises(UsageError, match="balance"):
        train(routed, "entropy", DATA, steps=1, balance="ls")
    with pytest.raises(DataError, match="NaN or infinite"):
        train(routed, "entropy", {**DATA, "task2": DATA["task2"] * torch.nan}, steps=1)


def test_more_experts_than_a_matrix_has_directions_is_told() -> None:
    base, experts = family(Perceptron, count=6)
    routed = weft.route(
        base, base, experts, residual="lowrank", shared="base", gate=Gating.of("residue", at="embed")
    )
    out = routed(inputs(Perceptron))
    assert bool(out.isfinite().all())
    assert any("fewer directions" in n or "one direction each" in n for n in routed.cost().notes)


def test_values_that_are_not_finite_are_found_when_they_are_read() -> None:
    bad = Perceptron()
    with torch.no_grad():
        bad.head.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        weft.route(BASE, BASE, [EXPERTS[0], bad])


def test_a_part_that_is_never_called_is_an_error_and_not_left_unrouted() -> None:
    base, experts = family(Reader)
    routed = weft.route(base, base, experts, where=["attention.out_proj"])
    with pytest.raises(UsageError, match=r"attention\.out_proj is never called"):
        routed(inputs(Reader), task="task0")
