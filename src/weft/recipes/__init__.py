"""Recipes: what the user wants, written down. `read` checks one, `build` turns it into a lazy checkpoint.

Importing this imports pydantic; the command line does so only for the verbs that need it.
"""

# bound here, at once: a lazy import would later be shadowed by the submodule of the same name
from weft.recipes.build import build
from weft.recipes.check import Report, check
from weft.recipes.jsonschema import json_schema
from weft.recipes.read import read
from weft.recipes.recipe import Recipe

__all__ = ["Recipe", "Report", "build", "check", "json_schema", "read"]
