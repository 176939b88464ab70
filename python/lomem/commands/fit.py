"""The command ``lomem fit``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..fit import fit, report
from ..fit._fit import CRITERIA
from .plotting import check_folder, check_plot


def _criteria(text: str | None) -> list[Any]:
    names = CRITERIA if text is None else tuple(text.split(","))
    for name in names:
        if name not in CRITERIA:
            raise ValueError(f"--criterion is {name!r}, expected {' or '.join(CRITERIA)}")
    return list(names)


def main(arguments: argparse.Namespace) -> int:
    """Runs ``lomem fit``; returns the exit status."""
    criteria = _criteria(arguments.criterion)
    for bits in arguments.bits:
        if not 1 <= bits <= 8:
            raise ValueError(f"--bits is {bits}, expected 1 to 8")
    if arguments.plot is not None:
        check_plot(arguments.plot, "fit")
    if arguments.json is not None:
        check_folder("--json", arguments.json)

    found: dict[str, Any] = {}
    for criterion in criteria:
        for bits in arguments.bits:
            result = fit(arguments.function, bits, criterion=criterion, density=arguments.density)
            width = f"{bits} bit" + "s" * (bits > 1)
            found[f"{criterion}, {width}"] = result
            print(f"{arguments.function}, {width}, {criterion}: error {result.error:.6g}")
            if bits <= arguments.digits_up_to:
                print("  boundaries " + " ".join(f"{c:.16g}" for c in result.boundaries))
                print("  levels     " + " ".join(f"{level:.16g}" for level in result.levels))
    fidelity = report(
        arguments.function, steps={name: result.step for name, result in found.items()}, density=arguments.measure
    )
    print()
    print(fidelity)
    if arguments.plot is not None:
        fidelity.plot(arguments.plot)
    if arguments.json is not None:
        fits = {name: {"error": r.error, "boundaries": r.boundaries, "levels": r.levels} for name, r in found.items()}
        contents = {"function": arguments.function, "density": arguments.density, "fits": fits, **fidelity.to_dict()}
        Path(arguments.json).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return 0
