"""`awq_gemm_w4a8` and `awq_gemm_w4a4` on a GPU, by each route and variant, and `verify` there."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.variants import (
    ALLOCATED,
    BF16,
    F16,
    F32,
    MOST_ROWS,
    OF_CODES,
    VARIANTS,
    assert_same_bits,
    run_twice,
)

from jax_awq import AWQWeight, _ffi, awq_gemm, awq_gemm_w4a4, awq_gemm_w4a8, plan
from jax_awq.testing_w4a8 import CODES, assert_solves, random_w4a8_problem

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
FUSED = tuple(v for v in VARIANTS if v != "dequantize_dot")
every_codes = pytest.mark.parametrize("codes", CODES)

# For the kernels of codes of one byte. Rows on both sides of every tile; columns that end within a
# tile; K that ends within a chunk of 128 where one group allows it.
OF_BYTES = (
    # M, K, N, group_size, options
    (1, 128, 32, 128, {}),
    (17, 112, 64, -1, {}),
    (31, 256, 160, 128, {}),
    (33, 1024, 288, 128, {"symmetric": True, "bias": True}),
    (64, 4192, 160, -1, {"bias": True, "activation": "silu"}),
    (65, 384, 96, 128, {"dtype": BF16, "activation": "gelu"}),
    (127, 640, 544, 128, {"dtype": F32, "scales_dtype": F16}),
    (129, 4192, 416, -1, {"out_dtype": F32, "symmetric": True}),
    (200, 1152, 1056, 128, {"dtype": BF16, "scales_dtype": F16, "bias": True}),
    (260, 2048, 672, 128, {"out_dtype": F32, "activation": "relu"}),
    (300, 4096, 160, -1, {"dtype": F32, "scales_dtype": BF16, "activation": "gelu_tanh"}),
    (700, 512, 4224, 128, {}),  # more tiles than processors
)
# For those of codes as floats, too: other layouts, group sizes and an odd K.
OF_FLOATS = (
    *OF_BYTES[1:4],
    (1, 4096, 1024, 128, {"bias": True}),
    (3, 96, 8, 32, {"symmetric": True, "layout": "oc_major"}),
    (5, 100, 24, -1, {"bias": True, "activation": "gelu"}),
    (8, 320, 160, 64, {"dtype": BF16, "scales_dtype": F16}),
    (16, 2048, 272, 32, {"out_dtype": F32}),
    (17, 256, 264, 64, {"dtype": F16, "activation": "silu"}),
    (129, 512, 136, 128, {"layout": "gemv", "bias": True, "out_dtype": F32}),
    (64, 515, 400, -1, {"symmetric": True, "out_dtype": F32}),
    (260, 1152, 1056, 32, {"dtype": F32, "scales_dtype": F16}),
    (8, 1024, 288, 128, {"dtype": BF16, "bias": True}),
    (40, 512, 160, 64, {"dtype": BF16}),
)
GRANULARITIES = (("token", False), ("tensor", False), ("tensor", True))


def problem_of(case, codes, batch=(), granularity="token", static=False):
    m, k, n, group_size, options = case
    return random_w4a8_problem(
        np.random.default_rng(m + k + n),
        m,
        k,
        n,
        codes=codes,
        group_size=group_size,
        batch=batch,
        granularity=granularity,
        static=static,
        **options,
    )


def cases(of):
    return pytest.mark.parametrize("case", of, ids=lambda c: f"{c[0]}x{c[1]}x{c[2]},g{c[3]}")


def planned(problem, x) -> Any:
    options = {
        "out_dtype": str(problem.base.out_dtype or problem.base.x.dtype),
        "activation": problem.base.activation,
    }
    if problem.codes == "int4":
        return plan("awq_gemm_w4a4", x, problem.base.weight, **options)
    options |= {"activation_dtype": problem.codes} if x is problem.base.x else {}
    return plan("awq_gemm_w4a8", x, problem.base.weight, **options)


def check(problem, x, found, judge=assert_solves, guarded=False):
    """By the custom calls of the plan `found`: right, and twice the same bits."""
    if found.route == "reference" and problem.codes == "float8_e4m3fn":
        # On a GPU XLA divides approximately: only of a power of two is the inverse the oracle's.
        problem = dataclasses.replace(problem, granularity="tensor", scale=np.float32(2**-6))

    def fn(x, weight):
        base = dataclasses.replace(problem.base, weight=weight)
        return dataclasses.replace(problem, base=base).run(x)

    operands = x, problem.base.weight
    # A function object of its own: JAX would find the program of another variant again.
    lowered = jax.jit(lambda *a: fn(*a)).lower(*operands)
    calls = {"fused": ["awq_gemm_w4a8"], "group_products": ["quantize_activation"]}
    wanted = calls.get(found.route, []) if x is problem.base.x or found.route == "fused" else []
    assert re.findall(r"@jax_awq\.(\w+)\(", lowered.as_text()) == wanted
    like = np.zeros(lowered.out_info.shape, lowered.out_info.dtype)
    workspace = np.zeros(found.workspace_bytes // 4, F32)
    (y,) = run_twice(lowered.compile(), operands, like, also=[workspace], guarded=guarded)
    judge(y, problem, found.kernel)


def check_forced(force, variant, problem, x, judge=assert_solves, guarded=False) -> bool:
    """`check` of a variant; False where it cannot run, which the error says."""
    force(variant)
    try:
        found = planned(problem, x)
    except ValueError as error:
        if f"variant {variant} cannot run: " not in str(error):
            raise
        return False
    assert (found.route, found.kernel) == ("fused", variant)
    check(problem, x, found, judge, guarded)
    return True


def can_run_codes() -> bool:
    """Whether device and build have the kernels of codes of one byte."""
    x = jax.ShapeDtypeStruct((64, 256), F16)
    weight = AWQWeight(
        jax.ShapeDtypeStruct((256, 16), jnp.int32),
        jax.ShapeDtypeStruct((1, 128), F16),
        group_size=-1,
    )
    return plan("awq_gemm_w4a8", x, weight).kernel in OF_CODES


@pytest.mark.parametrize("variant", OF_CODES)
@every_codes
@cases(OF_BYTES)
def test_kernels_of_bytes(force, case, codes, variant):
    p = problem_of(case, codes)
    check_forced(force, variant, p, p.base.x)
    if codes != "float8_e4m3fn":
        check_forced(force, variant, p, p.quantized())


@pytest.mark.parametrize("variant", [*FUSED, *OF_CODES])
def test_nothing_is_written_beside_the_result(force, variant):
    """Tiles in part, and a result that ends where the allocator's memory does."""
    m = MOST_ROWS.get(variant, 300)
    p = problem_of((m, 512, 160, -1, {"out_dtype": F32}), "int8")
    assert m * 160 * 4 % ALLOCATED == 0
    may_refuse = variant not in OF_CODES or not can_run_codes()  # asked before one is forced
    ran = check_forced(force, variant, p, p.base.x, guarded=True)
    assert ran or may_refuse


