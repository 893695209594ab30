"""`awq_gemm_w4a8` and `awq_gemm_w4a4` against exact integers in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_awq import (
    PermutedWeight,
    awq_gemm,
    awq_gemm_w4a4,
    awq_gemm_w4a8,
    calibrate_activation,
    quantize_activation,
)
from jax_awq.testing import random_weight
from jax_awq.testing_w4a8 import CODES, W4A8Problem, _float8, assert_solves, random_w4a8_problem

LAYOUTS = ["gemm", "gemv", "oc_major"]
DTYPES = [np.float16, jnp.bfloat16, np.float32]
GRANULARITIES = [("token", False), ("tensor", False), ("tensor", True)]
INTEGERS = ("int8", "int4")


@st.composite
def problems(draw, codes=CODES):
    group_size = draw(st.sampled_from([32, 64, 128, -1]))
    layout = draw(st.sampled_from(LAYOUTS))
    step = 8 if layout != "gemm" else 1
    k = (
        draw(st.integers(1, 40)) * step
        if group_size == -1
        else draw(st.integers(1, 3)) * group_size
    )
    granularity, static = draw(st.sampled_from(GRANULARITIES))
    return random_w4a8_problem(
        np.random.default_rng(draw(st.integers(0, 2**32))),
        tuple(draw(st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3))),
        k,
        8 * draw(st.integers(1, 5)),
        codes=draw(st.sampled_from(codes)),
        granularity=granularity,
        static=static,
        group_size=group_size,
        layout=layout,
        dtype=draw(st.sampled_from(DTYPES)),
        scales_dtype=draw(st.sampled_from(DTYPES)),
        symmetric=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu"])),
        out_dtype=draw(st.sampled_from([None, *DTYPES])),
        batch=draw(st.sampled_from([(), (1,), (3,)])),
    )


@given(problems())
def test_against_float64(problem):
    y = problem.run()
    assert y.shape == (*problem.base.x.shape[:-1], problem.base.weight.shape[-1])
    assert y.dtype == (problem.base.out_dtype or problem.base.x.dtype)
    assert_solves(y, problem)


@given(problems(INTEGERS))
def test_codes_of_the_caller_give_the_same_bits(problem):
    np.testing.assert_array_equal(problem.run(problem.quantized()), problem.run())


@given(problems(INTEGERS), st.integers(0, 2**32))
def test_codes_over_their_whole_range(problem, seed):
    """Sums as large as they can get, for which `x` alone hardly serves."""
    rng, largest = np.random.default_rng(seed), {"int8": 127, "int4": 7}[problem.codes]
    x = rng.choice([-largest, largest], problem.base.x.shape).astype(np.float32)
    base = dataclasses.replace(problem.base, x=x, activation=None, out_dtype=np.float32)
    one = W4A8Problem(base, problem.codes, "tensor", np.asarray(1, np.float32))
    np.testing.assert_array_equal(one.rounded()[0], x)
    assert_solves(one.run(), one)


@pytest.mark.parametrize("codes", INTEGERS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_integers_are_exact(rng, codes, group_size):
    """Scales of powers of two leave integers, to the last bit."""
    p = random_w4a8_problem(rng, 9, 256, 24, codes=codes, group_size=group_size, dtype=np.float32)
    scales = np.full_like(p.base.weight.scales, 0.5)
    weight = dataclasses.replace(p.base.weight, scales=scales)
    x = rng.integers(-7, 8, p.base.x.shape).astype(np.float32)
    base = dataclasses.replace(p.base, x=x, weight=weight)
    p = W4A8Problem(base, codes, "tensor", np.asarray(1, np.float32))
    np.testing.assert_array_equal(p.run(), p.float64().astype(np.float32))


@pytest.mark.parametrize("codes", CODES)
def test_no_worse_than_the_rounding_of_x(rng, codes):
    """The error against W4A16 is that of half a step of x, and no other."""
    p = random_w4a8_problem(rng, 64, 512, 128, codes=codes, group_size=128, dtype=np.float32)
    exact = p.base.float64()
    error = np.linalg.norm(p.run() - exact) / np.linalg.norm(exact)
    low, high = {"int8": (4e-3, 9e-3), "int4": (0.08, 0.16), "float8_e4m3fn": (0.015, 0.04)}[codes]
    assert low < error < high


def test_float8_is_the_type_of_that_name(rng):
    steps = np.concatenate([rng.uniform(-448, 448, 5000), rng.standard_normal(5000) * 0.01])
    steps = np.concatenate([steps, np.arange(-448, 448.5, 0.5)]).astype(np.float32)
    want = steps.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(_float8(steps, np.float32(1))[0], want)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(rng, codes, value):
    p = random_w4a8_problem(rng, 3, 64, 16, codes=codes, group_size=32)
    x = p.base.x.copy()
    x[1, 5] = value
    y = np.asarray(W4A8Problem(dataclasses.replace(p.base, x=x), codes).run())
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[::2], np.asarray(p.run())[::2])


@pytest.mark.parametrize("codes", CODES)
def test_rows_of_zeros(rng, codes):
    p = random_w4a8_problem(rng, 4, 64, 16, codes=codes, group_size=32, bias=True)
    x = p.base.x * np.asarray([[1], [0], [1], [0]], np.float16)
    y = W4A8Problem(dataclasses.replace(p.base, x=x), codes).run()
    np.testing.assert_array_equal(y[1::2], np.stack([p.base.bias] * 2))


def test_static_scale_of_calibration(rng):
    weight = random_weight(rng, 64, 16, group_size=32)
    x = rng.standard_normal((50, 64)).astype(np.float16)
    scale = calibrate_activation([x], granularity="tensor")
    np.testing.assert_array_equal(
        awq_gemm_w4a8(x, weight, granularity="tensor", scale=scale),
        awq_gemm_w4a8(x, weight, granularity="tensor"),
    )


def test_arrays_and_weight_are_the_same_call(rng):
    x = rng.standard_normal((5, 64)).astype(np.float16)
    w = random_weight(rng, 64, 16, group_size=32, layout="gemv")
    for op in (awq_gemm_w4a8, awq_gemm_w4a4):
        y = op(x, w.qweight, w.scales, w.qzeros, layout="gemv", group_size=32)
        np.testing.assert_array_equal(y, op(x, w))
        with_sums = quantize_activation(x, bits=8 if op is awq_gemm_w4a8 else 4, group_size=32)
        np.testing.assert_array_equal(op(with_sums, w, out_dtype=x.dtype), y)
        assert op(with_sums, w).dtype == jnp.float32


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("quantized", [False, True])
def test_permuted_weight(rng, batch, quantized):
    weight = random_weight(rng, 64, 16, group_size=32, batch=batch)
    perm = rng.permuted(np.broadcast_to(np.arange(64, dtype=np.int32), (*batch, 64)), axis=-1)
    x = rng.standard_normal((*batch, 3, 64)).astype(np.float16)
    permuted = np.take_along_axis(x, perm.reshape(*batch, 1, 64), -1)
    if quantized:
        x, permuted = (quantize_activation(a, bits=4) for a in (x, permuted))
    np.testing.assert_array_equal(
        awq_gemm_w4a4(x, PermutedWeight(weight, perm)), awq_gemm_w4a4(permuted, weight)
    )


def test_stacked_activations_of_one_scale_each(rng):
    weight = random_weight(rng, 64, 16, group_size=32, batch=(3,))
    x = rng.standard_normal((3, 5, 64)).astype(np.float16)
    each = jax.vmap(lambda x: quantize_activation(x, granularity="tensor"))(x)
    assert each.scale.shape == (3,)
    y = awq_gemm_w4a8(each, weight)
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], weight)
        qa = quantize_activation(x[i], granularity="tensor")
        np.testing.assert_array_equal(y[i], awq_gemm_w4a8(qa, one))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradient_in_x_is_that_of_awq_gemm(rng, codes, activation):
    """Of the same function of the sums, of which the forward pass has those of the codes."""
    p = random_w4a8_problem(
        rng, 5, 64, 16, codes=codes, group_size=32, dtype=np.float32, activation=activation
    )
    ct = rng.standard_normal((5, 16)).astype(np.float32)
    got = jax.vjp(lambda x: p.run(x), p.base.x)[1](ct)[0]
    q, sx = p.rounded()
    rounded = (q * sx).astype(np.float32)
    want = jax.vjp(lambda x: awq_gemm(x, p.base.weight, activation=activation), rounded)[1](ct)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_no_gradient_goes_through_a_scale_of_x(rng):
    p = random_w4a8_problem(rng, 5, 64, 16, group_size=32, granularity="tensor", static=True)
    run = lambda scale: awq_gemm_w4a8(  # noqa: E731
        p.base.x, p.base.weight, granularity="tensor", scale=scale
    )
    assert jax.grad(lambda s: run(s).astype(jnp.float32).sum())(p.scale) == 0
