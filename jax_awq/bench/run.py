"""The benchmark of `awq_gemm`: rows for every weight, M, dtype and implementation."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import jax_awq
from jax_awq.bench.impls import IMPLS, Case, make_x, weights
from jax_awq.bench.timing import MIN_CALLS, MIN_WEIGHT_BYTES, chained_loop, copies_for, time_program
from jax_awq.problems import Problem

# Measured on an H200: reading a large buffer, and the dense product of XLA at its best.
READ_BYTES_PER_SECOND = 4.6e12
FLOPS_PER_SECOND = 660e12


def floor_us(impl: str, case: Case) -> float:
    """Microseconds to read weight and x and to write y, each once, at the rate of memory."""
    return (IMPLS[impl].weight_bytes(case) + case.activation_bytes) / READ_BYTES_PER_SECOND * 1e6


def run_awq_gemm(
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
            results = []
            for impl in impls:
                # One set of weights serves every M, and is freed before the next.
                case = Case(0, problem.k, problem.n, group_size, dtype)
                data = weights(
                    impl, case, copies_for(IMPLS[impl].weight_bytes(case), min_weight_bytes)
                )
                for m in rows:
                    case = Case(m, problem.k, problem.n, group_size, dtype)
                    row = _time(impl, case, data, repeats, min_seconds)
                    results.append(row)
                    print(
                        f"K={case.k} N={case.n} M={m} {dtype} {impl}: {row['us']:.2f} us, "
                        f"{row['us'] / row['floor_us']:.2f} x floor{_kernel(impl, case, data)}",
                        file=sys.stderr,
                        flush=True,
                    )
                del data
            yield results


def _time(
    impl: str, case: Case, data: list[tuple[Any, ...]], repeats: int, min_seconds: float
) -> dict[str, Any]:
    calls = len(data) * math.ceil(MIN_CALLS / len(data))
    floor = floor_us(impl, case)
    flops_us = 2 * case.m * case.k * case.n / FLOPS_PER_SECOND * 1e6
    # At least two, or XLA would remove the loop; more for short calls, to hide the start of it.
    iterations = min(32, max(2, math.ceil(1000 / (calls * max(floor, flops_us, 3)))))
    x = make_x(jax.random.key(1), case)
    program = jax.jit(chained_loop(IMPLS[impl].op, calls, iterations))
    compiled = program.lower(x, data).compile()
    seconds = time_program(lambda: compiled(x, data), repeats=repeats, min_seconds=min_seconds)
    return {
        "op": "awq_gemm",
        "impl": impl,
        "M": case.m,
        "N": case.n,
        "K": case.k,
        "group_size": case.group_size,
        "dtype": case.dtype,
        "us": round(seconds / (calls * iterations) * 1e6, 3),
        "floor_us": round(floor, 3),
    }


def _kernel(impl: str, case: Case, data: list[tuple[Any, ...]]) -> str:
    if impl != "jax_awq":
        return ""
    x = jax.ShapeDtypeStruct((case.m, case.k), case.dtype)
    plan = jax_awq.plan("awq_gemm", x, *data[0])
    return f" ({plan.kernel or plan.route}, split_k {plan.split_k})"
