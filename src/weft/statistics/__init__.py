"""What data say of a model, kept as a checkpoint under the names of its parameters. See measure.py."""

from weft.statistics.measure import KINDS, measure
from weft.statistics.texts import rows, texts

__all__ = ["KINDS", "measure", "rows", "texts"]
