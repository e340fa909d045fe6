"""`build`: a recipe → one graph of lazy checkpoints.

Nested recipes and the documents they name become nodes of the same graph; nothing is written in between.
What is mentioned twice is loaded once, whether it is a reference or a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Asset, Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.refs import Ref, parse_ref
from weft.checkpoints.strictjson import parse_json
from weft.errors import UsageError, did_you_mean
from weft.recipes.read import Readable, read
from weft.recipes.recipe import Named, Recipe, Source, show_source, target, walk

Loader = Callable[[Any], Checkpoint]

TOKENIZER_FILES = (
    "tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template", "spiece",
    "additional_chat_templates",
)  # fmt: skip
"""How the names of files begin that belong to the tokenizer."""


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
        from weft.methods.merge import Merge

        seed = self.seed if self.seed is not None else recipe.seed if recipe.seed is not None else around
        models = [self.source(m, recipe, seed) for m in recipe.models]
        base = None if recipe.base is None else self.source(recipe.base, recipe, seed)
        if recipe.layers is not None:
            _check_layers(recipe, models)
        made: Checkpoint = Merge(
            models, base=base, method=recipe.method, params=recipe.params, seed=seed, missing=recipe.missing,
            mismatch=recipe.mismatch, nonfinite=recipe.nonfinite, origin=recipe.name or "",
        )  # fmt: skip
        if recipe.dtype is not None:
            made = Cast(made, recipe.dtype)
        return self._in_company(made, recipe, seed)

    def source(self, source: Source, recipe: Recipe, seed: int) -> Checkpoint:
        """The checkpoint of one source of `recipe`."""
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
        """The result with the config and tokenizer the recipe asks for."""
        if recipe.config_from is None and recipe.tokenizer_from is None:
            return made
        from weft.checkpoints.model import Model

        main = made if recipe.config_from is None else self.source(recipe.config_from, recipe, seed)
        assets = main.assets
        if recipe.tokenizer_from == "union":
            _check_one_tokenizer([self.source(s, recipe, seed) for s in recipe.sources])
        elif recipe.tokenizer_from is not None:
            other = self.source(recipe.tokenizer_from, recipe, seed)
            assets = tuple(a for a in assets if not _of_tokenizer(a)) + tuple(
                a for a in other.assets if _of_tokenizer(a)
            )
        return Model(made, main.config, assets, made.origin)


def _check_layers(recipe: Recipe, models: Sequence[Checkpoint]) -> None:
    """A slice is read as a whole model only if it is one."""
    from weft.methods.layers import count_layers

    for source, model in zip(recipe.models, models, strict=True):
        counts = count_layers(model)
        if recipe.layers not in counts.values():
            has = max(counts.values(), default=0)
            raise UsageError(
                f"slices: layer_range ends at {recipe.layers}, but {show_source(source)} has {has} layers; "
                f"slices of a model are not supported yet (give [0, {has}], or use models)"
            )


def _of_tokenizer(asset: Asset) -> bool:
    return asset.name.startswith(TOKENIZER_FILES) or asset.name.endswith((".tiktoken", ".spm", ".model"))


def _check_one_tokenizer(models: Sequence[Checkpoint]) -> None:
    """The union of one vocabulary with itself is itself; any other would move rows, which comes later."""
    vocabularies = [_vocabulary(m) for m in models]
    for model, words in zip(models, vocabularies, strict=True):
        if words != vocabularies[0]:
            raise UsageError(
                f"tokenizer_source: union is not supported yet where the vocabularies differ, and "
                f"{model.origin}'s is not {models[0].origin}'s; take one model's with tokenizer_source: base"
            )


def _vocabulary(model: Checkpoint) -> Any:
    """Words and their numbers, however the file is laid out; the bytes of a file that is not JSON."""
    files = {a.name: a for a in model.assets if a.name in ("tokenizer.json", "tokenizer.model", "vocab.json")}
    if "tokenizer.json" not in files:
        return {name: asset.read() for name, asset in files.items()}
    where = f"{shown(model.origin)}/tokenizer.json"
    data = parse_json(files["tokenizer.json"].read(), where, "config-json", depth=64)
    inner, added = data.get("model"), data.get("added_tokens")
    words = inner.get("vocab") if isinstance(inner, dict) else None
    extra = [(t.get("id"), t.get("content")) for t in added or [] if isinstance(t, dict)]
    return words, sorted(extra, key=repr)


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
