"""Results as JSON and as tables."""

import datetime
import importlib.util
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

import jax_awq
from jax_awq.problems import BENCH_PROBLEMS, PROBLEMS

Row = dict[str, Any]
# What tables, plots and merging read of a row of an op.
COLUMNS = ("op", "impl", "M", "N", "K", "group_size", "dtype", "us")


class BadResult(ValueError):
    """A file is no result of this benchmark, or not one that the command takes."""


def read(file: Path) -> dict[str, Any]:
    """A result, with "rows".

    Raises:
      BadResult: it cannot be read, or has no rows.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadResult(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of the text encoding as well as of JSON
        raise BadResult(f"{file} is not JSON: {error}") from error
    rows = result.get("rows") if isinstance(result, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadResult(f'{file} must be a JSON object with a list of objects in "rows"')
    return result


def check_rows(file: Path, rows: Iterable[Row], columns: Iterable[str]) -> None:
    for number, row in enumerate(rows):
        for name in columns:
            if name not in row:
                raise BadResult(f'{file}: row {number} must have "{name}", got {sorted(row)}')


def environment() -> dict[str, Any]:
    """What a result depends on besides the code that was timed or tested."""
    device = jax.devices()[0]
    return {
        "build_info": jax_awq.build_info(),
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "driver": _driver(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""  # no NVIDIA driver
    return output.stdout.split("\n")[0].strip()


def check_writable(file: Path) -> None:
    """Before a run, which takes minutes.

    Raises:
      OSError: `file` cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch()
            file.unlink()
        elif file.is_dir():
            raise IsADirectoryError("it is a folder")
        elif not os.access(file, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror or error}") from error


def write(file: Path, top: dict[str, Any], rows: Iterable[Row]) -> None:
    """One line a row, so that a diff of two results can be read."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps(top, indent=1).removesuffix("\n}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """`old` with the rows that `new` has again replaced, in the order of weights and M."""
    rows = {_key(row): row for row in (*old, *new)}
    weights = list(dict.fromkeys((r["K"], r["N"]) for r in rows.values()))
    return sorted(
        rows.values(),
        key=lambda r: (r["op"], weights.index((r["K"], r["N"])), r["dtype"], r["M"], r["impl"]),
    )


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("op", "impl", "M", "N", "K", "group_size", "dtype"))


def overview(rows: Iterable[Row], dtype: str) -> str:
    """The README's table: a column a weight, "jax_awq / other / other" in microseconds.

    Of group size 128, and the weights that the benchmark takes when it is told nothing. A first
    line tells what reading the weight alone takes, where that was timed.
    """
    rows = [row for row in rows if row["dtype"] == dtype and row["group_size"] == 128]
    rows = [row for row in rows if not row["impl"].endswith("_dx")]  # another product
    weights = list(dict.fromkeys((row["K"], row["N"]) for row in rows))
    shown = {(PROBLEMS[name].k, PROBLEMS[name].n) for name in BENCH_PROBLEMS}
    weights = [weight for weight in weights if weight in shown] or weights
    impls = ["jax_awq", *sorted({row["impl"] for row in rows} - {"jax_awq", "read"})]
    us = {(row["M"], row["K"], row["N"], row["impl"]): row["us"] for row in rows}
    lines = [
        f"| M | {' | '.join(f'{k} x {n}' for k, n in weights)} |",
        "|" + "---:|" * (len(weights) + 1),
    ]
    if any(row["impl"] == "read" for row in rows):
        cells = [_us(us.get((0, *weight, "read"))) for weight in weights]
        lines.append(f"| read | {' | '.join(cells)} |")
    for m in sorted({row["M"] for row in rows if row["impl"] != "read"}):
        cells = [" / ".join(_us(us.get((m, *weight, i))) for i in impls) for weight in weights]
        lines.append(f"| {m} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def markdown(rows: Iterable[Row]) -> str:
    """Tables of microseconds, and how many times faster than each other program."""
    parts = []
    for title, cells in _tables(rows).items():
        others = sorted({impl for _, impl in cells} - {"jax_awq"})
        head = ["M", "jax_awq", *others, *(f"vs {impl}" for impl in others), "floor"]
        parts += [
            f"\n**{title}**\n",
            f"| {' | '.join(head)} |",
            "|" + "---:|" * len(head),
        ]
        parts += [f"| {' | '.join(line)} |" for line in _lines(cells, others)]
    return "\n".join(parts).strip() + "\n"


def show(rows: Iterable[Row]) -> None:
    """Prints tables to the terminal, with rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        print(markdown(rows))
        return
    from rich.console import Console
    from rich.table import Table

    for title, cells in _tables(rows).items():
        others = sorted({impl for _, impl in cells} - {"jax_awq"})
        table = Table(title=title)
        for name in ("M", "jax_awq", *others, *(f"vs {impl}" for impl in others), "floor"):
            table.add_column(name, justify="right")
        for line in _lines(cells, others):
            table.add_row(*line)
        Console().print(table)


def _tables(rows: Iterable[Row]) -> dict[str, dict[tuple[int, str], Row]]:
    tables: dict[str, dict[tuple[int, str], Row]] = {}
    for row in rows:
        title = (
            f"{row['op']}, K={row['K']}, N={row['N']}, group_size {row['group_size']}, "
            f"{row['dtype']}, us"
        )
        tables.setdefault(title, {})[row["M"], row["impl"]] = row
    return tables


def _lines(cells: dict[tuple[int, str], Row], others: list[str]) -> Iterable[list[str]]:
    for m in sorted({m for m, _ in cells}):
        ours = cells.get((m, "jax_awq"))
        rows = [ours, *(cells.get((m, impl)) for impl in others)]
        ratios = [f"{row['us'] / ours['us']:.2f}x" if ours and row else "" for row in rows[1:]]
        yield [
            str(m),
            *(f"{row['us']:.1f}" if row else "" for row in rows),
            *ratios,
            f"{ours['floor_us']:.1f}" if ours else "",
        ]
