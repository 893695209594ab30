"""`awq_dequantize` on a GPU: bit for bit the float64 value rounded once."""

import jax
import jax.numpy as jnp
import pytest
from gpu.variants import BF16, F16, F32, all_as_first, assert_same_bits, run_twice

from jax_awq import AWQWeight, awq_dequantize, plan
from jax_awq.testing import dequantize_float64, random_weight

pytestmark = pytest.mark.gpu

CASES = (
    # K, N, group_size, layout, scales, options
    (256, 136, 32, "gemm", F16, {}),
    (256, 72, 64, "gemm", BF16, {}),
    (1152, 1000, 128, "gemm", F16, {"symmetric": True}),
    (100, 264, -1, "gemm", F16, {}),
    (96, 8, -1, "gemm", BF16, {"symmetric": True}),
    (256, 136, 64, "gemv", F16, {}),
    (384, 72, 128, "gemv", BF16, {"symmetric": True}),
    (1120, 1000, 32, "oc_major", F16, {}),
    (72, 2056, -1, "oc_major", BF16, {}),
    (256, 136, 32, "gemm", F16, {"batch": (3,)}),
    (256, 72, 64, "oc_major", BF16, {"batch": (3,)}),
)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(("k", "n", "group_size", "layout", "scales", "options"), CASES)
def test_bits(rng, k, n, group_size, layout, scales, options, dtype):
    weight = random_weight(rng, k, n, group_size=group_size, dtype=scales, layout=layout, **options)
    assert plan("awq_dequantize", weight).route == "fused"
    wanted = dequantize_float64(weight).astype(dtype)
    (w,) = run_twice(lambda weight: awq_dequantize(weight, dtype=dtype), (weight,), wanted)
    assert_same_bits(w, wanted)


def test_the_kernel_runs(rng):
    assert plan("awq_dequantize", random_weight(rng, 64, 8, group_size=32)).route == "fused"


@pytest.mark.parametrize("mapped", ["qweight", "scales", "qzeros"])
def test_mapped(rng, mapped):
    """What is not mapped is shared by the batch."""
    batch = random_weight(rng, 256, 136, group_size=64, batch=(3,))
    axes = [0 if name == mapped else None for name in ("qweight", "scales", "qzeros")]
    arrays = [
        a if axis == 0 else a[0]
        for a, axis in zip((batch.qweight, batch.scales, batch.qzeros), axes, strict=True)
    ]
    w = jax.vmap(lambda *a: awq_dequantize(AWQWeight(*a)), in_axes=axes)(*arrays)
    for entry in range(3):
        one = AWQWeight(
            *(a[entry] if axis == 0 else a for a, axis in zip(arrays, axes, strict=True))
        )
        assert_same_bits(w[entry], dequantize_float64(one).astype(F16))


@pytest.mark.parametrize("layout", ["gemm", "oc_major"])
@pytest.mark.xdist_group("much_memory")
def test_more_than_2_to_the_31_values(rng, layout):
    """The same 1024 rows again and again, so that all of them can be compared where they are."""
    k, n, copies = 1024, 36864, 64
    part = random_weight(rng, k, n, group_size=128, layout=layout)
    along_k = {"gemm": (copies, 1), "oc_major": (1, copies)}[layout]
    weight = AWQWeight(
        jnp.tile(part.qweight, along_k),
        jnp.tile(part.scales, (copies, 1)),
        jnp.tile(part.qzeros, (copies, 1)),
        layout=layout,
        group_size=128,
    )
    assert weight.shape[0] * n > 2**31
    w = awq_dequantize(weight).reshape(copies, k, n)
    assert_same_bits(w[0], dequantize_float64(part).astype(F16))
    assert all_as_first(w)
