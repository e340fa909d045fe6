"""PFNM, FedMA and GAMF on small splits of scikit-learn's digits over clients with other starts and classes."""

from __future__ import annotations

from functools import lru_cache

import torch
from matching_lab import Data, accuracy, digits, fitted, mlp
from torch import Tensor, nn
from torch.distributions import Dirichlet

import weft
from weft.align.graphs import graph_matching
from weft.align.growing import fedma, pfnm, widened
from weft.align.transport import ot_fusion


@lru_cache
def split(clients: int, alpha: float, seed: int) -> list[Data]:
    """Training images divided over clients: of each class shares drawn from a Dirichlet distribution."""
    x, y = digits()[0]
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for c in range(10):
            rows = (y == c).nonzero().flatten()
            share = Dirichlet(torch.full((clients,), alpha)).sample()
            cuts = (share.cumsum(0)[:-1] * len(rows)).long().tolist()
            for mine, some in zip(parts, torch.tensor_split(rows, cuts)):
                mine.append(some)
    return [(x[torch.cat(p)], y[torch.cat(p)]) for p in parts]


@lru_cache
def clients(seed: int, alpha: float, *widths: int) -> tuple[nn.Module, ...]:
    """Three networks of their own starts, each trained on its own part."""
    made = []
    for k, data in enumerate(split(3, alpha, seed)):
        with torch.random.fork_rng():
            torch.manual_seed(100 * seed + k)
            made.append(fitted(mlp(*widths), k, data, epochs=20))
    return tuple(made)


def counted(parts: list[Data]) -> list[Tensor]:
    return [torch.bincount(y, minlength=10) for _, y in parts]


def test_pfnm_matches_clients_in_one_round_where_averaging_fails() -> None:
    nets, parts = clients(0, 0.5, 48), split(3, 0.5, 0)
    averaged = accuracy(weft.merge(list(nets), "linear"), nets[0])
    made = pfnm(nets, counts=counted(parts)).merged()
    assert 48 < made.info("0.weight").shape[0] < 3 * 48  # grown, but units are shared
    assert accuracy(made, widened(nets[0], made)) > max(averaged, *(accuracy(n, n) for n in nets)) + 0.1
    plain = pfnm(nets).merged()
    assert accuracy(plain, widened(nets[0], plain)) > averaged + 0.05


def test_fedma_beats_as_many_rounds_of_averaging_and_matching_at_once() -> None:
    nets, parts = clients(2, 0.5, 32, 32), split(3, 0.5, 2)

    def retrain(module: nn.Module, client: int, frozen: frozenset[str]) -> None:
        x, y = parts[client]
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
        generator = torch.Generator().manual_seed(client)
        for _ in range(8):
            for batch in torch.randperm(len(x), generator=generator).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
                optimizer.step()

    averaged = weft.merge(list(nets), "linear")
    sizes = [float(len(y)) for _, y in parts]
    for _ in range(2):  # as many rounds as there are layers to match
        local = [widened(nets[0], averaged).requires_grad_(True) for _ in nets]
        for k, net in enumerate(local):
            retrain(net, k, frozenset())
        averaged = weft.merge(local, "linear", weight=sizes)
    made = fedma(nets, retrain, counts=counted(parts)).merged()
    once = pfnm(nets, counts=counted(parts)).merged()
    best = accuracy(made, widened(nets[0], made))
    assert best > accuracy(averaged, nets[0]) + 0.02
    assert best > accuracy(once, widened(nets[0], once)) + 0.1


def test_graphs_of_several_clients_are_matched_as_well_as_by_transport_to_one() -> None:
    merged = {"averaged": 0.0, "transport": 0.0, "graphs": 0.0}
    for seed in (0, 2, 3):
        nets = clients(seed, 1.0, 32)
        moved = [ot_fusion(n, nets[0]).checkpoint for n in nets[1:]]
        found = graph_matching(nets)
        merged["averaged"] += accuracy(weft.merge(list(nets), "linear"), nets[0]) / 3
        merged["transport"] += accuracy(weft.merge([nets[0], *moved], "linear"), nets[0]) / 3
        merged["graphs"] += accuracy(found.merged(), nets[0]) / 3
    assert merged["graphs"] > merged["averaged"] + 0.1
    assert merged["graphs"] > merged["transport"] - 0.01
