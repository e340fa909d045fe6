"""Section 2.4.1: learning one thing after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import weft
from weft.systems import System
from weft.systems.weighted import GRID, Choice, grid_search

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weft.adapters.merge import Source
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint
    from weft.train.batches import Data


def magmax(models: Sequence[Model], base: Model, scale: float = 0.5) -> Checkpoint:
    """θ0 + λ times every parameter's largest change. `models`: one run, after each of its tasks in turn."""
    return weft.merge(models, "magmax", base=base, scale=scale)


def paint(
    zero_shot: Model,
    fine_tuned: Model,
    patch: Callable[[Checkpoint], float],
    supported: Callable[[Checkpoint], float],
    grid: Sequence[float] = GRID,
) -> Choice:
    """(1−α)θ0 + αθ1 with the α whose mean of `patch` and `supported` accuracy is highest.

    Fine-tune with the head frozen, and measure both on validation data.
    """
    return grid_search(
        lambda alpha: weft.merge([fine_tuned], "wise_ft", base=zero_shot, alpha=alpha),
        lambda made: (patch(made) + supported(made)) / 2,
        grid,
    )


def lm_cocktail(
    models: Sequence[Model],
    losses: Sequence[float],
    fine_tuned: Model,
    alpha: float = 0.5,
    temperature: float = 5.0,
) -> Checkpoint:
    """αθ_ft + (1−α) Σ wᵢθᵢ, w = softmax(−ℓ/T), ℓᵢ the loss of model i on a few examples of the target.

    `models` are the base and whatever else has been fine-tuned from it.
    """
    nearest = min(losses)
    shares = [math.exp((nearest - loss) / temperature) for loss in losses]
    rest = [(1 - alpha) * share / sum(shares) for share in shares]
    return weft.merge([fine_tuned, *models], "linear", weight=[alpha, *rest])


def add_then_replay(
    base: Model,
    adapters: Sequence[Source],
    replay: Callable[[Checkpoint], Model],
    scale: float = 0.25,
) -> Model:
    """`replay(θ0 + λ Σ BₜAₜ)`: LoRAs of all tasks added exactly, then tuned once on a small balanced memory.

    Every adapter is trained from θ0 on its own task's data; `replay` fine-tunes a model on about ten examples
    a class of every task.
    """
    from weft.adapters.factors import as_adapter
    from weft.adapters.merge import merge_adapters
    from weft.checkpoints.adapted import Adapted

    start = weft.load(base)
    return replay(Adapted(start, as_adapter(merge_adapters(adapters, scale, how="concat", base=start)).lora))


@dataclass(frozen=True)
class Increments:
    """Features under averaged adapters, and a head a task whose last logit says "none of mine"."""

    features: nn.Module
    heads: Sequence[nn.Module]
    kept: Sequence[nn.Module]
    """The features with each task's own adapters, before they were averaged."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Task [n], the one whose head is least for "none of mine", and the class inside it [n]."""
        import torch

        shares = [head(self.features(x)).softmax(-1) for head in self.heads]
        task = torch.stack([s[:, -1] for s in shares], 1).argmin(1)
        inside = torch.stack([s[:, :-1].argmax(1) for s in shares], 1)
        return task, inside.gather(1, task[:, None])[:, 0]


