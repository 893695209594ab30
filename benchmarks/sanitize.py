"""Each kernel variant once or twice on small problems, with its results checked.

Made to run under compute-sanitizer: benchmarks/gpu.sh does, in parts side by side.

    python benchmarks/sanitize.py [--part 0/4] [--counts FILE]
    python benchmarks/sanitize.py --check FILE...

With --check it adds up what parts have counted, and fails if a variant of awq_gemm never ran, or
one that has a gradient of x not on a batch of weights.
"""

import argparse
import collections
import functools
import json
import os

# Every array an allocation of its own: inside one arena, nothing is out of bounds.
os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_awq
from jax_awq.testing import (
    assert_close,
    dequantize_float64,
    quantize_activation_numpy,
    random_problem,
    random_weight,
)
from jax_awq.testing_integers import random_int_problem
from jax_awq.testing_w4a8 import CODES, assert_solves, random_w4a8_problem

# M, K, N, group_size, dtype, layout, split_k_iters: 3 can be a cluster, 9 never is one. Where there
# is a split, there is an activation, too.
PRODUCTS = (
    (5, 320, 144, 32, jnp.float16, "gemm", 3),
    (7, 640, 272, 64, jnp.bfloat16, "gemm", 9),
    (35, 320, 72, 32, jnp.bfloat16, "oc_major", 3),
    (20, 136, 640, -1, jnp.float16, "oc_major", 9),
    (20, 96, 136, 32, jnp.float16, "gemm", 1),
    (5, 100, 72, -1, jnp.bfloat16, "gemm", 1),
    (20, 320, 288, 64, jnp.float16, "gemm", 3),
    (9, 640, 288, 32, jnp.bfloat16, "gemm", 1),
    # Few tokens, whose kernel takes 128 indices of K at a time.
    (1, 640, 544, 128, jnp.float16, "gemm", 1),
    (5, 640, 288, 32, jnp.bfloat16, "gemm", 3),
    (8, 1152, 96, 64, jnp.float16, "gemm", 9),
    (16, 1184, 320, -1, jnp.float16, "gemm", 3),
    (23, 1152, 352, 64, jnp.bfloat16, "gemm", 3),
    # No split is asked for: a few tiles for all processors, and more tiles than there are, of which
    # two share x.
    (140, 320, 288, 64, jnp.float16, "gemm", None),
    (130, 64, 17312, 64, jnp.bfloat16, "gemm", None),
)

# The same, for the gradient of x with so many weights in front of each other. Clusters and sums in
# the workspace in every kernel, tiles in part, and rows of words that TMA does not take.
BATCH = 3
BATCHED_GRADIENTS = (
    (5, 320, 288, 64, jnp.float16, "gemm", 3),
    (35, 96, 1184, 32, jnp.bfloat16, "gemm", 9),
    (20, 136, 72, -1, jnp.float16, "oc_major", 3),
    (140, 200, 160, -1, jnp.bfloat16, "gemm", None),
)
OF_GRADIENTS = ("transposed_", "wgmma_", "mma_", "simt")  # how their names start
GRADIENT_COUNTS = f"gradient of awq_gemm, {BATCH} weights"

# M, K, N: every tile of int8_matmul whole and in part, K that no step divides, sums over splits.
INTEGER_PRODUCTS = ((3, 17, 7), (70, 1024, 144), (300, 515, 272), (130, 2048, 256))

# M, K, N, group_size, x: tiles of awq_gemm_w4a8 whole and in part, a chunk of 128 in part, rows of
# a warp and of a block, clusters and more tiles than processors.
W4A8_PRODUCTS = (
    (3, 100, 72, -1, jnp.float16),
    (7, 1024, 288, 128, jnp.float32),
    (33, 336, 160, -1, jnp.bfloat16),
    (140, 640, 288, 128, jnp.float16),
    (130, 128, 17440, 128, jnp.float16),
    (1030, 256, 160, 128, jnp.float32),
)
W4A8_ALSO = ("few_8x256", "mma_32", "simt", "")  # besides the kernels of codes of one byte


def fused_variants(rng) -> list[str]:
    """Those that this device and this build have: `plan` names only what cannot run."""
    problem = random_problem(rng, 1, 64, 64, group_size=32)
    here = jax_awq.plan("awq_gemm", problem.x, problem.weight).refused
    float32 = jax_awq.plan("awq_gemm", problem.x.astype(np.float32), problem.weight).refused
    others = ("dequantize_dot", "w4a8_")  # of other products
    return [
        v for v in float32 if not v.startswith(others) and not here.get(v, "").startswith("needs")
    ]