def test_every_kernel_of_bytes_runs_enough():
    """A kernel that refuses everything would pass every other test."""
    refused = []
    for case in OF_BYTES:
        p = problem_of(case, "int8")
        refused.append(planned(p, p.base.x).refused)
        # awq_gemm, whose x is none of codes, refuses each of them.
        named = plan("awq_gemm", p.base.x, p.base.weight).refused
        assert {v for v in named if v.startswith("w4a8_")} == set(OF_CODES)
    for variant in OF_CODES:
        assert sum(variant not in r for r in refused) >= 4 or not can_run_codes()


@pytest.mark.parametrize("variant", FUSED)
@pytest.mark.parametrize("codes", ["int8", "float8_e4m3fn"])
@cases(OF_FLOATS)
def test_kernels_of_codes_as_floats(force, case, codes, variant):
    p = problem_of(case, codes)
    check_forced(force, variant, p, p.base.x)
    if codes != "float8_e4m3fn" and variant in ("simt", "few_8x256"):
        check_forced(force, variant, p, p.quantized())


@pytest.mark.parametrize("variant", ["w4a8_32x256", "w4a8_128x128", "few_16x256", "simt"])
@pytest.mark.parametrize(("granularity", "static"), GRANULARITIES)
@every_codes
@pytest.mark.parametrize("batch", [(), (3,)])
def test_scales_that_are_given(force, codes, granularity, static, batch, variant):
    case = (33, 256, 160, 128, {"bias": True})
    p = problem_of(case, codes, batch, granularity, static)
    check_forced(force, variant, p, p.base.x)
    if codes != "float8_e4m3fn":
        check_forced(force, variant, p, p.quantized())


