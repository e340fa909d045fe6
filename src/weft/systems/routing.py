"""Sections 2.2.3.4 and 2.2.3.5: merging anew for each input, and repairs after the merge.

Every system here is `weft.route` with its settings; `data` are by task, and `split` names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import weft
from weft.systems import System

if TYPE_CHECKING:
    from torch import nn

    from weft.api import Model
    from weft.routing.routed import Routed

Experts = Mapping[str, "Model"]
Data = Mapping[str, Any]


def smear(
    module: nn.Module, base: Model, experts: Experts, data: Data, *, steps: int, lr: float = 3e-4,
    drop: float = 0.1, where: Any = "linear", batch: int = 16, seed: int = 0, split: str = "validation",
) -> Routed:  # fmt: skip
    """θ̄ = Σ pₜ(x) θₜ at every part, p = softmax of a layer-normalised router; experts and routers trained together.

    `data` are labelled. Experts may be fine-tunes or adapters of one shape; SMEAR is a way to train them further.
    """
    from weft.routing import Gating, train

    gating = Gating.of("router", scope="layer", normed=True, drop=drop, seed=seed)
    routed = weft.route(module, base, experts, shared="base", gate=gating, where=where, rest=1 / len(experts))
    train(routed, "cross_entropy", data, steps=steps, lr=lr, what="all", batch=batch, seed=seed, split=split)
    return routed


def twin_merging(
    module: nn.Module, base: Model, experts: Experts, data: Data, *, density: float = 0.1, scale: float = 0.3,
    steps: int = 300, hidden: int = 1, seed: int = 0, split: str = "validation",
) -> Routed:  # fmt: skip
    """θ* + Σ softmax(r(x))ₜ SVD_d(θₜ − θ*): shared knowledge merged, the rest thin and added by a trained router.

    The router reads the shared model's last features; `data` are inputs by task, whose labels it does not need.
    """
    from weft.routing import Gating, fit_router

    shared = {"method": "task_arithmetic", "weight": scale}
    gating = Gating.of("router", hidden=hidden, seed=seed)
    routed = weft.route(module, base, experts, shared=shared, residual=f"lowrank:{density}", gate=gating)
    fit_router(routed, data, steps=steps, seed=seed, split=split)
    return routed


def wemoe(
    module: nn.Module, base: Model, experts: Experts, data: Data, *, loss: Any = "entropy", steps: int = 1000,
    lr: float = 1e-4, where: Any = "mlp", scale: float = 0.3, hidden: int = 1, density: float | None = None,
    tied: bool = False, per: Literal["sample", "batch"] = "sample", batch: int = 16, seed: int = 0,
    split: str = "test-time",
) -> Routed:  # fmt: skip
    """W0 + Σ g(h)ₜ τₜ in MLPs, task arithmetic elsewhere; gates start at λ, no softmax, trained by entropy.

    The paper trains on the inputs of the test, and takes the mean weights of a batch (`per="batch"`), which in
    batches of one task tells which it is. `density` and `tied` are E-WEMoE's: task vectors pruned to their largest
    entries, and one gate for all MLPs. With labels pass loss="cross_entropy".
    """
    from weft.routing import Gating, train

    gating = Gating.of(
        "router", scope="layer", softmax=False, start=scale, hidden=hidden, tied=tied, per=per, seed=seed
    )
    routed = weft.route(
        module, base, experts, shared={"method": "task_arithmetic", "weight": scale}, gate=gating, where=where,
        residual="full" if density is None else f"sparse:{density}", rests_on="base", rest=scale,
    )  # fmt: skip
    train(routed, loss, data, steps=steps, lr=lr, batch=batch, seed=seed, split=split)
    return routed


def pwemoe(
    module: nn.Module, base: Model, experts: Experts, data: Data, *, balance: Literal["ls", "epo"] = "ls",
    loss: Any = "cross_entropy", steps: int = 4000, lr: float = 1e-2, where: Any = "mlp", scale: float = 0.3,
    batch: int = 16, seed: int = 0, split: str = "validation",
) -> Routed:  # fmt: skip
    """W0 + Σ g(r)ₜ τₜ for a preference r: one model for a whole front, trained at preferences drawn each step.

    Call it with `preference=`, fold it with `checkpoint(preference=r)`, look along it with `weft.routing.pareto`.
    `balance`: Σ rₜlₜ ("ls"), which reaches convex fronts, or all rₜlₜ equal ("epo").
    """
    from weft.routing import Gating, train

    gating = Gating.of("preference", start=scale, seed=seed)
    routed = weft.route(
        module, base, experts, shared={"method": "task_arithmetic", "weight": scale}, gate=gating, where=where,
        rests_on="base", rest=scale,
    )  # fmt: skip
    train(
        routed,
        loss,
        data,
        steps=steps,
        lr=lr,
        balance=balance,
        batch=batch,
        schedule="cosine",
        seed=seed,
        split=split,
    )
    return routed


def smile(
    module: nn.Module, base: Model, experts: Experts, *, rank: int = 32, gate_rank: int = 8, top: int = 1,
    where: Any = "linear",
) -> Routed:  # fmt: skip
    """y = W0 x + Σ over the top experts by ‖Vₜᵀx‖ of Uₜ Sₜ Vₜᵀ x, for every token; Tang et al., arXiv:2408.10174.

    No data, no training. What is not a linear layer is the mean of the experts.
    """
    from weft.routing import Gating

    gating = Gating.of("energy", rank=gate_rank, top=top)
    return weft.route(
        module,
        base,
        experts,
        shared="linear",
        rests_on="base",
        residual=f"lowrank:{rank}",
        gate=gating,
        where=where,
    )


def esm_plus(
    module: nn.Module, base: Model, experts: Experts, data: Data, *, scale: float, rank: int = 32,
    samples: int = 32, temperature: float = 0.05, split: str = "validation", **settings: Any,
) -> Routed:  # fmt: skip
    """θ_ESM + Σ softmax(cos(z, μₜ))ₜ PₜPₜᵀ(θₜ − θ_ESM): thin residuals where outputs change most (ESM++).

    `data`: up to `samples` unlabelled inputs a task, for Gram matrices and prototypes alike. `scale` is ESM's,
    which has to be chosen on validation data, as the paper does in (0, 2): it may well be 0.2.
    """
    from copy import deepcopy

    import torch

    from weft.learn.data import Feed
    from weft.routing import Gating

    grams = []
    for task, model in experts.items():
        first = list(Feed(data[task], samples, 0, torch.device("cpu")).once())[:1]
        seen = [b.first(samples).raw for b in first]
        grams.append(weft.measure(weft.load(model), seen, "gram", module=deepcopy(module)))
    merged = weft.merge(list(experts.values()), "esm", base=base, statistics=grams, scale=scale, **settings)
    return weft.route(
        module, base, experts, shared=merged, residual=f"essential:{rank}", statistics=grams,
        gate=Gating.of("prototype", temperature=temperature), data=data, samples=samples, split=split,
    )  # fmt: skip


def mass(
    module: nn.Module, base: Model, experts: Experts, *, at: str, rank: int | None = None, threshold: float = 0.2,
    temperature: float = 1.0,
) -> Routed:  # fmt: skip
    """TSV-M of just the experts in whose directions an input lies: its residue at one layer decides (MASS).

    No data. A first pass of the merge of all looks at `at`; experts with a share above `threshold`, or the one with
    the largest, are merged anew for a second.
    """
    from weft.routing import Gating

    gating = Gating.of("residue", at=at, rank=rank, threshold=threshold, temperature=temperature)
    return weft.route(
        module,
        base,
        experts,
        shared="tsv",
        residual="lowrank",
        gate=gating,
        rests_on="base",
        rest=1.0,
        combine="tsv",
    )


def dawin(
    module: nn.Module, base: Model, experts: Experts, *, scale: float = 0.3, temperature: float = 1.0
) -> Routed:  # fmt: skip
    """θ0 + λ T Σ softmax(−H(pₜ(x)))ₜ τₜ: whoever is surest of an input counts most; T passes more. DaWin.

    Oh et al., ICLR 2025, arXiv:2410.03782. The paper groups weights by mixtures fitted to the test set to make
    fewer merges; here every example has its own.
    """
    from weft.routing import Gating

    gating = Gating.of("entropy", scale=scale * len(experts), temperature=temperature)
    return weft.route(module, base, experts, shared="base", gate=gating)


def dam(
    module: nn.Module, base: Model, experts: Experts, data: Data, *, where: Any, at: str | None = None,
    temperature: float = 0.01, top: int | None = None, samples: int = 256, split: str = "validation",
) -> Routed:  # fmt: skip
    """Σ softmax(cos(z, μₜ) / T)ₜ Aₜ for adapters Aₜ in a frozen network, down and up projections alike: DAM.

    `where`: the adapters; `base` is the network before any was trained, `data` are unlabelled inputs by task, whose
    mean features are the μₜ. `top=1` is hard routing.
    """
    from weft.routing import Gating

    gating = Gating.of("prototype", at=at, temperature=temperature, top=top)
    return weft.route(
        module,
        base,
        experts,
        shared="base",
        where=where,
        gate=gating,
        data=data,
        samples=samples,
        split=split,
    )


def similarity(base: Model, experts: Sequence[Model], names: Sequence[str]) -> float:
    """Mean cosine of the task vectors' pairs over some tensors."""
    import torch

    start, deltas = weft.load(base), []
    for model in experts:
        delta = weft.load(model) - start
        deltas.append([delta.tensor(n).double().flatten() for n in names])
    x = torch.stack([torch.cat(d) for d in deltas])
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = x @ x.T
    k = len(x)
    return float((cosines.sum() - cosines.trace()) / (k * (k - 1)))