def main() -> int:
    args = _parser().parse_args()
    if args.check:
        return check(args.check)
    part, parts = map(int, args.part.split("/"))
    counts = {
        "awq_gemm": products(PRODUCTS[part::parts]),
        GRADIENT_COUNTS: batched_gradients(BATCHED_GRADIENTS[part::parts]),
        "awq_gemm_w4a8": w4a8_products(W4A8_PRODUCTS[part::parts]),
        "int8_matmul, int4_matmul": integer_products(INTEGER_PRODUCTS[part::parts]),
    }
    if part == 0:
        counts["conversions"] = conversions()
    for op, ran in counts.items():
        print(f"{op} by variant:", ", ".join(f"{v or 'any'} {n}" for v, n in ran.items()))
    if args.counts:
        args.counts.write_text(json.dumps(counts), encoding="utf-8")
    return check_counts([counts]) if parts == 1 else 0


def check(files: list[pathlib.Path]) -> int:
    return check_counts([json.loads(file.read_text(encoding="utf-8")) for file in files])


def check_counts(parts: list[dict[str, dict[str, int]]]) -> int:
    """1 if a variant that is counted never ran, in all parts together, or else 0."""
    status = 0
    for what in ("awq_gemm", GRADIENT_COUNTS):
        total: collections.Counter[str] = collections.Counter()
        for counts in parts:
            total.update(counts[what])
        missing = [variant for variant, count in total.items() if count == 0]
        print(f"{what}, {len(total)} variants; never ran: {', '.join(missing) or 'none'}")
        if missing or not total:
            status = 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="0/1", help="which of how many (default: %(default)s)")
    parser.add_argument(
        "--counts", type=pathlib.Path, help="where to write the runs of each variant"
    )
    parser.add_argument("--check", type=pathlib.Path, nargs="+", help="such files, of all parts")
    return parser


def product_problem(rng, m, k, n, group_size, dtype, layout, split, batch=()):
    return random_problem(
        rng,
        m,
        k,
        n,
        group_size=group_size,
        dtype=dtype,
        layout=layout,
        bias=True,
        activation="silu" if split else None,
        batch=batch,
    )


def products(problems) -> dict[str, int]:
    """How often each variant of awq_gemm ran, forward or for the gradient."""
    rng = np.random.default_rng(0)
    ran = dict.fromkeys(fused_variants(rng), 0)
    for m, k, n, group_size, dtype, layout, split in problems:
        problem = product_problem(rng, m, k, n, group_size, dtype, layout, split)
        product = functools.partial(problem.run, split_k_iters=split)
        run_variants(ran, (product, problem.float64()), gradient(rng, problem, split))
    return ran


def batched_gradients(problems) -> dict[str, int]:
    """How often each variant that has a gradient ran on a batch of weights."""
    rng = np.random.default_rng(0)
    ran = dict.fromkeys((v for v in fused_variants(rng) if v.startswith(OF_GRADIENTS)), 0)
    for row in problems:
        run_variants(ran, gradient(rng, product_problem(rng, *row, batch=(BATCH,)), row[-1]))
    return ran


def gradient(rng, problem, split) -> tuple[Any, np.ndarray]:
    """The transposed product of a random cotangent, and what it is in float64."""
    weight = problem.weight
    ct = rng.standard_normal((*problem.x.shape[:-1], weight.shape[-1])).astype(problem.x.dtype)

    def run():
        def product(x):
            return jax_awq.awq_gemm(x, weight, split_k_iters=split)

        return jax.linear_transpose(product, problem.x)(ct)[0]

    return run, ct.astype(np.float64) @ dequantize_float64(weight).swapaxes(-1, -2)


def run_variants(ran: dict[str, int], *calls: tuple[Any, np.ndarray]) -> None:
    """Each call by each variant of `ran`, which counts those that can run."""
    with jax.default_device(jax.devices("cpu")[0]):
        references = [np.asarray(run()) for run, _ in calls]
    for variant in ran:
        os.environ["JAX_AWQ_FORCE"] = variant
        for (run, exact), reference in zip(calls, references, strict=True):
            try:
                result = run()
            except ValueError as error:
                if "cannot run" not in str(error):
                    raise
                continue
            assert_close(np.asarray(result), exact, reference)
            ran[variant] += 1
    os.environ["JAX_AWQ_FORCE"] = ""


