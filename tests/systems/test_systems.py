"""The catalogue: complete, and true."""

from __future__ import annotations

import ast
import csv
import json
import os
from pathlib import Path

import pytest

import weft
from weft.systems import FAMILIES, System, catalogue

ROOT = Path(__file__).parents[2]
LIST = Path(os.environ.get("WEFT_DATA", "nowhere/data")).parent / "specs" / "systems.tsv"
ROWS = catalogue()
WORKING = [s for s in ROWS if s.status == "works"]


def test_every_row_of_the_list_is_there_once() -> None:
    ids = [s.id for s in ROWS]
    expected = [f"M{i:02}" for i in range(1, 73)] + [f"S{i:02}" for i in range(1, 115)]
    assert sorted(ids) == sorted(expected)


@pytest.mark.skipif(not LIST.is_file(), reason="the project's list of systems is not here")
def test_names_and_sections_are_those_of_the_list() -> None:
    with LIST.open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert {(s.id, s.section, s.name) for s in ROWS} == {(r["id"], r["section"], r["name"]) for r in rows}


def test_every_row_says_what_it_is() -> None:
    for s in ROWS:
        assert s.summary.endswith(".") and "\n" not in s.summary and len(s.summary) <= 200, s.id
        assert s.paper and s.name and s.section.startswith("2."), s.id


@pytest.mark.parametrize("system", WORKING, ids=lambda s: s.id)
def test_a_row_that_works_has_an_entry_and_a_test_that_are_there(system: System) -> None:
    assert callable(system.load())
    assert system.test is not None
    path, _, name = system.test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_no_test_stands_for_two_different_entries() -> None:
    entries: dict[str | None, set[str | None]] = {}
    for s in WORKING:
        entries.setdefault(s.test, set()).add(s.entry)
    assert all(len(found) == 1 for found in entries.values())


def test_a_planned_row_claims_nothing() -> None:
    for s in ROWS:
        if s.status == "planned":
            assert s.entry is None and s.test is None, s.id
            with pytest.raises(LookupError, match="planned"):
                s.load()


def test_rows_are_plain_data() -> None:
    told = json.loads(json.dumps([s.to_json() for s in ROWS]))
    assert {"id", "name", "section", "status", "entry", "test"} <= told[0].keys()
    assert {row["status"] for row in told} == {"works", "planned"}


def test_every_module_of_the_package_is_a_family() -> None:
    folder = Path(weft.__file__).parent / "systems"
    assert {p.stem for p in folder.glob("*.py")} - {"__init__"} == set(FAMILIES)
