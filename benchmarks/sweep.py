"""Sweeps the variants and splits of awq_gemm that its cost model thinks near the best.

    python benchmarks/sweep.py SWEEP OUT [--x float16|int8|float8] [--seconds 0.1] [--slack 1.3]

SWEEP is what benchmarks/sweep.cu compiles to, OUT the file to write: what the plan is held against
(tests/sweeps.py), `K N M variant split us` a line. With --seconds each is timed after so long under
load, as the power limit has it in a program that goes on; 0 is a processor at rest. Of codes (--x)
all tiles and splits are timed, without the kernel that rounds.
"""

import argparse
import datetime
import pathlib
import subprocess

from jax_awq import build_info
from jax_awq.problems import PROBLEMS, SWEEP_PROBLEMS
from jax_awq.testing import planned

ROWS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
CODES_ROWS = (17, 32, 33, 64, 96, 128, 192, 256, 512)
SWEEP_TYPES = {"float16": "f16", "int8": "s8", "float8": "e4m3"}
MOST_SPLITS = 8  # parts of K that meet in a cluster


def main() -> None:
    args = _parser().parse_args()
    rows = ROWS if args.x == "float16" else CODES_ROWS
    points = [(k, n, m) for k, n in map(PROBLEMS.__getitem__, SWEEP_PROBLEMS) for m in rows]
    lines = [
        "# Microseconds of awq_gemm's variants and splits: benchmarks/sweep.cu, medians of seven",
        f"# runs after {args.seconds:g} s of load. {build_info()['source_hash']},"
        f" {datetime.date.today()}. {args.x}, groups of 128.",
        "# K N M variant split us",
    ]
    for done, (k, n, m) in enumerate(points):
        print(f"{done + 1} of {len(points)}: {k} x {n}, {m} rows", flush=True)
        found = candidates(k, n, m, args.slack) if args.x == "float16" else codes_candidates()
        command = [args.sweep, f"{k},{n}", str(m), " ".join(found)]
        command += [SWEEP_TYPES[args.x], "128", "product", str(args.seconds)]
        measured = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for line in measured.splitlines():
            *_, variant, split, us, error = line.split()
            if float(error) > 5e-3:
                raise SystemExit(f"{line}: the error is too large")
            lines.append(f"{k} {n} {m} {variant} {split} {us}")
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def candidates(k: int, n: int, m: int, slack: float) -> list[str]:
    """`variant:split` of all that take up to `slack` times the least, by the cost model."""
    refused = planned(m, k, n)["refused"]
    found = {}
    for variant in planned(m, k, n, x_dtype="float32")["refused"]:  # all there are
        if variant in refused or not variant.startswith(("few_", "tma_", "stream_")):
            continue
        if variant.startswith("stream_"):  # no split: one that is asked for refuses it
            found[variant] = planned(m, k, n, variant=variant)["microseconds"]
            continue
        for split in range(1, min(MOST_SPLITS, -(-k // 128)) + 1):
            plan = planned(m, k, n, variant=variant, split_k=split)
            found[f"{variant}:{split}"] = plan["microseconds"]
    return [name for name, us in found.items() if us <= slack * min(found.values())]


def codes_candidates() -> list[str]:
    """`variant:split` of all tiles of codes that take groups."""
    every = planned(17, 4096, 4096, x_dtype="float32")["refused"]
    tiles = [v for v in every if v.startswith("w4a8_") and v != "w4a8_256x128"]
    return [f"{variant}:{split}" for variant in tiles for split in range(1, MOST_SPLITS + 1)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=pathlib.Path, help="benchmarks/sweep.cu, compiled")
    parser.add_argument("out", type=pathlib.Path, help="file to write")
    parser.add_argument("--x", choices=SWEEP_TYPES, default="float16", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument(
        "--slack", type=float, default=1.3, help="times the least that is timed, too (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    main()
