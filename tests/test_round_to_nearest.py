"""`round_to_nearest` against what AutoAWQ packed, and against its definition in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_awq import convert
from jax_awq.quantize import round_to_nearest
from jax_awq.testing import dequantize_float64

VECTORS = np.load(Path(__file__).parent / "golden" / "packed_vectors.npz")
CASES = pytest.mark.parametrize("case", ["ic256_oc64_g128", "ic384_oc128_g64", "ic512_oc192_g128"])
NAMES = ("qweight", "scales", "qzeros")


def vector(case):
    return VECTORS[f"{case}/weight_fp16"].T, int(case.rpartition("_g")[2])


@CASES
@pytest.mark.parametrize("layout", ["gemm", "gemv"])
def test_bits_of_autoawq(case, layout):
    dense, group_size = vector(case)
    weight = convert(round_to_nearest(dense, group_size=group_size), layout)
    for name in NAMES:
        want = VECTORS[f"{case}/{layout}/{name}"]
        actual = np.asarray(getattr(weight, name))
        assert actual.dtype == want.dtype
        np.testing.assert_array_equal(actual, want)
    np.testing.assert_array_equal(weight.dequantize().T, VECTORS[f"{case}/fake_quant_fp16_oc_ic"])


@CASES
def test_bits_of_autoawq_inside_other_programs(case):
    dense, group_size = vector(case)

    @jax.jit
    @jax.vmap
    def doubled(w):
        return round_to_nearest((w * 2).astype(jnp.float32) / 2, group_size=group_size)

    weight = doubled(np.stack([dense, dense]))
    for name in NAMES:
        want = VECTORS[f"{case}/gemm/{name}"]
        np.testing.assert_array_equal(getattr(weight, name), np.stack([want, want]))


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float32])
def test_error_is_half_a_step(rng, group_size, dtype):
    dense = rng.standard_normal((2, 128, 16)).astype(np.float32)
    weight = round_to_nearest(dense, group_size=group_size, dtype=dtype)
    assert (weight.shape, weight.dtype, weight.group_size) == ((2, 128, 16), dtype, group_size)
    size = 128 if group_size == -1 else group_size
    groups = dense.reshape(2, -1, size, 16).astype(np.float64)
    step = (groups.max(2) - groups.min(2)) / 15
    error = np.abs(dequantize_float64(weight).reshape(groups.shape) - groups)
    # The zero point is rounded, so the ends of the range may lie half a step outside the codes;
    # eps is for the weight, the range, the quotient and the scale of up to 15 codes.
    slack = 1 + 60 * float(jnp.finfo(dtype).eps)
    assert (error <= slack * step[:, :, None]).all()
    inside = np.median(error / step[:, :, None])
    assert 0.2 < inside < 0.3  # uniform on [0, 1/2]


@pytest.mark.parametrize(
    ("weight", "options", "error", "text"),
    [
        (
            np.zeros((64, 8), np.int32),
            {},
            TypeError,
            "weight must be float16 or bfloat16 or float32, got",
        ),
        (np.zeros((128, 12), np.float16), {}, ValueError, "N=12 must be a multiple of 8"),
        (np.zeros(64, np.float16), {}, ValueError, r"weight must be \(..., K, N\), got \(64,\)"),
        (np.zeros((64, 8), np.float16), {}, ValueError, "group_size must be -1 or a divisor of"),
        (np.zeros((0, 8), np.float16), {"group_size": -1}, ValueError, "K must be positive, got 0"),
        (np.full((128, 8), np.nan, np.float16), {}, ValueError, "weight must be finite, got NaN"),
        (np.full((128, 8), np.inf, np.float32), {}, ValueError, "weight must be finite, got NaN"),
        (
            np.linspace(-6e4, 6e4, 1024, dtype=np.float32).reshape(128, 8),
            {},
            ValueError,
            r"weight must have groups whose scale is finite in float16, got values from -6e\+04 to",
        ),
        (np.zeros((64, 8), np.float16), {"group_size": 0}, ValueError, "of K=64, got 0"),
        *(
            (
                np.zeros((64, 8), np.float16),
                {"group_size": size},
                TypeError,
                f"group_size must be an integer, got {size!r}",
            )
            for size in (32.0, "32", None)
        ),
        (np.zeros((64, 8), np.float16), {"dtype": np.int8}, TypeError, "dtype must be float16 or"),
        (
            np.zeros((64, 8), np.float16),
            {"dtype": "junk"},
            TypeError,
            "dtype must be .*, got 'junk'",
        ),
        (np.zeros((64, 8), np.float16), {"dtype": None}, TypeError, "dtype must be .*, got None"),
    ],
)
def test_errors(weight, options, error, text):
    with pytest.raises(error, match=rf"round_to_nearest: .*{text}"):
        round_to_nearest(weight, **options)


def test_values_of_a_tracer_are_not_looked_at():
    bad = np.full((128, 8), np.nan, np.float32)
    assert np.isnan(jax.jit(round_to_nearest)(bad).scales).all()
    assert np.isnan(jax.jit(lambda: round_to_nearest(bad))().scales).all()
