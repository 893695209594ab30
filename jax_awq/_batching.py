"""Batch dimensions: how operands that have them meet, and batching rules shared by ops."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax


def aligned(*arrays: Any) -> list[Any]:
    """The arrays with as many dimensions each, ones before their own.

    NumPy's rules would do without, but JAX can be told that they are an error
    (`jax.numpy_rank_promotion`).
    """
    ndim = max(a.ndim for a in arrays)
    return [lax.expand_dims(a, range(ndim - a.ndim)) if a.ndim < ndim else a for a in arrays]


def fold_rows(bind, operands: Sequence[Any], dim: int, **params: Any):
    """Folds a mapped axis of the first operand into its rows, the second axis from the end."""
    x = jnp.moveaxis(operands[0], dim, -3)
    *batch, size, rows, columns = x.shape
    results = bind(x.reshape(*batch, size * rows, columns), *operands[1:], **params)
    return (
        [r.reshape(*r.shape[:-2], size, rows, r.shape[-1]) for r in results],
        [r.ndim - 2 for r in results],
    )


def scale_of_rows(scale: Any, dim: int | None, size: int, rows: int):
    """``(..., size * rows)`` scales, where a mapped axis is folded into the rows.

    Args:
      scale: ``(..., rows)`` or ``(..., 1)``, mapped over `dim`, or shared where that is None.
    """
    scale = scale[..., None, :] if dim is None else jnp.moveaxis(scale, dim, -2)
    scale = jnp.broadcast_to(scale, (*scale.shape[:-2], size, rows))
    return scale.reshape(*scale.shape[:-2], size * rows)


def fold_batch(
    bind, operands: Sequence[Any], dims: Sequence[int | None], ranks: Sequence[int], **params: Any
):
    """Folds a mapped axis into the leading batch dimension that every operand may have.

    Operands that are neither mapped nor batched stay shared, so their memory is not multiplied.

    Args:
      ranks: rank of each operand without the batch dimension.
    """
    operands = [
        o if d is None else jnp.moveaxis(o, d, 0) for o, d in zip(operands, dims, strict=True)
    ]
    size = next(o.shape[0] for o, d in zip(operands, dims, strict=True) if d is not None)
    inner = [
        o.shape[len(o.shape) - r - 1]
        for o, d, r in zip(operands, dims, ranks, strict=True)
        if o.ndim - (d is not None) > r
    ]

    def fold(operand, mapped, rank):
        batched = operand.ndim - mapped > rank
        if not (mapped or batched):
            return operand
        if not inner:
            return operand
        if not mapped:
            operand = jnp.broadcast_to(operand, (size, *operand.shape))
        elif not batched:
            operand = jnp.broadcast_to(operand[:, None], (size, inner[0], *operand.shape[1:]))
        return operand.reshape(size * inner[0], *operand.shape[2:])

    results = bind(
        *(fold(o, d is not None, r) for o, d, r in zip(operands, dims, ranks, strict=True)),
        **params,
    )
    if inner:
        results = [r.reshape(size, inner[0], *r.shape[1:]) for r in results]
    return results, [0] * len(results)
