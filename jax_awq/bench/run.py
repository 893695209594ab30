"""The benchmark: rows for every weight, dtype, M and implementation of an op."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

import jax_awq
from jax_awq.bench.impls import IMPLS, Case, Impl, weights
from jax_awq.bench.timing import (
    MIN_CALLS,
    MIN_WEIGHT_BYTES,
    calls_for,
    chained_loop,
    copies_for,
    time_program,
)
from jax_awq.problems import Problem

# Measured: the dense product of XLA on an H200 at its best (an H100 gave up to 748 TFLOP/s), and
# what more bytes to read cost.
FLOPS_PER_SECOND = 660e12
READ_BYTES_PER_SECOND = {"NVIDIA H200": 4.6e12, "NVIDIA H100 80GB HBM3": 3.1e12}


def read_rate() -> float:
    """Bytes a second that the memory of this device gives; an H200's where nobody has measured."""
    kind = jax.devices()[0].device_kind
    return READ_BYTES_PER_SECOND.get(kind, READ_BYTES_PER_SECOND["NVIDIA H200"])


def floor_us(op: str, impl: str, case: Case) -> float:
    """Microseconds to move weight, x and result, each once, at the rate of memory."""
    return IMPLS[op][impl].moved_bytes(case) / read_rate() * 1e6


def run(
    op: str,
    problems: Sequence[Problem],
    rows: Sequence[int],
    dtypes: Sequence[str],
    impls: Sequence[str],
    *,
    group_size: int = 128,
    repeats: int = 7,
    min_seconds: float = 0.015,
    min_weight_bytes: float = MIN_WEIGHT_BYTES,
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of each weight and dtype when they are there; progress goes to stderr."""
    for problem in problems:
        for dtype in dtypes:
            results, shared = [], (group_size, dtype)
            for name in impls:
                impl = IMPLS[op][name]
                # One set of weights serves every M, and is freed before the next.
                for some in [[m] for m in rows] if impl.of_rows else [rows]:
                    case = Case(some[0] if impl.of_rows else 0, problem.k, problem.n, *shared)
                    copies = copies_for(impl.weight_bytes(case), min_weight_bytes)
                    # Without an x that tells them apart, two calls need two weights.
                    copies = (
                        max(copies, MIN_CALLS) if impl.of_rows or op == "awq_dequantize" else copies
                    )
                    data = weights(impl, case, copies)
                    cases = [
                        dataclasses.replace(case, m=m) for m in (some if impl.takes_x else [0])
                    ]
                    for case, loop in zip(cases, _compile(op, name, cases, data), strict=True):
                        row = _time(op, name, case, data, loop, repeats, min_seconds)
                        results.append(row)
                        print(
                            f"{op} K={case.k} N={case.n} M={case.m} {dtype} {name}: "
                            f"{row['us']:.2f} us, "
                            f"{row['us'] / row['floor_us']:.2f} x floor"
                            f"{_kernel(op, name, case, data)}",
                            file=sys.stderr,
                            flush=True,
                        )
                    del data
            yield results


class _Loop(NamedTuple):
    """What is timed of one case: for each way to launch the op, so many calls of it."""

    programs: Sequence[Callable[..., Any]]
    calls: int


def _compile(op: str, name: str, cases: Sequence[Case], data: list[Any]) -> list[_Loop]:
    """The loops of all cases before any is timed, side by side: compiling is most of the time."""
    impl = IMPLS[op][name]
    lowered, loops = [], []
    for case in cases:
        calls = calls_for(len(data))
        flops_us = 2 * case.m * case.k * case.n / FLOPS_PER_SECOND * 1e6
        # At least two, or XLA would remove the loop; more for short calls, to hide the start of it.
        floor = max(floor_us(op, name, case), flops_us, 3)
        iterations = min(32, max(2, math.ceil(1000 / (calls * floor))))
        xs = jax.eval_shape(functools.partial(_make_xs, impl, case, len(data)))
        for launch in range(impl.launches):
            run = impl.run if impl.launches == 1 else functools.partial(impl.run, launch=launch)
            lowered.append(jax.jit(chained_loop(run, iterations)).lower(xs, data))
        loops.append(calls * iterations)
    # For a product of its own XLA times candidates on the device, which nothing else must use then.
    alone = ["dot_general" in program.as_text() for program in lowered]
    with ThreadPoolExecutor() as pool:
        others = [
            None if a else pool.submit(p.compile) for a, p in zip(alone, lowered, strict=True)
        ]
    programs = [
        program.compile() if other is None else other.result()
        for other, program in zip(others, lowered, strict=True)
    ]
    launches = impl.launches
    return [
        _Loop(programs[i * launches : (i + 1) * launches], calls) for i, calls in enumerate(loops)
    ]


def _make_xs(impl: Impl, case: Case, copies: int) -> list[Any]:
    """As many as all calls of an iteration take with so many weights."""
    keys = jax.random.split(jax.random.key(1), calls_for(copies) // copies)
    return [impl.make_x(key, case) for key in keys]


def _time(
    op: str,
    impl: str,
    case: Case,
    data: list[tuple[Any, ...]],
    loop: _Loop,
    repeats: int,
    min_seconds: float,
) -> dict[str, Any]:
    xs = _make_xs(IMPLS[op][impl], case, len(data))
    seconds = min(
        time_program(functools.partial(program, xs, data), repeats=repeats, min_seconds=min_seconds)
        for program in loop.programs
    )
    return {
        "op": op,
        "impl": impl,
        "M": case.m,
        "N": case.n,
        "K": case.k,
        "group_size": case.group_size,
        "dtype": case.dtype,
        "us": round(seconds / loop.calls * 1e6, 3),
        "floor_us": round(floor_us(op, impl, case), 3),
    }


def _kernel(op: str, impl: str, case: Case, data: list[tuple[Any, ...]]) -> str:
    if impl != "jax_awq" or op == "awq_dequantize":
        return ""
    if IMPLS[op][impl].of_rows:
        operands = data[0]
    else:
        x = jax.eval_shape(lambda key: IMPLS[op][impl].make_x(key, case), jax.random.key(0))
        # Of the arrays of an integer product the codes decide.
        operands = (x, *data[0]) if op.startswith("awq_gemm") else (x[0], data[0][0])
    plan = jax_awq.plan(op, *operands)
    return f" ({plan.kernel or plan.route}, split_k {plan.split_k})"
