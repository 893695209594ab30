"""A plot of benchmark results: how near to the limit of the machine, against M."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax_awq.bench import report
from jax_awq.bench.impls import Case
from jax_awq.bench.run import FLOPS_PER_SECOND

Row = dict[str, Any]

SUFFIXES = (".svg", ".png")

# Ours first and boldest; then what XLA makes, then other libraries.
STYLES: dict[str, dict[str, Any]] = {
    "jax_awq": {"color": "#c1121f", "linewidth": 2.5, "marker": "o", "zorder": 5},
    "xla_dense": {"color": "#003049", "marker": "s"},
    "xla_unpack": {"color": "#669bbc", "marker": "^"},
    "humming": {"color": "#588157", "linestyle": "--", "marker": "."},
    "machete": {"color": "#bc6c25", "linestyle": "--", "marker": "."},
    "marlin": {"color": "#6d597a", "linestyle": "--", "marker": "."},
}


def read(file: Path) -> list[Row]:
    """The rows of a result, each with the rate of memory where it was timed."""
    result = report.read(file)
    if "read_bytes_per_second" not in (result.get("ceilings") or {}):
        raise report.BadResult(
            f'plot: {file} has no "ceilings", the rate of memory where it was timed'
        )
    report.check_rows(file, result["rows"], report.COLUMNS)
    return [row | result["ceilings"] for row in result["rows"]]


def limit_us(row: Row) -> float:
    """Microseconds that a 4-bit product of this size takes at the rates of memory and cores."""
    case = Case(row["M"], row["K"], row["N"], row["group_size"], row["dtype"])
    moved = (case.packed_bytes + case.activation_bytes) / row["read_bytes_per_second"]
    multiplied = 2 * case.m * case.k * case.n / FLOPS_PER_SECOND
    return max(moved, multiplied) * 1e6


def efficiency(
    rows: Iterable[Row], weights: Sequence[tuple[int, int]], dtype: str
) -> dict[tuple[int, int], dict[str, list[tuple[int, float]]]]:
    """For each (K, N) and implementation with a style: (M, limit / time) in the order of M."""
    lines: dict[tuple[int, int], dict[str, list[tuple[int, float]]]] = {w: {} for w in weights}
    for row in sorted(rows, key=lambda r: r["M"]):
        weight = row["K"], row["N"]
        known = weight in lines and row["impl"] in STYLES
        if known and (row["dtype"], row["group_size"]) == (dtype, 128):
            points = lines[weight].setdefault(row["impl"], [])
            points.append((row["M"], limit_us(row) / row["us"]))
    return lines


def draw(
    rows: Iterable[Row], weights: Sequence[tuple[int, int]], dtype: str, file: Path, note: str
) -> None:
    """Writes one panel a weight to `file`, whose suffix names the format."""
    panels_of = efficiency(rows, weights, dtype)
    for (k, n), lines in panels_of.items():
        if not lines:
            raise report.BadResult(f"plot: no {dtype} row of {k}x{n} with group size 128")
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "plot needs matplotlib, which is not installed: pip install 'jax_awq[plot]'"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    # The same bytes from the same figures.
    with matplotlib.rc_context({"svg.hashsalt": "jax_awq", "svg.fonttype": "none"}):
        figure, panels = pyplot.subplots(
            (len(weights) + 1) // 2, 2, figsize=(11, 7), sharex=True, sharey=True, squeeze=False
        )
        for panel, (weight, lines) in zip(panels.flat, panels_of.items(), strict=False):
            for impl, style in STYLES.items():
                if impl in lines:
                    panel.plot(*zip(*lines[impl], strict=True), label=impl, **style)
            panel.set_title(f"K = {weight[0]}, N = {weight[1]}")
            panel.set_xscale("log", base=2)
            panel.set_ylim(0, 1.2)
            panel.axhline(1, color="black", linewidth=0.8)
            panel.grid(alpha=0.3)
        for panel in panels[:, 0]:
            panel.set_ylabel("limit of the machine / time")
        for panel in panels[-1]:
            panel.set_xlabel("M, rows of x")
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(STYLES), frameon=False)
        figure.text(0.5, 0.005, note, ha="center", fontsize=8)
        figure.tight_layout(rect=(0, 0.02, 1, 0.95))
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)
