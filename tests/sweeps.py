"""What the sweeps of benchmarks/sweep.py found, for the plans to be held against."""

import pathlib
from collections.abc import Callable

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks/results/nvidia_h200"


def excess(
    file: str, chosen: Callable[[int, int, int], tuple[str, int]]
) -> tuple[dict[tuple[int, ...], float], set[tuple[int, ...]]]:
    """By how much what is `chosen` for (M, K, N), a variant and a split of K, takes longer than
    the fastest, as a share of that; and the problems of which the sweep does not have it: not
    timed, or so slow that it was left out."""
    swept: dict[tuple[int, ...], dict[tuple[str, int], float]] = {}
    for line in (RESULTS / file).read_text().splitlines():
        if not line.startswith("#"):
            k, n, m, variant, split, us = line.split()
            swept.setdefault((int(m), int(k), int(n)), {})[variant, int(split)] = float(us)
    found, missing = {}, set()
    for problem, times in swept.items():
        us = times.get(chosen(*problem))
        if us is None:
            missing.add(problem)
        else:
            found[problem] = us / min(times.values()) - 1
    return found, missing
