"""Rows of the router: what makes a token go to one expert rather than another, before any training.

For expert e and layer l, with x the router's input (the normalised state that enters the MLP), s(p) the state
of prompt p, P⁺ and P⁻ the positive and negative prompts:

    hidden, hidden_last   h = mean over P⁺ of x at the prompt's last token, less the same over P⁻
    hidden_avg            x averaged over the prompt's tokens instead
    cheap_embed           the embeddings of all tokens of P⁺, summed and normalised, less those of P⁻; one for all l
    random                normal, standard deviation 0.02, as a fresh router of transformers
    uniform_random        uniform in ±1/√H, as a fresh torch.nn.Linear

and, but for the random ones, w_e = h / ‖h‖₂. With `compat: mergekit` the states are those that enter the layer,
as MergeKit takes them; the router never sees those. Every prompt then begins with the beginning-of-text token, even
where the tokenizer puts none there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.assembled import Assembled, Span, joined
from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, UsageError
from weft.llm.moe.noise import normal
from weft.llm.moe.recipe import Expert, GateMode
from weft.methods.random import uniform_bits
from weft.methods.step import At

FRESH = 0.02
"""Standard deviation of a fresh router's weights in transformers."""
ALIKE = 0.98
"""Cosine from which two experts' rows count as near-identical."""
ILL_CONDITIONED = 5.0
"""Condition number of the rows from which the report speaks of it."""


def gate_vectors(
    base: Checkpoint,
    experts: Sequence[Expert],
    mode: GateMode,
    *,
    layers: int,
    stack: str,
    seed: int = 0,
    mergekit: bool = False,
    name: str = "experts",
) -> Tensor:
    """Router rows `[layers, len(experts), hidden]` in float32, by the formulas above.

    `stack` begins the names of the layers; `mergekit` takes the state that enters the layer, of prompts that begin
    with a beginning-of-text token. Experts without prompts get zeros. Raises UsageError where the prompts cannot
    be read for want of a tokenizer.
    """
    embedding = _embedding(base)
    hidden = base.info(embedding).shape[1]
    if mode in ("random", "uniform_random"):
        return _random((layers, len(experts), hidden), mode, seed, name)
    prompts = sorted({p for e in experts for p in (*e.positive, *e.negative)})
    if not prompts:
        return torch.zeros(layers, len(experts), hidden)
    tokens = dict(zip(prompts, _tokens(base, prompts, mergekit), strict=True))
    rows = []
    if mode == "cheap_embed":
        for expert in experts:
            plus, minus = (_summed(base, embedding, [tokens[p] for p in side])
                           for side in (expert.positive, expert.negative))  # fmt: skip
            rows.append((plus - minus).expand(layers, hidden))
    else:
        states = _states(base, tokens, layers, stack, mode == "hidden_avg", mergekit)
        nothing = torch.zeros(layers, hidden, dtype=torch.float64)
        for expert in experts:
            plus, minus = (torch.stack([states[p] for p in side]).mean(0) if side else nothing
                           for side in (expert.positive, expert.negative))  # fmt: skip
            rows.append(plus - minus)
    return _normalised(torch.stack(rows, dim=1)).float()


