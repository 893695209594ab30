"""Benchmarks of the ops on the device that JAX finds, and tables of their results.

python -m jax_awq.bench awq_gemm --json OUT.json
python -m jax_awq.bench awq_gemm_w4a8 --json OUT.json
python -m jax_awq.bench awq_dequantize --json OUT.json
python -m jax_awq.bench quantize_activation --json OUT.json
python -m jax_awq.bench int8_matmul --json OUT.json
python -m jax_awq.bench int4_matmul --json OUT.json
python -m jax_awq.bench decode --json OUT.json
python -m jax_awq.bench generate --json OUT.json
python -m jax_awq.bench table OUT.json
python -m jax_awq.bench plot OUT.json [MORE.json ...] --out PLOT.svg
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jax_awq.bench import arguments, decode, generate, plot, report
from jax_awq.bench.impls import IMPLS, kernels_run
from jax_awq.bench.run import read_rate, run
from jax_awq.bench.timing import METHOD, MIN_WEIGHT_BYTES
from jax_awq.problems import BENCH_PROBLEMS, BENCH_ROWS, PROBLEMS, W4A8_ROWS, Problem


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _check_output(parser, args)
        return _run(parser, args)
    except report.BadResult as error:
        parser.error(str(error))


def _check_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.command == "table":
        return
    name, file = ("--out", args.out) if args.command == "plot" else ("--json", args.json)
    if args.command == "plot" and file.suffix not in plot.SUFFIXES:
        parser.error(f"argument --out: must end with {' or '.join(plot.SUFFIXES)}, got {file}")
    if file is None:
        if getattr(args, "merge", False):
            parser.error("argument --merge: needs --json, the file to merge with")
        return
    try:
        report.check_writable(file)
    except OSError as error:
        parser.error(f"argument {name}: {error}")


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.command in ("decode", "generate"):
        shape = decode.SMALL if args.small else decode.LLAMA_3_8B
        widths = (shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim)
        arguments.check_group_size(parser, args.group_size, widths)
        return (decode if args.command == "decode" else generate).main(args)
    if args.command == "plot":
        rows = [row for file in args.json for row in plot.read(file)]
        weights = [(shape.k, shape.n) for shape in args.shapes]
        plot.draw(rows, weights, args.dtype, args.out, args.note)
        return 0
    if args.command == "table":
        rows = report.read(args.json)["rows"]
        of_models = {"decode": decode, "generate": generate}
        of_model = of_models.get(str(rows[0].get("op"))) if rows else None
        if of_model is not None:
            report.check_rows(args.json, rows, of_model.SHOWN)
            print(of_model.markdown(rows), end="")
            return 0
        report.check_rows(args.json, rows, report.COLUMNS)
        if not args.overview:
            ours = [row for row in rows if row["impl"] == "jax_awq"]
            report.check_rows(args.json, ours, ("floor_us",))
        elif not any(row["dtype"] == args.overview for row in rows):
            parser.error(f"argument --overview: {args.json} has no rows of dtype {args.overview!r}")
        text = report.overview(rows, args.overview) if args.overview else report.markdown(rows)
        print(text, end="")
        return 0
    arguments.check_group_size(parser, args.group_size, [shape.k for shape in args.shapes])
    top: dict[str, Any] = report.environment() | {
        "ceilings": {"read_bytes_per_second": read_rate()},
        "floor": "bytes of weight, x and y, each moved once, at read_bytes_per_second",
        "method": METHOD,
    }
    old = kept(args.json, top) if args.merge and args.json and args.json.exists() else []
    timed: list[report.Row] = []
    for new in run(
        args.command,
        args.shapes,
        args.m,
        args.dtypes,
        _impls(args.command, args.impls),
        group_size=args.group_size,
        repeats=args.repeats,
        min_weight_bytes=args.min_weight_mb * 1e6,
    ):
        timed += new
        if args.json is not None:  # after every weight: a run that is cut off keeps what it has
            report.write(args.json, top, report.merge(old, timed))
    report.show(report.merge([], timed))
    return 0


def _impls(op: str, wanted: list[str] | None) -> list[str]:
    """Those named, or all that run here and do not ask to be named."""
    impls = IMPLS[op]
    here = [name for name, impl in impls.items() if not impl.kernel or kernels_run()]
    if wanted is None:
        return [name for name in here if not impls[name].on_request]
    for name in wanted:
        if name not in here:
            raise SystemExit(f"--impls {name} needs a CUDA device and the kernels of jax_awq")
    return wanted


def kept(file: Path, top: dict[str, Any]) -> list[report.Row]:
    """Rows of an earlier run that still tell of what `top` describes."""
    same = ("device", "driver", "jax", "jaxlib", "ceilings", "method")
    old = report.read(file)
    for name in (*same, "build_info"):
        if name not in old:
            raise report.BadResult(f'--merge: {file} has no "{name}"')
    report.check_rows(file, old["rows"], report.COLUMNS)
    for name in same:
        if old[name] != top[name]:
            raise SystemExit(f"--merge: {file} has {name} {old[name]!r}, here it is {top[name]!r}")
    if old["build_info"] == top["build_info"]:
        return old["rows"]
    return [row for row in old["rows"] if not row["impl"].startswith(("jax_awq", "awq_gemm"))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_awq.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for op, impls in IMPLS.items():
        bench = commands.add_parser(op, help=f"time {op} and what it replaces")
        activations = op == "quantize_activation"
        w4a8 = op == "awq_gemm_w4a8"
        bench.add_argument(
            "--shapes",
            nargs="+",
            type=arguments.width if activations else arguments.problem,
            metavar="K" if activations else "KxN or model/linear",
            default=[Problem(k, 0) for k in (4096, 8192, 14336, 28672)]
            if activations
            else [PROBLEMS[name] for name in BENCH_PROBLEMS[: 4 if w4a8 else None]],
        )
        if op == "awq_dequantize":
            bench.set_defaults(m=[0])
        else:
            rows = [1024, 4096, 16384] if activations else W4A8_ROWS if w4a8 else BENCH_ROWS
            bench.add_argument(
                "--m", nargs="+", type=arguments.positive, default=rows, help="rows of x"
            )
        dtypes = ["float16", "bfloat16"]
        bench.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=dtypes)
        bench.add_argument("--impls", nargs="+", choices=list(impls), help="default: all")
        if op.startswith("awq"):
            bench.add_argument(
                "--group-size", type=arguments.group_size, default=128, help="-1: a single group"
            )
        else:
            bench.set_defaults(group_size=0 if activations else -1)  # none, or whole columns
        bench.add_argument("--repeats", type=arguments.positive, default=7)
        bench.add_argument(
            "--min-weight-mb",
            type=arguments.megabytes,
            default=MIN_WEIGHT_BYTES / 1e6,
            help="what the distinct weights exceed together: the cache",
        )
        bench.add_argument("--json", type=Path, help="file for the rows")
        bench.add_argument(
            "--merge",
            action="store_true",
            help="keep the rows of the file that are not timed again, "
            "but ours only where they are of the same build",
        )
    tokens = commands.add_parser("decode", help="tokens per second of a Llama-3-8B-shaped decoder")
    decode.add_arguments(tokens)
    tokens.add_argument("--json", type=Path, help="file for the rows")
    text = commands.add_parser(
        "generate", help="write, load and run a Llama-3-8B-shaped checkpoint"
    )
    generate.add_arguments(text)
    text.add_argument("--json", type=Path, help="file for the rows")
    table = commands.add_parser("table", help="print the Markdown tables of a result")
    table.add_argument("json", type=Path)
    table.add_argument(
        "--overview", metavar="DTYPE", help="one table of all weights, as in the README"
    )
    drawing = commands.add_parser("plot", help="draw efficiency against M; needs matplotlib")
    drawing.add_argument("json", type=Path, nargs="+", help="results of awq_gemm, or of others")
    drawing.add_argument("--out", type=Path, required=True, help="file, .svg or .png")
    drawing.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    drawing.add_argument("--note", default="", help="a line below the panels")
    drawing.add_argument(
        "--shapes",
        nargs="+",
        type=arguments.problem,
        metavar="KxN or model/linear",
        default=[PROBLEMS[name] for name in BENCH_PROBLEMS[:4]],
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
