"""Statistics of models larger than memory: one block after the other, from a lazy checkpoint.

A stack of blocks that run in order (the layers of a language model, an nn.Sequential) needs one block's weights at
a time: the hidden states of all examples wait between blocks. Three steps: the module runs with blocks that change
nothing, which shows what else each block is given (masks, positions); each block runs on the true hidden states,
under watch; the module runs once more with blocks that hand on the true result, for what lies outside them. Blocks
that are not run once each, in order, on one tensor, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems, UsageError
from weft.statistics.batches import Batch, Forward, outputs_of

Watched = Callable[[Batch, Callable[[], Any]], Any]
"""Runs something under watch, with the masks of a batch in force."""
HIDDEN = "hidden_states"
"""How blocks of transformers call their input, where it is given by name."""


@dataclass
class Passing:
    """One batch on its way through the blocks."""

    batch: Batch
    hidden: Tensor | None = None
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """What each block is given beside the hidden states."""


class _Enough(Exception):
    """Ends a forward pass whose remainder does not matter."""


def stack_of(module: nn.Module) -> tuple[str, list[nn.Module]]:
    """The blocks: the list or sequence of modules with most parameters; its name and what is in it."""
    found = [
        (sum(p.numel() for p in m.parameters()), name, list(m))
        for name, m in module.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1
    ]
    if not found:
        raise UsageError(f"{type(module).__name__} has no stack of blocks (a ModuleList or Sequential)")
    most = max(size for size, _, _ in found)
    _, name, blocks = next(f for f in found if f[0] == most)
    return name, blocks


class Stack:
    """A module whose values come from a checkpoint, block by block.

    `values(name)` gives them by their stored names; one that other values take the place of is a stack, too.
    """

    def __init__(
        self, module: nn.Module, source: Checkpoint, device: torch.device, forward: Forward | None
    ) -> None:
        self.module, self.source, self.device, self.forward = module, source, device, forward
        self.name, self.blocks = stack_of(module)
        self.names = [f"{self.name}.{i}." if self.name else f"{i}." for i in range(len(self.blocks))]
        self.values: Callable[[str], Tensor] = source.tensor
        self.tuple = False
        """Whether blocks give their result in a tuple."""
        state = module.state_dict(keep_vars=True)
        stored = {n: source.aliases.get(n, n) for n in state}
        first = {id(t): n for n, t in reversed(state.items()) if stored[n] in source}
        self.stored = {n: stored[first.get(id(t), n)] for n, t in state.items()}
        problems = [f"{n}: not in {source.origin}" for n, s in self.stored.items() if s not in source]
        problems += [
            f"{n}: shape {list(source.info(s).shape)} does not fit {list(state[n].shape)}"
            for n, s in self.stored.items()
            if s in source and source.info(s).shape != tuple(state[n].shape)
        ]
        if problems:
            raise DataProblems(f"{source.origin} does not fit the module", problems)

    def run(self, batches: Sequence[Batch], watched: Watched) -> None:
        """One forward pass over all batches; every use of a parameter happens once, under watch."""
        passing = [Passing(b) for b in batches]
        with self.outside(), self.without_cache(), torch.no_grad():
            with self.filled(0):
                self.begin(passing[0])
            for one in passing:
                self.record(one, len(self.blocks))
            for i in range(len(self.blocks)):
                with self.filled(i):
                    for one in passing:
                        one.hidden, _ = watched(one.batch, partial(self.advance, one, i))
            for one in passing:
                self.hand_on(one, watched)

    def begin(self, one: Passing) -> None:
        """See in which form blocks give their result."""
        self.record(one, 1)
        _, self.tuple = self.advance(one, 0)

    def record(self, one: Passing, upto: int) -> None:
        """Note what the first `upto` blocks are given; each gives back what it gets."""
        one.rest, one.hidden = [], None
        last: list[Tensor] = []

        def recorder(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = _split(args, kwargs)
                if len(one.rest) != i or (last and hidden is not last[-1]) or hidden is None:
                    raise UsageError(
                        f"the blocks of {self.name or type(self.module).__name__} are not run one after the "
                        f"other on one tensor, so they cannot be measured by block"
                    )
                one.rest.append((args, kwargs))
                one.hidden = hidden if i == 0 else one.hidden
                last.append(hidden)
                if i + 1 == upto:
                    raise _Enough
                return self._formed(hidden)

            return forward

        with self._replaced(recorder):
            try:
                outputs_of(self.module, one.batch, self.forward)
            except _Enough:
                return
        raise UsageError(f"the blocks of {self.name or type(self.module).__name__} are not all run")

    def advance(self, one: Passing, i: int) -> tuple[Tensor, bool]:
        """The hidden states behind block i, and whether it gave them in a tuple."""
        args, kwargs = one.rest[i]
        out = self.blocks[i](one.hidden, *args, **kwargs)
        first = out[0] if isinstance(out, tuple) and out else out
        more = [v for v in out[1:] if v is not None] if isinstance(out, tuple) else []
        if not isinstance(first, Tensor) or more:
            raise UsageError(
                f"block {self.names[i].rstrip('.')} hands on more than one tensor, so the model cannot be "
                f"measured by block"
            )
        return first, isinstance(out, tuple)

    def hand_on(self, one: Passing, watched: Watched) -> None:
        """The parts outside the blocks, on the true result of the last one."""
        end = one.hidden
        assert end is not None

        def player(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._formed(end if i + 1 == len(self.blocks) else _split(args, kwargs)[0])

            return forward

        with self._replaced(player):
            watched(one.batch, partial(outputs_of, self.module, one.batch, self.forward))
        one.hidden = None

    def _formed(self, hidden: Any) -> Any:
        return (hidden,) if self.tuple else hidden

    @contextmanager
    def _replaced(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Other forwards for the blocks; whatever else is asked of them they answer themselves."""
        own = [{k: v for k, v in vars(block).items() if k == "forward"} for block in self.blocks]
        for i, block in enumerate(self.blocks):
            vars(block)["forward"] = make(i)
        try:
            yield
        finally:
            for block, before in zip(self.blocks, own, strict=True):
                del vars(block)["forward"]
                vars(block).update(before)

    def filled(self, i: int) -> Any:
        return self._with_values([n for n in self.stored if n.startswith(self.names[i])])

    def outside(self) -> Any:
        return self._with_values([n for n in self.stored if not n.startswith(tuple(self.names))])

    @contextmanager
    def _with_values(self, names: Sequence[str]) -> Iterator[None]:
        """Parameters and buffers with the checkpoint's values; afterwards as they were."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        made: dict[int, Tensor] = {}
        try:
            for name in names:
                place, _, leaf = name.rpartition(".")
                owner = self.module.get_submodule(place)
                held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
                old = held[leaf]
                before.append((held, leaf, old))
                if id(old) not in made:  # tied names stay tied
                    value = self.values(self.stored[name]).to(self.device, old.dtype)
                    tied = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(value, requires_grad=False) if tied else value
                held[leaf] = made[id(old)]
            yield
        finally:
            for held, leaf, old in before:
                held[leaf] = old

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """No keys and values kept for generation, which nobody asks for here."""
        config = getattr(self.module, "config", None)
        before = getattr(config, "use_cache", None)
        if before is not None:
            config.use_cache = False  # type: ignore[union-attr]
        try:
            yield
        finally:
            if before is not None:
                config.use_cache = before  # type: ignore[union-attr]


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other arguments."""
    if args:
        return args[0], args[1:], dict(kwargs)
    return kwargs.get(HIDDEN), (), {k: v for k, v in kwargs.items() if k != HIDDEN}


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have parameters without memory (on the meta device); buffers are as usual."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        plain(self, name, param)
        if param is not None and not param.is_meta:  # a tied one is without already, and stays tied
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The transformers model that a checkpoint's config names, without weights."""
    from weft.llm.hf import config_of, model_class, quiet, usual_dtype

    made, config = model_class(checkpoint), config_of(checkpoint)
    with quiet(), without_weights():
        module = made._from_config(config, dtype=usual_dtype(checkpoint))
    assert isinstance(module, nn.Module)
    return module.eval()
