"""Arguments that `awq_gemm_w4a8` and `awq_gemm_w4a4` share."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive

from jax_awq._checks import FLOATS, check_choice, check_dtype, check_shape, check_static, read_scale
from jax_awq._primitive import apply_explicit, bind_varying
from jax_awq.ops import _activation, _weight
from jax_awq.ops import _w4a8_call as call
from jax_awq.ops._activation import QuantizedActivation
from jax_awq.ops._arguments import product_operands

_STATIC = (
    "prim",
    "codes",
    "granularity",
    "group_size",
    "layout",
    "activation",
    "out_dtype",
    "variant",
)


def matmul(
    prim: Primitive,
    x: Any,
    qweight: Any,
    scales: Any,
    qzeros: Any,
    bias: Any,
    scale: Any,
    *,
    codes: str,
    granularity: str,
    group_size: int | None,
    layout: str,
    activation: str | None,
    out_dtype: Any,
) -> Array:
    op = prim.name.removeprefix("jax_awq.")
    check_static(
        op,
        codes=codes,
        granularity=granularity,
        group_size=group_size,
        layout=layout,
        activation=activation,
        out_dtype=out_dtype,
    )
    permuted = qweight if hasattr(qweight, "perm") else None
    arrays, layout, group_size = _weight.unpack_weight(
        op, permuted.weight if permuted else qweight, scales, qzeros, layout, group_size
    )
    if isinstance(x, QuantizedActivation):
        x, scale = _codes_and_scale(op, x, scale, codes, granularity)
        granularity = "given"
    if permuted:
        x = permuted.permute_inputs(x)
    return _matmul(
        x,
        *arrays,
        bias,
        scale,
        prim=prim,
        codes=codes,
        granularity=granularity,
        group_size=group_size,
        layout=layout,
        activation=activation,
        out_dtype=out_dtype,
        variant=_weight.forced_variant(),
    )


def _codes_and_scale(op, qa, scale, codes, granularity) -> tuple[Array, Array]:
    """int8 ``(..., K)``, and float32 ``()`` or ``(...)``."""
    if codes == call.FLOAT8:
        raise ValueError(f"{op}: a QuantizedActivation has integer codes, not {codes}")
    if qa.bits != call.BITS[codes]:
        raise ValueError(f"{op}: x must have {call.BITS[codes]} bits, got {qa.bits}")
    if qa.granularity == "channel":
        raise ValueError(
            f"{op}: x must have a scale for each token or a single one: those of channels cannot "
            "leave the sum over K"
        )
    if scale is not None or granularity not in ("token", qa.granularity):
        given = "scale" if scale is not None else "granularity"
        raise ValueError(f"{op}: a QuantizedActivation brings its own {given}")
    scale = jnp.asarray(qa.scale)
    if qa.granularity == "tensor" and scale.ndim:  # stacked ones
        rows = qa.shape[:-1]
        scale = jnp.broadcast_to(scale.reshape(*scale.shape, *[1] * (len(rows) - scale.ndim)), rows)
    return _activation.unpack_codes(jnp.asarray(qa.q), qa.bits, qa.k), scale


@functools.partial(jax.jit, inline=True, static_argnames=_STATIC)
def _matmul(
    x,
    qweight,
    scales,
    qzeros,
    bias,
    scale,
    *,
    prim,
    codes,
    granularity,
    group_size,
    layout,
    activation,
    out_dtype,
    variant,
):
    op = prim.name.removeprefix("jax_awq.")
    quantized = granularity == "given"
    rows, operands, params = product_operands(
        op,
        x,
        qweight,
        scales,
        qzeros,
        bias,
        layout=layout,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        x_dtypes=("int8",) if quantized else FLOATS,
    )
    if not quantized:
        scale = _scale_of_tensor(op, x, scale, codes, granularity)
    kind = ""
    if scale is not None:
        kind = "row" if scale.ndim else "one"
        scale = scale.reshape(rows.shape[:-1] if scale.ndim else (1,))
        operands.insert(len(operands) - (bias is not None), scale)
    (y,) = apply_explicit(
        op,
        functools.partial(_on_rows, prim),
        rows,
        *operands,
        codes=codes,
        scale=kind,
        variant=variant,
        **params,
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _scale_of_tensor(op, x, scale, codes, granularity) -> Array | None:
    """float32 ``()``, or None where every row has its own."""
    check_choice(op, "granularity", granularity, ("token", "tensor"))
    if granularity == "token":
        if scale is not None:
            raise ValueError(f"{op}: scale must be None for granularity 'token', got one")
        return None
    if scale is None:
        # XLA's own reduction, which also knows how to reduce over devices.
        return call.scale_of(_activation.absmax_of(lax.stop_gradient(x)), codes)
    scale = read_scale(scale)
    check_dtype(op, "scale", scale, *FLOATS)
    check_shape(op, "scale", scale, ())
    return lax.stop_gradient(scale.astype(jnp.float32))


def _on_rows(prim, x, *rest, scale, **params):
    """Folds the free dimensions of `x` into one."""
    _, weight, given, bias = call.operands_of((x, *rest), scale=scale, **params)
    others = (*weight, *(() if bias is None else (bias,)))
    other_ranks = call.ranks(**{**params, "scale": ""})[1:]
    batched = any(o.ndim > rank for o, rank in zip(others, other_ranks, strict=True))
    batch = x.shape[:1] if batched else ()
    rows = math.prod(x.shape[len(batch) : -1])
    if scale == "row":
        given = given.reshape(*batch, rows)
    (y,) = bind_varying(
        prim,
        x.reshape(*batch, rows, x.shape[-1]),
        *call.joined(weight, given, bias),
        scale=scale,
        **params,
    )
    return (y.reshape(*x.shape[:-1], y.shape[-1]),)
