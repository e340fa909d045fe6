"""The smoke run: does the merged model load, compute numbers, and predict text about as well as its parents?

What is loaded is the written folder, by transformers' own `from_pretrained`, since that is what its users do.
A collapse is told apart from a weak merge by two tests at once: far worse than the best parent, and worse than
a model that only knows how frequent each token of the text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.load import load
from weft.checkpoints.quantised import Dequantised
from weft.engine.card import leaves
from weft.engine.writer import SINGLE_FILES
from weft.errors import UsageError, WeftError
from weft.llm.forward import finite_outputs, sample_inputs
from weft.llm.hf import import_transformers, load_module, model_class, quiet, tokenizer_of, written_module
from weft.llm.perplexity import Texts, is_causal, score_ids, tokens_of, unigram_perplexity, vocabulary_of

BUNDLED = "weft's sample text"
FACTOR = 10.0
"""A result this many times as perplexed as its best parent, and worse than token frequencies, has collapsed."""
WORSE = 2.0
"""From here on a result is told to be worse than its parents, which is no failure."""
LIMIT = 4096
_PROMPTS, _PROMPT, _NEW, _LEAST = 3, 16, 16, 8


@dataclass
class Measured:
    """What one model did."""

    origin: str
    architecture: str = ""
    finite: bool | None = None
    """Whether every output of a forward pass is a number; None where it could not be run."""
    failure: str | None = None
    """Why the model could not be run."""
    perplexity: float | None = None
    ids: list[list[int]] = field(default_factory=list, repr=False)
    vocabulary: int = 0
    tokenized: bool = True
    """False where the text's bytes stood in for tokens, since there is no tokenizer."""
    repeats: int | None = None
    """The token that every greedy continuation consists of, if there is one."""
    continuation: str | None = None
    unused: list[str] = field(default_factory=list)
    """Tensors that the class has no place for."""

    def describe(self) -> dict[str, Any]:
        """As data for JSON, without the tokens."""
        known = self.perplexity is not None and isfinite(self.perplexity)
        return {
            "model": self.origin,
            "architecture": self.architecture,
            "finite": self.finite,
            "failure": self.failure,
            "perplexity": float(f"{self.perplexity:.5g}") if known else None,
            "continuation": self.continuation,
            "unused": self.unused,
        }


