"""What the sweeps of benchmarks/sweep.py found, for the plans to be held against."""

import pathlib
from collections.abc import Callable

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks/results/nvidia_h200"


def excess(
    file: str, chosen: Callable[[int, int, int], tuple[str, int]]
) -> dict[tuple[int, ...], float]:
    """By how much what is `chosen` for (M, K, N), a variant and a split of K, takes longer than
    the fastest, as a share of that: of all problems where the sweep has it."""
    swept: dict[tuple[int, ...], dict[tuple[str, int], float]] = {}
    for line in (RESULTS / file).read_text().splitlines():
        if not line.startswith("#"):
            k, n, m, variant, split, us = line.split()
            swept.setdefault((int(m), int(k), int(n)), {})[variant, int(split)] = float(us)
    found = {}
    for problem, times in swept.items():
        us = times.get(chosen(*problem))
        if us is not None:
            found[problem] = us / min(times.values()) - 1
    return found
