"""Nibble orders and layouts, against words written out by hand and AutoAWQ's own files."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_awq import AWQWeight, convert, pack_int4, unpack_int4
from jax_awq.testing import dequantize_float64, random_weight

GOLDEN = pathlib.Path(__file__).parent / "golden" / "packed_vectors.npz"
NAMESPACES = pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])


@NAMESPACES
@pytest.mark.parametrize(("order", "word"), [("awq", 0x75316420), ("natural", 0x76543210)])
def test_words_by_hand(xp, order, word):
    packed = pack_int4(xp.arange(8), order=order)
    assert packed.dtype == np.int32
    assert packed.tolist() == [word]
    assert unpack_int4(packed, order=order).tolist() == list(range(8))


@NAMESPACES
def test_the_last_nibble_is_the_sign(xp):
    packed = pack_int4(xp.full(8, 15), order="awq")
    assert packed.tolist() == [-1]
    assert unpack_int4(packed).tolist() == [15] * 8


@NAMESPACES
def test_only_the_low_bits_count(xp):
    assert pack_int4(xp.asarray([-1, 16, 17, 0, 0, 0, 0, 0]), order="natural").tolist() == [0x10F]


@given(order=st.sampled_from(["awq", "natural"]), axis=st.integers(-3, 2), seed=st.integers(0, 99))
def test_round_trip_along_any_axis(order, axis, seed):
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (2, 3, 4)).astype(np.int32)
    codes = unpack_int4(words, order=order, axis=axis)
    assert codes.dtype == np.int8
    assert codes.shape[axis] == 8 * words.shape[axis]
    assert codes.min() >= 0
    assert codes.max() <= 15
    np.testing.assert_array_equal(pack_int4(codes, order=order, axis=axis), words)
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(words), order=order, axis=axis), codes)
    np.testing.assert_array_equal(pack_int4(jnp.asarray(codes), order=order, axis=axis), words)


def test_errors():
    with pytest.raises(
        ValueError,
        match=r"^pack_int4: axis -1 must be a multiple of 8 long, "
        r"got shape \(2, 12\)$",
    ):
        pack_int4(np.zeros((2, 12), np.int32))
    with pytest.raises(
        ValueError, match=r"^unpack_int4: order must be 'awq' or 'natural', got 'gp"
    ):
        unpack_int4(np.zeros(1, np.int32), order="gptq")
    with pytest.raises(ValueError, match=r"^pack_int4: order must be 'awq' or 'natural', got 'x'$"):
        pack_int4(np.zeros(8, np.int32), order="x")


@pytest.mark.parametrize("prefix", ["ic256_oc64_g128", "ic512_oc192_g128", "ic384_oc128_g64"])
def test_convert_gives_what_autoawq_writes(prefix):
    arrays = np.load(GOLDEN)
    group_size = int(prefix.rpartition("g")[2])
    weights = {
        layout: AWQWeight(
            *(arrays[f"{prefix}/{layout}/{name}"] for name in ("qweight", "scales", "qzeros")),
            layout=layout,
            group_size=group_size,
        )
        for layout in ("gemm", "gemv")
    }
    for source in weights.values():
        for layout, want in weights.items():
            for name in ("qweight", "scales", "qzeros"):
                got = getattr(convert(source, layout), name)
                assert isinstance(got, np.ndarray)
                np.testing.assert_array_equal(got, getattr(want, name))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("source", ["gemm", "gemv", "oc_major"])
@pytest.mark.parametrize("target", ["gemm", "gemv", "oc_major"])
@pytest.mark.parametrize(("k", "group_size"), [(288, 32), (1152, 64), (384, 128), (264, -1)])
def test_convert_keeps_the_weight(rng, source, target, k, group_size, symmetric):
    weight = random_weight(
        rng, k, 24, group_size=group_size, layout=source, symmetric=symmetric, batch=(2,)
    )
    there = convert(weight, target)
    np.testing.assert_array_equal(dequantize_float64(there), dequantize_float64(weight))
    for before, after in zip(*map(_arrays, (weight, convert(there, source))), strict=True):
        np.testing.assert_array_equal(before, after)


def test_gemv_rows_are_padded_as_autoawq_pads_them():
    # Width of the packed zeros for IC 1152: 18 groups of 64 take 3 words, padded to 4.
    for k, group_size, words in [(1152, 64, 4), (384, 128, 1), (256, 32, 4), (1152, -1, 1)]:
        weight = random_weight(np.random.default_rng(0), k, 8, group_size=group_size, layout="gemv")
        assert weight.qzeros.shape == (8, words)
        assert weight.scales.shape == (8, 8 * words)


def _arrays(weight):
    return [a for a in (weight.qweight, weight.scales, weight.qzeros) if a is not None]


@pytest.mark.parametrize(
    ("value", "got"), [([[1] * 8], "list"), (np.ones(8, np.float32), "float32"), (None, "NoneType")]
)
@pytest.mark.parametrize(
    ("function", "text"),
    [
        (pack_int4, "pack_int4: codes must be an array of integers"),
        (unpack_int4, "unpack_int4: words must be an array of int32"),
    ],
)
def test_integers_alone(function, text, value, got):
    with pytest.raises(TypeError, match=rf"^{text}, got {got}$"):
        function(value)


@NAMESPACES
@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8"])
def test_words_of_another_size(xp, dtype):
    with pytest.raises(TypeError, match=rf"^unpack_int4: words .* of int32, got {dtype}$"):
        unpack_int4(xp.zeros(8, dtype))


def test_words_of_64_bits():
    with pytest.raises(TypeError, match=r"^unpack_int4: words .* of int32, got uint64$"):
        unpack_int4(np.zeros(8, np.uint64))


@NAMESPACES
def test_words_without_a_sign(xp):
    words = xp.asarray([0xF531_6420, 7], np.uint32)
    np.testing.assert_array_equal(unpack_int4(words), unpack_int4(words.astype(np.int32)))


@NAMESPACES
@pytest.mark.parametrize("axis", [2, -3, None, "x", 1.0])
@pytest.mark.parametrize(
    ("function", "name"),
    [(pack_int4, "pack_int4: .* codes"), (unpack_int4, "unpack_int4: .* words")],
)
def test_axis_that_is_not_there(xp, function, name, axis):
    with pytest.raises(ValueError, match=rf"^{name} of shape \(8, 8\), got {axis!r}$"):
        function(xp.zeros((8, 8), np.int32), axis=axis)