def gated_where_dissimilar(
    module: nn.Module, base: Model, experts: Experts, data: Data, *, share: float = 0.5, at: str | None = None,
    where: Any = "linear", scale: float = 1.0, steps: int = 300, seed: int = 0, split: str = "validation",
) -> Routed:  # fmt: skip
    """Parts whose task vectors point the same way are averaged once, the `share` least alike is merged by input.

    A classifier of tasks on early features gives the weights of all gated parts; `data` are unlabelled inputs by
    task. The paper's measure of likeness could not be verified: this is the mean cosine of task vectors.
    """
    from weft.routing import Gating, fit_router
    from weft.routing.blocks import blocks_of

    blocks = blocks_of(module, where)
    alike = {b.name: similarity(base, list(experts.values()), b.parameters) for b in blocks}
    count = max(1, round(share * len(blocks)))
    chosen = sorted(sorted(alike, key=lambda n: alike[n])[:count], key=[b.name for b in blocks].index)
    gating = Gating.of("router", at=at or chosen[0], hidden=1, scale=scale, seed=seed)
    routed = weft.route(module, base, experts, shared="linear", gate=gating, where=chosen)
    fit_router(routed, data, steps=steps, seed=seed, split=split)
    return routed


TESTS = "tests/systems/test_routing_systems.py::"