def assert_exact(y, problem, kernel):
    """The integer, times the scale of the row, rounded once."""
    q, sx = problem.rounded()
    unit = dataclasses.replace(problem, granularity="tensor", scale=np.float32(1))
    unit = dataclasses.replace(unit, base=dataclasses.replace(problem.base, x=q.astype(F32)))
    sums = unit.float64()
    assert np.abs(sums).max() < 2**24
    np.testing.assert_array_equal(sums, np.rint(sums))
    np.testing.assert_array_equal(y, sums.astype(F32) * sx)


@pytest.mark.parametrize("variant", [*FUSED, *OF_CODES])
@pytest.mark.parametrize("codes", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("m", "k", "group_size"), [(7, 4096, 128), (40, 2144, -1), (130, 384, 128)]
)
def test_integers_are_exact(force, m, k, group_size, symmetric, codes, variant):
    """With weights that are integers every step is: codes, sums and zero points bit for bit."""
    rng = np.random.default_rng(m)
    p = random_w4a8_problem(
        rng, m, k, 160, codes=codes, group_size=group_size, symmetric=symmetric, out_dtype=F32
    )
    weight = dataclasses.replace(p.base.weight, scales=np.ones_like(p.base.weight.scales))
    for dtype in (F16, BF16, F32):
        x = p.base.x.astype(dtype)
        base = dataclasses.replace(p.base, x=x, weight=weight)
        one = dataclasses.replace(p, base=base)
        check_forced(force, variant, one, x, assert_exact)


@pytest.mark.parametrize(("granularity", "static"), GRANULARITIES)
@every_codes
@cases(OF_FLOATS + OF_BYTES[4:])
def test_what_is_chosen(case, codes, granularity, static):
    p = problem_of(case, codes, (), granularity, static)
    check(p, p.base.x, planned(p, p.base.x))
    if codes != "float8_e4m3fn":
        check(p, p.quantized(), planned(p, p.quantized()))


@pytest.mark.parametrize(
    ("m", "group_size", "options", "route"),
    [
        (300, 32, {"out_dtype": F32, "layout": "oc_major"}, "group_products"),
        (300, 64, {"out_dtype": F16}, "fused"),
        (64, 128, {"scales_dtype": F32}, "group_products"),
        (64, 16, {}, "group_products"),
    ],
)
@every_codes
def test_every_route(rng, m, group_size, options, route, codes):
    p = random_w4a8_problem(rng, m, 256, 160, codes=codes, group_size=group_size, **options)
    found = planned(p, p.base.x)
    if route == "group_products" and codes == "float8_e4m3fn":
        route = "reference"
    assert found.route == route or not can_run_codes()
    check(p, p.base.x, found)


