"""A routed model: one-hot weights are the expert, constant ones a static merge, and every way of running agrees."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from routed_nets import Conv, Perceptron, Reader, family, inputs
from torch import nn
from torch.func import functional_call

import weft
from weft.errors import UsageError
from weft.routing import Gating, Routed, fit_router, train

KINDS = [Perceptron, Reader, Conv]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def at_expert(kind: type[nn.Module], **how: Any) -> tuple[Routed, list[nn.Module]]:
    base, experts = family(kind)
    return weft.route(base, base, experts, **how), experts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rests_on", ["shared", "base"])
def test_a_task_told_is_that_expert(kind: type[nn.Module], rests_on: Any) -> None:
    routed, experts = at_expert(kind, rests_on=rests_on)
    x = inputs(kind)
    for t, expert in enumerate(experts):
        torch.testing.assert_close(routed(x, task=f"task{t}"), expert(x), **CLOSE)


@pytest.mark.parametrize("kind", [Perceptron, Reader])
def test_constant_weights_are_the_static_merge(kind: type[nn.Module]) -> None:
    base, experts = family(kind)
    routed = weft.route(base, base, experts, shared="base")
    merged = weft.merge(experts, "task_arithmetic", base=base, weight=[0.5, -0.2, 0.3])
    expected = functional_call(base, merged.state_dict(), (inputs(kind),))
    torch.testing.assert_close(routed(inputs(kind), weights=[0.5, -0.2, 0.3]), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_no_weights_are_the_shared_merge(kind: type[nn.Module]) -> None:
    base, experts = family(kind)
    routed = weft.route(base, base, experts, shared="linear")
    merged = weft.materialize(weft.merge(experts, "linear"), deepcopy(base))
    torch.testing.assert_close(routed(inputs(kind), weights=[0.0] * 3), merged(inputs(kind)), **CLOSE)


def test_a_shared_method_takes_its_own_parameters() -> None:
    base, experts = family(Perceptron)
    x = inputs(Perceptron)
    for shared, weight in (
        ("task_arithmetic", 0.3),
        ({"method": "task_arithmetic", "scale": 0.4}, 0.4),
        ({"method": "task_arithmetic", "weight": 0.2}, 0.2),
    ):
        routed = weft.route(base, base, experts, shared=shared)  # type: ignore[arg-type]
        merged = weft.merge(experts, "task_arithmetic", base=base, weight=weight).state_dict()
        torch.testing.assert_close(routed(x, weights=[0.0] * 3), functional_call(base, merged, (x,)), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", ["full", "lowrank:2"])
def test_every_way_of_running_gives_the_same(kind: type[nn.Module], residual: str) -> None:
    base, experts = family(kind)
    x = inputs(kind)
    generator = torch.Generator().manual_seed(1)
    w = torch.rand(len(x), 3, generator=generator)
    w[1] = w[0]
    w[2] = torch.tensor([0.0, 1.0, 0.0])
    made = {}
    for how in ("weights", "vmap", "outputs", "auto"):
        routed = weft.route(base, base, experts, residual=residual, how=how)  # type: ignore[arg-type]
        one_by_one = (
            torch.cat([routed(x[i : i + 1], weights=w[i]) for i in range(len(x))])
            if how == "weights"
            else None
        )
        if how == "outputs" and kind is not Perceptron:  # attention in one call, and running statistics
            with pytest.raises(UsageError, match="not linear in its routed weights"):
                routed(x, weights=w)
            continue
        made[how] = routed(x, weights=w)
        if one_by_one is not None:
            torch.testing.assert_close(made[how], one_by_one, **CLOSE)
    for out in made.values():
        torch.testing.assert_close(out, made["weights"], **CLOSE)


def test_convolutions_and_tables_add_up_in_their_outputs() -> None:
    for kind, where in ((Conv, ["first", "second", "head"]), (Reader, ["mlp"])):
        base, experts = family(kind)
        x = inputs(kind)
        w = torch.rand(len(x), 3, generator=torch.Generator().manual_seed(2))
        both = [
            weft.route(base, base, experts, where=where, how=how)(x, weights=w)
            for how in ("outputs", "weights")
        ]
        torch.testing.assert_close(*both, **CLOSE)


def test_one_task_an_example_equals_each_by_itself() -> None:
    routed, experts = at_expert(Reader)
    x = inputs(Reader, 4)
    mixed = routed(x, task=["task2", "task0", "task2", "task1"])
    expected = torch.stack([experts[t](x[i : i + 1])[0] for i, t in enumerate((2, 0, 2, 1))])
    torch.testing.assert_close(mixed, expected, **CLOSE)
    for numbers in (torch.tensor([2, 0, 2, 1]), [2, 0, 2, 1]):
        torch.testing.assert_close(routed(x, task=numbers), mixed, rtol=0, atol=0)


def test_switching_tasks_two_thousand_times_changes_no_bit() -> None:
    base, experts = family(Perceptron)
    for residual in ("emr", "full"):
        routed = weft.route(base, base, experts, shared="base", residual=residual)
        x = inputs(Perceptron, 2)
        before = [routed(x, task=f"task{t}") for t in range(3)]
        with routed.unpacked():
            for i in range(2000):
                routed(x[:1], task=f"task{i % 3}")
        assert all(torch.equal(routed(x, task=f"task{t}"), before[t]) for t in range(3))


def test_a_static_model_is_the_routed_one_at_fixed_weights() -> None:
    for kind in KINDS:
        base, experts = family(kind)
        routed = weft.route(base, base, experts, residual="lowrank:2")
        x = inputs(kind)
        for given in ({"task": "task1"}, {"weights": [0.2, 0.3, 0.5]}):
            static = weft.materialize(routed.checkpoint(**given), deepcopy(base))
            torch.testing.assert_close(static(x), routed(x, **given), **CLOSE)
    gating = Gating.of("router", scope="layer")
    base, experts = family(Perceptron)
    routed = weft.route(base, base, experts, gate=gating, where="mlp")
    fit_router(routed, {f"task{t}": inputs(Perceptron, 8, t) for t in range(3)}, steps=3)
    x = inputs(Perceptron, 1)
    static = weft.materialize(
        routed.checkpoint(weights={k: v[0] for k, v in routed.weights_for(x).items()}), base
    )
    torch.testing.assert_close(static(x), routed(x), **CLOSE)


def test_neither_the_module_nor_the_experts_are_touched() -> None:
    base, experts = family(Conv)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (base, *experts)]
    routed = weft.route(base, base, experts)
    routed(inputs(Conv), task="task0")
    for m, old in zip((base, *experts), before, strict=True):
        assert all(torch.equal(t, old[n]) for n, t in m.state_dict().items())


def test_a_copy_of_a_routed_model_is_its_own() -> None:
    routed, _ = at_expert(Perceptron)
    x = inputs(Perceptron)
    other = deepcopy(routed)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not torch.equal(routed(x, task="task0"), other(x, task="task0"))
    assert float(other(x, task="task0").abs().max()) == 0


# -- gates ---------------------------------------------------------------------------------------------------


def test_weights_of_one_example_do_not_depend_on_the_others() -> None:
    base, experts = family(Perceptron)
    data = {f"task{t}": inputs(Perceptron, 8, t) for t in range(3)}
    for gate in ("prototype", "energy", "residue", "entropy"):
        gating = Gating.of(gate, top=None)
        where = "linear" if gate == "energy" else "all"
        routed = weft.route(
            base, base, experts, gate=gating, where=where, residual="lowrank:2",
            data=data if gate == "prototype" else None,
        )  # fmt: skip
        x = inputs(Perceptron)
        together = routed(x)
        alone = torch.cat([routed(x[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(together, alone, **CLOSE)


def test_a_mean_over_the_batch_depends_on_the_others_and_says_so() -> None:
    base, experts = family(Perceptron)
    data = {f"task{t}": inputs(Perceptron, 8, t) + t for t in range(3)}
    routed = weft.route(base, base, experts, gate=Gating.of("prototype", per="batch"), data=data)
    x = inputs(Perceptron)
    w = routed.weights_for(x)
    assert isinstance(w, torch.Tensor) and bool((w == w[0]).all())
    assert not torch.allclose(w[:1], routed.weights_for(x[:1]))  # type: ignore[arg-type]
    assert routed.cost().test_time and any("leak" in n for n in routed.cost().notes)


def test_energy_is_the_length_of_the_projection() -> None:
    base, experts = family(Perceptron)
    routed = weft.route(
        base,
        base,
        experts,
        shared="base",
        gate=Gating.of("energy", rank=2, top=None),
        where=["embed"],
        residual="full",
    )
    x = inputs(Perceptron)
    w = routed.weights_for(x)["embed"]  # type: ignore[index]
    scores = []
    for e in experts:
        v = torch.linalg.svd(e.embed.weight.double() - base.embed.weight.double())[2][:2]  # type: ignore[union-attr]
        scores.append((x.double() @ v.T).norm(dim=1))
    torch.testing.assert_close(w.double(), torch.stack(scores, 1).softmax(1), rtol=1e-4, atol=1e-5)


def test_the_residue_is_what_a_task_cannot_see() -> None:
    base, experts = family(Perceptron)
    routed = weft.route(base, base, experts, gate=Gating.of("residue", at="embed", rank=3), shared="base")
    x = inputs(Perceptron)
    residues = []
    for e in experts:
        v = torch.linalg.svd(e.embed.weight.double() - base.embed.weight.double())[2][:3]  # type: ignore[union-attr]
        residues.append((x.double() - x.double() @ v.T @ v).norm(dim=1))
    expected = (-torch.stack(residues, 1)).softmax(1)
    torch.testing.assert_close(routed.weights_for(x).double(), expected, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_entropy_prefers_the_surer_expert() -> None:
    base, experts = family(Perceptron)
    routed = weft.route(base, base, experts, gate=Gating.of("entropy", scale=0.9))
    x = inputs(Perceptron)
    h = torch.stack([torch.distributions.Categorical(logits=e(x)).entropy() for e in experts], 1)
    torch.testing.assert_close(routed.weights_for(x), 0.9 * (-h).softmax(1), rtol=1e-3, atol=1e-4)
    assert routed.cost().passes == 3


class Masked(Reader):
    """Takes a mask of tokens and does nothing with it but pass over them."""

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.table(ids)
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        return self.head(x + self.mlp(x))  # type: ignore[no-any-return]


def test_padding_has_no_say() -> None:
    base, experts = family(Masked)
    data = {f"task{t}": {"ids": inputs(Reader, 8, t), "attention_mask": torch.ones(8, 5)} for t in range(3)}
    for gating in (Gating.of("prototype", at="mlp"), Gating.of("prototype", scope="layer")):
        routed = weft.route(base, base, experts, gate=gating, where=["mlp"], data=data)
        ids, mask = inputs(Reader, 4), torch.ones(4, 5)
        mask[:, 3:] = 0
        other = ids.clone()
        other[:, 3:] = 1
        found = [
            routed.weights_for(i, attention_mask=m)
            for i, m in ((ids, mask), (other, mask), (ids, mask * 0 + 1))
        ]
        w, padded, whole = (f if isinstance(f, torch.Tensor) else f["mlp"] for f in found)
        torch.testing.assert_close(w, padded)
        assert not torch.allclose(w, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_precisions_keep_theirs(dtype: torch.dtype) -> None:
    base, experts = family(Perceptron)
    nets = [deepcopy(m).to(dtype) for m in (base, *experts)]
    x = inputs(Perceptron).to(dtype)
    w = torch.rand(len(x), 3, generator=torch.Generator().manual_seed(3))
    for residual in ("full", "lowrank:2", "emr"):
        made = [
            weft.route(nets[0], nets[0], nets[1:], shared="base", residual=residual, how=how)(x, weights=w)
            for how in ("weights", "outputs")
        ]
        assert all(m.dtype == dtype for m in made)
        torch.testing.assert_close(*made, rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0.05)
    routed = weft.route(nets[0], nets[0], nets[1:], dtype=torch.float64)
    torch.testing.assert_close(
        routed(x, task="task1"), nets[2](x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-12, atol=1e-3
    )


def test_tokens_choose_for_themselves() -> None:
    base, experts = family(Reader)
    data = {f"task{t}": inputs(Reader, 8, t) for t in range(3)}
    routed = weft.route(
        base,
        base,
        experts,
        gate=Gating.of("prototype", scope="layer", per="token", top=1),
        where="mlp",
        data=data,
    )
    x = inputs(Reader)
    w = routed.weights_for(x)["mlp"]  # type: ignore[index]
    assert w.shape == (7, 5, 3) and bool((w.sum(-1) == 1).all()) and len(w.reshape(-1, 3).unique(dim=0)) > 1
    seen = []
    handle = routed.net.mlp.inner.register_forward_pre_hook(lambda m, a: seen.append(a[0]))  # type: ignore[union-attr,operator]
    out = routed(x)
    handle.remove()
    h, chosen = seen[0], w.argmax(-1)
    one = torch.stack([e.mlp(h) for e in experts])  # type: ignore[operator]
    expected = one.gather(0, chosen[None, ..., None].expand(1, *h.shape))[0]
    torch.testing.assert_close(routed.net.head(h + expected), out, **CLOSE)  # type: ignore[operator]


def test_what_is_learned_moves_only_what_was_asked_for() -> None:
    base, experts = family(Perceptron)
    generator = torch.Generator().manual_seed(0)
    data = {
        f"task{t}": (inputs(Perceptron, 16, t), torch.randint(0, 4, (16,), generator=generator))
        for t in range(3)
    }
    gating = Gating.of("router", scope="layer", softmax=False, start=0.3)
    routed = weft.route(base, base, experts, gate=gating, where="mlp", rests_on="base", rest=0.3)
    residuals = [p.clone() for p in routed.residuals.parameters()]
    merged = weft.merge(experts, "task_arithmetic", base=base, weight=0.3).state_dict()
    before = functional_call(base, merged, (inputs(Perceptron),))
    train(routed, "cross_entropy", data, steps=0)
    torch.testing.assert_close(
        routed(inputs(Perceptron)), before, rtol=0.05, atol=0.05
    )  # weights start at N(0, 0.01)
    made = train(routed, "cross_entropy", data, steps=20, lr=1e-2)
    assert made.losses[-1] < made.losses[0]
    assert all(torch.equal(a, b) for a, b in zip(residuals, routed.residuals.parameters(), strict=True))
    train(routed, "cross_entropy", data, steps=3, what="all", split="validation")
    assert not any(torch.equal(a, b) for a, b in zip(residuals, routed.residuals.parameters(), strict=True))
    assert not any(p.requires_grad for p in routed.parameters())


def test_experts_left_out_while_training_are_back_afterwards() -> None:
    gating = Gating.of("router", softmax=True, drop=0.5)
    scores, rest = torch.zeros(200, 4), torch.zeros(4)
    torch.manual_seed(0)
    w = gating.weights(scores, rest, training=True)
    assert bool((w == 0).any()) and torch.allclose(w.sum(1), torch.ones(200))
    torch.testing.assert_close(gating.weights(scores, rest), torch.full((200, 4), 0.25))


def test_an_unsure_gate_falls_back_to_the_resting_weights() -> None:
    gating = Gating.of("prototype", unsure=0.6, temperature=1.0)
    rest = torch.tensor([0.1, 0.2])
    w = gating.weights(torch.tensor([[0.0, 0.1], [0.0, 3.0]]), rest)
    torch.testing.assert_close(w[0], rest)
    assert w[1, 1] > 0.9


def test_a_threshold_keeps_the_largest_at_least() -> None:
    w = Gating.of("residue", threshold=0.45).weights(
        torch.tensor([[0.0, 0.0, 0.1], [2.0, 2.0, 0.0]]), torch.zeros(3)
    )
    torch.testing.assert_close(w, torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]))


def test_a_method_combines_the_chosen_experts() -> None:
    base, experts = family(Perceptron)
    routed = weft.route(base, base, experts, shared="base", combine={"method": "tsv"}, rest=1.0)
    x = inputs(Perceptron)
    merged = weft.merge([experts[0], experts[2]], "tsv", base=base)
    expected = functional_call(base, merged.state_dict(), (x,))
    torch.testing.assert_close(routed(x, weights=[0.4, 0.0, 0.6]), expected, rtol=1e-3, atol=1e-4)