def conversions() -> dict[str, int]:
    """How often each op that multiplies nothing ran, its results bit for bit as they should be."""
    rng = np.random.default_rng(0)
    ran = dict.fromkeys(("awq_dequantize", "quantize_activation", "dequantize_activation"), 0)
    for k, n, group_size, layout in (
        (96, 136, 32, "gemm"),
        (100, 72, -1, "gemm"),
        (72, 72, -1, "oc_major"),
        (256, 136, 64, "oc_major"),
    ):
        weight = random_weight(rng, k, n, group_size=group_size, layout=layout)
        for dtype in (jnp.float16, jnp.float32):
            np.testing.assert_array_equal(
                np.asarray(jax_awq.awq_dequantize(weight, dtype=dtype)),
                dequantize_float64(weight).astype(dtype),
            )
            ran["awq_dequantize"] += 1
    for m, k, group_size in ((3, 31, None), (5, 320, 64), (3, 2056, -1), (2, 70000, None)):
        x = jnp.asarray(rng.standard_normal((m, k)), jnp.float16)
        for bits in (8, 4):
            for granularity, scale in (("token", None), ("tensor", 0.02)):
                qa = jax_awq.quantize_activation(
                    x, bits=bits, granularity=granularity, scale=scale, group_size=group_size
                )
                codes, wide = quantize_activation_numpy(x, bits=bits, scale=scale)
                np.testing.assert_array_equal(
                    np.asarray(jax_awq.dequantize_activation(qa)), codes.astype(np.float32) * wide
                )
                if group_size:
                    np.testing.assert_array_equal(
                        qa.group_sums.sum(1), codes.sum(1, dtype=np.int32)
                    )
                ran["quantize_activation"] += 1
                ran["dequantize_activation"] += 1
    return ran


def w4a8_problem(rng, m, k, n, group_size, dtype, codes):
    return random_w4a8_problem(
        rng,
        m,
        k,
        n,
        codes=codes,
        group_size=group_size,
        dtype=dtype,
        scales_dtype=jnp.float16,
        bias=True,
    )


def w4a8_products(problems) -> dict[str, int]:
    """How often each variant of awq_gemm_w4a8 ran; "" is the one that is chosen."""
    rng = np.random.default_rng(0)
    ran: dict[str, int] = {}
    problem = random_problem(rng, 1, 64, 64, group_size=32)
    named = jax_awq.plan("awq_gemm", problem.x, problem.weight).refused
    variants = (*(v for v in named if v.startswith("w4a8_")), *W4A8_ALSO)
    for row in problems:
        for codes in CODES:
            problem = w4a8_problem(rng, *row, codes)
            inputs = [problem.base.x]
            if codes != "float8_e4m3fn":
                inputs.append(problem.quantized())
            for variant in variants:
                os.environ["JAX_AWQ_FORCE"] = variant
                for x in inputs:
                    try:
                        y = np.asarray(problem.run(x))
                    except ValueError as error:
                        if "cannot run" not in str(error):
                            raise
                        continue
                    chosen = variant or w4a8_kernel(problem, x)
                    assert_solves(y, problem, chosen)
                    ran[variant] = ran.get(variant, 0) + 1
            os.environ["JAX_AWQ_FORCE"] = ""
    return ran


def w4a8_kernel(problem, x) -> str:
    options = {"out_dtype": str(problem.base.out_dtype or problem.base.x.dtype)}
    if problem.codes == "int4":
        return jax_awq.plan("awq_gemm_w4a4", x, problem.base.weight, **options).kernel
    if x is problem.base.x:
        options["activation_dtype"] = problem.codes
    return jax_awq.plan("awq_gemm_w4a8", x, problem.base.weight, **options).kernel


def integer_products(problems) -> dict[str, int]:
    """How often each variant of int8_matmul and int4_matmul ran."""
    rng = np.random.default_rng(0)
    ran: dict[str, int] = {}
    for m, k, n in problems:
        for bits in (8, 4):
            raw = random_int_problem(rng, m, k, n, bits=bits)
            scaled = random_int_problem(
                rng, m, k, n, bits=bits, out_dtype=np.float32, bias=np.float32, activation="silu"
            )
            for variant in ("tma_64", "tma_128", "tma_256", "mma", "dp4a"):
                os.environ["JAX_AWQ_FORCE"] = variant
                try:
                    sums, y = np.asarray(raw.run()), np.asarray(scaled.run())
                except ValueError as error:
                    if "cannot run" not in str(error):
                        raise
                    continue
                np.testing.assert_array_equal(sums, raw.sums())
                assert_close(y, scaled.float64(), np.asarray(scaled.reference()))
                ran[variant] = ran.get(variant, 0) + 1
            os.environ["JAX_AWQ_FORCE"] = ""
    return ran


if __name__ == "__main__":
    sys.exit(main())
