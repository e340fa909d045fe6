"""`build`: a recipe → one graph of lazy checkpoints.

Nested recipes and the documents they name become nodes of the same graph; nothing is written in between.
What is mentioned twice is loaded once, whether it is a reference or a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.refs import Ref, parse_ref
from weft.errors import UsageError, did_you_mean
from weft.recipes import pieces, tokenizer
from weft.recipes.read import Readable, read
from weft.recipes.recipe import Named, Recipe, Source, target, walk

Loader = Callable[[Any], Checkpoint]


def build(
    recipe: Recipe | Sequence[Recipe] | Readable,
    *,
    loader: Loader | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Checkpoint:
    """The checkpoint a recipe describes, unread.

    `recipe` is what `read` returns, or anything it reads. Of several documents, the one without a name (or
    the last) is built, or that called `name`. `loader` turns a reference into a checkpoint. `seed` goes
    before the recipe's. Raises UsageError and DataError as `read` and the loader do, and UsageError where
    documents name each other in a circle.
    """
    if isinstance(recipe, str | bytes | Path | Mapping):
        recipe = read(recipe)
    if isinstance(recipe, Recipe):
        chosen = recipe
    elif name is None:
        chosen = target(list(recipe))
    else:
        named = {r.name: r for r in recipe}
        if name not in named:
            raise UsageError(f"there is no document named {name!r}{did_you_mean(name, filter(None, named))}")
        chosen = named[name]
    if loader is None:
        from weft.checkpoints.load import load

        return _Graph(load, seed).node(chosen, 0)
    return _Graph(loader, seed).node(chosen, 0)


class _Graph:
    """Nodes made so far, by what they were made from."""

    def __init__(self, loader: Loader, seed: int | None) -> None:
        self.loader, self.seed = loader, seed
        self.loaded: dict[Ref, Checkpoint] = {}
        self.merged: dict[int, Checkpoint] = {}
        self.spelled: dict[int, dict[int, Checkpoint]] = {}
        self.open: list[Recipe] = []

    def node(self, recipe: Recipe, seed: int) -> Checkpoint:
        """The node of a recipe; `seed` is that of the recipe around it."""
        if id(recipe) in self.merged:
            return self.merged[id(recipe)]
        if any(r is recipe for r in self.open):
            circle = " → ".join(str(r.name) for r in [*self.open, recipe] if r.name)
            raise UsageError(f"the recipe is merged from itself: {circle}")
        self.open.append(recipe)
        made = self._merge(recipe, seed)
        self.open.pop()
        self.merged[id(recipe)] = made
        return made

    def _merge(self, recipe: Recipe, around: int) -> Checkpoint:
        from weft.checkpoints.lazy import Cast

        seed = self.seed if self.seed is not None else recipe.seed if recipe.seed is not None else around
        models = [self.source(m, recipe, seed) for m in recipe.models]
        base = None if recipe.base is None else self.source(recipe.base, recipe, seed)
        tokenizer.check_one_vocabulary(recipe, models if base is None else [base, *models])
        made = pieces.merged(recipe, seed, lambda s: self.source(s, recipe, seed))
        if recipe.dtype is not None:
            made = Cast(made, recipe.dtype)
        return self._in_company(made, recipe, seed)

    def source(self, source: Source, recipe: Recipe, seed: int) -> Checkpoint:
        """The checkpoint of one source of `recipe`, in the vocabulary that the recipe asks for."""
        made = self._source(source, recipe, seed)
        if recipe.tokenizer is None:
            return made
        if id(recipe) not in self.spelled:
            self.spelled[id(recipe)] = tokenizer.in_one_vocabulary(
                recipe, lambda s: self._source(s, recipe, seed)
            )
        return self.spelled[id(recipe)].get(id(made), made)

    def _source(self, source: Source, recipe: Recipe, seed: int) -> Checkpoint:
        if isinstance(source, Recipe):
            return self.node(source, seed)
        if isinstance(source, Named):
            if source.name not in recipe.documents:
                raise UsageError(f"there is no document named {source.name!r}")
            # a document is the same whoever names it, so it gets no seed from around it
            return self.node(recipe.documents[source.name], 0)
        ref = parse_ref(source) if isinstance(source, str) else source
        if ref not in self.loaded:
            self.loaded[ref] = self.loader(source)
        return self.loaded[ref]

    def _in_company(self, made: Checkpoint, recipe: Recipe, seed: int) -> Checkpoint:
        """The result with the chat template the recipe asks for."""
        if recipe.chat_template is not None:
            models = [self._source(s, recipe, seed) for s in recipe.references]
            made = tokenizer.with_template(made, recipe.chat_template, models)
        return made


def documents(recipe: Recipe) -> list[Recipe]:
    """The recipe, those inside it and those it names, each once: everything `build` will make a node of."""
    found: list[Recipe] = []
    waiting = [recipe]
    while waiting:
        for inner in walk(waiting.pop()):
            if any(r is inner for r in found):
                continue
            found.append(inner)
            waiting += [inner.documents[s.name] for s in inner.references
                        if isinstance(s, Named) and s.name in inner.documents]  # fmt: skip
    return found
