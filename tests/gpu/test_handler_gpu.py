"""The FFI handlers called without the Python layer: an exported program can hold any call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.variants import F16, F32, assert_same_bits, refusals

from jax_awq import _ffi, awq_gemm
from jax_awq.testing import assert_close, random_problem

pytestmark = pytest.mark.gpu

M, K, N, GROUPS = 4, 256, 128, 2
GEMM = {
    "x": ((M, K), F16),
    "qweight": ((K, N // 8), jnp.int32),
    "scales": ((GROUPS, N), F16),
    "qzeros": ((GROUPS, N // 8), jnp.int32),
    "bias": ((N,), F16),
    "y": ((M, N), F16),
    "group_size": 128,
    "layout": "gemm",
    "activation": "none",
    "split_k": 0,
    "transpose": False,
    "batch_invariant": False,
    "variant": "",
}
DEQUANTIZE = {name: GEMM[name] for name in ("qweight", "scales", "qzeros", "group_size", "layout")}
DEQUANTIZE["w"] = ((K, N), F16)


def call(op, parts):
    """Calls the handler with zeros in the given shapes and dtypes."""
    attributes = {n: v for n, v in parts.items() if not isinstance(v, tuple)}
    (result,) = (jax.ShapeDtypeStruct(*parts[n]) for n in ("y", "w") if n in parts)
    operands = [
        jnp.zeros(*v) for n, v in parts.items() if n not in attributes and n not in ("y", "w")
    ]
    if op == "awq_gemm":
        attributes["workspace_bytes"] = 0
    return np.asarray(_ffi.call(op, result, *operands, **attributes))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"x": ((K,), F16)}, "x must have rank 2 or 3, got 1"),
        ({"x": ((M, N), F16)}, "x must have shape (4, 256), got (4, 128)"),
        ({"x": ((M, K), jnp.int8)}, "x must be float16, bfloat16 or float32"),
        ({"x": ((M, K), F32)}, "no kernel takes this call: x is float32"),
        ({"qweight": ((K, N // 8), jnp.int8)}, ""),
        (
            {"qweight": ((3, K, N // 8), jnp.int32), "x": ((2, M, K), F16)},
            "x has batch size 2, others have 3",
        ),
        ({"scales": ((N, GROUPS), F16)}, "scales must have shape (2, 128), got (128, 2)"),
        ({"scales": ((GROUPS, N), jnp.int16)}, "scales must be float16, bfloat16 or float32"),
        ({"scales": ((GROUPS, N), F32)}, "no kernel takes this call: scales are float32"),
        ({"qzeros": ((GROUPS, N), jnp.int32)}, "qzeros must have shape (2, 16), got (2, 128)"),
        ({"bias": ((K,), F16)}, "bias must have shape (128), got (256)"),
        ({"y": ((M, K), F16)}, "y must have shape (4, 128), got (4, 256)"),
        ({"y": ((2, M, N), F16)}, "y must have batch size 1"),
        ({"y": ((M, N), jnp.int16)}, "y must be float16, bfloat16 or float32"),
        ({"group_size": 48}, "group_size must be 32, 64, 128 or K, got 48"),
        (
            {"x": ((M, 96), F16), "qweight": ((96, N // 8), jnp.int32), "group_size": 64},
            "K=96 must be a multiple of group_size 64",
        ),
        ({"layout": "gemv"}, "unknown layout gemv"),
        ({"activation": "tanh"}, "unknown activation tanh"),
        ({"split_k": -1}, "split_k must not be negative, got -1"),
        ({"variant": "mma_7"}, "unknown variant mma_7"),
        ({"variant": "dequantize_dot"}, "variant dequantize_dot cannot run: only a fused kernel"),
        (
            {"x": ((33, K), F16), "y": ((33, N), F16), "variant": "decode_16"},
            "variant decode_16 cannot run: more than 16 rows of x",
        ),
    ],
    ids=lambda v: v or "dtype" if isinstance(v, str) else "",
)
def test_awq_gemm_refuses(changed, text):
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        call("awq_gemm", GEMM | changed)
    if text:  # otherwise XLA refuses before the handler is asked
        assert f"awq_gemm: {text}" in str(error.value)
    assert not call("awq_gemm", GEMM).any()  # the process and the device are as they were


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"w": ((N, K), F16)}, "w must have shape (256, 128), got (128, 256)"),
        ({"w": ((K, N), jnp.int16)}, "w must be float16, bfloat16 or float32"),
        ({"scales": ((GROUPS, 64), F16)}, "scales must have shape (2, 128), got (2, 64)"),
        ({"layout": "exllama"}, "unknown layout exllama"),
    ],
)
def test_awq_dequantize_refuses(changed, text):
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        call("awq_dequantize", DEQUANTIZE | changed)
    assert f"awq_dequantize: {text}" in str(error.value)
    assert not call("awq_dequantize", DEQUANTIZE).any()


def test_missing_attribute():
    with pytest.raises(jax.errors.JaxRuntimeError):
        call("awq_gemm", {n: v for n, v in GEMM.items() if n != "split_k"})


@pytest.mark.parametrize("variant", ["decode_8", "mma_32", "wgmma_16"])
def test_smaller_workspace_than_planned(rng, variant, force):
    """As where a program was exported for another GPU: fewer splits, and the same result."""
    p = random_problem(rng, M, 1024, N, group_size=128)
    refused = refusals(awq_gemm, p.x, p.weight)
    if variant in refused:
        pytest.skip(f"{variant} {refused[variant]}")
    results = []
    for workspace_bytes in (0, 2 * M * N * 4, 12 * M * N * 4):
        y = _ffi.call(
            "awq_gemm",
            jax.ShapeDtypeStruct((M, N), F16),
            jnp.asarray(p.x),
            p.weight.qweight,
            p.weight.scales,
            p.weight.qzeros,
            jnp.zeros((0,), F16),
            group_size=128,
            layout="gemm",
            activation="none",
            split_k=12,
            transpose=False,
            batch_invariant=False,
            variant=variant,
            workspace_bytes=workspace_bytes,
        )
        results.append(np.asarray(y))
        assert_close(results[-1], p.float64(), p.reference())
    force(variant)
    assert_same_bits(results[0], awq_gemm(p.x, p.weight, split_k_iters=1))


@pytest.mark.parametrize("size", [16, 4096 + 16, 3 * 1024 * 1024 + 48])
@pytest.mark.parametrize("launch", range(7))
def test_copy(rng, size, launch):
    """What benchmarks hold kernels against moves every byte."""
    x = rng.integers(0, 256, size, np.uint8)
    y = _ffi.call("copy", jax.ShapeDtypeStruct(x.shape, x.dtype), jnp.asarray(x), shape=launch)
    assert_same_bits(y, x)


@pytest.mark.parametrize(
    ("size", "result", "launch", "text"),
    [
        (24, 24, 0, "copy: x must be a multiple of 16 bytes, got 24"),
        (32, 16, 0, "copy: y must have 32 bytes as x, got 16"),
        (32, 32, 7, "copy: shape must be below 7, got 7"),
    ],
)
def test_copy_refuses(size, result, launch, text):
    y = jax.ShapeDtypeStruct((result,), jnp.uint8)
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        np.asarray(_ffi.call("copy", y, jnp.zeros(size, jnp.uint8), shape=launch))
