"""`AWQWeight` to and from qwix's `QArray`; qwix itself dequantizes and quantizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_awq import PermutedWeight
from jax_awq.testing import dequantize_float64, random_weight

qwix = pytest.importorskip("qwix", reason="qwix is not installed")
awq_qwix = pytest.importorskip("jax_awq.qwix")


@pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_there_and_back(rng, layout, symmetric, batch, dtype):
    weight = random_weight(
        rng, 128, 24, group_size=32, layout=layout, symmetric=symmetric, batch=batch, dtype=dtype
    )
    array = awq_qwix.to_qarray(weight)
    assert array.qtype == array.qvalue.dtype == jnp.int4
    assert array.shape == (*batch, 128, 24)
    assert array.scale.shape == (*batch, 4, 24)
    assert (array.zero_point is None) == symmetric
    want = dequantize_float64(weight)
    np.testing.assert_array_equal(qwix.dequantize(array), want.astype(dtype))

    back = awq_qwix.from_qarray(array)
    assert (back.layout, back.group_size, back.dtype) == ("gemm", 32, dtype)
    assert (back.qzeros is None) == symmetric
    np.testing.assert_array_equal(dequantize_float64(back), want)


@pytest.mark.parametrize(
    ("tiles", "calibration", "group_size"),
    [
        ({"channelwise_axes": (1,), "tiled_axes": {0: 32}}, "minmax", 32),
        ({"channelwise_axes": (1,), "tiled_axes": {0: 64}}, "absmax", 64),
        ({"channelwise_axes": (1,)}, "minmax", 128),
        ({"tiled_axes": {0: 32, 1: 8}}, "minmax", 32),
        ({}, "absmax", 128),
    ],
)
def test_weights_that_qwix_quantizes(rng, tiles, calibration, group_size):
    dense = jnp.asarray(rng.standard_normal((128, 24)), jnp.float16)
    array = qwix.quantize(dense, jnp.int4, calibration_method=calibration, **tiles)
    weight = jax.jit(awq_qwix.from_qarray)(array)
    assert weight.group_size == group_size
    np.testing.assert_array_equal(weight.dequantize(), qwix.dequantize(array))
    want = dequantize_float64(weight).astype(np.float16)
    np.testing.assert_array_equal(want, qwix.dequantize(array))


@pytest.mark.parametrize("symmetric", [False, True])
def test_uint4(rng, symmetric):
    array = awq_qwix.to_qarray(random_weight(rng, 64, 8, group_size=32))
    unsigned = qwix.QArray(
        (array.qvalue.astype(jnp.int8) + 8).astype(jnp.uint4),
        array.scale,
        None if symmetric else (array.zero_point.astype(jnp.int8) + 8).astype(jnp.uint4),
    )
    weight = awq_qwix.from_qarray(unsigned)
    np.testing.assert_array_equal(weight.dequantize(), qwix.dequantize(unsigned))


def test_zero_points_of_other_tiles_than_the_scales(rng):
    array = awq_qwix.to_qarray(random_weight(rng, 96, 8, group_size=32))
    array = dataclasses.replace(array, zero_point=array.zero_point[:1])
    weight = awq_qwix.from_qarray(array)
    assert weight.group_size == 32
    np.testing.assert_array_equal(weight.dequantize(), qwix.dequantize(array))
    array = dataclasses.replace(array, scale=jnp.repeat(array.scale[:1], 2, axis=0))
    array = dataclasses.replace(array, zero_point=jnp.repeat(array.zero_point, 3, axis=0))
    assert awq_qwix.from_qarray(array).group_size == 16


def test_permuted_inputs_have_no_tiles(rng):
    weight = PermutedWeight(random_weight(rng, 64, 8, group_size=32), np.arange(64, dtype=np.int32))
    with pytest.raises(TypeError, match="weight must be an AWQWeight, got PermutedWeight"):
        awq_qwix.to_qarray(weight)


@pytest.mark.parametrize("qtype", [jnp.int8, "nf4"])
def test_other_qtypes(rng, qtype):
    array = qwix.quantize(jnp.ones((64, 8)), qtype)
    with pytest.raises(ValueError, match=r"from_qarray: qtype must be one of \('int4', 'uint4'\)"):
        awq_qwix.from_qarray(array)


def test_size_that_no_weight_has():
    array = qwix.quantize(jnp.ones((64, 12)), jnp.int4)
    with pytest.raises(ValueError, match=r"N a multiple of 8, got \(64, 12\)"):
        awq_qwix.from_qarray(array)
