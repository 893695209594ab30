"""`quantize_activation` and `dequantize_activation` on a GPU: the bits of plain JAX on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.variants import BF16, F16, F32, all_as_first, assert_same_bits, run_twice

from jax_awq import (
    QuantizedActivation,
    _ffi,
    dequantize_activation,
    plan,
    quantize_activation,
)
from jax_awq.testing import quantize_activation_numpy, unpack_bytes

pytestmark = pytest.mark.gpu

# Rows of a part of a vector, of a warp, of blocks, and beyond what a block holds; odd and even.
# From 1024 rows on, a thread takes more of a row.
WIDTHS = (1, 7, 8, 31, 128, 1000, 2048, 2052, 4096, 14336, 28672)
SIZES = (
    *((3, k) for k in WIDTHS),
    *((1030, k) for k in (5, 8, 260, 2048, 2056, 4096, 4099, 11008)),
    (2, 65536 + 8),
    (2, 70001),
    (2, 33024),
)
every_size = pytest.mark.parametrize(("m", "k"), SIZES, ids=lambda v: str(v))
every_dtype = pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)


def activations(rng, m, k, dtype):
    """Rows of very different size; a zero row, one with a NaN and one with an infinity."""
    x = rng.standard_normal((m, k), np.float32) * np.exp2(rng.integers(-14, 10, (m, 1)))
    x[rng.integers(m)] = 0
    if m > 2:
        x[m // 2, k // 2], x[m - 1, k - 1] = np.nan, -np.inf
    return x.astype(np.float32).astype(dtype)


def assert_exact(call, operand, wanted):
    """Asserts values as wanted, NaN where it is (of any payload), and twice the same bits."""
    like = jax.tree.leaves(wanted)
    results = run_twice(call, (operand,), *like)
    for got, want in zip(results, like, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got, want)


def by_definition(x, bits, groups, scale=None):
    """The leaves of the `QuantizedActivation`; a scale for every row unless one is given."""
    codes, wide = quantize_activation_numpy(x, bits=bits, scale=scale)
    sums = [codes.reshape(len(x), groups, -1).sum(-1, dtype=np.int32)] if groups else []
    if bits == 4:
        codes = np.pad(codes, [(0, 0), (0, codes.shape[1] % 2)])
        codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return [codes, wide[:, 0] if scale is None else wide, *sums]


@every_dtype
@every_size
def test_a_scale_for_every_row(rng, m, k, dtype):
    x = activations(rng, m, k, dtype)
    for bits in (8, 4):
        for group_size in (None, -1, *(g for g in (32, 128) if k % g == 0)):
            groups = 0 if group_size is None else 1 if group_size == -1 else k // group_size
            options = {"bits": bits, "group_size": group_size}
            assert plan("quantize_activation", x, **options).route == "fused"
            assert_exact(
                lambda x, options=options: quantize_activation(x, **options),
                x,
                by_definition(x, bits, groups),
            )


@every_dtype
@pytest.mark.parametrize("granularity", ["channel", "tensor", "computed"])
@pytest.mark.parametrize(
    ("m", "k"), [(3, 1), (3, 31), (70, 128), (9, 1000), (33, 2052), (1030, 4096), (3, 28672)]
)
def test_one_scale_or_one_for_every_column(rng, m, k, granularity, dtype):
    x = activations(rng, m, k, dtype)
    scale = {
        "channel": rng.uniform(0.01, 1, k).astype(np.float32),
        "tensor": np.float32(0.3),
        "computed": None,
    }[granularity]
    if granularity == "channel":
        scale[0] = 0
    if granularity == "computed":  # with a NaN there would be no codes to compare
        x = np.nan_to_num(x.astype(np.float32), nan=1, posinf=2, neginf=-3).astype(dtype)
    for bits in (8, 4):
        given = scale
        if granularity == "computed":
            given = quantize_activation_numpy(x.reshape(1, -1), bits=bits)[1][0, 0]
        for group_size in (None, -1, *(g for g in (64,) if k % g == 0)):
            groups = 0 if group_size is None else 1 if group_size == -1 else k // group_size
            options = {
                "bits": bits,
                "group_size": group_size,
                "granularity": "channel" if granularity == "channel" else "tensor",
            }
            assert plan("quantize_activation", x, **options, scale=scale).kernel == "columns"
            assert_exact(
                lambda x, o=options: quantize_activation(x, scale=scale, **o),
                x,
                by_definition(x, bits, groups, given),
            )


def test_entries_of_a_batch_have_scales_of_their_own(rng):
    x = rng.standard_normal((3, 5, 100)).astype(F16)
    scale = rng.uniform(0.01, 0.1, (3, 100)).astype(np.float32)

    def one(x, scale):
        qa = quantize_activation(x, granularity="channel", scale=scale, bits=4)
        return qa.q, dequantize_activation(qa, F16)

    q, back = jax.vmap(one)(x, scale)
    for i in range(3):
        codes, wide = quantize_activation_numpy(x[i], bits=4, scale=scale[i])
        np.testing.assert_array_equal(unpack_bytes(q[i], 4, 100), codes)
        assert_same_bits(back[i], (codes.astype(np.float32) * wide).astype(F16))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["token", "channel", "tensor"])
@every_dtype
@pytest.mark.parametrize(
    ("m", "k"), [(3, 1), (3, 7), (70, 128), (9, 1000), (33, 2052), (1030, 4096), (3, 28673)]
)
def test_dequantize(rng, m, k, dtype, granularity, bits):
    q = rng.integers(-128, 128, (m, k if bits == 8 else (k + 1) // 2)).astype(np.int8)
    shape = {"token": (m,), "channel": (k,), "tensor": ()}[granularity]
    scale = np.asarray(rng.uniform(0, 2, shape), np.float32)
    wide = scale[:, None] if granularity == "token" else scale
    wanted = (unpack_bytes(q, bits, k).astype(np.float32) * wide).astype(dtype)
    qa = QuantizedActivation(q, scale, bits=bits, granularity=granularity, k=k)
    assert plan("dequantize_activation", qa).route == "fused"
    assert_exact(lambda qa: dequantize_activation(qa, dtype), qa, wanted)


@pytest.mark.xdist_group("much_memory")
def test_more_than_2_to_the_31_values(rng):
    """The same 1024 rows again and again, so that all of them can be compared where they are."""
    k, copies = 4096, 520
    part = rng.standard_normal((1024, k), np.float32).astype(F16)
    x = jnp.tile(part, (copies, 1))
    assert x.size > 2**31
    for bits, granularity in ((8, "token"), (4, "token"), (8, "tensor")):
        qa = quantize_activation(
            x, bits=bits, granularity=granularity, scale=None if granularity == "token" else 0.02
        )
        codes, wide = quantize_activation_numpy(
            part, bits=bits, scale=None if granularity == "token" else 0.02
        )
        q = qa.q.reshape(copies, 1024, -1)
        np.testing.assert_array_equal(unpack_bytes(q[0], bits, k), codes)
        assert all_as_first(q)
        del q
        back = dequantize_activation(qa, F16).reshape(copies, 1024, k)
        assert_same_bits(back[0], (codes.astype(np.float32) * wide).astype(F16))
        assert all_as_first(back)
        del back


# --- handlers called without the Python layer

QUANTIZE = {
    "x": ((4, 256), F16),
    "scale": ((0, 1), F32),
    "q": ((4, 256), jnp.int8),
    "row_scale": ((4,), F32),
    "group_sums": ((4, 2), jnp.int32),
    "bits": 8,
    "group_size": 128,
}


def call(op, parts, results):
    operands = [
        jnp.zeros(*v) for n, v in parts.items() if isinstance(v, tuple) and n not in results
    ]
    attributes = {n: v for n, v in parts.items() if not isinstance(v, tuple)}
    found = _ffi.call_all(
        op, [jax.ShapeDtypeStruct(*parts[n]) for n in results], *operands, **attributes
    )
    return [np.asarray(f) for f in found]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"x": ((2, 4, 256), F16)}, "x must have rank 2, got 3"),
        ({"x": ((4, 256), jnp.int8)}, "x must be float16, bfloat16 or float32"),
        ({"q": ((4, 128), jnp.int8)}, "q must have shape (4, 256), got (4, 128)"),
        ({"bits": 4}, "q must have shape (4, 128), got (4, 256)"),
        ({"bits": 5}, "bits must be 8 or 4, got 5"),
        ({"scale": ((3, 1), F32)}, "scale must have shape (divisor of 4, 1 or 256), got (3, 1)"),
        ({"scale": ((1, 4), F32)}, "scale must have shape (divisor of 4, 1 or 256), got (1, 4)"),
        ({"row_scale": ((5,), F32)}, "row_scale must have shape (4), got (5)"),
        ({"group_sums": ((4, 3), jnp.int32)}, "group_sums must have shape (4, 2), got (4, 3)"),
        ({"group_size": 48}, "group_size must be 32, 64, 128 or K and divide K=256, got 48"),
    ],
)
def test_quantize_activation_refuses(changed, text):
    results = ("q", "row_scale", "group_sums")
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        call("quantize_activation", QUANTIZE | changed, results)
    assert f"quantize_activation: {text}" in str(error.value)
    assert not any(r.any() for r in call("quantize_activation", QUANTIZE, results))


def test_quantize_activation_of_no_columns():
    parts = QUANTIZE | {"x": ((4, 0), F16), "q": ((4, 0), jnp.int8), "group_size": 0}
    _, scale, _ = call("quantize_activation", parts, ("q", "row_scale", "group_sums"))
    np.testing.assert_array_equal(scale, np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"q": ((4, 128), jnp.int8)}, "q must have shape (4, 256), got (4, 128)"),
        ({"x": ((4, 256), jnp.int8)}, "x must be float16, bfloat16 or float32"),
        ({"scale": ((0, 1), F32)}, "scale must not be empty"),
        ({"bits": 3}, "bits must be 8 or 4, got 3"),
    ],
)
def test_dequantize_activation_refuses(changed, text):
    parts = {
        "q": ((4, 256), jnp.int8),
        "scale": ((4, 1), F32),
        "x": ((4, 256), F16),
        "bits": 8,
    }
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        call("dequantize_activation", parts | changed, ("x",))
    assert f"dequantize_activation: {text}" in str(error.value)
    assert not call("dequantize_activation", parts, ("x",))[0].any()
