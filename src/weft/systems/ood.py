"""Section 2.4.3: shifts of distribution, and domains never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import weft
from weft.systems import System
from weft.systems.basic import weight_average

if TYPE_CHECKING:
    from torch import nn

    from weft.analysis.ensemble import Ensemble
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint
    from weft.train.loop import Finetuned
    from weft.train.trace import Trace


def wise_ft(zero_shot: Model, fine_tuned: Model, alpha: float = 0.5) -> Checkpoint:
    """(1−α)θ0 + αθ1, every weight, the head too."""
    return weft.merge([fine_tuned], "wise_ft", base=zero_shot, alpha=alpha)


def uniform_soup(models: Sequence[Model]) -> Checkpoint:
    """The mean of runs from one start."""
    return weight_average(models)


def greedy_soup(
    models: Sequence[Model], score: Callable[[Checkpoint], float]
) -> tuple[Checkpoint, list[int]]:
    """From the best model down, each is kept if the mean with it scores no worse; and which were kept.

    `score` is on held-out data that nothing is reported on. Every mean is lazy: only `score` reads it.
    """
    alone = [score(weft.load(m)) for m in models]
    order = sorted(range(len(models)), key=lambda i: -alone[i])
    kept, best = order[:1], alone[order[0]]
    for i in order[1:]:
        found = score(uniform_soup([models[j] for j in (*kept, i)]))
        if found >= best:
            kept, best = [*kept, i], found
    return uniform_soup([models[j] for j in kept]), kept


def diwa(
    runs: Sequence[Model], score: Callable[[Checkpoint], float] | None = None
) -> tuple[Checkpoint, list[int]]:
    """The mean of runs from one start with mildly different settings, for domains unseen; and which are in it.

    All of them, or, with a `score` on held-out data of the domains that were trained on, those that a greedy soup
    keeps (arXiv:2205.09739). `weft.analysis.decomposition.bias_variance` tells why.
    """
    return (uniform_soup(runs), list(range(len(runs)))) if score is None else greedy_soup(runs, score)


def model_stock(models: Sequence[Model], base: Model) -> Checkpoint:
    """From the base towards the mean of a few runs, as far as the angle between them says."""
    return weft.merge(models, "model_stock", base=base)


def periodic_swa(module: nn.Module, data: Any, *, period: int, **training: Any) -> tuple[Finetuned, Trace]:
    """Train, every `period` steps going on from the mean of the weights since; and the mean since the last time.

    The moments of the optimiser stay. `training` is `weft.finetune`'s.
    """
    from weft.train.loop import finetune
    from weft.train.trace import Trace

    trace = Trace("mean")
    made = finetune(module, data, on_step=trace, on_round=trace.restart, round_every=period, **training)
    return made, trace


def dart(
    module: nn.Module, data: Sequence[Any], *, period: int, steps: int, seed: int = 0, **training: Any
) -> Checkpoint:
    """A run on each of `data` (the same examples under other augmentations), all from `module`; every `period`
    steps, and at the end, each goes on from the mean of all, θ ← (1/M) Σ θₘ, which is what is given back.

    The paper trains `module` on mixed augmentations first. Every run keeps its optimiser's moments. `training` is
    `Training`'s. Raises UsageError for fewer than two data sets, or a period that is none.
    """
    from weft.errors import UsageError
    from weft.train.loop import Training
    from weft.train.modes import charted

    if len(data) < 2 or not 1 <= period <= steps:
        raise UsageError(
            f"{len(data)} data sets, period {period} of {steps} steps: give two or more, and a period in the steps"
        )
    runs = [
        Training(charted(module, "full"), part, steps=steps, seed=seed + i, **training)
        for i, part in enumerate(data)
    ]
    while not runs[0].done:
        for run in runs:
            run.advance(period)
        mean = weft.load(uniform_soup([run.model.weights() for run in runs]).state_dict())
        for run in runs:
            run.replace(mean)
    return mean


def ensemble_of_averages(
    module: nn.Module, data: Any, *, runs: int = 6, start: float = 100, seed: int = 0, **training: Any
) -> tuple[Ensemble, list[Finetuned]]:
    """An ensemble of `runs` trainings with other orders of the data, each the mean of its iterates from `start`.

    And the runs themselves, whose last weights are not averaged. `training` is `weft.finetune`'s.
    """
    from copy import deepcopy

    from weft.analysis.ensemble import Ensemble
    from weft.train.loop import finetune
    from weft.train.trace import Trace

    traces = [Trace("mean", start=start) for _ in range(runs)]
    made = [finetune(module, data, on_step=t, seed=seed + i, **training) for i, t in enumerate(traces)]
    averaged = [weft.materialize(t.checkpoint(), deepcopy(module)).eval() for t in traces]
    return Ensemble(averaged), made


TESTS = "tests/systems/test_ood.py::"
LEARNED = "tests/systems/test_learned.py::"
HERE = "weft.systems.ood:"
RUNS = "tests/systems/test_trajectory.py::"

SYSTEMS = (
    System("S67", "SWA", "2.4.3.1", "training", "Izmailov et al., UAI 2018, arXiv:1803.05407",
           "The mean of the weights at the ends of late epochs.", aliases=("M61",),
           entry="weft.train.trace:Trace", test=RUNS + "test_averages_along_a_run_are_better_than_its_end"),
    System("S68", "PSWA (periodic SWA)", "2.4.3.1", "training", "Guo et al., 2022",
           "Averages in periods and restarts training from each average.",
           entry=HERE + "periodic_swa", test=RUNS + "test_restarts_from_averages_are_ahead_of_plain_training"),
    System("S69", "Mean Teacher", "2.4.3.1", "training",
           "Tarvainen & Valpola, NeurIPS 2017, arXiv:1703.01780",
           "A teacher that is the moving average of its student, whose outputs it must match."),
    System("S70", "Late-phase weights", "2.4.3.1", "training",
           "von Oswald et al., ICLR 2021, arXiv:2007.12927",
           "Several copies of a few weights late in training, averaged at the end."),
    System("S71", "SWALP", "2.4.3.1", "training", "Yang et al., ICML 2019, arXiv:1904.11943",
           "SWA over a run in low precision, which averages its rounding noise away."),
    System("S72", "WiSE-FT", "2.4.3.1", "merge", "Wortsman et al., CVPR 2022, arXiv:2109.01903",
           "Interpolates between a zero-shot model and its fine-tune, and keeps robustness.",
           entry=HERE + "wise_ft", test=TESTS + "test_wise_ft_regains_robustness_at_little_cost"),
    System("S73", "ASWA adaptive SWA", "2.4.3.1", "training", "Demir et al., JMLR 2024, arXiv:2406.19092",
           "Takes an epoch into the average only if validation does not suffer.",
           entry="weft.train.trace:Trace",
           test=RUNS + "test_an_average_that_validation_accepts_leaves_out_bad_states"),
    System("S74", "TWA trainable weight averaging", "2.4.3.1", "training", "Li et al., ICLR 2023",
           "Trains in the span of a run's checkpoints.", entry="weft.learn.soups:twa",
           test=LEARNED + "test_training_in_the_span_of_half_a_run_reaches_its_end"),
    System("S75", "Model Soups (uniform, greedy, learned)", "2.4.3.1", "merge",
           "Wortsman et al., ICML 2022, arXiv:2203.05482",
           "Averages fine-tunes of one model with different settings: all, those that help, or by weight.",
           entry=HERE + "greedy_soup",
           test=TESTS + "test_a_greedy_soup_leaves_out_a_bad_run_and_a_learned_one_lowers_the_loss"),
    System("S76", "Sparse Model Soups", "2.4.3.1", "training", "Zimmer et al., ICLR 2024, arXiv:2306.16788",
           "Averages re-trainings of one pruned model, which share its mask."),
    System("S77", "AdapterSoup", "2.4.3.1", "inference",
           "Chronopoulou et al., EACL Findings 2023, arXiv:2302.07027",
           "Averages the adapters of the domains nearest to a new one."),
    System("S78", "Model Ratatouille", "2.4.3.1", "training", "Ramé et al., ICML 2023, arXiv:2212.10445",
           "Fine-tunes on the target from several auxiliary fine-tunes and averages."),
    System("S79", "WARM", "2.4.3.1", "training", "Ramé et al., ICML 2024, arXiv:2401.12187",
           "Averages reward models, which are then harder to exploit."),
    System("S80", "PAPA (+ PAPA-all, PAPA-2)", "2.4.3.1", "training",
           "Jolicoeur-Martineau et al., TMLR 2024, arXiv:2304.03094",
           "Trains a population whose members are pulled towards their mean."),
    System("S81", "WASH", "2.4.3.1", "training", "Fournier et al., 2024, arXiv:2405.17517",
           "Shuffles parameters among the members of a population so that they stay mergeable."),
    System("S82", "DART", "2.4.3.1", "training", "Jain et al., CVPR 2023, arXiv:2302.14685",
           "Trains a branch an augmentation and averages them from time to time.", entry=HERE + "dart",
           test="tests/systems/test_branches.py::"
           "test_branches_that_meet_again_and_again_are_ahead_of_one_mean_at_the_end_and_of_one_long_run"),
    System("S83", "DiWA", "2.4.3.1", "training", "Ramé et al., NeurIPS 2022, arXiv:2205.09739",
           "Averages diverse runs from one start and one linear probe.", entry=HERE + "diwa",
           test=TESTS + "test_an_average_of_diverse_runs_serves_an_unseen_domain_better_than_the_chosen_one"),
    System("S84", "Model Stock", "2.4.3.1", "merge", "Jang et al., ECCV 2024, arXiv:2403.19522",
           "Finds the robust centre of two runs from their angle at the base.", entry=HERE + "model_stock",
           test=TESTS + "test_the_stock_of_two_runs_is_more_robust_than_their_mean"),
    System("S85", "MEHL-Soup", "2.4.3.1", "search", "Li et al., ECCV 2024, arXiv:2407.03641",
           "Learns signed soup weights on a hyperplane, a few models at a time.",
           entry="weft.learn.soups:mehl_soup",
           test=LEARNED + "test_a_signed_soup_of_twelve_runs_needs_four_in_memory"),
    System("S86", "Lookaround", "2.4.3.1", "training", "Zhang et al., NeurIPS 2023, arXiv:2306.07684",
           "An optimiser that steps along several augmentations and averages every few steps."),
    System("S87", "SWAD", "2.4.3.2", "training", "Cha et al., NeurIPS 2021, arXiv:2102.08604",
           "Averages every iterate while the validation loss lies in its valley.",
           entry="weft.train.valley:Valley", test=RUNS + "test_the_valley_leaves_out_where_the_run_overfits"),
    System("S88", "EoA ensemble of averages", "2.4.3.2", "inference",
           "Arpit et al., NeurIPS 2022, arXiv:2110.10832", "An ensemble of averaged runs.",
           aliases=("M63",), entry=HERE + "ensemble_of_averages",
           test=RUNS + "test_an_ensemble_of_averages_is_better_than_one_of_last_iterates"),
)  # fmt: skip
