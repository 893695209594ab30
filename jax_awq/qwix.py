"""`AWQWeight` to and from qwix, whose `QArray` has one code in each element."""

import math
from typing import Any

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
      ValueError: another qtype, or a shape that is no weight's.

    Source: qwix 0.1.8, QArray.
    """
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
    rows = {array.scale.shape[-2], *(() if zeros is None else (zeros.shape[-2],))}
    shape = (*array.shape[:-2], math.lcm(*rows), array.shape[-1])

    def codes_of(values: Any) -> Any:
        return jnp.asarray(values, jnp.int8) - _LEAST[qtype]

    return AWQWeight(
        pack_int4(codes_of(array.qvalue)),
        _untiled(array.scale, shape),
        None if zeros is None else pack_int4(_untiled(codes_of(zeros), shape)),
    )


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
