"""Section 2.3.1: extrapolated alignment, forgetting by negation, forgetting by fusion."""

from __future__ import annotations

import copy

import torch
from lab import UPRIGHT, Data, as_network, correct, only, random_step, score, tuned
from poison import Poisoned, hit_rate
from torch import nn
from torch.nn import functional as F

from weft.demo.network import DigitNet
from weft.demo.tasks import examples
from weft.systems.llm import expo, forget, fuse_to_forget


def preferred(reference: DigitNet, data: Data, seed: int, steps: int = 30, beta: float = 0.1) -> nn.Module:
    """Direct preference optimisation: an image is a prompt, its class the answer, the true one preferred."""
    net = copy.deepcopy(reference).requires_grad_(True)
    net.head.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    inputs, labels = data
    for _ in range(steps):
        i = torch.randint(len(inputs), (50,), generator=generator)
        chosen, rejected = labels[i], (labels[i] + torch.randint(1, 10, (50,), generator=generator)) % 10
        margin = (net(inputs[i]).log_softmax(1) - reference(inputs[i]).log_softmax(1)).gather(
            1, torch.stack([chosen, rejected], 1)
        )
        optimizer.zero_grad()
        (-F.logsigmoid(beta * (margin[:, 0] - margin[:, 1]))).mean().backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def reward(model: object, split: str) -> float:
    """Mean probability of the preferred answer."""
    inputs, labels = examples("rotated", split)  # type: ignore[arg-type]
    return float(as_network(model)(inputs).softmax(1).gather(1, labels[:, None]).mean())


@torch.no_grad()
def divergence(model: object, reference: nn.Module) -> float:
    """KL(model ‖ reference)."""
    inputs, _ = examples("rotated", "test")
    p, q = as_network(model)(inputs).log_softmax(1), reference(inputs).log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def test_expo_gains_reward_beyond_a_short_dpo_training(bases: dict[int, DigitNet]) -> None:
    alphas = (0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)
    for seed, sft in bases.items():
        aligned = preferred(sft, examples("rotated", "train"), seed)
        assert reward(aligned, "test") > reward(sft, "test") + 0.05
        made = {a: expo(aligned, sft, a) for a in alphas}
        assert reward(made[0.3], "test") > reward(aligned, "test") + 0.01
        chosen = max(alphas, key=lambda a: reward(made[a], "validation"))
        assert alphas[0] < chosen < alphas[-1], "the gain has a maximum inside the range"
        assert reward(made[chosen], "test") > reward(aligned, "test") + 0.03
        far = [divergence(m, sft) for m in (aligned, *made.values())]
        assert far == sorted(far)


def test_forgetting_under_a_control_lowers_the_target_and_keeps_the_rest(bases: dict[int, DigitNet]) -> None:
    upper, lower = (lambda y: y >= 5), (lambda y: y < 5)
    validation, test = examples(UPRIGHT, "validation"), examples(UPRIGHT, "test")
    for seed, base in bases.items():
        bad = tuned(base, only(examples(UPRIGHT, "train"), upper), seed, epochs=15)
        found = forget(
            base, bad,
            target=lambda m: correct(m, only(validation, upper)),
            control=lambda m: correct(m, only(validation, lower)),
            grid=(0.0, 0.5, 1.0, 2.0, 3.0),
        )  # fmt: skip
        assert correct(found.checkpoint, only(test, upper)) < correct(base, only(test, upper)) - 0.5
        assert correct(found.checkpoint, only(test, lower)) > 0.95 * correct(base, only(test, lower))
        control = random_step(base, found.checkpoint.state_dict(), seed)
        assert correct(control, only(test, upper)) > correct(base, only(test, upper)) - 0.03


def test_forgetting_stops_where_the_control_would_suffer(bases: dict[int, DigitNet]) -> None:
    base = bases[1]
    bad = tuned(base, examples("rotated", "train"), 1, epochs=5)
    found = forget(
        base, bad, target=lambda m: score(m, "rotated", "validation"), control=lambda _: 0.0, keep=1.0,
        grid=(0.5,),
    )  # fmt: skip
    assert found.tried.keys() == {0.0, 0.5}
    scores = iter([1.0, 0.9])
    found = forget(base, bad, target=lambda _: 0.5, control=lambda _: next(scores), keep=0.95, grid=(0.5,))
    assert found.value == 0.0 and found.tried.keys() == {0.0}


def test_fusing_forgets_a_shortcut_of_one_parent_and_keeps_a_shared_one(poisoned: list[Poisoned]) -> None:
    clean = examples(UPRIGHT, "test")
    for made in poisoned:
        fused = fuse_to_forget(made.models)
        before = [hit_rate(m, i) for i, m in enumerate(made.models)]
        after = [hit_rate(fused, i) for i in range(len(made.models))]
        assert all(b > 0.85 for b in before)
        assert all(a < 0.5 * b for a, b in zip(after, before, strict=True)), after
        assert hit_rate(fused, "shared") > 0.85
        assert correct(fused, clean) > max(correct(m, clean) for m in made.models) - 0.02
