"""Section 2.4.6: a backdoor is a patch that sends an image to a label of the attacker's."""

from __future__ import annotations

from lab import UPRIGHT, correct
from poison import Poisoned, hit_rate

from weft.demo.tasks import examples
from weft.systems.adversarial import sanitise


def test_averaging_weakens_backdoors_that_are_not_shared(poisoned: list[Poisoned]) -> None:
    clean = examples(UPRIGHT, "test")
    for made in poisoned:
        averaged = sanitise(made.models)
        before = [hit_rate(m, i) for i, m in enumerate(made.models)]
        after = [hit_rate(averaged, i) for i in range(3)]
        assert min(before) > 0.85
        assert sum(after) < 0.4 * sum(before)
        assert correct(averaged, clean) > sum(correct(m, clean) for m in made.models) / 3 - 0.01
        # with the clean base beside them every backdoor loses more
        with_base = sanitise([*made.models, made.base])
        assert all(hit_rate(with_base, i) <= after[i] for i in range(3))
        # what all of them know survives
        assert hit_rate(averaged, "shared") > 0.85
