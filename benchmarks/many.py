"""`alignment.py many`: three or more networks of other starts in one order, their mean, and the mean repaired."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

import weft
from weft.align.many import c2m3, mean, merge_many, relating, shared
from weft.align.soft import softened
from weft.analysis.network import Network


def many(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Test loss and error of means; f = Σ_{i<j} ⟨πᵢθᵢ, πⱼθⱼ⟩, and whether orders agree around a cycle."""
    from alignment import images, trained

    if options.models < 3:
        raise SystemExit("--models: three or more; `barriers` has pairs")
    rows = []
    for name in options.data.split(","):
        train, test = images(name)
        for group in range(options.groups):
            k = options.models
            nets = [
                trained(train, k * group + i, options.width, options.depth, options.epochs, options.decay)
                for i in range(k)
            ]
            here, spec = Network(nets[0], test), weft.align.discover(nets[0])
            states = [{n: t.double() for n, t in net.state_dict().items()} for net in nets]
            few = list(train[0][:2000].split(500))

            def to_first(nets: Any = nets, spec: Any = spec) -> Any:
                return [spec.identity()] + [weft.align.weight_matching(spec, nets[0], n) for n in nets[1:]]

            ways: dict[str, Callable[[], Any]] = {
                "as they are": lambda s=spec, n=nets: [s.identity() for _ in n],
                "all to the first": to_first,
                "MergeMany": lambda s=spec, n=nets: merge_many(s, n),
                "C2M3": lambda s=spec, n=nets: c2m3(s, n),
                "C2M3, polished": lambda s=spec, n=nets: c2m3(s, n, polish=True),
            }
            if options.tries > 1:
                ways[f"C2M3, {options.tries} tries"] = lambda s=spec, n=nets: c2m3(s, n, tries=options.tries)
            ends = [here.measure(here.state(n)) for n in nets]
            told = "/".join(f"{100 * (e.error or 0):.1f}" for e in ends)
            for how, make in ways.items():
                started = time.perf_counter()
                orders = make()
                spent = time.perf_counter() - started
                f = float(shared(spec, states, [softened(spec, p, torch.float64) for p in orders]))
                moved = [spec.apply(n, p) for n, p in zip(nets, orders, strict=True)]
                middle = mean(moved)
                at = here.measure(here.state(middle))
                mended = weft.calibrate(middle, few, "repair", parents=moved, module=deepcopy(nets[0]))
                repaired = here.measure_module(mended.module)
                round_trip = spec.compose(
                    spec.compose(relating(spec, orders[2], orders[0]), relating(spec, orders[1], orders[2])),
                    relating(spec, orders[0], orders[1]),
                )  # the first into the third's order, on into the second's, and back
                cycle = all(torch.equal(p, spec.identity()[n]) for n, p in round_trip.items())
                rows.append({"data": name, "group": group, "how": how, "loss": at.loss, "error": at.error,
                             "repaired_loss": repaired.loss, "repaired_error": repaired.error, "f": f,
                             "cycle": cycle, "seconds": spent})  # fmt: skip
                before, after = (f"{m.loss:.4f}, {100 * (m.error or 0):5.2f} %" for m in (at, repaired))
                print(
                    f"{name} group {group} (ends {told}) {how:18} loss {before}  repaired {after}  f {f:.5g}  "
                    f"cycle {cycle}  {spent:.1f} s",
                    flush=True,
                )
    return rows