def test_rows_of_every_length(rng):
    """What a thread, a warp and a block hold of a row, and more; from 1024 rows on as well."""
    for m, k in ((3, 16), (2, 65536 + 48), (1030, 272), (1030, 2064), (1030, 11008), (2, 70001)):
        for codes in CODES:
            # As floats of 16 bits, codes of a row this long have sums that float32 rounds.
            out_dtype = F16 if k >= 8800 and m <= 16 else None
            for dtype in (F16, F32):
                p = random_w4a8_problem(
                    rng,
                    m,
                    k,
                    32,
                    codes=codes,
                    group_size=-1,
                    dtype=dtype,
                    scales_dtype=F16,
                    out_dtype=out_dtype,
                )
                check(p, p.base.x, planned(p, p.base.x))


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("codes", CODES)
def test_experts_and_free_dimensions(rng, codes, group_size):
    p = random_w4a8_problem(
        rng, (2, 5), 256, 136, codes=codes, group_size=group_size, batch=(3,), bias=True
    )
    y = jax.jit(p.run)(jax.device_put(p.base.x))
    assert_solves(y, p, planned(p, p.base.x).kernel)


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


# --- the handler called without the Python layer

M, K, N = 4, 256, 128
CALL = {
    "x": ((M, K), F16),
    "qweight": ((K, N // 8), jnp.int32),
    "scales": ((2, N), F16),
    "qzeros": ((2, N // 8), jnp.int32),
    "scale": ((0,), F32),
    "bias": ((N,), F16),
    "y": ((M, N), F16),
    "group_size": 128,
    "layout": "gemm",
    "activation": "none",
    "codes": "int8",
    "variant": "",
    "workspace_bytes": 1 << 20,
}


def call(parts):
    """Calls the handler with zeros in the given shapes and dtypes."""
    attributes = {n: v for n, v in parts.items() if not isinstance(v, tuple)}
    operands = [jnp.zeros(*v) for n, v in parts.items() if n not in attributes and n != "y"]
    result = jax.ShapeDtypeStruct(*parts["y"])
    return np.asarray(_ffi.call("awq_gemm_w4a8", result, *operands, **attributes))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"x": ((K,), F16)}, "x must have rank 2 or 3, got 1"),
        ({"x": ((M, N), F16)}, "x must have shape (4, 256), got (4, 128)"),
        ({"x": ((M, K), jnp.int16)}, "x must be float16, bfloat16 or float32"),
        ({"x": ((M, K), jnp.int8)}, "x of int8 needs a scale"),
        (
            {"x": ((M, K), jnp.int8), "scale": ((1,), F32), "codes": "float8_e4m3fn"},
            "x of int8 has no float8 codes",
        ),
        ({"scale": ((3,), F32)}, "scale must have shape (4), got (3)"),
        ({"scale": ((1, 1, 1), F32)}, "scale must have rank 1 or 2, got 3"),
        (
            {"scale": ((2, M), F32), "qweight": ((3, K, N // 8), jnp.int32)},
            "scale has batch size 2, others have 3",
        ),
        ({"scales": ((2, N), F32)}, "no kernel takes this call: scales are float32"),
        ({"qzeros": ((2, N), jnp.int32)}, "qzeros must have shape (2, 16), got (2, 128)"),
        ({"bias": ((K,), F16)}, "bias must have shape (128), got (256)"),
        ({"y": ((M, K), F16)}, "y must have shape (4, 128), got (4, 256)"),
        ({"y": ((M, N), jnp.int16)}, "y must be float16, bfloat16 or float32"),
        ({"codes": "int2"}, "unknown codes int2"),
        ({"activation": "tanh"}, "unknown activation tanh"),
        ({"layout": "exllama"}, "unknown layout exllama"),
        ({"workspace_bytes": 16}, "the workspace has less than 2304 bytes"),
    ],
)
def test_the_handler_refuses(changed, text):
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        call(CALL | changed)
    assert f"awq_gemm_w4a8: {text}" in str(error.value) or f"call: {text}" in str(error.value)
    assert not call(CALL).any()  # the process and the device are as they were
