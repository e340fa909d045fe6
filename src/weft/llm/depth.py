"""What a config says of each layer, taken apart into one list an aspect, and written for other layers.

A config speaks of single layers in three ways: a list with one entry a layer (`layer_types`), a list of layer
numbers (`mlp_only_layers`), and a rule of the number (`first_k_dense_replace`, `sliding_window_pattern`). All
three become a list with one entry a layer. Where layers are picked, repeated or reordered the entries go
with them, and the fields are written so that they say the same again, or it is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import DataProblems
from weft.llm.layout import ConfigPath, Stack, index_list

Config = Mapping[str, Any]
Kind = Callable[[int, int, int, Config], Any]
"""(value of the field, index of the layer, number of layers, the sub-config) → what that layer is."""


@dataclass(frozen=True)
class Rule:
    """A whole number from which follows what each layer is."""

    field: str
    aspect: str
    """The list it stands for: a field of the config that would say the same explicitly, or a word for it."""
    kind: Kind
    explicit: bool
    """True where transformers reads `aspect` as a list and prefers it."""
    holds: Callable[[Config], bool] = lambda config: True


def _attention(sliding: str, full: str, is_sliding: Callable[[int, int], bool]) -> Kind:
    return lambda value, i, count, config: sliding if is_sliding(value, i) else full


def _dense_first(value: int, i: int, count: int, config: Config) -> str:
    every = config.get("moe_layer_freq")
    every = every if type(every) is int and every > 0 else 1
    return "sparse" if i >= value and i % every == 0 else "dense"


def _sparse_step(value: int, i: int, count: int, config: Config) -> str:
    only = config.get("mlp_only_layers") or ()
    return "sparse" if i not in only and value > 0 and (i + 1) % value == 0 else "dense"


def _periodic(offset: str) -> Kind:
    return lambda value, i, count, config: value > 0 and i % value == config.get(offset, 0)


RULES: tuple[Rule, ...] = (
    Rule("full_attention_interval", "layer_types",
         _attention("linear_attention", "full_attention", lambda n, i: n <= 0 or (i + 1) % n != 0), True),
    Rule("sliding_window_pattern", "layer_types",
         _attention("sliding_attention", "full_attention", lambda n, i: n <= 0 or (i + 1) % n != 0), True),
    Rule("max_window_layers", "layer_types",
         _attention("sliding_attention", "full_attention", lambda n, i: i >= n), True,
         lambda config: bool(config.get("use_sliding_window"))),
    Rule("global_attn_every_n_layers", "layer_types",
         _attention("sliding_attention", "full_attention", lambda n, i: n > 0 and i % n != 0), True),
    Rule("no_rope_layer_interval", "no_rope_layers", lambda n, i, count, _: int(n <= 0 or (i + 1) % n != 0), True),
    Rule("interleave_moe_layer_step", "sparse layers", lambda n, i, count, _: n > 0 and (i + 1) % n == 0, False,
         lambda config: not config.get("moe_layers")),
    Rule("first_k_dense_replace", "sparse layers", _dense_first, False),
    Rule("decoder_sparse_step", "sparse layers", _sparse_step, False),
    Rule("attn_layer_period", "attention layers", _periodic("attn_layer_offset"), False),
    Rule("expert_layer_period", "expert layers", _periodic("expert_layer_offset"), False),
    Rule("num_kv_shared_layers", "layers that share keys and values",
         lambda n, i, count, _: i >= count - n, False),
)  # fmt: skip
"""What no name and no shape can tell: how a number in a config says which layers are what."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model, as its config speaks of it."""

    origin: str
    aspects: Mapping[str, Sequence[Any]]
    index: int

    def __getitem__(self, aspect: str) -> Any:
        return self.aspects[aspect][self.index]

    def __str__(self) -> str:
        return f"layer {self.index} of {self.origin}"


def aspects(config: Config, stack: Stack) -> dict[str, list[Any]]:
    """Aspect → one entry a layer of the stack."""
    section = _section(config, stack)
    found: dict[str, list[Any]] = {}
    for path in stack.listed_by:
        found[path[-1]] = list(_get(config, path))
    for key, value in section.items():
        if index_list((key,), value) and all(i < stack.count for i in value):
            found[key] = [i in value for i in range(stack.count)]
    for rule in _rules(section):
        said = [rule.kind(section[rule.field], i, stack.count, section) for i in range(stack.count)]
        found.setdefault(rule.aspect, said)
    return found