def dynammo(
    features: nn.Module, adapters: str, width: int, data: Sequence[tuple[Tensor, Tensor]],
    memory: Sequence[tuple[Tensor, Tensor]], *, lr: float = 1e-3, head_lr: float = 3e-3, epochs: int = 12,
    seed: int = 0,
) -> Increments:  # fmt: skip
    """One adapter a task, each from the one before; then their mean, and all heads anew on a balanced memory.

    `features` gives [n, `width`]; only parameters that match `adapters` are trained. `data` are the tasks in turn,
    labels 0 … cₜ−1 in each; a new adapter and its head see the memory of earlier tasks as "none of mine". `memory`
    holds a few examples of every task, as many of each.
    """
    import torch

    from weft.train.loop import finetune

    sizes = [int(y.max()) + 1 for _, y in data]
    made, last = [], features

    def trained(net: nn.Module, head: nn.Module, own: tuple[Tensor, Tensor], others: Sequence[Tensor],
                which: Sequence[str], classes: int, rate: float) -> nn.Module:  # fmt: skip
        x = torch.cat([own[0], *others])
        y = torch.cat([own[1], torch.full((len(x) - len(own[0]),), classes)])
        joint = torch.nn.Sequential(deepcopy(net), head)
        found = finetune(joint, (x, y), which=which, epochs=epochs, batch=50, lr=rate, seed=seed)
        joint.load_state_dict(joint.state_dict() | found.model.weights())
        return joint.eval().requires_grad_(False)

    def fresh(t: int) -> nn.Module:
        torch.manual_seed(seed + t)
        return torch.nn.Linear(width, sizes[t] + 1)

    with torch.random.fork_rng([]):
        for t, own in enumerate(data):
            earlier = [memory[s][0] for s in range(t)]
            last = trained(last, fresh(t), own, earlier, [f"0.{adapters}", "1.*"], sizes[t], lr)[0]  # type: ignore[index]
            made.append(last)
        averaged = weft.materialize(weft.merge(made, "linear"), deepcopy(features)).eval()
        heads = [
            trained(
                averaged,
                fresh(t),
                own,
                [x for s, (x, _) in enumerate(memory) if s != t],
                ["1.*"],
                sizes[t],
                head_lr,
            )[1]  # type: ignore[index]
            for t, own in enumerate(memory)
        ]
    return Increments(averaged, heads, made)


def ita_iel(
    module: nn.Module,
    data: Sequence[Data],
    fisher: Model | Mapping[str, Tensor],
    strength: float = 100.0,
    how: Literal["ita", "iel"] = "ita",
    freeze: Sequence[str] = (),
    **training: Any,
) -> list[Checkpoint]:
    """One model a task, each kept near θ0 as its Fisher information says; their mean is the composed model.

    ITA tunes each task alone on ℓ_t(θ_t) + (β/2) (θ_t−θ0)ᵀ F (θ_t−θ0). IEL takes the tasks in turn and tunes the
    new one through the mean of all so far, θ_P = θ0 + Σ τ_s / t, on ℓ_t(θ_P) + (β/2) (θ_P−θ0)ᵀ F (θ_P−θ0), whose
    cross terms couple the tasks. `fisher` is diagonal, of θ0 (`weft.measure(module, …, "fisher")`); β is
    `strength`. The Fisher here is measured once; the paper accumulates it over tasks.
    """
    from weft.train.chart import Direct, Shared
    from weft.train.loop import Training
    from weft.train.model import Charted
    from weft.train.objectives import quadratic, supervised
    from weft.train.select import chosen

    importance = fisher if isinstance(fisher, Mapping) else weft.load(fisher)
    objective = supervised() + strength * quadratic(importance)
    names = chosen(module, "all", freeze)
    deltas: list[Mapping[str, Tensor]] = []
    made: list[Checkpoint] = []
    for part in data:
        chart = Shared(module, names, deltas) if how == "iel" else Direct(module, names)
        model = Charted(module, chart)
        Training(model, part, objective=objective, **training).advance()
        own = Charted(module, Direct(module, names))
        own.take({n: p.detach() for n, p in model.phi.items()})
        deltas.append({n: t.detach() for n, t in own.delta().items()})
        made.append(weft.load(own.weights()))
    return made


TESTS = "tests/systems/test_continual.py::"
HERE = "weft.systems.continual:"

