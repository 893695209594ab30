"""The (K, N) matrix that an AWQ weight stands for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq import _ffi
from jax_awq._batching import fold_batch
from jax_awq._checks import FLOATS, check_static, read_out_dtype
from jax_awq._packing import weight_size
from jax_awq._plan import kernel_plan, reference_plan, target_of, why_reference
from jax_awq._primitive import OpDef, Sharding, apply_explicit, bind_varying, define_primitive
from jax_awq.ops import _weight


def awq_dequantize(
    qweight: Any,
    scales: Any = None,
    qzeros: Any = None,
    *,
    layout: str = "gemm",
    group_size: int | None = None,
    dtype: Any = None,
) -> Array:
    """Computes ``(q - z) * s``, rounded once.

    Args:
      qweight: ``(K, N/8)`` int32 for layout "gemm", ``(N, K/8)`` for "gemv" and "oc_major", or an
        `AWQWeight` or `PermutedWeight` in place of all arrays.
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
    check_static("awq_dequantize", layout=layout, group_size=group_size, dtype=dtype)
    permuted = qweight if hasattr(qweight, "perm") else None
    qweight = qweight if permuted is None else permuted.weight
    arrays, layout, group_size = _weight.unpack_weight(
        "awq_dequantize", qweight, scales, qzeros, layout, group_size
    )
    dense = _awq_dequantize(
        *arrays, layout=layout, group_size=group_size, dtype=dtype, variant=_weight.forced_variant()
    )
    return dense if permuted is None else permuted.restore_rows(dense)


@functools.partial(
    jax.jit, inline=True, static_argnames=("layout", "group_size", "dtype", "variant")
)
def _awq_dequantize(qweight, scales, qzeros, *, layout, group_size, dtype, variant):
    operands, params = _weight.canonical_weight(
        "awq_dequantize", qweight, scales, qzeros, layout=layout, group_size=group_size
    )
    dtype = scales.dtype if dtype is None else dtype
    dtype = read_out_dtype("awq_dequantize", dtype, *FLOATS, name="dtype")
    (weight,) = apply_explicit(
        "awq_dequantize",
        functools.partial(bind_varying, awq_dequantize_p),
        *operands,
        dtype=dtype,
        variant="reference" if variant == "reference" else "",
        **params,
    )
    return weight


def _operands(operands, symmetric):
    return (*operands, None) if symmetric else operands


def _out_avals(*operands, layout, group_size, symmetric, dtype, variant):
    batch = next((o.shape[:1] for o in operands if o.ndim == 3), ())
    k, n = weight_size(operands[0].shape, layout)
    return (jax.ShapeDtypeStruct((*batch, k, n), dtype),)


def _reference(*operands, layout, group_size, symmetric, dtype, variant):
    qweight, scales, qzeros = _operands(operands, symmetric)
    return (_weight.dequantize(qweight, scales, qzeros, layout=layout, dtype=dtype),)


def _plan(device, qweight, scales, *rest, layout, group_size, symmetric, dtype, variant):
    target = target_of(device)
    reason = why_reference(device, target, variant)
    if not reason and scales.dtype == jnp.float32:
        reason = "scales are float32"
    if not reason and any(isinstance(d, int) and d == 0 for d in qweight.shape):
        reason = "the weight is empty"
    reason = reason or _weight.no_kernel(*weight_size(qweight.shape, layout), group_size)
    if reason:
        return reference_plan("awq_dequantize", reason)
    return kernel_plan("awq_dequantize", "awq_dequantize")


def _kernel(plan, *operands, layout, group_size, symmetric, dtype, variant):
    qweight, scales, qzeros = _operands(operands, symmetric)
    k, _ = weight_size(qweight.shape, layout)
    (result,) = _out_avals(
        *operands,
        layout=layout,
        group_size=group_size,
        symmetric=symmetric,
        dtype=dtype,
        variant=variant,
    )
    return (
        _ffi.call(
            "awq_dequantize",
            result,
            qweight,
            scales,
            jnp.zeros((0,), jnp.int32) if qzeros is None else qzeros,
            group_size=k if group_size == -1 else group_size,
            layout=layout,
        ),
    )


def _batching(bind, operands, dims, **params):
    return fold_batch(bind, operands, dims, [2] * len(operands), **params)


def _jvp(bind, primals, tangents, **params):
    qweight, _, *qzeros = primals
    results = bind(*primals, **params)
    return results, [None] if tangents[1] is None else bind(qweight, tangents[1], *qzeros, **params)


def _transpose(bind, cotangents, operands, index, *, layout, symmetric, **params):
    qweight, scales, qzeros = _operands(operands, symmetric)
    return _weight.sum_over_groups(
        cotangents[0].astype(jnp.float32), qweight, scales, qzeros, layout=layout
    )


def _sharding(*operands, layout, group_size, symmetric, **params):
    dims, whole = _weight.factors(layout, group_size)
    names = ("qweight", "scales") if symmetric else ("qweight", "scales", "qzeros")
    terms = [
        ("b " if o.ndim == 3 else "") + dims[name] for name, o in zip(names, operands, strict=True)
    ]
    batch = "b " if any(o.ndim == 3 for o in operands) else ""
    return Sharding(f"{', '.join(terms)} -> {batch}{dims['K']} {dims['N']}", whole, ())


def _partial(summed_axes, *operands, **params):
    return operands, params, lambda weight: (weight,)


awq_dequantize_p = define_primitive(
    OpDef(
        name="awq_dequantize",
        out_avals=_out_avals,
        reference=_reference,
        plan=_plan,
        kernel=_kernel,
        batching=_batching,
        jvp=_jvp,
        transpose=_transpose,
        sharding=_sharding,
        partial=_partial,
    )
)
