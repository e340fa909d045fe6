"""Quantised checkpoints seen as the ones they stand for.

Merging codes instead of values is meaningless, so a quantised checkpoint shows, under the plain names, the
values that its codes, scales and zero points stand for, computed for the elements that are read. One file a
scheme says where it keeps them; formats that no formula decodes are refused with what to do.
"""

from weft.checkpoints.quantised.node import Dequantised
from weft.checkpoints.quantised.schemes import dequantised

__all__ = ["Dequantised", "dequantised"]