SYSTEMS = (
    System("M56", "SMEAR", "2.2.3.4", "inference", "Muqeeth et al., TMLR 2024, arXiv:2306.03745",
           "A mixture of experts that averages the experts' weights by the router's output.",
           entry="weft.systems.routing:smear",
           test=TESTS + "test_parameters_averaged_by_a_trained_router_beat_one_expert_of_the_cost"),
    System("M57", "Twin-Merging", "2.2.3.4", "inference", "Lu et al., NeurIPS 2024, arXiv:2406.15479",
           "Keeps what experts share merged and what is their own compressed, and adds it by input.",
           entry="weft.systems.routing:twin_merging",
           test=TESTS + "test_thin_knowledge_added_by_a_router_nearly_reaches_the_experts"),
    System("M58", "WEMoE", "2.2.3.4", "inference", "Tang et al., ICML 2024, arXiv:2402.00433",
           "Merges the MLP blocks by input through small gates, everything else once.",
           entry="weft.systems.routing:wemoe", test=TESTS + "test_gates_at_the_mlps_learn_to_weigh_task_vectors"),
    System("M59", "PWEMoE", "2.2.3.4", "inference", "Tang et al., 2024, arXiv:2406.09770",
           "Gates that read a preference instead of an input, and so give a whole Pareto set.",
           aliases=("S62",), entry="weft.systems.routing:pwemoe",
           test=TESTS + "test_one_model_turns_a_preference_into_weights"),
    System("M60", "Representation Surgery", "2.2.3.5", "training",
           "Yang et al., ICML 2024, arXiv:2402.02705",
           "A small module a task that pulls the merged model's features back to the expert's.",
           entry="weft.calibrate.surgery:surgery",
           test="tests/systems/test_calibration.py::test_surgery_brings_a_merge_near_its_experts"),
)  # fmt: skip