@dataclass
class Verification:
    """The result beside its parents, and what is wrong with it."""

    result: Measured
    parents: list[Measured]
    text: str
    unigram: float | None = None
    """exp of the entropy of the text's token frequencies."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def describe(self) -> dict[str, Any]:
        """As data for the manifest and `--json`."""
        return {
            "ok": self.ok,
            "text": self.text,
            "tokens": sum(max(0, len(ids) - 1) for ids in self.result.ids) or None,
            "unigram_perplexity": self.unigram and float(f"{self.unigram:.5g}"),
            "result": self.result.describe(),
            "parents": [p.describe() for p in self.parents],
            "problems": self.problems,
            "notes": self.notes,
        }


def verify(
    result: str | Path | Checkpoint,
    parents: Sequence[str | Path | Checkpoint] = (),
    *,
    texts: Texts | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    limit_tokens: int = LIMIT,
    factor: float = FACTOR,
) -> Verification:
    """Load a result (a written folder, or a checkpoint), run it, and compare it with its parents.

    A causal language model has its perplexity taken on at most `limit_tokens` tokens of `texts` (bundled text
    by default) and goes on greedily from three places in it; any other model is run forward once. `problems`
    of the answer name: outputs that are no numbers, a forward pass that fails, tensors without a place, a
    perplexity above `factor` times the best comparable parent's and above the unigram's (without parents:
    above the vocabulary's size), one token repeated from every prompt where no parent does so.

    Raises UsageError without a config, DataProblems where the result doesn't hold the whole model its config
    states, MissingExtra without transformers. A parent that cannot be measured is a note.
    """
    import_transformers("weft verify")
    name = BUNDLED if texts is None else texts.name if isinstance(texts, Path) else "the given text"
    chosen = files("weft.llm").joinpath("sample.txt").read_text("utf-8") if texts is None else texts

    def measured(source: str | Path | Checkpoint, written: bool) -> Measured:
        checkpoint = source if isinstance(source, Checkpoint) else load(source)
        folder = Path(source) if written and not isinstance(source, Checkpoint) else None
        if folder is not None and _as_it_lies(folder, checkpoint):
            module, unused = written_module(folder, dtype=dtype, device=device)
        else:
            module, unused = load_module(checkpoint, dtype=dtype, device=device)
        made = Measured(checkpoint.origin, type(module).__name__, unused=unused)
        _run(module, made, tokenizer_of(checkpoint), chosen, limit_tokens)
        return made

    report = Verification(measured(result, True), [], name)
    for parent in parents:
        try:
            report.parents.append(measured(parent, False))
        except WeftError as error:
            origin = parent.origin if isinstance(parent, Checkpoint) else parent
            report.notes.append(f"{origin} was not measured: {str(error).splitlines()[0].rstrip(':')}")
    if report.result.ids:
        report.unigram = unigram_perplexity(report.result.ids)
    _judge(report, factor)
    return report


def refuse_unverifiable(checkpoint: Checkpoint, out: Path) -> None:
    """Raise before anything is computed where the output could not be verified."""
    import_transformers("--verify")
    if out.suffix in SINGLE_FILES:
        raise UsageError(f"--verify loads a model folder, and {out} is a single file; name a folder")
    model_class(checkpoint)


def parents_of(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The models at the ends of the graph that a merge was made from, each once; adapters have no config."""
    found = {leaf.origin: leaf for leaf in leaves(checkpoint) if (leaf.config or {}).get("model_type")}
    return list(found.values())


def _as_it_lies(folder: Path, checkpoint: Checkpoint) -> bool:
    """True where transformers can read the folder itself: whole, uncoded weights as safetensors."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return any((folder / n).is_file() for n in names) and not isinstance(checkpoint, Dequantised)


def _run(module: nn.Module, made: Measured, tokenizer: Any, texts: Texts, limit: int) -> None:
    """Run the model on the text, or once on samples; what its own code raises is its `failure`."""
    with quiet():
        try:
            if is_causal(module):
                made.vocabulary, made.tokenized = vocabulary_of(module), tokenizer is not None
                made.ids = tokens_of(texts, tokenizer, made.vocabulary, limit)
                _predict(module, made, tokenizer)
            else:
                made.finite = finite_outputs(module, sample_inputs(module))
        except WeftError:
            raise
        except Exception as error:  # the model's code may not be made for these weights
            made.failure = f"{type(error).__name__}: {error}".splitlines()[0]


def _predict(module: nn.Module, made: Measured, tokenizer: Any) -> None:
    """Perplexity, and greedy continuations from places spread over the text."""
    made.finite = finite_outputs(module, sample_inputs(module, made.ids[0]))
    if not made.finite:
        return
    made.perplexity = score_ids(module, made.ids).perplexity
    made.finite = made.perplexity == made.perplexity
    if not made.finite:
        made.perplexity = None
        return
    longest = max(made.ids, key=len)
    step = max(1, (len(longest) - _PROMPT) // _PROMPTS)
    said = [_continued(module, longest[i * step :][:_PROMPT]) for i in range(_PROMPTS)]
    if all(len(ids) >= _LEAST for ids in said) and len(distinct := {t for ids in said for t in ids}) == 1:
        made.repeats = distinct.pop()
    made.continuation = tokenizer.decode(said[0]) if tokenizer is not None else None


def _continued(module: Any, prompt: list[int]) -> list[int]:
    """At most 16 tokens after the prompt, each the likeliest."""
    ids = torch.tensor([prompt], device=next(module.parameters()).device)
    settings = module.generation_config
    stop = settings.eos_token_id
    pad = settings.pad_token_id if settings.pad_token_id is not None else stop
    with torch.inference_mode():
        out = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW, do_sample=False, num_beams=1,
            pad_token_id=(pad[0] if isinstance(pad, list) else pad) or 0,
        )  # fmt: skip
    return [int(t) for t in out[0, len(prompt) :]]


def _judge(report: Verification, factor: float) -> None:
    """Turn what was measured into problems and notes."""
    made, parents, problems, notes = report.result, report.parents, report.problems, report.notes
    known = {n for p in parents for n in p.unused}
    left = [n for n in made.unused if n not in known]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        problems.append(
            f"{made.architecture} has no place for {', '.join(map(shown, left[:5]))}{more}: the config "
            "contradicts the tensors"
        )
    elif made.unused:
        notes.append(f"{made.architecture} leaves {len(made.unused)} tensors unused, as in the parents")
    if made.failure is not None:
        same = any(p.failure == made.failure for p in parents)
        (notes if same else problems).append(
            f"the forward pass failed ({made.failure})" + (", as a parent's did" if same else "")
        )
    if made.finite is False:
        problems.append("the model's outputs are not all numbers (NaN or infinity): it has collapsed")
    if made.perplexity is not None:
        _judge_text(report, made.perplexity, factor)


def _judge_text(report: Verification, perplexity: float, factor: float) -> None:
    made = report.result
    if not made.tokenized:
        report.notes.append("there is no tokenizer, so bytes of the text stood in for tokens")
    comparable = [p for p in report.parents if p.perplexity is not None and p.ids == made.ids]
    others = [p for p in report.parents if p.perplexity is not None and p.ids != made.ids]
    if others:
        names = ", ".join(p.origin for p in others)
        report.notes.append(f"other tokens, so perplexities are not compared with: {names}")
    best = min(comparable, key=lambda p: p.perplexity or 0.0, default=None)
    if best is not None and best.perplexity is not None:
        bound, unigram = factor * best.perplexity, report.unigram or 0.0
        if perplexity > bound and perplexity > unigram:
            report.problems.append(
                f"perplexity {perplexity:.4g} is {perplexity / best.perplexity:.3g} times that of "
                f"{best.origin} ({best.perplexity:.4g}) and worse than token frequencies alone "
                f"({unigram:.4g}): the merge has collapsed"
            )
        elif perplexity > WORSE * best.perplexity:
            report.notes.append(
                f"perplexity {perplexity:.4g} is {perplexity / best.perplexity:.3g} times that of {best.origin}"
            )
    elif perplexity > made.vocabulary:
        report.problems.append(
            f"perplexity {perplexity:.4g} is worse than guessing among {made.vocabulary} tokens: the model "
            "has collapsed or was never trained"
        )
    if made.repeats is not None:
        told = f"every greedy continuation repeats one token (id {made.repeats})"
        if report.parents and all(p.repeats is None for p in report.parents):
            report.problems.append(f"{told}, which no parent does: the merge has collapsed")
        else:
            report.notes.append(told)
