"""Quantized activations back to floats."""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq import _ffi
from jax_awq._checks import FLOATS, check_static, read_out_dtype
from jax_awq._plan import kernel_plan, reference_plan, target_of, why_reference
from jax_awq._primitive import OpDef, Sharding, apply_explicit, bind_varying, define_primitive
from jax_awq.ops import _activation, _weight
from jax_awq.ops._activation import QuantizedActivation


def dequantize_activation(qa: QuantizedActivation, dtype: Any = jnp.float32) -> Array:
    """Computes ``q * scale`` in float32, converted to `dtype`.

    Differentiable in `scale`, of which it is a linear function; the codes are integers.

    Args:
      qa: from `quantize_activation`.
      dtype: of the result, float16, bfloat16 or float32.

    Returns:
      ``(..., K)``.

    Raises:
      TypeError: `qa` is no `QuantizedActivation`, or `dtype` is another.
      ValueError: 4-bit codes of a symbolic K (`jax.export`) that may be odd.
    """
    if not isinstance(qa, QuantizedActivation):
        raise TypeError(
            f"dequantize_activation: qa must be a QuantizedActivation, got {type(qa).__name__}"
        )
    check_static("dequantize_activation", dtype=dtype)
    return _dequantize_activation(
        qa,
        dtype=dtype,
        variant="reference" if _weight.forced_variant() == "reference" else "",
    )


@functools.partial(jax.jit, inline=True, static_argnames=("dtype", "variant"))
def _dequantize_activation(qa, *, dtype, variant):
    dtype = read_out_dtype("dequantize_activation", dtype, *FLOATS, name="dtype")
    odd = qa.k % 2 if qa.bits == 4 else 0
    if not isinstance(odd, numbers.Integral):  # of a symbolic K
        raise ValueError(
            "dequantize_activation: K of 4-bit codes must be a number, or symbolic and known to be "
            f"even, as 2*k is; got {qa.k}"
        )
    shape = list(qa.scale.shape)
    columns = [shape.pop()] if qa.granularity == "channel" else [1]
    scale = qa.scale.reshape(*shape, *[1] * (qa.ndim - 1 - len(shape)), *columns)
    (x,) = apply_explicit(
        "dequantize_activation",
        _on_rows,
        qa.q,
        scale,
        bits=qa.bits,
        odd=bool(odd),
        dtype=dtype,
        variant=variant,
    )
    return x


def _on_rows(q, scale, **params):
    """Folds the free dimensions of `q`."""
    (x,) = bind_varying(dequantize_activation_p, *_activation.fold_free(q, scale), **params)
    return (x.reshape(*q.shape[:-1], x.shape[-1]),)


def _k(q, bits, odd):
    return q.shape[-1] if bits == 8 else 2 * q.shape[-1] - odd


def _out_avals(q, scale, *, bits, odd, dtype, variant):
    return (jax.ShapeDtypeStruct((*q.shape[:-1], _k(q, bits, odd)), dtype),)


def _reference(q, scale, *, bits, odd, dtype, variant):
    codes = _activation.unpack_codes(q, bits, _k(q, bits, odd))
    return ((codes.astype(jnp.float32) * scale).astype(dtype),)


def _plan(device, q, scale, *, bits, odd, dtype, variant):
    reason = why_reference(device, target_of(device), variant)
    if not reason and any(isinstance(d, int) and d == 0 for d in q.shape):
        reason = "q is empty"
    if not reason and isinstance(q.shape[-1], int) and _k(q, bits, odd) >= 2**31:
        reason = "K is not below 2**31"
    if reason:
        return reference_plan("dequantize_activation", reason)
    return kernel_plan("dequantize_activation", "dequantize_activation")


def _kernel(plan, q, scale, *, bits, odd, dtype, variant):
    rows = math.prod(q.shape[:-1])
    k = _k(q, bits, odd)
    x = _ffi.call(
        "dequantize_activation",
        jax.ShapeDtypeStruct((rows, k), dtype),
        q.reshape(rows, q.shape[-1]),
        scale.reshape(-1, scale.shape[-1]),
        bits=bits,
    )
    return (x.reshape(*q.shape[:-1], k),)


def _jvp(bind, primals, tangents, **params):
    results = bind(*primals, **params)
    return results, [None] if tangents[1] is None else bind(primals[0], tangents[1], **params)


def _transpose(bind, cotangents, operands, index, *, bits, odd, **params):
    q, scale = operands
    codes = _activation.unpack_codes(q, bits, _k(q, bits, odd))
    products = cotangents[0].astype(jnp.float32) * codes.astype(jnp.float32)
    shared = [i for i, size in enumerate(scale.shape) if size == 1]
    return products.sum(shared, keepdims=True)


def _sharding(q, scale, *, bits, odd, dtype, variant):
    shape = (*q.shape[:-1], _k(q, bits, odd))
    dims, whole = _activation.factors(shape[-1], bits)
    rows = " ".join(f"m{i}" for i in range(len(shape) - 1))
    term, ones = _activation.scale_factors(shape, scale, dims["K"])
    return Sharding(f"{rows} {dims['q']}, {term} -> {rows} {dims['K']}", {**whole, **ones}, ())


def _partial(summed_axes, *operands, **params):
    return operands, params, lambda x: (x,)


dequantize_activation_p = define_primitive(
    OpDef(
        name="dequantize_activation",
        out_avals=_out_avals,
        reference=_reference,
        plan=_plan,
        kernel=_kernel,
        batching=_activation.fold_batch,
        jvp=_jvp,
        transpose=_transpose,
        sharding=_sharding,
        partial=_partial,
    )
)
