"""The cases that the contract tests run for every op of the table."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contract_case import ACTIVATIONS, Case, K, M, N, dense_weight
from contract_w4a8 import W4A8_CASES

from jax_awq import (
    AWQWeight,
    QuantizedActivation,
    awq_dequantize,
    awq_gemm,
    dequantize_activation,
    int4_matmul,
    int8_matmul,
    quantize_activation,
)
from jax_awq.testing import (
    Problem,
    dequantize_float64,
    quantize_activation_numpy,
    random_problem,
    unpack_bytes,
)
from jax_awq.testing_integers import random_int_problem


def _gemm(seed: int, deterministic: str = "run", **options: Any) -> Case:
    problem = random_problem(np.random.default_rng(seed), M, K, N, group_size=32, **options)
    weight, out_dtype = problem.weight, problem.out_dtype or problem.x.dtype
    has_zeros, has_bias = weight.qzeros is not None, problem.bias is not None
    static = {"layout": weight.layout, "group_size": weight.group_size}

    def arguments(x, qweight, scales, *rest):
        rest = list(rest)
        bias = rest.pop() if has_bias else None
        return x, qweight, scales, rest[0] if has_zeros else None, bias

    def fn(*operands):
        x, qweight, scales, qzeros, bias = arguments(*operands)
        return awq_gemm(
            x,
            qweight,
            scales,
            qzeros,
            bias=bias,
            activation=problem.activation,
            out_dtype=problem.out_dtype,
            deterministic=deterministic,
            **static,
        )

    def exact(*operands):
        x, qweight, scales, qzeros, bias = arguments(*operands)
        return Problem(
            x, AWQWeight(qweight, scales, qzeros, **static), bias, problem.activation, None
        ).float64()

    def dense(x, scales, bias=None):
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        y = jnp.matmul(x, dense_weight(weight, scales, x.dtype), preferred_element_type=wide)
        y = y if bias is None else y + bias.astype(wide)
        return ACTIVATIONS[problem.activation](y).astype(wide if wide == jnp.float64 else out_dtype)

    arrays = [problem.x, weight.qweight, weight.scales, weight.qzeros, problem.bias]
    operands = tuple(a for a in arrays if a is not None)
    floats = (0, 2, len(operands) - 1) if has_bias else (0, 2)
    return Case("awq_gemm", fn, exact, dense, operands, floats)


def _dequantize(seed: int, *, dtype: Any = None, **options: Any) -> Case:
    weight = random_problem(np.random.default_rng(seed), 0, K, N, group_size=32, **options).weight
    static = {"layout": weight.layout, "group_size": weight.group_size}

    def fn(*arrays):
        return awq_dequantize(*arrays, dtype=dtype, **static)

    def exact(*arrays):
        return dequantize_float64(AWQWeight(*arrays, **static))

    def dense(scales):
        return dense_weight(weight, scales, dtype or weight.dtype)

    operands = tuple(a for a in (weight.qweight, weight.scales, weight.qzeros) if a is not None)
    return Case("awq_dequantize", fn, exact, dense, operands, (1,))


def _quantize_activation(
    seed: int, *, dtype: Any, bits: int = 8, granularity: str = "token", k: int = K
) -> Case:
    """Quantized and dequantized: codes alone are no floats to differentiate."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((M, k)).astype(np.float32).astype(dtype)
    scales = {
        "token": (),
        "channel": (rng.uniform(0.01, 0.1, k).astype(np.float32),),
        "tensor": (np.asarray(0.05, np.float32),),
    }[granularity]

    def fn(x, *scale):
        qa = quantize_activation(
            x, bits=bits, granularity=granularity, scale=scale[0] if scale else None
        )
        return dequantize_activation(qa, dtype)

    def exact(x, *scale):
        codes, scale = quantize_activation_numpy(x, bits=bits, scale=scale[0] if scale else None)
        return codes * scale.astype(np.float64)

    def dense(x, *scale):
        largest, x = {8: 127, 4: 7}[bits], jax.lax.stop_gradient(x)
        wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        scale = scale[0] if scale else jnp.abs(wide).max(-1, keepdims=True) / largest
        codes = jnp.clip(jnp.round(wide / jax.lax.stop_gradient(scale)), -largest, largest)
        return (codes * scale).astype(wide.dtype if wide.dtype == jnp.float64 else dtype)

    return Case(
        "quantize_activation", fn, exact, dense, (x, *scales), tuple(range(1 + len(scales)))
    )