SYSTEMS = (
    System("S45", "Tangent Model Composition (TMC)", "2.4.1.1", "training", "Liu & Soatto, ICCV 2023",
           "Trains each task in the tangent space of one model and averages."),
    System("S46", "ITA / IEL", "2.4.1.1", "training", "Porrello et al., ICLR 2025, arXiv:2405.16350",
           "Keeps each task's weights where a quadratic model of the loss holds, so that they add up.",
           entry=HERE + "ita_iel",
           test="tests/systems/test_finetune.py::test_weights_held_where_the_loss_is_quadratic_add_up_better"),
    System("S47", "WARP", "2.4.1.1", "training", "Ramé et al., 2024, arXiv:2406.16768",
           "Rounds of rewarded training from an averaged anchor, SLERP of the policies, and a step back."),
    System("S48", "BaM (Branch-and-Merge)", "2.4.1.1", "training",
           "Alexandrov et al., EMNLP Findings 2024, arXiv:2407.08699",
           "Trains copies on slices of the data and merges them before the next slices."),
    System("S49", "MagMax", "2.4.1.1", "merge", "Marczak et al., ECCV 2024, arXiv:2407.06322",
           "Of models trained one after the other, keeps every parameter's largest change.",
           entry=HERE + "magmax",
           test=TESTS + "test_largest_changes_of_a_sequence_beat_the_mean_of_independent_experts"),
    System("S50", '"Equifinality"', "2.4.1.1", "study", "none: no such paper is known",
           "No system: most likely an adverb that a translation took for a name. The sentence is about "
           "two-point interpolation, so the row runs weft.wise_ft.",
           entry="weft:wise_ft", test=TESTS + "test_two_point_interpolation_passes_between_its_ends"),
    System("S51", "PAINT", "2.4.1.1", "merge", "Ilharco et al., NeurIPS 2022, arXiv:2208.05592",
           "Patches a model for a task by interpolating to its fine-tuned self as far as the rest allows.",
           entry=HERE + "paint", test=TESTS + "test_paint_patches_a_task_and_keeps_what_was_supported"),
    System("S52", "LM-Cocktail", "2.4.1.1", "merge", "Xiao et al., ACL Findings 2024, arXiv:2311.13534",
           "Averages a fine-tuned model with its relatives, weighed by their loss on a few examples.",
           entry=HERE + "lm_cocktail",
           test=TESTS + "test_a_cocktail_keeps_general_accuracy_and_most_of_the_target"),
    System("S53", "Task arithmetic with LoRA for CL (Chitale)", "2.4.1.1", "training",
           "Chitale et al., NeurIPS workshop 2023, arXiv:2311.02428",
           "Adds the LoRAs of all tasks, then tunes on ten examples a class.",
           entry=HERE + "add_then_replay",
           test="tests/systems/test_adapters.py::test_loras_of_all_tasks_and_a_replay_nearly_reach_joint_training"),
    System("S54", "DynaMMo", "2.4.1.1", "training", "Qazi et al., 2024, arXiv:2404.14099",
           "Averages one adapter a task, then re-trains the heads on a small memory.", entry=HERE + "dynammo",
           test="tests/systems/test_routing_systems.py::test_averaged_adapters_serve_nearly_like_one_a_task"),
    System("S55", "DAM dynamic adapter merging", "2.4.1.1", "inference",
           "Cheng et al., 2024, arXiv:2403.08755",
           "Merges adapters for each input by its distance from the data they were trained on.",
           entry="weft.systems.routing:dam",
           test="tests/systems/test_routing_systems.py::test_adapters_merged_by_distance_beat_their_average"),
    System("S56", "AMM inside ADM (novel class discovery)", "2.4.1.1", "training",
           "Chen et al., AAAI 2024, arXiv:2403.03382",
           "Folds a parallel branch for novel classes into the convolution beside it, exactly."),
    System("S57", "Disperse-Then-Merge", "2.4.1.1", "training",
           "Fu et al., ACL Findings 2024, arXiv:2405.13432",
           "Instruction-tunes a model a random shard of the data and averages them."),
    System("S58", "EWC comparator", "2.4.1.1", "training", "Kirkpatrick et al., PNAS 2017, arXiv:1612.00796",
           "Penalises moving weights that earlier tasks depend on."),
)  # fmt: skip
