"""The cases of `awq_gemm_w4a8` and `awq_gemm_w4a4`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contract_case import ACTIVATIONS, Case, K, M, N, dense_weight

from jax_awq import AWQWeight, QuantizedActivation, awq_gemm_w4a4, awq_gemm_w4a8
from jax_awq.testing import unpack_bytes
from jax_awq.testing_w4a8 import random_w4a8_problem


def _w4a8(seed: int, *, quantized: bool = False, group_size: int = 32, **options: Any) -> Case:
    """Of float x, or of codes and their scales, whatever they stand for."""
    problem = random_w4a8_problem(
        np.random.default_rng(seed), M, K, N, group_size=group_size, **options
    )
    base = problem.base
    weight, out_dtype = base.weight, base.out_dtype or base.x.dtype
    static = {"layout": weight.layout, "group_size": weight.group_size}
    bits = 4 if problem.codes == "int4" else 8
    if quantized:
        qa = problem.quantized()
        first = [qa.q, np.asarray(qa.scale)]
    else:
        first = [base.x]
    count = len(first)
    arrays = [weight.qweight, weight.scales, weight.qzeros, base.bias]
    has_zeros, has_bias = weight.qzeros is not None, base.bias is not None
    operands = (*first, *(a for a in arrays if a is not None))

    def arguments(*operands):
        activations, rest = operands[:count], list(operands[count:])
        bias = rest.pop() if has_bias else None
        return activations, (*rest, *(() if has_zeros else (None,))), bias

    def fn(*operands):
        (x, *scale), arrays, bias = arguments(*operands)
        options: dict[str, Any] = {"granularity": problem.granularity, "scale": problem.scale}
        if quantized:
            granularity = problem.granularity
            x, options = QuantizedActivation(x, *scale, bits=bits, granularity=granularity), {}
        options |= {"bias": bias, "activation": base.activation, "out_dtype": out_dtype}
        if problem.codes == "int4":
            return awq_gemm_w4a4(x, *arrays, **options, **static)
        if not quantized:
            options["activation_dtype"] = problem.codes
        return awq_gemm_w4a8(x, *arrays, **options, **static)

    def exact(*operands):
        (x, *scale), arrays, bias = arguments(*operands)
        changed = dataclasses.replace(base, weight=AWQWeight(*arrays, **static), bias=bias)
        if not quantized:
            return dataclasses.replace(problem, base=dataclasses.replace(changed, x=x)).float64()
        # Their codes are their values where the scale is 1.
        own = np.asarray(scale[0], np.float64)
        codes = unpack_bytes(x, bits, K).astype(np.float32)
        sums = dataclasses.replace(
            problem,
            base=dataclasses.replace(changed, x=codes, bias=None, activation=None),
            granularity="tensor",
            scale=np.asarray(1, np.float32),
        ).float64() * (own[:, None] if own.ndim else own)
        return np.asarray(_finish(sums, bias))

    def _finish(sums, bias):
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            y = sums if bias is None else sums + bias.astype(np.float64)
            return np.asarray(ACTIVATIONS[base.activation](jnp.asarray(y)))

    codes, sx = problem.rounded()
    rounded = codes * sx.astype(np.float64)

    def dense(first, scales, bias=None):
        wide = jnp.float64 if first.dtype == jnp.float64 else jnp.float32
        first = first.astype(wide)
        if quantized:
            x = codes.astype(wide) * (first[:, None] if first.ndim else first)
        else:
            x = first + jax.lax.stop_gradient(rounded.astype(wide) - first)
        y = jnp.matmul(x, dense_weight(weight, scales, wide))
        y = y if bias is None else y + bias.astype(wide)
        return ACTIVATIONS[base.activation](y).astype(wide if wide == jnp.float64 else out_dtype)

    floats = (count - 1, count + 1, *((len(operands) - 1,) if has_bias else ()))
    name = "awq_gemm_w4a4" if problem.codes == "int4" else "awq_gemm_w4a8"
    return Case(name, fn, exact, dense, operands, floats)


W4A8_CASES = {
    "w4a8": _w4a8(20),
    "w4a8-bias-silu": _w4a8(21, bias=True, activation="silu", dtype=jnp.bfloat16),
    "w4a8-one-group-tensor": _w4a8(22, group_size=-1, granularity="tensor", static=True),
    "w4a8-codes-gelu": _w4a8(23, quantized=True, activation="gelu", out_dtype=np.float32),
    "w4a8-float8-symmetric": _w4a8(
        24, codes="float8_e4m3fn", symmetric=True, layout="oc_major", dtype=np.float32
    ),
    "w4a4-gemv-f32": _w4a8(25, codes="int4", layout="gemv", dtype=np.float32),
    "w4a4-codes-tensor-bias": _w4a8(
        26, codes="int4", quantized=True, granularity="tensor", bias=True
    ),
}
