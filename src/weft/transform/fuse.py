"""Knowledge fusion of language models of any architecture and tokenizer: FuseLLM and FuseChat.

    P_j     what source j says of each token of a text, top k, softmax at temperature 1
    aligned put on the target's tokens: where one token of the source stands beside one of the target and both are
            the same (or the nearest in the vocabulary), P_j, its tokens mapped; elsewhere the target's token itself
    MinCE   of the aligned distributions of a text the one of least cross-entropy with the text
    AvgCE   their mean, weighted by softmax over exp(−cross-entropy)
    L       λ · CE(text) + (1 − λ) · CE(fused ‖ target)

FuseLLM (arXiv:2401.10491) trains one target so. FuseChat (arXiv:2402.16107) trains a copy of the pivot with each
source and merges the copies, which share its architecture, by VaRM or SCE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany
from weft.errors import DataError, UsageError
from weft.methods.registry import METHODS
from weft.statistics.placed import of_module
from weft.train.loop import Finetuned, finetune
from weft.train.objectives import Objective, Point
from weft.transform.tokens import Nearest, Tokenizer, aligned, checked, encoded, pieces, plain

How = Literal["mince", "avgce"]
Speaker = Any
"""A language model: (module, tokenizer), or a checkpoint or path of transformers with its tokenizer beside it."""
FLOOR = 1e-6
"""The least probability that a token of the text counts with, where it is not among a source's top k."""