def _dequantize_activation(
    seed: int, *, dtype: Any, bits: int = 8, granularity: str = "token", k: int = K
) -> Case:
    rng = np.random.default_rng(seed)
    columns = k if bits == 8 else (k + 1) // 2
    q = rng.integers(-127, 128, (M, columns)).astype(np.int8)
    shape = {"token": (M,), "channel": (k,), "tensor": ()}[granularity]
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)

    def wide(scale):
        return scale[..., None] if granularity == "token" else scale

    def fn(q, scale):
        qa = QuantizedActivation(q, scale, bits=bits, granularity=granularity, k=k)
        return dequantize_activation(qa, dtype)

    def exact(q, scale):
        return unpack_bytes(q, bits, k) * np.asarray(wide(scale), np.float64)

    def dense(scale):
        codes = unpack_bytes(q, bits, k).astype(scale.dtype)
        return (codes * wide(scale)).astype(scale.dtype if scale.dtype == jnp.float64 else dtype)

    return Case("dequantize_activation", fn, exact, dense, (q, np.asarray(scale)), (1,))


def _integers(seed: int, **options: Any) -> Case:
    """Of a problem without raw sums, which have nothing to differentiate."""
    k = K if options["bits"] == 8 else K - 1
    problem = random_int_problem(np.random.default_rng(seed), M, k, N, **options)
    op = int4_matmul if problem.bits == 4 else int8_matmul
    names = [
        n for n in ("scale_a", "scale_b", "scale_c", "bias") if getattr(problem, n) is not None
    ]
    sums = problem.sums()
    static = {"k": problem.k} if problem.bits == 4 else {}

    def fn(a, b, *floats):
        return op(
            a,
            b,
            **dict(zip(names, floats, strict=True)),
            activation=problem.activation,
            out_dtype=problem.out_dtype,
            **static,
        )

    def exact(a, b, *floats):
        changes = dict(zip(names, floats, strict=True))
        return dataclasses.replace(problem, a=a, b=b, **changes).float64()

    def dense(*floats):
        by_name = dict(zip(names, floats, strict=True))
        wide = jnp.float64 if by_name["scale_b"].dtype == jnp.float64 else jnp.float32
        scale_a, scale_b = by_name["scale_a"], by_name["scale_b"]
        y = sums.astype(wide) * (scale_a if scale_a.ndim == 0 else scale_a[:, None])
        y = y * (scale_b * by_name.get("scale_c", wide(1)))
        y = y + by_name["bias"].astype(wide) if "bias" in by_name else y
        return ACTIVATIONS[problem.activation](y).astype(
            wide if wide == jnp.float64 else problem.out_dtype
        )

    operands = (problem.a, problem.b, *(getattr(problem, n) for n in names))
    return Case(op.__name__, fn, exact, dense, operands, tuple(range(2, len(operands))))


CASES = {
    "gemm": _gemm(0),
    "gemm-symmetric": _gemm(1, symmetric=True),
    "gemm-bias-silu": _gemm(2, bias=True, activation="silu"),
    "gemm-bf16-gelu": _gemm(3, dtype=jnp.bfloat16, activation="gelu"),
    "gemm-f32out": _gemm(4, bias=True, out_dtype=jnp.float32, layout="oc_major"),
    "gemm-gemv": _gemm(5, layout="gemv", bias=True, activation="gelu_tanh"),
    "gemm-batch-invariant": _gemm(12, "batch_invariant", bias=True, activation="relu"),
    "dequantize": _dequantize(6),
    "dequantize-symmetric": _dequantize(7, symmetric=True, layout="oc_major"),
    "int8": _integers(9, bits=8, out_dtype=np.float16),
    "int8-scalar-bias-silu": _integers(
        10, bits=8, scales="scalar", bias=np.float32, activation="silu", out_dtype=np.float32
    ),
    "int4-odd-bias-gelu": _integers(
        11, bits=4, bias=jnp.bfloat16, activation="gelu", out_dtype=jnp.bfloat16
    ),
    "dequantize-gemv-f32": _dequantize(8, layout="gemv", dtype=jnp.float32),
    "quantize_activation": _quantize_activation(9, dtype=np.float16),
    "quantize_activation-int4-tensor": _quantize_activation(
        10, dtype=jnp.bfloat16, bits=4, granularity="tensor"
    ),
    "quantize_activation-int4-odd-channel": _quantize_activation(
        11, dtype=np.float32, bits=4, granularity="channel", k=K - 1
    ),
    "dequantize_activation": _dequantize_activation(12, dtype=np.float16),
    "dequantize_activation-int4-tensor": _dequantize_activation(
        13, dtype=np.float32, bits=4, granularity="tensor"
    ),
    "dequantize_activation-int4-odd-channel": _dequantize_activation(
        14, dtype=jnp.bfloat16, bits=4, granularity="channel", k=K - 1
    ),
    **W4A8_CASES,
}
OF_OPS = {case.op: case for case in CASES.values()}  # one of each
