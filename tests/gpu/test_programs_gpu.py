"""Programs around the ops on a GPU: command buffers, scan, large results, the examples."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.thunks import as_executed, calls_in_command_buffers
from gpu.variants import (
    BF16,
    F16,
    VARIANTS,
    Case,
    all_as_first,
    assert_same_bits,
    problem_of,
    refusals,
)

from jax_awq import AWQWeight, awq_gemm
from jax_awq.testing import assert_close, random_problem, random_weight

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
COMMAND_BUFFERS = """
import jax, ml_dtypes, numpy as np
from jax_awq import awq_gemm
from jax_awq.testing import random_problem

rng = np.random.default_rng(0)
for m, dtype in ((1, np.float16), (12, ml_dtypes.bfloat16), (100, np.float16)):
    p = random_problem(rng, m, 512, 512, group_size=128, dtype=dtype, bias=True)
    p = jax.device_put((p.x / 100, p.weight, p.bias))
    def step(x, weight, bias):
        for split in (None, 4, 12):
            x = awq_gemm(x, weight, bias=bias, split_k_iters=split)
        return x
    x, weight, bias = p
    eager = x
    for _ in range(2):
        eager = step(eager, weight, bias)
    loop = jax.jit(lambda x, w, b: jax.lax.fori_loop(0, 2, lambda _, x: step(x, w, b), x))
    for _ in range(3):  # the first runs record, later ones replay
        got = np.asarray(loop(*p))
        assert np.isfinite(got).all()
        assert got.tobytes() == np.asarray(eager).tobytes()
print("same bits")
"""


def python(*command, **env):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | env,
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMMAND_BUFFER_CALLS = 9  # at least: those in the bodies of the three loops
COMMAND_BUFFER_FLAGS = {
    "always": "--xla_gpu_graph_min_graph_size=1",
    "never": "--xla_gpu_graph_min_graph_size=1000000 --xla_gpu_enable_command_buffer=",
}


@pytest.mark.parametrize("when", ["always", "never"])
def test_command_buffers(when, tmp_path):
    """The same bits, from calls all of which, or none, lie in command buffers."""
    flags = f"--xla_dump_to={tmp_path} {COMMAND_BUFFER_FLAGS[when]}"
    told = python("-c", COMMAND_BUFFERS, XLA_FLAGS=flags, JAX_ENABLE_COMPILATION_CACHE="0")
    assert "same bits" in told
    inside = [
        call
        for file in tmp_path.glob("*.thunk_sequence.txt")
        for call in calls_in_command_buffers(as_executed(file).read_text())
    ]
    assert len(inside) >= COMMAND_BUFFER_CALLS, sorted(file.name for file in tmp_path.iterdir())
    assert set(inside) == {when == "always"}


@pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])
def test_scan_over_stacked_weights(rng, layout):
    weights = jax.device_put(
        random_weight(rng, 256, 256, group_size=64, layout=layout, dtype=BF16, batch=(3,))
    )
    x = jnp.asarray(rng.standard_normal((5, 256)), BF16)
    step = functools.partial(awq_gemm, activation="silu")
    scanned, _ = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (step(x, w), None), x, w))(
        x, weights
    )
    for layer in range(3):
        x = step(x, jax.tree.map(lambda a, i=layer: a[i], weights))
    assert np.isfinite(np.asarray(x, np.float32)).all()
    assert_same_bits(scanned, x)


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if not v.startswith(("decode", "dequantize"))],
)
@pytest.mark.xdist_group("many_results")
def test_more_than_2_to_the_31_results(variant, force):
    """The same 1000 rows again and again, so that all results can be compared where they are."""
    p = problem_of(Case(1000, 64, 32768, 64))
    copies = 70
    x = jnp.tile(p.x, (copies, 1))
    assert len(x) * p.weight.shape[1] > 2**31
    refused = refusals(awq_gemm, x, p.weight)
    if variant in refused:
        pytest.skip(f"{variant} {refused[variant]}")
    force(variant)
    y = awq_gemm(x, p.weight).reshape(copies, 1000, -1)
    rows = np.array([0, 1, 499, 998, 999])
    few = type(p)(x=p.x[rows], weight=p.weight, bias=None, activation=None, out_dtype=None)
    assert_close(np.asarray(y[0, rows]), few.float64(), few.reference())
    assert all_as_first(y)


@pytest.mark.xdist_group("much_memory")
def test_large_operand(rng):
    """More than 2^31 values of x: the same long rows, behind each other."""
    p = random_problem(rng, 16, 8192, 64, group_size=128)
    copies = 2**31 // (16 * 8192) + 1
    x = jnp.tile(p.x, (copies, 1))
    assert x.size > 2**31
    y = awq_gemm(x, p.weight, split_k_iters=1).reshape(copies, 16, -1)
    assert_close(np.asarray(y[0]), p.float64(), p.reference())
    assert all_as_first(y)


@pytest.mark.parametrize(
    ("example", "package", "shown"),
    [
        ("01_awq_gemm.py", "jax", "route='fused'"),
        ("02_llama_mlp.py", "jax", "device: gpu"),
        ("03_flax_nnx.py", "flax", "gradient of x"),
        ("04_equinox.py", "equinox", "gradient of down.scales"),
    ],
)
def test_example(example, package, shown):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert shown in python(ROOT / "examples" / example)


def test_several_streams_of_one_weight(rng):
    """Independent products of one program may run at the same time, each in its own workspace."""
    p = random_problem(rng, 7, 1024, 136, group_size=128)
    xs = jax.device_put([p.x * np.float16(2.0**i) for i in range(6)])
    weight: AWQWeight = jax.device_put(p.weight)
    many = jax.jit(lambda xs, w: [awq_gemm(x, w, split_k_iters=12) for x in xs])
    first = np.asarray(awq_gemm(xs[0], weight, split_k_iters=12))
    for i, y in enumerate(many(xs, weight)):
        # A power of two changes no rounding, but for subnormal results.
        np.testing.assert_allclose(np.asarray(y), first * np.float16(2.0**i), atol=1e-5)


def test_result_in_float16_of_a_bfloat16_product():
    p = problem_of(Case(9, 256, 144, 64, BF16, out=F16))
    y = jax.jit(p.run)()
    assert y.dtype == F16
    assert_close(np.asarray(y), p.float64(), p.reference())
