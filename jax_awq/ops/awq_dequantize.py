"""The (K, N) matrix that an AWQ weight stands for."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq import _ffi
from jax_awq._batching import fold_batch
from jax_awq._checks import FLOATS, check_dtype, check_weight
from jax_awq._packing import (
    PACK_FACTOR,
    canonical_groups,
    decode_codes,
    unpack_int4,
    weight_size,
)
from jax_awq._plan import KernelPlan, reference_plan, target_of, why_reference
from jax_awq._primitive import OpDef, Sharding, apply_explicit, bind_varying, define_primitive

SYMMETRIC_ZERO = 8  # the zero point of a weight without zeros


def awq_dequantize(qweight: Any, scales: Any = None, qzeros: Any = None, *,
                   layout: str = "gemm", group_size: int | None = None,
                   dtype: Any = None) -> Array:
    """Computes ``(q - z) * s``, rounded once.

    Args:
      qweight: ``(K, N/8)`` int32 for layout "gemm", ``(N, K/8)`` for "gemv" and "oc_major", or an
        `AWQWeight` in place of all arrays.
      scales: ``(K/group_size, N)`` float16, bfloat16 or float32, weight units per code step;
        ``(N, 8 * padded words)`` for "gemv".
      qzeros: int32 zero points 0 to 15, packed like the layout says; None is 8 everywhere.
      layout: "gemm" (what almost every AWQ checkpoint on Hugging Face has), "gemv" or "oc_major".
      group_size: rows of K that share one scale, -1 for all of them; derived from `scales` where
        it can be, needed for "gemv".
      dtype: of the result, float16, bfloat16 or float32; default that of `scales`.

      Each array may have one leading batch dimension E; one without it is shared.

    Returns:
      ``(K, N)``, or ``(E, K, N)``. In float16 bit for bit what AutoAWQ's dequantize_gemm gives.

    Raises:
      ValueError: a shape or a value disagrees with the table above.
      TypeError: a dtype disagrees with it.

    Source: AutoAWQ 0.2.9, awq/utils/packing_utils.py, dequantize_gemm.
    """
    arrays, layout, group_size = unpack_weight(
        "awq_dequantize", qweight, scales, qzeros, layout, group_size)
    return _awq_dequantize(*arrays, layout=layout, group_size=group_size, dtype=dtype,
                           variant=forced_variant())


@functools.partial(jax.jit, inline=True,
                   static_argnames=("layout", "group_size", "dtype", "variant"))
def _awq_dequantize(qweight, scales, qzeros, *, layout, group_size, dtype, variant):
    operands, params = canonical_weight(
        "awq_dequantize", qweight, scales, qzeros, layout=layout, group_size=group_size)
    dtype = jnp.dtype(scales.dtype if dtype is None else dtype)
    check_dtype("awq_dequantize", "the result", jax.ShapeDtypeStruct((), dtype), *FLOATS)
    (weight,) = apply_explicit(
        "awq_dequantize", functools.partial(bind_varying, awq_dequantize_p), *operands,
        dtype=dtype, variant="reference" if variant == "reference" else "", **params)
    return weight


def forced_variant() -> str:
    """`JAX_AWQ_FORCE`: the kernel variant to run, for tests. Part of every jit key."""
    return os.environ.get("JAX_AWQ_FORCE", "")


def unpack_weight(op: str, qweight, scales, qzeros, layout, group_size):
    """((qweight, scales, qzeros), layout, group_size) of three arrays or of one `AWQWeight`."""
    if not hasattr(qweight, "qweight"):
        if scales is None:
            raise ValueError(f"{op}: scales are needed unless qweight is an AWQWeight")
        return (qweight, scales, qzeros), layout, group_size
    weight = qweight
    given = [name for name, is_given in (
        ("scales", scales is not None), ("qzeros", qzeros is not None),
        ("layout", layout not in ("gemm", weight.layout)),
        ("group_size", group_size is not None)) if is_given]
    if given:
        raise ValueError(f"{op}: an AWQWeight brings its own {', '.join(given)}")
    return (weight.qweight, weight.scales, weight.qzeros), weight.layout, weight.group_size


def canonical_weight(op: str, qweight, scales, qzeros, *, layout, group_size):
    """Operands and parameters of the primitives, which know two layouts of `qweight` only.

    The scales and zeros of "gemv" and "oc_major" are rearranged here: they are 1/32 of the weight
    or less, and the kernels then have one form of them.
    """
    group_size = check_weight(op, qweight, scales, qzeros, layout=layout, group_size=group_size)
    arrays = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    for name, array in arrays.items():
        if array is not None and array.ndim > 3:
            raise ValueError(f"{op}: {name} must have 2 dimensions, or 3 with a leading batch, "
                             f"got shape {array.shape}")
    check_batch(op, {name: a.shape[:-2] for name, a in arrays.items() if a is not None})
    k, _ = weight_size(qweight.shape, layout)
    groups = 1 if group_size == -1 else k // group_size
    scales, qzeros = canonical_groups(scales, qzeros, layout=layout, groups=groups)
    operands = (qweight, scales) if qzeros is None else (qweight, scales, qzeros)
    # One group stays -1: its size follows K where K is split over devices.
    return operands, {"layout": "gemm" if layout == "gemm" else "oc_major",
                      "group_size": -1 if groups == 1 else group_size,
                      "symmetric": qzeros is None}


def check_batch(op: str, leading: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The batch dimension that operands share, as () or (E,)."""
    batched = {name: shape for name, shape in leading.items() if shape}
    if len(set(batched.values())) > 1:
        told = ", ".join(f"{name} {shape[0]}" for name, shape in batched.items())
        raise ValueError(f"{op}: leading batch dimensions must agree, got {told}")
    return next(iter(batched.values()), ())


