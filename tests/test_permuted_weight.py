"""`PermutedWeight`: GPTQ's act-order under every transformation of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_awq import AWQWeight, PermutedWeight, awq_dequantize, awq_gemm, convert, plan
from jax_awq.testing import dequantize_float64, random_weight

K, N = 64, 16
LAYOUTS = pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])


def permuted(rng, *, layout="gemm", batch=(), dtype=np.float32):
    weight = random_weight(rng, K, N, group_size=32, layout=layout, batch=batch, dtype=dtype)
    perm = rng.permuted(np.broadcast_to(np.arange(K, dtype=np.int32), (*batch, K)), axis=-1)
    return PermutedWeight(weight, perm)


def dense(weight):
    """(..., K, N) in float64, row by row in the order of the inputs."""
    sorted_rows = dequantize_float64(weight.weight)
    result = np.empty_like(sorted_rows)
    for index in np.ndindex(weight.perm.shape):
        result[(*index[:-1], weight.perm[index])] = sorted_rows[index]
    return result


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@LAYOUTS
def test_values(rng, layout):
    weight = permuted(rng, layout=layout)
    assert (weight.shape, weight.ndim, weight.dtype) == ((K, N), 2, np.float32)
    assert (weight.layout, weight.group_size) == (layout, 32)
    np.testing.assert_array_equal(weight.dequantize(), dense(weight).astype(np.float32))
    np.testing.assert_array_equal(
        awq_dequantize(weight, dtype=jnp.bfloat16), dense(weight).astype(jnp.bfloat16)
    )
    eye = np.eye(K, dtype=np.float32)
    for identity in (eye, jnp.asarray(eye)):
        np.testing.assert_array_equal(identity @ weight, dense(weight).astype(np.float32))


def test_shared_codes_with_scales_of_their_own(rng):
    one = permuted(rng)
    scales = rng.uniform(0.5, 1, (3, *one.weight.scales.shape)).astype(np.float32)
    weight = PermutedWeight(AWQWeight(one.weight.qweight, scales, one.weight.qzeros), one.perm)
    want = np.stack(
        [
            dense(PermutedWeight(AWQWeight(one.weight.qweight, s, one.weight.qzeros), one.perm))
            for s in scales
        ]
    )
    np.testing.assert_array_equal(weight.dequantize(), want.astype(np.float32))
    x = rng.standard_normal((3, 5, K)).astype(np.float32)
    assert_close(awq_gemm(x, weight), x @ want)


def test_options_of_the_op(rng):
    weight, x, bias = permuted(rng), rng.normal(size=(2, 3, K)).astype(np.float32), np.ones(N)
    y = awq_gemm(x, weight, bias=bias.astype(np.float32), activation="relu")
    assert_close(y, np.maximum(x.astype(np.float64) @ dense(weight) + bias, 0))
    assert plan("awq_gemm", x, weight).route == "reference"


def test_jit_grad_scan_and_vmap(rng):
    weight, x = permuted(rng, batch=(3,)), rng.normal(size=(3, 5, K)).astype(np.float32)
    want = x.astype(np.float64) @ dense(weight)
    assert_close(awq_gemm(x, weight), want)
    assert_close(awq_gemm(x[:, 0], weight), want[:, 0])
    assert_close(jax.jit(lambda x, w: x @ w)(x, weight), want)
    assert_close(jax.vmap(lambda x, w: x @ w)(x, weight), want)
    assert_close(jax.lax.scan(lambda c, xw: (c, xw[0] @ xw[1]), 0, (x, weight))[1], want)
    np.testing.assert_array_equal(weight.dequantize(), dense(weight).astype(np.float32))

    first = jax.tree.map(lambda a: a[0], weight)
    cotangent = rng.normal(size=(5, N)).astype(np.float32)
    dx = jax.grad(lambda x: jnp.sum((x @ first) * cotangent))(x[0])
    assert_close(dx, cotangent.astype(np.float64) @ dense(first).T)
    dscales = jax.grad(lambda w: jnp.sum(w.dequantize() * 2), allow_int=True)(first).weight.scales
    ones = PermutedWeight(
        AWQWeight(first.weight.qweight, np.ones_like(first.weight.scales), first.weight.qzeros),
        first.perm,
    )
    assert_close(dscales, 2 * dequantize_float64(ones.weight).reshape(2, 32, N).sum(1))


def test_export(rng):
    weight, x = permuted(rng), rng.normal(size=(5, K)).astype(np.float32)
    stored = export.export(jax.jit(lambda x, w: x @ w))(x, weight).serialize()
    assert_close(export.deserialize(stored).call(x, weight), x.astype(np.float64) @ dense(weight))


def test_pytree(rng):
    weight = permuted(rng)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(weight)]
    assert paths == [".weight.qweight", ".weight.scales", ".weight.qzeros", ".perm"]
    assert jax.tree.map(lambda _: 0, weight).perm == 0
    assert repr(weight).endswith("group_size=32), perm=int32[64])")


@LAYOUTS
def test_convert(rng, layout):
    weight = permuted(rng)
    other = convert(weight, layout)
    assert other.layout == layout
    np.testing.assert_array_equal(other.dequantize(), weight.dequantize())


def test_errors(rng):
    weight = permuted(rng)
    with pytest.raises(ValueError, match=r"^PermutedWeight: perm must have shape \(64,\), got"):
        PermutedWeight(weight.weight, weight.perm[:-1])
    with pytest.raises(TypeError, match=r"^PermutedWeight: perm must be int32, got int64"):
        PermutedWeight(weight.weight, weight.perm.astype(np.int64))
    with pytest.raises(TypeError, match=r"^PermutedWeight: weight must be an AWQWeight, got ndarr"):
        PermutedWeight(np.zeros((K, N)), weight.perm)
    with pytest.raises(ValueError, match=r"^PermutedWeight: x must have shape \(\.\.\., 64\), got"):
        awq_gemm(np.ones((2, 32), np.float32), weight)
    with pytest.raises(TypeError, match=r"^PermutedWeight: x must be an array, got list"):
        awq_gemm([1.0] * 64, weight)
    with pytest.raises(TypeError, match=r"^convert: weight must be an AWQWeight or a Permuted"):
        convert(weight.perm, "gemm")
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), weight)
    for shape in ((1, 3, 64), (3, 64), (64,)):
        with pytest.raises(ValueError, match=r"x must have shape \(2, \.\.\., 64\), got"):
            awq_gemm(np.ones(shape, np.float32), stacked)
    with pytest.raises(ValueError, match="brings its own scales"):
        awq_gemm(np.ones((2, K), np.float32), weight, weight.weight.scales)
