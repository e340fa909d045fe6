"""`weft systems`: the catalogue of the field. Imports no torch."""

from __future__ import annotations

from collections import Counter

from weft.cli.output import console, one_line, print_json, table
from weft.errors import UsageError


def list_systems(section: str | None, as_json: bool) -> None:
    """Print the catalogue of the field's systems, or of one section with those under it."""
    from weft.systems import catalogue

    every = catalogue()
    chosen = [s for s in every if section is None or f"{s.section}.".startswith(f"{section.rstrip('.')}.")]
    if not chosen:
        known = ", ".join(sorted({s.section for s in every}))
        raise UsageError(f"there is no section {section!r}; the sections are {known}")
    if as_json:
        print_json([s.to_json() for s in chosen])
        return
    listed = table("id", "section", "name", "status", "what it is")
    for s in chosen:
        listed.add_row(s.id, s.section, one_line(s.name), s.status, one_line(s.summary))
    console().print(listed)
    counts = Counter(s.status for s in chosen)
    print(f"\n{len(chosen)} systems: {counts['works']} work, {counts['planned']} planned")
