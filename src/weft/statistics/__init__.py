"""What data say of a model, kept as a checkpoint under the names of its parameters. See measure.py."""

from weft.statistics.measure import measure

__all__ = ["measure"]