def _normalised(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp(min=1e-8)


def _embedding(base: Checkpoint) -> str:
    found = [n for n in base if n.endswith(("embed_tokens.weight", "wte.weight"))]
    if len(found) != 1:
        raise DataError(
            f"{base.origin} has {len(found)} token embeddings; a mixture is made of a decoder with one"
        )
    return found[0]


def _random(shape: tuple[int, int, int], mode: GateMode, seed: int, name: str) -> Tensor:
    """Drawn from a counter keyed by seed and name, so the same whatever the machine's threads."""
    at = At(f"moe/{name}", shape, seed=seed)
    n = at.numel
    if mode == "uniform_random":
        u = (uniform_bits(at, 0, n).double() + 0.5) / 2**32
        return ((2 * u - 1) / sqrt(shape[-1])).reshape(shape).float()
    return (FRESH * normal(at, 0, n)).reshape(shape).float()


def _tokens(base: Checkpoint, prompts: Sequence[str], always_begin: bool) -> list[list[int]]:
    from weft.llm.hf import tokenizer_of

    tokenizer = tokenizer_of(base)
    if tokenizer is None:
        raise UsageError(
            f"{base.origin} has no tokenizer to read the prompts with; put its tokenizer files beside "
            "config.json, or choose gate_mode random"
        )
    if always_begin:
        begin = tokenizer.bos_token or ""
        found = [list(tokenizer(begin + p, add_special_tokens=False)["input_ids"]) for p in prompts]
    else:
        found = [list(tokenizer(p)["input_ids"]) for p in prompts]
    if empty := [p for p, ids in zip(prompts, found, strict=True) if not ids]:
        raise DataError(f"the tokenizer of {base.origin} finds no token in the prompt {empty[0]!r}")
    return found


def _summed(base: Checkpoint, embedding: str, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The embeddings of all tokens, summed and normalised `[hidden]`; only the rows needed are read."""
    vocabulary, hidden = base.info(embedding).shape
    if not sequences:
        return torch.zeros(hidden, dtype=torch.float64)
    counted = Counter(i for s in sequences for i in s)
    if max(counted) >= vocabulary:
        raise DataError(
            f"the tokenizer of {base.origin} gives token {max(counted)}, but {embedding} has "
            f"{vocabulary} rows"
        )
    spans = [Span(base, embedding, i * hidden, (i + 1) * hidden) for i in counted]
    counts = torch.tensor(list(counted.values()), dtype=torch.float64)
    picked = Assembled({"rows": joined(spans, (len(spans), hidden))})
    picked.survey()
    picked.ready("rows")
    return _normalised(counts @ picked.tensor("rows").double())


def _states(
    base: Checkpoint, tokens: dict[str, list[int]], layers: int, stack: str, average: bool, residual: bool
) -> dict[str, Tensor]:
    """`[layers, hidden]` float64 for each prompt: prompts of one length go through the model together.

    Nothing is padded, so a prompt's state is the same whatever others it is listed with.
    """
    from weft.llm.hf import to_transformers

    module = to_transformers(base, dtype=torch.float32)
    modules = dict(module.named_modules())
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"]).detach())

    names = [f"{stack}{i}" + ("" if residual else ".mlp") for i in range(layers)]
    hooks = [modules[n].register_forward_pre_hook(catch, with_kwargs=True) for n in names]
    states: dict[str, Tensor] = {}
    try:
        for length in sorted({len(ids) for ids in tokens.values()}):
            batch = [p for p, ids in tokens.items() if len(ids) == length]
            caught.clear()
            with torch.no_grad():
                module(input_ids=torch.tensor([tokens[p] for p in batch]), use_cache=False)
            x = torch.stack(caught).double()  # [layers, prompts, tokens, hidden]
            x = x.mean(dim=2) if average else x[:, :, -1]
            states |= {p: x[:, i] for i, p in enumerate(batch)}
    finally:
        for hook in hooks:
            hook.remove()
    return states


def condition(gates: Tensor) -> list[float]:
    """σ_max / σ_min of the router rows `[layers, experts, hidden]`, by layer; infinite where rows depend."""
    values = torch.linalg.svdvals(gates.double())
    small = values[:, -1].clamp(min=0)
    found = torch.where(small > values[:, 0] * 1e-12, values[:, 0] / small, torch.inf)
    return [float(c) for c in found]


def complaints(gates: Tensor) -> list[str]:
    """What a reader should know of router rows made of prompts: pairs that can hardly be told apart."""
    notes = []
    numbers = condition(gates)
    worst = max(range(len(numbers)), key=lambda i: numbers[i])
    if gates.shape[1] > 1 and numbers[worst] > ILL_CONDITIONED:
        notes.append(
            f"the router tells the experts apart poorly: the condition number of its rows is up to "
            f"{numbers[worst]:.3g} (layer {worst})"
        )
    rows = _normalised(gates.double())
    cosines = (rows @ rows.mT).mean(0)
    for i in range(gates.shape[1]):
        for j in range(i):
            if cosines[i, j] >= ALIKE:
                notes.append(
                    f"the prompts of experts {j} and {i} are near-identical to the base model (cosine "
                    f"{cosines[i, j]:.3f} on average over the layers): give them prompts that differ"
                )
    return notes