@dataclass(frozen=True)
class Voice:
    """A module that gives logits [n, t, vocabulary] for token numbers [n, t], and its tokenizer."""

    module: nn.Module
    tokenizer: Tokenizer
    name: str
    weights: Checkpoint
    """The module's, with the config and files of the checkpoint that it came from."""

    @torch.no_grad()
    def top(self, ids: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
        """Of every token behind the first, the k largest logits that predict it and whose: [t − 1, k] both."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        result = self.module(torch.tensor([list(ids)], device=device))
        logits = getattr(result, "logits", result)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(ids):
            raise UsageError(f"{self.name} gives no logits [n, t, vocabulary] for token numbers [n, t]")
        if not bool(logits.isfinite().all()):
            raise DataError(f"{self.name} gives logits that are NaN or infinite")
        found = logits[0, :-1].float().cpu().topk(min(k, logits.shape[-1]), dim=-1)
        return found.values, found.indices


def voice(speaker: Speaker, name: str) -> Voice:
    """A language model ready to speak. UsageError where it has no tokenizer or is no model."""
    if isinstance(speaker, tuple) and len(speaker) == 2:
        model, tokenizer = speaker
    else:
        model, tokenizer = speaker, None
    if isinstance(model, nn.Module):
        return Voice(model.eval(), checked(tokenizer, name), name, of_module(model))
    if not isinstance(model, str | Path | Checkpoint):
        raise UsageError(f"{name} must be (module, tokenizer), or a checkpoint or path of transformers")
    from weft.llm.hf import to_transformers, tokenizer_of

    source = weft.load(model)
    words = checked(tokenizer or tokenizer_of(source), source.origin)
    module = to_transformers(source)
    weights = InCompany(of_module(module), source.config, source.assets)
    return Voice(module, words, source.origin, weights)


@dataclass(frozen=True)
class Fused:
    """Texts as token numbers of the target, and what the sources together say of every token."""

    ids: Tensor
    """[n, t], padded behind with 0."""
    present: Tensor
    """[n, t] bool: tokens that are predicted, so not the first of a text and no padding."""
    tokens: Tensor
    """[n, t, k]: tokens that the fused distribution gives mass to."""
    mass: Tensor
    """[n, t, k]: how much; 1 over k where `present`."""
    loss: Tensor
    """[n, sources]: cross-entropy of each aligned distribution with the text, over the tokens all of them cover."""
    chosen: Tensor
    """[n, sources]: how much of each went into the fused one."""
    covered: tuple[float, ...]
    """By source, the share of tokens that its distribution could be put on."""
    names: tuple[str, ...]


def fuse(
    target: Speaker, sources: Sequence[Speaker], texts: Sequence[str], *, how: How = "mince", top: int = 10,
    length: int = 256,
) -> Fused:  # fmt: skip
    """The fused distributions of `texts`, on the target's tokens. The target's own counts among the sources.

    Texts are cut into pieces of at most `length` characters. Cross-entropies are compared over the tokens that
    every source covers: elsewhere a source says nothing, and saying nothing must not win.
    """
    if how not in ("mince", "avgce"):
        raise UsageError(f"how must be mince or avgce, not {how!r}")
    if isinstance(texts, str) or not len(texts):
        raise UsageError("texts must be a list of at least one text")
    if top < 1:
        raise UsageError(f"top must be at least 1, not {top}")
    pivot = voice(target, "the target")
    voices = [pivot, *(voice(s, f"source {i}") for i, s in enumerate(sources))]
    nearest = Nearest(pivot.tokenizer.get_vocab())
    rows = []
    for text in pieces(texts, length):
        ids = encoded(pivot.tokenizer, text)
        if len(ids) > 1:
            rows.append(_text(ids, text, voices, nearest, how, top))
    if not rows:
        raise DataError("no text has two tokens, so there is nothing to predict")
    return _stacked(rows, voices)


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    tokens: Tensor
    mass: Tensor
    loss: Tensor
    chosen: Tensor
    covered: Tensor


def _text(ids: list[int], text: str, voices: Sequence[Voice], nearest: Nearest, how: How, top: int) -> _Row:
    """One text: distributions of the tokens behind the first, [t − 1, …]."""
    each = [_on_target(ids, text, v, voices[0], nearest, top) for v in voices]
    gold = torch.tensor(ids[1:])
    every = torch.stack([c for _, _, c in each]).all(0)
    counted = every if bool(every.any()) else torch.ones_like(every)
    loss = torch.stack([
        -((m * (t == gold[:, None])).sum(1).clamp(min=FLOOR).log()[counted]).mean() for t, m, _ in each
    ])  # fmt: skip
    share = torch.zeros_like(loss)
    if how == "mince":
        share[loss.argmin()] = 1.0
    else:
        share = (-loss).exp().softmax(0)
    kept = [(t, m * s) for (t, m, _), s in zip(each, share, strict=True) if s > 0]
    tokens, mass = torch.cat([t for t, _ in kept], 1), torch.cat([m for _, m in kept], 1)
    return _Row(ids, tokens, mass, loss, share, torch.stack([c.float().mean() for _, _, c in each]))


def _on_target(
    ids: list[int], text: str, source: Voice, target: Voice, nearest: Nearest, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A source's distributions on the target's tokens: tokens and mass [t − 1, top], and where it could be put."""
    mine = target.tokenizer.convert_ids_to_tokens(ids)
    theirs_ids = encoded(source.tokenizer, text)
    theirs = source.tokenizer.convert_ids_to_tokens(theirs_ids)
    beside = [(i,) for i in range(len(ids))] if source is target else aligned(mine, theirs)
    tokens = torch.tensor(ids[1:])[:, None].expand(-1, top).clone()
    mass = torch.zeros(len(ids) - 1, top)
    mass[:, 0] = 1.0
    covered = torch.zeros(len(ids) - 1, dtype=torch.bool)
    if len(theirs_ids) < 2:
        return tokens, mass, covered
    logits, found = source.top(theirs_ids, top)
    shared = _counts(beside)
    for i, at in enumerate(beside[1:], 1):
        if len(at) != 1 or at[0] == 0 or shared[at[0]] != 1:
            continue
        j = at[0]
        same = plain(theirs[j]) == plain(mine[i]) or nearest(theirs[j]) == ids[i]
        if not same:
            continue
        said = found[j - 1].tolist()
        if source is not target:
            said = [nearest(name) for name in source.tokenizer.convert_ids_to_tokens(said)]
        mapped: dict[int, float] = {}
        for token, value in zip(said, logits[j - 1].tolist(), strict=True):
            mapped.setdefault(token, value)  # the likeliest of those that go to one token
        p = torch.tensor(list(mapped.values())).softmax(0)
        tokens[i - 1, : len(p)] = torch.tensor(list(mapped))
        mass[i - 1] = 0.0
        mass[i - 1, : len(p)] = p
        covered[i - 1] = True
    return tokens, mass, covered


def _counts(beside: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """How many tokens of the target each token of the source stands beside."""
    found: dict[int, int] = {}
    for at in beside:
        for j in at:
            found[j] = found.get(j, 0) + 1
    return found


def _stacked(rows: Sequence[_Row], voices: Sequence[Voice]) -> Fused:
    n, t = len(rows), max(len(r.ids) for r in rows)
    k = max(r.tokens.shape[1] for r in rows)
    ids, present = torch.zeros(n, t, dtype=torch.long), torch.zeros(n, t, dtype=torch.bool)
    tokens, mass = torch.zeros(n, t, k, dtype=torch.long), torch.zeros(n, t, k)
    for i, r in enumerate(rows):
        m = len(r.ids)
        ids[i, :m] = torch.tensor(r.ids)
        present[i, 1:m] = True
        tokens[i, 1:m, : r.tokens.shape[1]] = r.tokens
        mass[i, 1:m, : r.mass.shape[1]] = r.mass
    covered = torch.stack([r.covered for r in rows]).mean(0).tolist()
    return Fused(
        ids, present, tokens, mass, torch.stack([r.loss for r in rows]), torch.stack([r.chosen for r in rows]),
        tuple(covered), tuple(v.name for v in voices),
    )  # fmt: skip


def fused_loss(fused: Fused, weight: float = 0.9) -> Objective:
    """λ CE(text) + (1 − λ) CE(fused ‖ target); the targets of a batch are rows of `fused`."""
    if not 0 <= weight <= 1:
        raise UsageError(f"weight must be from 0 to 1, not {weight}")

    def loss(point: Point) -> Tensor:
        rows = point.batch.targets
        logp = point.outputs()[:, :-1].log_softmax(-1)
        here = fused.present.to(logp.device)[rows][:, 1:]
        gold = fused.ids.to(logp.device)[rows][:, 1:]
        text = -logp.gather(-1, gold[..., None])[..., 0][here].mean()
        tokens, mass = (x.to(logp.device)[rows][:, 1:] for x in (fused.tokens, fused.mass))
        said = -(mass.to(logp.dtype) * logp.gather(-1, tokens)).sum(-1)[here].mean()
        return weight * text + (1 - weight) * said

    return Objective(loss)


def fusellm(
    target: Speaker, sources: Sequence[Speaker], texts: Sequence[str] | Fused, *, how: How = "mince",
    weight: float = 0.9, top: int = 10, length: int = 256, **training: Any,
) -> Finetuned:  # fmt: skip
    """One target taught what its sources together say of `texts`, by `weft.finetune` (steps or epochs, lr …).

    `weight` is λ; 1 is plain language modelling on the texts. `texts` may be what `fuse` gave. The target stays as
    it is; `.checkpoint` is the taught one. UsageError where a model has no tokenizer or settings make no sense.
    """
    pivot = voice(target, "the target")
    found = (
        texts if isinstance(texts, Fused) else fuse(target, sources, texts, how=how, top=top, length=length)
    )
    data = (found.ids, torch.arange(len(found.ids)))
    return finetune(pivot.module, data, objective=fused_loss(found, weight), **training)


@dataclass(frozen=True)
class FusedChat:
    """The pivot taught by each source, and the merge of these."""

    taught: Mapping[str, Finetuned]
    merged: Checkpoint


def fusechat(
    pivot: Speaker, sources: Mapping[str, Speaker], texts: Sequence[str], *, merge: str = "varm",
    merging: Mapping[str, Any] | None = None, how: How = "mince", weight: float = 0.9, top: int = 10,
    length: int = 256, **training: Any,
) -> FusedChat:  # fmt: skip
    """FuseLLM of the pivot with each source by itself, then a merge of the results about the pivot.

    `merge` is a method of weft ("varm", "sce", …) with the parameters `merging`. The pivot needs to be one model,
    the sources a mapping by name. The result is lazy.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise UsageError("sources must be a mapping of at least one language model by name")
    made = METHODS[merge]
    taught = {
        name: fusellm(pivot, [source], texts, how=how, weight=weight, top=top, length=length, **training)
        for name, source in sources.items()
    }
    base = voice(pivot, "the pivot").weights
    models = [t.checkpoint for t in taught.values()]
    about = base if made.space == "deltas" else None
    return FusedChat(taught, weft.merge(models, made, base=about, **dict(merging or {})))


__all__ = ["Fused", "FusedChat", "fuse", "fusechat", "fused_loss", "fusellm"]
