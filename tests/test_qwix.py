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


@pytest.fixture
def unsigned(rng):
    array = awq_qwix.to_qarray(random_weight(rng, 64, 8, group_size=32))
    qvalue, zero_point = (
        (a.astype(jnp.int8) + 8).astype(jnp.uint4) for a in (array.qvalue, array.zero_point)
    )
    return qwix.QArray(qvalue, array.scale, zero_point, qtype=jnp.uint4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_uint4(unsigned, symmetric):
    if symmetric:
        unsigned = dataclasses.replace(unsigned, zero_point=None)
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


def test_array_that_is_none():
    with pytest.raises(TypeError, match=r"^from_qarray: array must be a QArray, got ndarray$"):
        awq_qwix.from_qarray(np.ones((64, 8)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"zero_point": lambda z: z.astype(jnp.int32) + 20}, "zero_point must be from 0 to 15"),
        ({"zero_point": lambda z: z.astype(jnp.int32) - 16}, "zero_point must be from 0 to 15"),
        ({"qvalue": lambda q: np.full(q.shape, 100, np.int8)}, ".*of uint4, got 100 to 100"),
        ({"qvalue": lambda q: q.astype(jnp.int8) - 1}, "qvalue must be .*, got -1 to 14"),
        ({"scale": lambda s: s[0]}, r"scale must .* of \(64, 8\), got shape \(8,\)"),
        ({"scale": lambda s: s[:, :3]}, r"scale must have a divisor .*, got shape \(2, 3\)"),
        ({"zero_point": lambda z: z[:0]}, r"zero_point must .*, got shape \(0, 8\)"),
    ],
)
def test_values_and_tiles_that_no_weight_has(unsigned, changes, text):
    changes = {name: change(getattr(unsigned, name)) for name, change in changes.items()}
    with pytest.raises(ValueError, match=f"^from_qarray: {text}"):
        awq_qwix.from_qarray(dataclasses.replace(unsigned, **changes))


@pytest.mark.parametrize("name", ["qvalue", "zero_point"])
def test_integers_alone(unsigned, name):
    value = getattr(unsigned, name).astype(jnp.float16) + 0.5
    with pytest.raises(TypeError, match=f"^from_qarray: {name} must be integers, got float16"):
        awq_qwix.from_qarray(dataclasses.replace(unsigned, **{name: value}))


def test_signed_codes_in_wider_integers(rng):
    array = awq_qwix.to_qarray(random_weight(rng, 64, 8, group_size=32))
    wide = dataclasses.replace(
        array, qvalue=array.qvalue.astype(jnp.int8), zero_point=array.zero_point.astype(jnp.int32)
    )
    for a, b in zip(
        *(jax.tree.leaves(awq_qwix.from_qarray(q)) for q in (array, wide)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    other = dataclasses.replace(array, qvalue=jnp.full((64, 8), 8, jnp.uint4))
    with pytest.raises(ValueError, match=r"qvalue must be from -8 to 7, .* of int4, got 8 to 8"):
        awq_qwix.from_qarray(other)


def test_codes_that_are_constants_of_a_program(unsigned):
    want = awq_qwix.from_qarray(unsigned)
    found = jax.jit(lambda: awq_qwix.from_qarray(unsigned))()
    np.testing.assert_array_equal(found.qweight, want.qweight)
