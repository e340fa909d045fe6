"""The schema for editors accepts what the reader accepts, and knows every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.methods.registry import METHODS
from weft.methods.step import STEPS
from weft.recipes import json_schema
from weft.recipes.mergekit import SPELLINGS
from weft.recipes.yaml import parse

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json_schema()
CHECK = jsonschema.Draft202012Validator(SCHEMA)


def published() -> list[Any]:
    """Every recipe written out whole in the test of MergeKit's recipes."""
    text = Path(__file__).with_name("test_mergekit_recipes.py").read_text()
    parts = [
        p for p in text.split('"""')[1::2] if "merge_method" in p and "{method}" not in p and "{{" not in p
    ]
    return [d.data for p in parts for d in parse(p)]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert len(json.dumps(SCHEMA)) < 200_000


def test_every_method_is_in_it() -> None:
    names = SCHEMA["$defs"]["Recipe"]["properties"]["merge_method"]["enum"]
    assert set(METHODS) <= set(names) and set(SPELLINGS) <= set(names)
    for name, method in METHODS.items():
        properties = SCHEMA["$defs"][f"parameters of {name}"]["properties"]
        assert set(method.params) <= set(properties)
    assert "density" in SCHEMA["$defs"]["parameters of a model of ties"]["properties"]
    known = json_schema()["$defs"]["Recipe"]["properties"]["steps"]["items"]["anyOf"][0]["enum"]
    assert set(STEPS) == set(known)  # other tests may have imported more steps since


def test_published_recipes_are_valid() -> None:
    recipes = published()
    assert len(recipes) >= 8
    for recipe in recipes:
        assert [e.message for e in CHECK.iter_errors(recipe)] == []


@pytest.mark.parametrize(
    "text",
    [
        "{method: linear, models: [a, {model: {path: b, revision: c}}], dtype: bf16, seed: 3}",
        "{method: ties, base: b, models: [{model: {method: linear, models: [c]}}], missing: carry}",
        "{steps: [trim, {elect_sign: null}, {disjoint_mean: {weight: [0, 1]}}], base: b, models: [a]}",
        "{method: slerp, models: [a, b], parameters: {t: [{kind: mlp, layers: 0-3, value: [0]}]}}",
        "{merge_method: dare_ties, base_model: b, models: [a], parameters: {rescale: true, lambda: 1}}",
    ],
)
def test_valid(text: str) -> None:
    assert [e.message for e in CHECK.iter_errors(parse(text)[0].data)] == []


@pytest.mark.parametrize(
    "text",
    [
        "{method: lienar, models: [a]}",
        "{method: linear}",
        "{models: [a]}",
        "{method: linear, merge_method: linear, models: [a]}",
        "{method: linear, models: [a], dtpye: x}",
        "{method: linear, models: [a], parameters: {weihgt: 1}}",
        "{method: ties, base: b, models: [a], parameters: {density: 1.5}}",
        "{method: ties, base: b, models: [{model: a, parameters: {density: [0, 2]}}]}",
        "{method: ties, base: b, models: [{model: a, parameters: {elect: mass}}]}",
        "{method: ties, base: b, models: [a], parameters: {elect: cuont}}",
        "{method: slerp, models: [a, b], parameters: {t: [{fitler: mlp, value: 0}]}}",
        "{steps: [tirm], base: b, models: [a]}",
        "{steps: [{trim: {densty: 1}}], base: b, models: [a]}",
        "{method: linear, models: [{model: {method: linar, models: [a]}}]}",
    ],
)
def test_invalid(text: str) -> None:
    assert not CHECK.is_valid(parse(text)[0].data)