def conflicts(layers: Sequence[Layer]) -> list[str]:
    """What configs say differently of layers that are to be merged with one another."""
    first, told = layers[0], []
    for other in layers[1:]:
        for aspect in first.aspects.keys() & other.aspects.keys():
            if first[aspect] != other[aspect]:
                told.append(f"{aspect} is {first[aspect]!r} in {first} and {other[aspect]!r} in {other}")
    return sorted(told)


def relayered(config: Config, stack: Stack, layers: Sequence[Layer], origin: str) -> dict[str, Any]:
    """The config with `stack` made of `layers`: counters, lists, layer numbers and rules rewritten.

    Raises DataProblems naming every field that cannot say what the layers are.
    """
    made = copy.deepcopy(dict(config))
    told: dict[str, list[Any]] = {}
    problems = []
    for aspect in aspects(config, stack):
        lacking = sorted({layer.origin for layer in layers if aspect not in layer.aspects})
        if lacking:
            problems.append(f"{aspect}: the config of {', '.join(lacking)} does not say it")
        else:
            told[aspect] = [layer[aspect] for layer in layers]
    for path in stack.counted_by:
        _set(made, path, len(layers))
    for path in stack.listed_by:
        if path[-1] in told:
            value = told[path[-1]]
            _set(made, path, "".join(value) if isinstance(_get(config, path), str) else value)
    section = _section(made, stack)
    for key in [k for k, v in section.items() if k in told and index_list((k,), v)]:
        section[key] = [i for i, there in enumerate(told[key]) if there]
    for rule in _rules(_section(config, stack)):
        if rule.aspect in told and not _fit(rule, section, told[rule.aspect]):
            problems.append(f"no {rule.field} makes {rule.aspect} {told[rule.aspect]}")
    if section.get("max_window_layers") == stack.count and not section.get("use_sliding_window"):
        section["max_window_layers"] = len(layers)  # "to the last", though nothing slides
    if problems:
        raise DataProblems(f"{origin}: its config cannot describe these layers", problems)
    return made


def _rules(section: Config) -> list[Rule]:
    return [r for r in RULES if type(section.get(r.field)) is int and r.holds(section)]


def _fit(rule: Rule, section: dict[str, Any], wanted: list[Any]) -> bool:
    """Give the rule a value from which `wanted` follows, or say it with a list; False if neither can."""
    count = len(wanted)

    def follows(value: int) -> bool:
        return [rule.kind(value, i, count, section) for i in range(count)] == wanted

    value = next((v for v in (section[rule.field], *range(count + 2)) if follows(v)), None)
    if value is not None:
        section[rule.field] = value
        return True
    if rule.field == "decoder_sparse_step":
        section[rule.field], section["mlp_only_layers"] = 1, [i for i, k in enumerate(wanted) if k == "dense"]
        return True
    if rule.field == "interleave_moe_layer_step":
        section["moe_layers"] = [i for i, sparse in enumerate(wanted) if sparse]
        return True
    if rule.field.endswith("_period"):
        return _fit_offset(rule, section, rule.field.replace("period", "offset"), wanted)
    if rule.explicit:
        section[rule.aspect] = wanted
    return rule.explicit


def _fit_offset(rule: Rule, section: dict[str, Any], offset: str, wanted: list[Any]) -> bool:
    count = len(wanted)
    for start in range(count):
        for period in range(start + 1, count + 2):
            tried = {**section, rule.field: period, offset: start}
            if [rule.kind(period, i, count, tried) for i in range(count)] == wanted:
                section.update(tried)
                return True
    return False


def _section(config: Any, stack: Stack) -> Any:
    """The config, or the config inside it, that counts the layers of the stack."""
    for part in stack.counted_by[0][:-1] if stack.counted_by else ():
        config = config[part]
    return config


def _get(config: Config, path: ConfigPath) -> Any:
    value: Any = config
    for part in path:
        value = value[part]
    return value


def _set(config: dict[str, Any], path: ConfigPath, value: Any) -> None:
    for part in path[:-1]:
        config = config[part]
    config[path[-1]] = value