def factors(layout: str, group_size: int) -> tuple[dict[str, str], dict[str, int]]:
    """Dimensions of a weight in the notation of Shardy, and the factors that are never split.

    K is split between groups only, and N between words of zeros.
    """
    if group_size == -1:  # the one row of scales is "u", so K may be split at any row
        rows, words = ("k", "k") if layout == "gemm" else ("(k q)", "k")
        whole, groups = {"u": 1}, "u"
    elif layout == "gemm":
        rows, words, whole, groups = "(g s)", "(g s)", {"s": group_size}, "g"
    else:
        rows, words, whole, groups = "(g w q)", "(g w)", {"w": group_size // PACK_FACTOR}, "g"
    if layout != "gemm":
        whole["q"] = PACK_FACTOR
    dims = {"K": rows, "N": "(n p)", "scales": f"{groups} (n p)", "qzeros": f"{groups} n",
            "qweight": f"{rows} n" if layout == "gemm" else f"(n p) {words}"}
    return dims, {**whole, "p": PACK_FACTOR}


def code_minus_zero(qweight, qzeros, *, layout, dtype=jnp.float32) -> Array:
    """The integers ``q - z`` as ``(..., K/G, G, N)``, exact in every float dtype.

    `qzeros` has one row for each group; None is one group of zeros 8.
    """
    codes = decode_codes(qweight, layout)
    zeros = (jnp.full((1, codes.shape[-1]), SYMMETRIC_ZERO, jnp.int8) if qzeros is None
             else unpack_int4(qzeros))
    return grouped(codes, zeros.shape[-2]).astype(dtype) - zeros[..., None, :].astype(dtype)


def grouped(array: Array, groups: int) -> Array:
    *batch, k, n = array.shape
    return array.reshape(*batch, groups, k // groups, n)


def dequantize(qweight, scales, qzeros, *, layout, dtype) -> Array:
    codes = code_minus_zero(qweight, qzeros, layout=layout)
    groups = scales.shape[-2]
    codes = codes.reshape(*codes.shape[:-3], groups, -1, codes.shape[-1])
    # q - z has 5 bits, so its float32 product with a 16-bit scale is exact: one rounding follows.
    weight = (codes * scales[..., None, :].astype(jnp.float32)).astype(dtype)
    return weight.reshape(*weight.shape[:-3], weight.shape[-3] * weight.shape[-2],
                          weight.shape[-1])


def sum_over_groups(products: Array, qweight, scales, qzeros, *, layout) -> Array:
    """Cotangent of `scales` from that of the weight, float32 (..., K, N)."""
    codes = code_minus_zero(qweight, qzeros, layout=layout)
    codes = codes.reshape(*codes.shape[:-3], codes.shape[-3] * codes.shape[-2], codes.shape[-1])
    result = grouped(products * codes, scales.shape[-2]).sum(-2)
    return sum_batch(result, scales)


def sum_batch(array: Array, like) -> Array:
    """Sums a batch dimension that `like`, an operand shared over the batch, does not have."""
    array = array.sum(0) if array.ndim > len(like.shape) else array
    return array.astype(like.dtype)


def _operands(operands, symmetric):
    return (*operands, None) if symmetric else operands


def _out_avals(*operands, layout, group_size, symmetric, dtype, variant):
    batch = next((o.shape[:1] for o in operands if o.ndim == 3), ())
    k, n = weight_size(operands[0].shape, layout)
    return (jax.ShapeDtypeStruct((*batch, k, n), dtype),)


def _reference(*operands, layout, group_size, symmetric, dtype, variant):
    qweight, scales, qzeros = _operands(operands, symmetric)
    return (dequantize(qweight, scales, qzeros, layout=layout, dtype=dtype),)


def _plan(device, qweight, scales, *rest, layout, group_size, symmetric, dtype, variant):
    target = target_of(device)
    reason = why_reference(device, target, variant)
    if not reason and scales.dtype == jnp.float32:
        reason = "scales are float32"
    if not reason and any(isinstance(d, int) and d == 0 for d in qweight.shape):
        reason = "the weight is empty"
    if reason:
        return reference_plan("awq_dequantize", reason)
    return KernelPlan(op="awq_dequantize", route="fused", kernel="awq_dequantize", tile=(),
                      split_k=1, workspace_bytes=0, accumulator="float32", deterministic=True,
                      refused={}, reason="")


def _kernel(plan, *operands, layout, group_size, symmetric, dtype, variant):
    qweight, scales, qzeros = _operands(operands, symmetric)
    k, _ = weight_size(qweight.shape, layout)
    (result,) = _out_avals(*operands, layout=layout, group_size=group_size, symmetric=symmetric,
                           dtype=dtype, variant=variant)
    return (_ffi.call("awq_dequantize", result, qweight, scales,
                      jnp.zeros((0,), jnp.int32) if qzeros is None else qzeros,
                      group_size=k if group_size == -1 else group_size, layout=layout),)


def _batching(bind, operands, dims, **params):
    return fold_batch(bind, operands, dims, [2] * len(operands), **params)


def _jvp(bind, primals, tangents, **params):
    qweight, _, *qzeros = primals
    results = bind(*primals, **params)
    return results, [None] if tangents[1] is None else bind(qweight, tangents[1], *qzeros, **params)


def _transpose(bind, cotangents, operands, index, *, layout, symmetric, **params):
    qweight, scales, qzeros = _operands(operands, symmetric)
    return sum_over_groups(cotangents[0].astype(jnp.float32), qweight, scales, qzeros,
                           layout=layout)


def _sharding(*operands, layout, group_size, symmetric, **params):
    dims, whole = factors(layout, group_size)
    names = ("qweight", "scales") if symmetric else ("qweight", "scales", "qzeros")
    terms = [("b " if o.ndim == 3 else "") + dims[name]
             for name, o in zip(names, operands, strict=True)]
    batch = "b " if any(o.ndim == 3 for o in operands) else ""
    return Sharding(f"{', '.join(terms)} -> {batch}{dims['K']} {dims['N']}", whole, ())


def _partial(*operands, **params):
    return operands, params, lambda weight: (weight,)


awq_dequantize_p = define_primitive(OpDef(
    name="awq_dequantize", out_avals=_out_avals, reference=_reference, plan=_plan, kernel=_kernel,
    batching=_batching, jvp=_jvp, transpose=_transpose, sharding=_sharding, partial=_partial))
