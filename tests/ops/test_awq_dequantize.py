"""`awq_dequantize`: exact in every dtype, equal to AutoAWQ in float16."""

import hashlib
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jax_awq import AWQWeight, awq_dequantize
from jax_awq.testing import dequantize_float64, random_weight

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DTYPES = [np.float16, jnp.bfloat16, np.float32]


@given(st.data())
def test_is_rounded_once(data):
    group_size = data.draw(st.sampled_from([32, 64, 128, -1]))
    layout = data.draw(st.sampled_from(["gemm", "gemv", "oc_major"]))
    k = (
        8 * data.draw(st.integers(1, 40))
        if group_size == -1
        else group_size * data.draw(st.integers(1, 10))
    )
    weight = random_weight(
        np.random.default_rng(data.draw(st.integers(0, 2**32))),
        k,
        8 * data.draw(st.integers(1, 4)),
        group_size=group_size,
        layout=layout,
        dtype=data.draw(st.sampled_from([np.float16, jnp.bfloat16])),
        symmetric=data.draw(st.booleans()),
        batch=data.draw(st.sampled_from([(), (2,)])),
    )
    dtype = data.draw(st.sampled_from([None, *DTYPES]))
    got = weight.dequantize(dtype)
    assert got.dtype == (dtype or weight.dtype)
    # float32 holds every product exactly, so the second conversion is the only rounding.
    want = dequantize_float64(weight).astype(np.float32).astype(got.dtype)
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def test_subnormal_scales_are_kept():
    scales = np.asarray([1e-5 / 15, 2.0**-24, 2.0**-14], np.float16).repeat(8)[None]
    weight = AWQWeight(np.full((8, 3), -1, np.int32), scales, np.zeros((1, 3), np.int32))
    got = np.asarray(weight.dequantize())
    np.testing.assert_array_equal(got, np.broadcast_to(scales * np.float16(15), got.shape))
    assert got.min() > 0


def test_overflow_is_infinite_in_float16_only():
    weight = AWQWeight(
        np.full((8, 1), -1, np.int32), np.full((1, 8), 8192, np.float16), np.zeros((1, 1), np.int32)
    )
    assert np.isinf(weight.dequantize()).all()
    np.testing.assert_array_equal(weight.dequantize(jnp.float32), np.full((8, 8), 15 * 8192.0))


def test_autoawq_checkpoint_bit_for_bit():
    folder = GOLDEN / "llama-awq-gemm-g128"
    expected = json.loads((folder / "expected_dequant_sha256.json").read_text())
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for name, want in expected.items():
        weight = awq_dequantize(
            *(tensors[f"{name}.{part}"] for part in ("qweight", "scales", "qzeros"))
        )
        got = hashlib.sha256(np.ascontiguousarray(weight, "<f2").tobytes()).hexdigest()
        assert got == want["sha256_fp16_le_ic_major"], name


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
@pytest.mark.parametrize("prefix", ["ic256_oc64_g128", "ic512_oc192_g128", "ic384_oc128_g64"])
def test_autoawq_vectors_bit_for_bit(layout, prefix):
    arrays = np.load(GOLDEN / "packed_vectors.npz")
    got = awq_dequantize(
        *(arrays[f"{prefix}/{layout}/{part}"] for part in ("qweight", "scales", "qzeros")),
        layout=layout,
        group_size=int(prefix.rpartition("g")[2]),
    )
    np.testing.assert_array_equal(np.asarray(got).T, arrays[f"{prefix}/fake_quant_fp16_oc_ic"])
