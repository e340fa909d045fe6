"""README.md, the model card, in the Hub's form: front matter that tools read, then what people read.

What the cards of the merged models state about licences is read from their README.md; a licence is stated only
where all of them state the same one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from weft._version import __version__
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.folders import Folder, LocalFolder
from weft.checkpoints.refs import Kind, parse_ref
from weft.errors import UsageError, WeftError

README = "README.md"
_LONGEST = 1 << 20
_FRONT = re.compile(r"\A---\r?\n(.*?)^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
_LICENCE_KEYS = ("license", "license_name", "license_link")
_EVALUATION = "## Evaluation\n"


def model_card(checkpoint: Checkpoint, recipe_text: str | None) -> str:
    """The card of what `checkpoint` is saved as: what was merged, licences, the recipe."""
    models = {leaf.origin: leaf for leaf in leaves(checkpoint)}
    front: dict[str, Any] = {}
    if hub_ids := list(dict.fromkeys(filter(None, map(hub_id, models)))):
        front |= {"base_model": hub_ids, "base_model_relation": "merge"}
    adapter = getattr(checkpoint, "adapter_config", None)
    if adapter is not None:
        base = hub_id(str(adapter.get("base_model_name_or_path") or ""))
        front = {"base_model": [base], "base_model_relation": "adapter"} if base else {}
        front["library_name"] = "peft"
    classes = (checkpoint.config or {}).get("architectures")
    if classes:
        front["library_name"] = "transformers"
        if isinstance(classes, list) and str(classes[0]).endswith("ForCausalLM"):
            front["pipeline_tag"] = "text-generation"
    stated = {name: licence(leaf) for name, leaf in models.items()}
    front |= _common(list(stated.values())) or {}
    front["tags"] = ["merge", "weft"]
    lines = ["", "# Merged with weft", "", "Models:", "", *(f"- `{_plain(n)}`" for n in models), ""]
    lines += _licences(stated)
    lines += [
        f"Made by weft {__version__}; `weft-manifest.json` has the hashes of every input and output.",
        "",
    ]
    if recipe_text:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", recipe_text)), default=0))
        lines += ["Recipe:", "", f"{fence}yaml", recipe_text.rstrip(), fence, ""]
    return _joined(front, "\n".join(lines))


def with_evaluation(card: str, name: str, verification: Mapping[str, Any]) -> str:
    """The card with a verification (`Verification.describe()`) as its evaluation; an earlier one is replaced.

    A perplexity goes into the front matter's `model-index`, everything into a table.
    """
    front, body = front_matter(card), _FRONT.sub("", card, count=1)
    front.pop("model-index", None)
    text, result = str(verification["text"]), verification["result"]
    if result["perplexity"] is not None:
        metric = {"type": "perplexity", "value": result["perplexity"], "name": "Perplexity"}
        measured = {
            "task": {"type": "text-generation"},
            "dataset": {"name": text, "type": "text"},
            "metrics": [metric],
        }
        front["model-index"] = [{"name": name, "results": [measured]}]
    lines = ["", f"On {_plain(text)} ({verification['tokens'] or 0} tokens), by `weft verify`:", ""]
    lines += ["| model | outputs | perplexity |", "|---|---|---:|"]
    for title, row in [("this model", result), *((p["model"], p) for p in verification["parents"])]:
        figure = "–" if row["perplexity"] is None else f"{row['perplexity']:.4g}"
        outputs = {True: "finite", False: "not finite", None: "not run"}[row["finite"]]
        lines.append(f"| {_plain(title).replace('|', '?')} | {outputs} | {figure} |")
    lines += ["", *(f"Problem: {_plain(p)}" for p in verification["problems"])]
    before = body.partition(_EVALUATION)[0].rstrip("\n")
    return _joined(front, "\n".join([before, "", _EVALUATION.rstrip(), *lines, ""]).rstrip("\n") + "\n")


def front_matter(card: str) -> dict[str, Any]:
    """The card's YAML front matter as data; empty where there is none that can be read."""
    from weft.recipes.yaml import parse

    found = _FRONT.match(card)
    if not found:
        return {}
    try:
        documents = parse(found[1], README)
    except UsageError:
        return {}
    data = documents[0].data if documents else None
    return data if isinstance(data, dict) else {}


def licence(leaf: Checkpoint) -> dict[str, str] | None:
    """`license`, `license_name`, `license_link` as the model's own card has them; None where it has none."""
    folder = _home(leaf)
    try:
        if folder is None or not folder.exists(README):
            return None
        front = front_matter(folder.read(README, _LONGEST, "asset-size").decode("utf-8", "replace"))
    except WeftError:  # an unreadable card states nothing
        return None
    stated = {k: front[k] for k in _LICENCE_KEYS if isinstance(front.get(k), str)}
    if not stated.get("license_link", "http").startswith("http"):
        del stated["license_link"]  # a file beside that card, which is not beside this one
    return stated if "license" in stated else None


def hub_id(origin: str) -> str | None:
    """The Hub id in what the user called a model, without revision; None for anything else."""
    try:
        # what is read from the Hub by range is called hf://org/name@commit
        ref = parse_ref(origin.removeprefix("hf://"))
    except UsageError:
        return None
    local = Path(ref.path).exists() and not origin.startswith("hf://")
    return ref.path if ref.kind is Kind.HUB and not local else None


def leaves(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoints at the ends of the graph."""
    if not checkpoint.inputs:
        return [checkpoint]
    return [leaf for source in checkpoint.inputs for leaf in leaves(source)]


def _home(leaf: Checkpoint) -> Folder | None:
    """The folder that the model's weights lie in."""
    if not leaf.files:
        return None
    parent, _, _ = leaf.files[0].path.rpartition("/")
    if "://" not in leaf.files[0].path:
        return LocalFolder(Path(leaf.files[0].path).parent)
    from weft.checkpoints.remote import RemoteFolder

    return RemoteFolder(parent, (README,))


def _common(stated: Sequence[dict[str, str] | None]) -> dict[str, str] | None:
    """The licence that all models state, or None; `other` without a name may be anything."""
    first = stated[0] if stated and all(s == stated[0] for s in stated) else None
    return None if first and first["license"] == "other" and "license_name" not in first else first


def _licences(stated: Mapping[str, dict[str, str] | None]) -> list[str]:
    """What the models state, where it is no single licence; nothing where none states any."""
    if _common(list(stated.values())) is not None or not any(stated.values()):
        return []
    lines = ["The models do not all state one licence, so this card states none; each one's applies:", ""]
    for name, found in stated.items():
        told = ", ".join(f"`{_plain(v)}`" for v in found.values()) if found else "none stated"
        lines.append(f"- `{_plain(name)}`: {told}")
    return [*lines, ""]


def _joined(front: Mapping[str, Any], body: str) -> str:
    text = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n{body}"


def _plain(text: str) -> str:
    return re.sub(r"[`\x00-\x1f\x7f]", "?", text)
