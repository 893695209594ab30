"""The arguments that every product with an AWQ weight takes."""

from typing import Any

import jax.numpy as jnp

from jax_awq._checks import FLOATS, check_choice, check_dtype, check_shape, read_out_dtype
from jax_awq._packing import weight_size
from jax_awq.ops import _weight
from jax_awq.ops._epilogue import ACTIVATIONS


def product_operands(
    op: str,
    x: Any,
    qweight: Any,
    scales: Any,
    qzeros: Any,
    bias: Any,
    *,
    layout: str,
    group_size: int | None,
    activation: str | None,
    out_dtype: Any,
    x_dtypes: tuple[str, ...],
) -> tuple[Any, list[Any], dict[str, Any]]:
    """`x` with a dimension of rows, the operands of the primitive that follow, its parameters.

    Args:
      out_dtype: None is that of `x`, float32 where `x` is of integers.
    """
    weight, params = _weight.canonical_weight(
        op, qweight, scales, qzeros, layout=layout, group_size=group_size
    )
    operands = [*weight]
    k, n = weight_size(qweight.shape, layout)
    check_dtype(op, "x", x, *x_dtypes)
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"{op}: x must have shape (..., {k}), got {x.shape}")
    check_choice(op, "activation", activation, (None, *sorted(set(ACTIVATIONS) - {"none"})))
    if out_dtype is None:
        out_dtype = x.dtype if str(x.dtype) in FLOATS else jnp.float32
    out_dtype = read_out_dtype(op, out_dtype, *FLOATS)
    leading = {"qweight": qweight.shape[:-2], "scales": scales.shape[:-2]}
    if qzeros is not None:
        leading["qzeros"] = qzeros.shape[:-2]
    if bias is not None:
        check_dtype(op, "bias", bias, *FLOATS)
        check_shape(op, "bias", bias, (*bias.shape[:-1][:1], n))
        leading["bias"] = bias.shape[:-1]
        operands.append(bias)
    batch = _weight.check_batch(op, leading)
    if batch and (x.ndim < 2 or x.shape[0] != batch[0]):
        raise ValueError(f"{op}: x must have shape ({batch[0]}, ..., {k}), got {x.shape}")
    return (
        x[:, None] if batch and x.ndim == 2 else x,
        operands,
        {
            **params,
            "activation": activation or "none",
            "out_dtype": out_dtype,
            "has_bias": bias is not None,
        },
    )
