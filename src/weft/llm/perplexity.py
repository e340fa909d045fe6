"""Perplexity of a causal language model on text, exact: every token after the first is scored once.

Windows of one length share a batch, so nothing is padded and the figure doesn't depend on the batch size beyond
rounding. Sums are float64 over log-probabilities in float32.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from math import exp, inf, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.errors import DataError, UsageError

WINDOW = 512
"""Tokens a model sees at once, where its own limit is no smaller and the caller says nothing."""
Texts = str | Path | Sequence[str]


@dataclass(frozen=True, slots=True)
class Score:
    """What a model makes of a text: −Σ log p(xᵢ | x₍ᵢ₋w₎ … xᵢ₋₁) in nats, over `tokens` tokens."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(−(1/N) Σ log p(xᵢ | …)); infinite where it is beyond float64, NaN where a logit was."""
        mean = self.nll / self.tokens
        return exp(mean) if mean < 709 else (mean if mean != mean else inf)


def perplexity(
    model: Checkpoint | nn.Module,
    texts: Texts,
    tokenizer: Any = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    limit_tokens: int | None = None,
    batch: int = 4,
) -> float:
    """exp(−(1/N) Σᵢ log p(xᵢ | context)), token by token over all texts (no mean of means).

    `texts`: a text, several, or the Path of a file (see `read_texts`); `tokenizer`: by default the
    checkpoint's own. Without any, tokens are the bytes of the text modulo the vocabulary's size: figures that
    compare models of one vocabulary and mean nothing by themselves. A window of `window` tokens (the model's
    limit, at most 512) moves by `stride` (half of it); each text's first token has no context and isn't scored.

    Raises UsageError for a model that does not predict the next token, DataError where the tokenizer's
    ids exceed the model's vocabulary or there are no two tokens.
    """
    return score(
        model, texts, tokenizer, window=window, stride=stride, limit_tokens=limit_tokens, batch=batch
    ).perplexity


def score(
    model: Checkpoint | nn.Module,
    texts: Texts,
    tokenizer: Any = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    limit_tokens: int | None = None,
    batch: int = 4,
) -> Score:
    """As `perplexity`, with the sum and the number of tokens it is made of."""
    if isinstance(model, Checkpoint):
        from weft.llm.hf import to_transformers, tokenizer_of

        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        model = to_transformers(model)
    if not is_causal(model):
        raise UsageError(
            f"{type(model).__name__} does not predict the next token, so it has no perplexity; "
            "weft verify runs such a model forward instead"
        )
    ids = tokens_of(texts, tokenizer, vocabulary_of(model), limit_tokens)
    return score_ids(model, ids, window=window, stride=stride, batch=batch)


def score_ids(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 4,
) -> Score:
    """The score of texts that are token ids already."""
    most = _limit(model)
    window = min(WINDOW, most or WINDOW) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if window < 2 or not 1 <= stride < window or batch < 1:
        raise UsageError(
            f"window {window}, stride {stride}, batch {batch}: a window has two tokens at least, moves by "
            "one at least and by fewer than it has, and a batch has one window at least"
        )
    if most and window > most:
        raise UsageError(f"{type(model).__name__} takes {most} tokens at once, not {window}")
    groups: dict[tuple[int, int], list[Sequence[int]]] = {}
    for ids in texts:
        for start, stop, scored in windows(len(ids), window, stride):
            groups.setdefault((stop - start, scored), []).append(ids[start:stop])
    nll, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for (_, scored), members in sorted(groups.items(), reverse=True):
            for i in range(0, len(members), batch):
                rows = torch.tensor(members[i : i + batch], device=device)
                found = _log_likelihoods(model, rows, scored)
                nll -= float(found.double().sum())
                count += found.numel()
    if not count:
        raise DataError("the text has fewer than two tokens, so there is nothing to predict; give more text")
    return Score(nll, count)


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, n): windows whose last n tokens are scored, each token but the text's first once."""
    done = 1
    while done < length:
        stop = min(length, window if done == 1 else done + stride)
        yield max(0, stop - window), stop, stop - done
        done = stop


def _log_likelihoods(model: nn.Module, rows: Tensor, scored: int) -> Tensor:
    """log p of the last `scored` tokens of each row, [rows, scored]."""
    logits = logits_of(model, rows)[:, -scored - 1 : -1].float()
    return torch.log_softmax(logits, dim=-1).gather(-1, rows[:, -scored:, None])[..., 0]


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[batch, tokens, vocabulary] from a model of transformers or any module from ids to logits."""
    cached = "use_cache" in signature(model.forward).parameters
    out = model(ids, use_cache=False) if cached else model(ids)  # a cache would only be thrown away
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UsageError(f"{type(model).__name__} gives no logits [batch, tokens, vocabulary]")
    return logits


def is_causal(model: nn.Module) -> bool:
    """True for what predicts the next token from those before it; any module without a config is believed to."""
    config = getattr(model, "config", None)
    if config is None:
        return True
    able = getattr(model, "can_generate", None)
    return bool(able and able()) and not getattr(config, "is_encoder_decoder", False)


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the token embedding."""
    get = getattr(model, "get_input_embeddings", None)
    table = (
        get() if get is not None else next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    )
    if table is None or not hasattr(table, "weight"):
        raise UsageError(f"{type(model).__name__} has no token embedding")
    return int(table.weight.shape[0])


def tokens_of(texts: Texts, tokenizer: Any, vocabulary: int, limit: int | None = None) -> list[list[int]]:
    """Token ids of each text, at most `limit` in all; bytes modulo the vocabulary without a tokenizer."""
    if limit is not None and limit < 2:
        raise UsageError(f"limit_tokens is {limit}; two tokens are the least that can be scored")
    listed = [texts] if isinstance(texts, str) else read_texts(texts) if isinstance(texts, Path) else texts
    made, left = [], inf if limit is None else limit
    for text in listed:
        if left <= 0:
            break
        if tokenizer is None:
            ids = [byte % vocabulary for byte in text.encode()]
        else:
            ids = list(tokenizer(text, verbose=False)["input_ids"])
        if ids and max(ids) >= vocabulary:
            raise DataError(
                f"the tokenizer gives the id {max(ids)}, but the model has {vocabulary} rows in its token "
                "embedding: this tokenizer belongs to another model"
            )
        ids = ids if len(ids) <= left else ids[: int(left)]
        left -= len(ids)
        made.append(ids)
    return made


def read_texts(path: Path) -> list[str]:
    """The texts of a file: one for a plain file, the `text` of each line of .jsonl; .gz of both."""
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); convert it") from None
    if ".jsonl" not in path.suffixes:
        return [text]
    texts = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            texts.append(_text_of(line, f"{path}, line {number}"))
    return texts


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    text = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise DataError(f'{where} holds {shown(value)}; write {{"text": …}}')
    return text


def unigram_perplexity(texts: Sequence[Sequence[int]]) -> float:
    """exp(H) of the tokens' own frequencies: no model without context does better on this very text."""
    counts = Counter(token for ids in texts for token in ids[1:])
    total = sum(counts.values())
    return exp(-sum(n / total * log(n / total) for n in counts.values()))


def _limit(model: nn.Module) -> int | None:
    """Tokens the config allows at once, where it says so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        stated = getattr(text, name, None)
        if isinstance(stated, int) and stated > 1:
            return stated
    return None
