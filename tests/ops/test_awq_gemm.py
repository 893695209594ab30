"""`awq_gemm` against float64, over shapes, groups, layouts and dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_awq import AWQWeight, awq_gemm, awq_gemm_w4a8, plan, quantize_activation
from jax_awq.testing import (
    Problem,
    assert_close_to_float64,
    dequantize_float64,
    random_problem,
    random_weight,
)

LAYOUTS = ["gemm", "gemv", "oc_major"]
DTYPES = [np.float16, jnp.bfloat16, np.float32]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]


@st.composite
def problems(draw):
    group_size = draw(st.sampled_from([32, 64, 128, -1]))
    layout = draw(st.sampled_from(LAYOUTS))
    step = 8 if layout != "gemm" else 1  # K of one group has any length along the rows of "gemm"
    k = (
        draw(st.integers(1, 40)) * step
        if group_size == -1
        else draw(st.integers(1, 3)) * group_size
    )
    return random_problem(
        np.random.default_rng(draw(st.integers(0, 2**32))),
        tuple(draw(st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3))),
        k,
        8 * draw(st.integers(1, 5)),
        group_size=group_size,
        layout=layout,
        dtype=draw(st.sampled_from(DTYPES)),
        scales_dtype=draw(st.sampled_from(DTYPES)),
        symmetric=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        out_dtype=draw(st.sampled_from([None, *DTYPES])),
        batch=draw(st.sampled_from([(), (1,), (3,)])),
    )


@given(problems())
def test_against_float64(problem):
    y = problem.run()
    assert y.shape == (*problem.x.shape[:-1], problem.weight.shape[-1])
    assert y.dtype == (problem.out_dtype or problem.x.dtype)
    assert_close_to_float64(y, problem)


@given(problems())
def test_identity_gives_the_dequantized_weight_bit_for_bit(problem):
    weight, dtype = problem.weight, problem.x.dtype
    *batch, k, _ = weight.shape
    eye = np.broadcast_to(np.eye(k, dtype=dtype), (*batch, k, k))
    np.testing.assert_array_equal(
        awq_gemm(eye, weight), dequantize_float64(weight).astype(np.float32).astype(dtype)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue(rng, activation, dtype):
    assert_close_to_float64(
        *_run(
            random_problem(
                rng, 7, 256, 40, group_size=64, dtype=dtype, bias=True, activation=activation
            )
        )
    )


@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("zero", [0, 15])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_extreme_codes_and_zeros(code, zero, layout):
    word = {0: 0, 15: -1}
    rows, words = (64, 2) if layout == "gemm" else (16, 8)
    scales, zeros = ((16, 32), (16, 4)) if layout == "gemv" else ((2, 16), (2, 2))
    weight = AWQWeight(
        np.full((rows, words), word[code], np.int32),
        np.full(scales, 0.5, np.float16),
        np.full(zeros, word[zero], np.int32),
        layout=layout,
        group_size=32,
    )
    y = np.ones((1, 64), np.float16) @ weight
    np.testing.assert_array_equal(y, np.full((1, 16), 64 * (code - zero) * 0.5))


def test_weights_are_rounded_to_the_dtype_of_x():
    """One product that bfloat16 cannot hold: 15 * 257 / 256 has 12 bits."""
    weight = AWQWeight(
        np.full((8, 1), -1, np.int32),
        np.full((1, 8), 257 / 256, np.float32),
        np.zeros((1, 1), np.int32),
    )
    x = np.zeros((1, 8), np.float32)
    x[0, 0] = 1
    exact = 15 * 257 / 256
    for dtype in DTYPES:
        y = awq_gemm(x.astype(dtype), weight, out_dtype=jnp.float32)
        assert y[0, 0] == np.float32(exact).astype(dtype).astype(np.float32)


def test_bias_and_activation_come_before_the_one_rounding():
    """2048 + 1 is no float16, and relu of the sum is 1 however the product would round."""
    weight = AWQWeight(
        np.full((1, 1), 0x11111111, np.int32),
        np.ones((1, 8), np.float16),
        np.zeros((1, 1), np.int32),
    )
    y = awq_gemm(
        np.full((1, 1), 2048, np.float16),
        weight,
        bias=np.full(8, -2047.5, np.float32),
        activation="relu",
    )
    np.testing.assert_array_equal(y, np.full((1, 8), 0.5))


@pytest.mark.parametrize("shared", ["qweight", "scales", "qzeros", "bias"])
def test_one_array_shared_over_the_batch(rng, shared):
    p = random_problem(rng, 5, 64, 16, group_size=32, bias=True, batch=(3,))
    first = {name: getattr(p.weight, name)[0] for name in ("qweight", "scales", "qzeros")}
    if shared == "bias":
        one, weight = dataclasses.replace(p, bias=p.bias[0]), p.weight
    else:
        weight = dataclasses.replace(p.weight, **{shared: first[shared]})
        one = dataclasses.replace(p, weight=weight)
    y = awq_gemm(p.x, weight.qweight, weight.scales, weight.qzeros, bias=one.bias)
    for i in range(3):
        bias = p.bias[0] if shared == "bias" else p.bias[i]
        parts = {n: first[n] if n == shared else getattr(p.weight, n)[i] for n in first}
        assert_close_to_float64(y[i], Problem(p.x[i], AWQWeight(**parts), bias, None, None))


def test_batch_without_rows(rng):
    p = random_problem(rng, (), 64, 16, group_size=32, batch=(3,), bias=True)
    assert p.x.shape == (3, 64)
    y = p.run()
    for i in range(3):
        one = Problem(p.x[i], jax.tree.map(lambda a, i=i: a[i], p.weight), p.bias[i], None, None)
        assert_close_to_float64(y[i], one)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 3, 64)])
def test_no_rows(rng, shape):
    weight = random_weight(rng, 64, 16, group_size=32)
    x = np.zeros(shape, np.float16)
    assert awq_gemm(x, weight).shape == (*shape[:-1], 16)
    grad = jax.grad(lambda s: awq_gemm(x, weight.qweight, s, weight.qzeros).sum())(weight.scales)
    np.testing.assert_array_equal(grad, np.zeros_like(weight.scales))


@pytest.mark.usefixtures("optimized")  # else gelu of a single row has other last bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_rows_have_the_same_bits_in_every_batch(rng, dtype):
    p = random_problem(
        rng, 40, 1152, 136, group_size=128, dtype=dtype, bias=True, activation="gelu"
    )
    product = functools.partial(
        awq_gemm, bias=p.bias, activation="gelu", deterministic="batch_invariant"
    )
    y = np.asarray(product(p.x, p.weight))
    assert_close_to_float64(y, p)
    for first, rows in ((0, 1), (39, 1), (3, 2), (8, 7), (5, 33)):
        part = product(p.x[first : first + rows], p.weight)
        np.testing.assert_array_equal(part, y[first : first + rows])
    mapped = jax.vmap(product, (0, None))(p.x.reshape(8, 5, -1), p.weight)
    np.testing.assert_array_equal(mapped.reshape(y.shape), y)


def test_arrays_and_weight_are_the_same_call(rng):
    p = random_problem(rng, 5, 64, 16, group_size=32)
    w = p.weight
    np.testing.assert_array_equal(awq_gemm(p.x, w.qweight, w.scales, w.qzeros), p.x @ w)
    np.testing.assert_array_equal(
        awq_gemm(p.x, w.qweight, w.scales, w.qzeros, group_size=32, split_k_iters=8), p.x @ w
    )


def test_without_zeros_eight_is_the_zero():
    weight = AWQWeight(np.full((64, 2), 0x77777777, np.int32), np.ones((2, 16), np.float16))
    np.testing.assert_array_equal(np.ones((1, 64), np.float16) @ weight, np.full((1, 16), -64))


def _run(problem):
    return problem.run(), problem


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.float32, jnp.float32])
def test_plan_takes_what_the_op_takes(rng, dtype):
    p = random_problem(rng, 3, 64, 64, group_size=32)
    given = {"out_dtype": dtype, "split_k_iters": np.int64(2)}
    wanted = {"out_dtype": "float32", "split_k_iters": 2}
    for device in ("sm_90", None):
        found = plan("awq_gemm", p.x, p.weight, device=device, **given)
        assert found == plan("awq_gemm", p.x, p.weight, device=device, **wanted)
    codes = quantize_activation(p.x)
    assert plan("dequantize_activation", codes, dtype) == plan("dequantize_activation", codes)


def test_integers_of_numpy(rng):
    p = random_problem(rng, 3, 64, 16, group_size=32)
    weight = AWQWeight(*jax.tree.leaves(p.weight), group_size=np.int64(32))
    assert type(weight.group_size) is int
    given = {"group_size": np.int64(32), "split_k_iters": np.int32(2)}
    y = awq_gemm(p.x, *jax.tree.leaves(p.weight), **given)
    np.testing.assert_array_equal(y, awq_gemm(p.x, weight, split_k_iters=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_experts(rng, layout):
    weight = random_weight(rng, 64, 16, group_size=32, layout=layout, batch=(3,))
    none = jax.tree.map(lambda a: a[:0], weight)
    assert (np.zeros((0, 5, 64), np.float16) @ none).shape == (0, 5, 16)
    assert none.dequantize().shape == (0, 64, 16)


def test_no_outputs():
    weight = AWQWeight(np.zeros((64, 0), np.int32), np.ones((2, 0), np.float16))
    assert (np.zeros((5, 64), np.float16) @ weight).shape == (5, 0)


@pytest.mark.parametrize("op", [awq_gemm, awq_gemm_w4a8])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradient_of_a_shared_bias_adds_in_float32(op, activation):
    """8192 ones: in bfloat16 a sum of ones stays at 256, in blocks at 2048."""
    weight = AWQWeight(jnp.zeros((64, 32, 8), jnp.int32), jnp.ones((64, 1, 64), jnp.bfloat16))
    x, bias = jnp.zeros((64, 128, 32), jnp.bfloat16), jnp.ones(64, jnp.bfloat16)

    def loss(bias):
        return op(x, weight, bias=bias, activation=activation).astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(loss)(bias), np.full(64, 8192, jnp.bfloat16))


@pytest.mark.parametrize("factor", [1e-9, 1e6])
def test_gradient_of_scales_has_the_range_of_the_result(rng, factor):
    """float16 would have none of the first, and infinities of the second."""
    p = random_problem(rng, 4, 256, 16, group_size=32)
    qweight, scales, qzeros = jax.tree.leaves(p.weight)
    scales = scales.astype(np.float32)

    def loss(s):
        return (awq_gemm(p.x, qweight, s, qzeros, out_dtype=jnp.float32) * factor).sum()

    codes = dequantize_float64(AWQWeight(qweight, np.ones_like(scales), qzeros))
    sums = (p.x.astype(np.float64).sum(0)[:, None] * codes).reshape(8, 32, 16).sum(1)
    np.testing.assert_allclose(jax.grad(loss)(scales), factor * sums, rtol=1e-5, atol=1e-3 * factor)
