"""`AWQWeight` to and from qwix, whose `QArray` has one code in each element."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_awq._checks import check_choice
from jax_awq._packing import PACK_FACTOR, decode, pack_int4
from jax_awq.weights import AWQWeight

try:
    from qwix import QArray
except ImportError as error:
    raise ImportError("jax_awq.qwix needs qwix: pip install 'jax_awq[qwix]'") from error

__all__ = ["from_qarray", "to_qarray"]

_LEAST = {"int4": -8, "uint4": 0}
_LARGEST_CODE = 15


def to_qarray(weight: AWQWeight) -> QArray:
    """The same weight as an int4 `QArray`, ``(qvalue - zero_point) * scale``.

    Args:
      weight: ``(..., K, N)`` in any layout.

    Returns:
      `QArray` of shape ``(..., K, N)`` whose scale and zero_point have K/group_size rows; without
      zero points, where all are 8, zero_point is None.

    Raises:
      TypeError: `weight` is no `AWQWeight`; the groups of a `PermutedWeight` are no tiles.

    Source: qwix 0.1.8, QArray.
    """
    if not isinstance(weight, AWQWeight):
        raise TypeError(f"to_qarray: weight must be an AWQWeight, got {type(weight).__name__}")
    codes, zeros, scales = decode(
        *(weight.qweight, weight.scales, weight.qzeros),
        layout=weight.layout,
        group_size=weight.group_size,
    )
    codes, zeros = (None if a is None else jnp.asarray(a - 8, jnp.int4) for a in (codes, zeros))
    return QArray(codes, jnp.asarray(scales), zeros, qtype=jnp.int4)


def from_qarray(array: QArray) -> AWQWeight:
    """The same weight as an `AWQWeight` in layout "gemm", scales and codes unchanged.

    Args:
      array: `QArray` ``(..., K, N)``, inputs first, of qtype int4 or uint4; scale and zero_point
        may have any tiles.

    Returns:
      `AWQWeight` with the group size of the smaller tile; without zero points where `array` is
      int4 and has none.

    Raises:
      ValueError: another qtype, a shape that is no weight's, tiles that do not fill it, or, where
        the values are known, a code or zero point that qtype does not have.
      TypeError: `array` is no `QArray`, or its codes or zero points are no integers.

    Source: qwix 0.1.8, QArray.
    """
    if not isinstance(array, QArray):
        raise TypeError(f"from_qarray: array must be a QArray, got {type(array).__name__}")
    qtype = jnp.dtype(array.qtype).name if _is_dtype(array.qtype) else array.qtype
    check_choice("from_qarray", "qtype", qtype, tuple(_LEAST))
    if array.ndim < 2 or array.shape[-1] % PACK_FACTOR:
        raise ValueError(
            f"from_qarray: array must have shape (..., K, N) with N a multiple of {PACK_FACTOR}, "
            f"got {array.shape}"
        )
    zeros = array.zero_point
    if zeros is None and qtype == "uint4":
        zeros = jnp.zeros_like(array.scale, jnp.uint4)
    tiled = {"scale": array.scale} | ({} if zeros is None else {"zero_point": zeros})
    for name, part in tiled.items():
        _check_tiles(name, part.shape, array.shape)
    rows = math.lcm(*(part.shape[-2] for part in tiled.values()))
    shape = (*array.shape[:-2], rows, array.shape[-1])
    return AWQWeight(
        pack_int4(_codes("qvalue", array.qvalue, qtype)),
        _untiled(array.scale, shape),
        None if zeros is None else pack_int4(_untiled(_codes("zero_point", zeros, qtype), shape)),
    )


def _check_tiles(name: str, counts: tuple[int, ...], shape: tuple[int, ...]) -> None:
    fits = len(counts) == len(shape) and all(counts)
    if not fits or any(size % count for size, count in zip(shape, counts, strict=True)):
        raise ValueError(
            f"from_qarray: {name} must have a divisor of each size of {shape}, got shape {counts}"
        )


def _codes(name: str, values: Any, qtype: str) -> Any:
    """0 to 15, as int8."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"from_qarray: {name} must be integers, got {values.dtype}")
    least = _LEAST[qtype]
    inside = _is_inside(values, least)
    if not isinstance(inside, jax.core.Tracer) and not inside:
        raise ValueError(
            f"from_qarray: {name} must be from {least} to {least + _LARGEST_CODE}, those of "
            f"{qtype}, got {values.min()} to {values.max()}"
        )
    return jnp.asarray(values, jnp.int8) - least


@functools.partial(jax.jit, static_argnums=1)
def _is_inside(values: Any, least: int) -> Any:
    values = values.astype(jnp.float32)  # which has the bounds, whatever integers these are
    return ((values >= least) & (values <= least + _LARGEST_CODE)).all()


def _untiled(array: Any, shape: tuple[int, ...]) -> Any:
    for axis, (have, want) in enumerate(zip(array.shape, shape, strict=True)):
        array = jnp.repeat(array, want // have, axis=axis) if have != want else array
    return array


def _is_dtype(qtype: Any) -> bool:
    try:
        jnp.dtype(qtype)
    except TypeError:  # qwix has names of its own, such as "nf4"
        return False
    return True
