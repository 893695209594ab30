"""`awq_gemm_w4a8` and `awq_gemm_w4a4` on a GPU, by each of their routes, and `verify` there."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.variants import BF16, F16, F32, assert_same_bits, poison

from jax_awq import awq_gemm, awq_gemm_w4a4, awq_gemm_w4a8, plan
from jax_awq.testing_w4a8 import CODES, assert_solves, random_w4a8_problem

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
# Rows from 1 to beyond a tile; K that no step divides where one group allows it.
CASES = (
    # M, K, N, group_size, options
    (1, 128, 128, 128, {}),
    (1, 4096, 1024, 128, {"bias": True}),
    (3, 96, 8, 32, {"symmetric": True, "layout": "oc_major"}),
    (17, 256, 264, 64, {"dtype": BF16, "activation": "silu"}),
    (129, 512, 136, 128, {"layout": "gemv", "bias": True, "out_dtype": F32}),
    (260, 1152, 1040, 128, {"dtype": F32, "scales_dtype": F16}),
    (1, 4096, 1024, -1, {}),
    (5, 100, 24, -1, {"bias": True, "activation": "gelu"}),
    (33, 1000, 272, -1, {"dtype": BF16, "layout": "oc_major"}),
    (64, 515, 400, -1, {"symmetric": True, "out_dtype": F32}),
    (300, 2048, 1040, -1, {"dtype": F32, "scales_dtype": BF16, "activation": "relu"}),
)
GRANULARITIES = (("token", False), ("tensor", False), ("tensor", True))


def op_of(codes):
    return "awq_gemm_w4a4" if codes == "int4" else "awq_gemm_w4a8"


def check(problem, x, kernels):
    """Right, twice the same bits, and by these custom calls."""
    options = {} if problem.codes == "int4" else {"activation_dtype": problem.codes}
    found = plan(op_of(problem.codes), x, problem.base.weight, **options)
    route = {(): "reference", ("quantize_activation",): "group_products"}
    assert found.route == route.get(kernels, "int8_matmul")
    fn = jax.jit(
        lambda x, weight: dataclasses.replace(
            problem, base=dataclasses.replace(problem.base, weight=weight)
        ).run(x)
    )
    operands = jax.device_put((x, problem.base.weight))
    text = fn.lower(*operands).as_text()
    assert tuple(re.findall(r"@jax_awq\.(\w+)\(", text)) == kernels
    wanted = problem.reference()
    runs = []
    for _ in range(2):
        poison(wanted)
        runs.append(np.asarray(fn(*operands)))
    assert_same_bits(*runs)
    assert_solves(runs[0], problem)


@pytest.mark.parametrize(("granularity", "static"), GRANULARITIES)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("m", "k", "n", "group_size", "options"), CASES)
def test_every_route(rng, m, k, n, group_size, options, codes, granularity, static):
    p = random_w4a8_problem(
        rng,
        m,
        k,
        n,
        codes=codes,
        granularity=granularity,
        static=static,
        group_size=group_size,
        **options,
    )
    multiplied = ("int8_matmul",) * (group_size in (-1, k))
    kernels = () if codes == "float8_e4m3fn" else ("quantize_activation", *multiplied)
    check(p, p.base.x, kernels)
    if codes != "float8_e4m3fn":
        check(p, p.quantized(), multiplied)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("codes", CODES)
def test_experts_and_free_dimensions(rng, codes, group_size):
    p = random_w4a8_problem(
        rng, (2, 5), 256, 136, codes=codes, group_size=group_size, batch=(3,), bias=True
    )
    assert_solves(jax.jit(p.run)(jax.device_put(p.base.x)), p)


@pytest.mark.parametrize("mapped", ["x", "weight", "both"])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("op", [awq_gemm_w4a8, awq_gemm_w4a4], ids=["w4a8", "w4a4"])
def test_vmap(rng, op, group_size, mapped):
    p = random_w4a8_problem(rng, 7, 256, 136, group_size=group_size, batch=(3,))
    x, weight = jax.device_put((p.base.x, p.base.weight))
    axes = (0 if mapped != "weight" else None, 0 if mapped != "x" else None)
    x = x if axes[0] == 0 else x[0]
    weight = weight if axes[1] == 0 else jax.tree.map(lambda a: a[0], weight)
    y = jax.jit(jax.vmap(op, axes))(x, weight)
    for i in range(3):
        one = op(
            x if axes[0] is None else x[i],
            weight if axes[1] is None else jax.tree.map(lambda a, i=i: a[i], weight),
        )
        np.testing.assert_allclose(
            y[i].astype(F32), one.astype(F32), rtol=2e-3, atol=2e-3 * float(jnp.abs(one).max())
        )


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("codes", CODES)
def test_gradient_in_x_is_that_of_awq_gemm_bit_for_bit(rng, codes, group_size):
    p = random_w4a8_problem(rng, 40, 512, 256, codes=codes, group_size=group_size)
    x, weight = jax.device_put((p.base.x, p.base.weight))
    ct = jnp.asarray(rng.standard_normal((40, 256)), F16)
    straight, want = (
        jax.jit(lambda x, ct, f=f: jax.vjp(f, x)[1](ct)[0])(x, ct)
        for f in (p.run, lambda x: awq_gemm(x, weight))
    )
    assert_same_bits(np.asarray(straight), np.asarray(want))


def test_rows_that_are_zero_nan_or_infinite(rng):
    for group_size in (32, -1):
        p = random_w4a8_problem(rng, 5, 256, 136, group_size=group_size, bias=True)
        x = p.base.x.copy()
        x[0], x[1, 9], x[2, 200] = 0, np.nan, -np.inf
        for codes in CODES:
            one = dataclasses.replace(p, codes=codes)
            y = np.asarray(one.run(jax.device_put(x)))
            assert_same_bits(y[0], p.base.bias)
            assert np.isnan(y[1:3]).all()
            assert np.isfinite(y[3:]).all()


def test_verify(tmp_path):
    """Within its bounds, and what a CPU found."""
    testing = pytest.importorskip("typer.testing")
    from jax_awq.cli import app

    folder, file = ROOT / "tests/golden/llama-awq-gemm-g128", tmp_path / "verify.json"
    arguments = ["verify", "--awq-model-path", str(folder), "--json", str(file)]
    found = testing.CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    gpu = json.loads(file.read_text())
    assert gpu["platform"] == "gpu"
    cpu = json.loads((ROOT / "benchmarks/results/cpu/verify.json").read_text())
    assert gpu["perplexity"] == pytest.approx(cpu["perplexity"], rel=1e-3)
    for here, there in zip(gpu["summary"], cpu["summary"], strict=True):
        assert here["scheme"] == there["scheme"]
        # A value that lies between two codes may fall to either side.
        assert here["perplexity"] == pytest.approx(there["perplexity"], rel=0.01)
        assert here["mean_error"] == pytest.approx(there["mean_error"], rel=0.1)
