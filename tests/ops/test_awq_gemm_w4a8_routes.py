"""What `awq_gemm_w4a8` and `awq_gemm_w4a4` run on CUDA, seen on a machine without a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_awq import (
    AWQWeight,
    awq_gemm_w4a4,
    awq_gemm_w4a8,
    plan,
    quantize_activation,
)
from jax_awq._primitive import OPS
from jax_awq.testing_w4a8 import CODES, random_w4a8_problem

INTEGERS = ("int8", "int4")

needs_plan = pytest.mark.skipif(
    plan("int8_matmul", np.ones((1, 1), np.int8), np.ones((1, 1), np.int8), device="sm_90").route
    == "reference",
    reason="the compiled part is not built",
)


def as_kernels(monkeypatch):
    """The kernels that a route calls, played by their plain-JAX forms; what was called."""
    called = []

    def played(name):
        def kernel(plan, *operands, **params):
            called.append(name)
            return OPS[name].reference(*operands, **params)

        return kernel

    for name in ("quantize_activation", "int8_matmul"):
        monkeypatch.setitem(OPS, name, dataclasses.replace(OPS[name], kernel=played(name)))
    return called


@needs_plan
@pytest.mark.parametrize("codes", INTEGERS)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("scale", ["", "row", "one"])
@pytest.mark.parametrize("floats", [True, False])
def test_routes_are_the_reference(monkeypatch, rng, codes, group_size, batch, scale, floats):
    """Of every combination of operands, with a batch in the weight alone, too."""
    if not (scale or floats):
        pytest.skip("codes have a scale")
    p = random_w4a8_problem(rng, 3, 64, 16, codes=codes, group_size=group_size, batch=batch)
    w = p.base.weight
    x = p.base.x if floats else rng.integers(-7, 8, p.base.x.shape).astype(np.int8)
    shape = (*batch, 3 if scale == "row" else 1)
    given = (rng.uniform(0.2, 0.5, shape).astype(np.float32),) if scale else ()
    params = {
        "layout": "gemm",
        "group_size": group_size,
        "symmetric": False,
        "codes": codes,
        "scale": scale,
        "activation": "silu",
        "out_dtype": jnp.dtype(jnp.float32),
        "has_bias": True,
        "variant": "",
    }
    bias = rng.standard_normal(16).astype(np.float16)
    op = "awq_gemm_w4a8" if codes == "int8" else "awq_gemm_w4a4"
    for own in (x, x[0]) if batch else (x,):
        operands = (own, w.qweight, w.scales, w.qzeros, *given, bias)
        found = OPS[op].plan("sm_90", *operands, **params)
        want = OPS[op].reference(*operands, **params)
        if found.route == "reference":
            assert group_size == 32
            assert not floats
            continue
        with monkeypatch.context() as patch:
            called = as_kernels(patch)
            got = OPS[op].kernel(found, *map(jnp.asarray, operands), **params)
        assert called == ["quantize_activation"] * floats + ["int8_matmul"] * (group_size == -1)
        assert found.route == ("int8_matmul" if group_size == -1 else "group_products")
        assert [r.shape for r in got] == [r.shape for r in want]
        np.testing.assert_allclose(got[0], want[0], rtol=2e-6, atol=2e-6)


def shapes(m, k, n, group_size=-1):
    groups = 1 if group_size == -1 else k // group_size
    return jax.ShapeDtypeStruct((m, k), np.float16), AWQWeight(
        jax.ShapeDtypeStruct((k, n // 8), np.int32),
        jax.ShapeDtypeStruct((groups, n), np.float16),
        jax.ShapeDtypeStruct((groups, n // 8), np.int32),
        group_size=group_size,
    )


@needs_plan
@pytest.mark.parametrize("op", ["awq_gemm_w4a8", "awq_gemm_w4a4"])
def test_plan(op):
    bits = 8 if op == "awq_gemm_w4a8" else 4
    one, many = shapes(1024, 4096, 4096), shapes(1024, 4096, 4096, 128)
    found = plan(op, *one, device="sm_90")
    a = jax.ShapeDtypeStruct((1024, 4096), np.int8)
    inner = plan(
        "int8_matmul",
        a,
        jax.ShapeDtypeStruct((4096, 4096), np.int8),
        jax.ShapeDtypeStruct((1024,), np.float32),
        jax.ShapeDtypeStruct((4096,), np.float32),
        out_dtype="float16",
        device="sm_90",
    )
    assert found == dataclasses.replace(inner, op=op, route="int8_matmul")
    qa = jax.eval_shape(lambda x: quantize_activation(x, bits=bits), one[0])
    assert plan(op, qa, one[1], device="sm_90").route == "int8_matmul"

    found = plan(op, *many, device="sm_90")
    assert (found.route, found.kernel) == ("group_products", "quantize_activation")
    assert found.refused == {"int8_matmul": "32 groups have scales of their own"}
    found = plan(op, qa, many[1], device="sm_90")
    assert (found.route, found.reason) == ("reference", "32 groups have scales of their own")
    assert found.accumulator == "int32"


@needs_plan
def test_plan_of_the_reference(monkeypatch):
    x, weight = shapes(16, 256, 64)
    options = {"activation_dtype": "float8_e4m3fn"}
    found = plan("awq_gemm_w4a8", x, weight, device="sm_90", **options)
    assert found.reason == "there is no kernel for float8_e4m3fn activations"
    assert found.accumulator == "float32"
    none = jax.ShapeDtypeStruct((0, 256), np.float16)
    found = plan("awq_gemm_w4a8", none, weight, device="sm_90")
    assert found.reason == "an operand or the result is empty"
    cpu = jax.devices("cpu")[0]
    assert "platform cpu" in plan("awq_gemm_w4a8", x, weight, device=cpu).reason
    monkeypatch.setenv("JAX_AWQ_FORCE", "reference")
    found = plan("awq_gemm_w4a8", x, weight, device="sm_90")
    assert found.reason == "JAX_AWQ_FORCE is reference"


@needs_plan
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("op", [awq_gemm_w4a8, awq_gemm_w4a4])
def test_what_is_lowered_for_cuda_is_what_the_plan_says(op, group_size):
    x, weight = shapes(16, 256, 64, group_size)
    text = jax.jit(op).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    calls = [
        line.split("@jax_awq.")[1].split("(")[0] for line in text.splitlines() if "@jax" in line
    ]
    assert calls == ["quantize_activation"] + ["int8_matmul"] * (group_size == -1)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("codes", CODES)
def test_export_with_symbolic_rows(rng, codes, group_size):
    """One program for any number of rows, on a CPU and on CUDA, stored and loaded."""
    p = random_w4a8_problem(rng, (2, 5), 64, 16, codes=codes, group_size=group_size, bias=True)

    def run(x, weight):
        return dataclasses.replace(p, base=dataclasses.replace(p.base, weight=weight)).run(x)

    rows = export.symbolic_shape("a, b")
    x = jax.ShapeDtypeStruct((*rows, 64), np.float16)
    stable = [
        export.DisabledSafetyCheck.custom_call(f"jax_awq.{name}")
        for name in ("quantize_activation", "int8_matmul")
    ]
    exported = export.export(jax.jit(run), platforms=("cpu", "cuda"), disabled_checks=stable)(
        x, p.base.weight
    )
    loaded = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(loaded.call(p.base.x, p.base.weight), p.run())
