"""Float activations as int8 or int4 codes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_awq import _ffi
from jax_awq._checks import (
    FLOATS,
    check_choice,
    check_dtype,
    check_shape,
    check_static,
    read_integer,
    read_scale,
)
from jax_awq._plan import kernel_plan, reference_plan, target_of, why_reference
from jax_awq._primitive import OpDef, Sharding, apply_explicit, bind_varying, define_primitive
from jax_awq.ops import _activation, _weight
from jax_awq.ops._activation import GRANULARITIES, LARGEST_CODE, QuantizedActivation

_KERNEL_GROUP_SIZES = (32, 64, 128)


def quantize_activation(
    x: Any,
    *,
    bits: int = 8,
    granularity: str = "token",
    scale: Any = None,
    group_size: int | None = None,
) -> QuantizedActivation:
    """Computes ``q = round(x * (1 / scale))``, ties to even, and `scale` where none is given.

    A computed scale is ``absmax * (1 / 127)``, for 4 bits ``absmax * (1 / 7)``, over a row or over
    all of `x`. Every step is rounded to float32, so that kernels and plain JAX have the same bits.

    - Zeros have scale 0 and codes 0; so has everything whose scale would be below 2**-100.
    - With a NaN the scale is NaN, with an infinity (and no NaN) it is infinite, and the codes are
      0: what is dequantized is NaN throughout, so neither gets lost.
    - With a given scale codes saturate, infinities too, and NaN becomes 0: there is no place to
      mark it. A given scale that is not in 2**-100 to 2**125 makes codes 0.

    Codes are integers: no derivative goes through them, nor through a computed scale. (A
    straight-through estimate is a matter of the product that takes the codes.)

    Args:
      x: ``(..., K)`` float16, bfloat16 or float32, activations.
      bits: 8, or 4 for two codes a byte.
      granularity: "token" (a scale for every row, computed), "channel" (for every column, given)
        or "tensor" (a single one, computed unless given).
      scale: float, activation units per code step, as from `calibrate_activation`; ``(K,)`` for
        "channel", ``()`` for "tensor".
      group_size: divisor of K, -1 for K: also gives the sum of the codes of each group, by which
        a product with AWQ weights corrects for their zero points. None gives none.

    Returns:
      `QuantizedActivation`.

    Raises:
      ValueError: a shape or a value disagrees with the table above.
      TypeError: a dtype disagrees with it.
    """
    check_static("quantize_activation", bits=bits, granularity=granularity, group_size=group_size)
    return _quantize_activation(
        x,
        scale,
        bits=bits,
        granularity=granularity,
        group_size=group_size,
        variant="reference" if _weight.forced_variant() == "reference" else "",
    )


@functools.partial(
    jax.jit, inline=True, static_argnames=("bits", "granularity", "group_size", "variant")
)
def _quantize_activation(x, scale, *, bits, granularity, group_size, variant):
    op = "quantize_activation"
    check_dtype(op, "x", x, *FLOATS)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have shape (..., K), got ()")
    k = x.shape[-1]
    check_choice(op, "bits", bits, tuple(LARGEST_CODE))
    check_choice(op, "granularity", granularity, GRANULARITIES)
    if granularity == "token" and scale is not None:
        raise ValueError(f"{op}: scale must be None for granularity 'token', got one")
    if granularity == "channel" and scale is None:
        raise ValueError(f"{op}: granularity 'channel' needs scale, got None")
    if group_size is not None:
        group_size = read_integer(op, "group_size", group_size)
    groups = 0 if group_size is None else k if group_size == -1 else group_size
    if group_size is not None and (groups < 1 or k % groups):
        raise ValueError(f"{op}: group_size must be -1 or a divisor of K={k}, got {group_size}")
    if granularity == "tensor" and scale is None:
        # XLA's own reduction, which also knows how to reduce over devices.
        scale = _activation.scale_of(_activation.absmax_of(lax.stop_gradient(x)), bits)
    scale = read_scale(scale)
    if scale is not None:
        check_dtype(op, "scale", scale, *FLOATS)
        check_shape(op, "scale", scale, (k,) if granularity == "channel" else ())
        scale = scale.astype(jnp.float32)
    q, *rest = apply_explicit(
        op,
        _on_rows,
        x,
        *(() if scale is None else (scale.reshape(*[1] * (x.ndim - 1), scale.size),)),
        bits=bits,
        group_size=groups,
        variant=variant,
    )
    scale = rest.pop(0) if scale is None else scale
    return QuantizedActivation(q, scale, *rest, bits=bits, granularity=granularity, k=k)


def _on_rows(x, scale=None, **params):
    """Folds the free dimensions of `x`."""
    operands = _activation.fold_free(x, scale)
    results = bind_varying(quantize_activation_p, *operands, **params)
    rows = operands[0].ndim - 1
    return tuple(r.reshape(*x.shape[:-1], *r.shape[rows:]) for r in results)


def _out_avals(x, *scale, bits, group_size, variant):
    *rows, k = x.shape
    avals = [jax.ShapeDtypeStruct((*rows, _activation.packed_size(k, bits)), jnp.int8)]
    if not scale:
        avals.append(jax.ShapeDtypeStruct(tuple(rows), jnp.float32))
    if group_size:
        avals.append(jax.ShapeDtypeStruct((*rows, k // group_size), jnp.int32))
    return tuple(avals)


def _reference(x, *scale, bits, group_size, variant):
    results = []
    if not scale:
        results = [_activation.scale_of(_activation.absmax_of(x, axis=-1), bits)]
        scale = (results[0][..., None],)
    codes = _activation.codes_of(x, scale[0], bits)
    if group_size:
        groups = codes.reshape(*codes.shape[:-1], codes.shape[-1] // group_size, group_size)
        results.append(groups.sum(-1, dtype=jnp.int32))
    return (_activation.pack_codes(codes, bits), *results)


def _plan(device, x, *scale, bits, group_size, variant):
    target = target_of(device)
    k = x.shape[-1]
    reason = why_reference(device, target, variant)
    if not reason and any(isinstance(d, int) and d == 0 for d in x.shape):
        reason = "x is empty"
    if not reason and group_size not in (0, *_KERNEL_GROUP_SIZES, k):
        reason = "group_size is not 32, 64, 128 or K"
    if not reason and isinstance(k, int) and k >= 2**31:
        reason = "K is not below 2**31"
    if reason:
        return reference_plan("quantize_activation", reason)
    return kernel_plan("quantize_activation", "columns" if scale else "rows")


def _kernel(plan, x, *scale, bits, group_size, variant):
    rows = math.prod(x.shape[:-1])
    folded = x.reshape(rows, x.shape[-1])
    avals = _out_avals(x, *scale, bits=bits, group_size=group_size, variant=variant)
    q, *rest = _out_avals(folded, *scale, bits=bits, group_size=group_size, variant=variant)
    # Every call has three results; one that is not wanted has a single element.
    found = jax.ShapeDtypeStruct((1,), jnp.float32) if scale else rest.pop(0)
    sums = rest.pop(0) if group_size else jax.ShapeDtypeStruct((1, 1), jnp.int32)
    results = _ffi.call_all(
        "quantize_activation",
        [q, found, sums],
        folded,
        scale[0].reshape(-1, scale[0].shape[-1]) if scale else jnp.zeros((0, 1), jnp.float32),
        bits=bits,
        group_size=group_size,
    )
    wanted = (True, not scale, group_size > 0)
    kept = [r for r, is_wanted in zip(results, wanted, strict=True) if is_wanted]
    return tuple(r.reshape(aval.shape) for r, aval in zip(kept, avals, strict=True))


def _jvp(bind, primals, tangents, **params):
    results = bind(*primals, **params)
    return results, [None] * len(results)


def _transpose(bind, cotangents, operands, index, **params):
    raise TypeError("quantize_activation: rounding is not linear in x, it cannot be transposed")


def _sharding(x, *scale, bits, group_size, variant):
    *shape, k = x.shape
    dims, whole = _activation.factors(k, bits, group_size)
    rows = " ".join(f"m{i}" for i in range(len(shape)))
    ins, outs = [f"{rows} {dims['K']}"], [f"{rows} {dims['q']}"]
    if scale:
        term, ones = _activation.scale_factors(x.shape, scale[0], dims["K"])
        ins.append(term)
        whole = {**whole, **ones}
    else:  # the largest of a row is of the whole row
        lead, *rest = dims["K"].strip("()").split()
        whole = {**whole, lead: k // math.prod(whole[f] for f in rest)}
        outs.append(rows)
    if group_size:
        outs.append(f"{rows} {dims['group_sums']}")
    return Sharding(f"{', '.join(ins)} -> {', '.join(outs)}", whole, ())


def _partial(summed_axes, *operands, **params):
    return operands, params, lambda *results: results


quantize_activation_p = define_primitive(
    OpDef(
        name="quantize_activation",
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
