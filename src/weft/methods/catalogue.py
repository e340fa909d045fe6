"""Imports every family, so that each declares its steps and methods."""

from weft.methods import (
    arcee_fusion,
    averages,
    breadcrumbs,
    dare,
    della,
    lines,
    magmax,
    masks,
    nearswap,
    pcb,
    ram,
    sce,
    spherical,
    stock,
    ties,
)

__all__ = [
    "arcee_fusion",
    "averages",
    "breadcrumbs",
    "dare",
    "della",
    "lines",
    "magmax",
    "masks",
    "nearswap",
    "pcb",
    "ram",
    "sce",
    "spherical",
    "stock",
    "ties",
]
