"""Checks of what a caller passes; every text starts with the op and names the argument."""

import numbers
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_awq._packing import LAYOUTS, PACK_FACTOR, group_shapes, weight_size

FLOATS = ("float16", "bfloat16", "float32")


def check_shape(op: str, name: str, array: Any, want: tuple[int, ...]) -> None:
    if tuple(array.shape) != tuple(want):
        raise ValueError(f"{op}: {name} must have shape {tuple(want)}, got {tuple(array.shape)}")


def check_array(op: str, name: str, array: Any) -> None:
    if not hasattr(array, "dtype"):
        raise TypeError(f"{op}: {name} must be an array, got {type(array).__name__}")


def check_dtype(op: str, name: str, array: Any, *want: str) -> None:
    check_array(op, name, array)
    if str(array.dtype) not in want:
        raise TypeError(f"{op}: {name} must be {' or '.join(want)}, got {array.dtype}")


def read_scale(value: Any) -> Any:
    """A number of Python is float64 where JAX has that, and is meant as float32."""
    if isinstance(value, int | float) and not isinstance(value, bool):  # without jit
        return jnp.float32(value)
    if getattr(value, "weak_type", False) and value.dtype == jnp.float64:
        return value.astype(jnp.float32)
    return value


def read_dtype(op: str, dtype: Any, name: str = "dtype") -> np.dtype:
    try:
        return jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(
            f"{op}: {name} must be a dtype or the name of one, got {dtype!r}"
        ) from error


def read_out_dtype(op: str, dtype: Any, *want: str, name: str = "out_dtype") -> np.dtype:
    """The dtype of a result, one of `want`."""
    found = read_dtype(op, dtype, name)
    check_dtype(op, "the result", jax.ShapeDtypeStruct((), found), *want)
    return found


def read_integer(op: str, name: str, value: Any) -> int:
    """A Python int, which is what parameters of primitives have to be."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    return int(value)


def read_number(op: str, name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return float(value)


def check_static(op: str, **values: Any) -> None:
    """What a program is compiled for cannot be a list, a dict or an array."""
    for name, value in values.items():
        if not isinstance(value, Hashable):
            raise TypeError(f"{op}: {name} must be a plain value, got {value!r}")


def check_choice(op: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")


def check_weight(
    op: str, qweight: Any, scales: Any, qzeros: Any, *, layout: str, group_size: int | None
) -> int:
    """Checks the arrays of a packed weight, each with any leading batch dimensions.

    Returns:
      The group size: as given, or derived from the shapes when it is None.
    """
    check_choice(op, "layout", layout, LAYOUTS)
    arrays = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    for name, array in arrays.items():
        if array is not None:
            check_dtype(op, name, array, *(FLOATS if name == "scales" else ("int32",)))
            if len(array.shape) < 2:
                raise ValueError(
                    f"{op}: {name} must have 2 or more dimensions, got shape {tuple(array.shape)}"
                )
    k, n = weight_size(qweight.shape, layout)
    if n % PACK_FACTOR:
        raise ValueError(f"{op}: N={n} must be a multiple of {PACK_FACTOR}")
    group_size = _group_size(op, k, n, scales, layout, group_size)
    scales_shape, qzeros_shape = group_shapes(k, n, group_size, layout)
    check_shape(op, "scales", scales, (*scales.shape[:-2], *scales_shape))
    if qzeros is not None:
        check_shape(op, "qzeros", qzeros, (*qzeros.shape[:-2], *qzeros_shape))
    return group_size


def _group_size(op, k, n, scales, layout, group_size) -> int:
    if group_size is not None:
        group_size = read_integer(op, "group_size", group_size)
    if group_size is None:
        if layout == "gemv":
            raise ValueError(
                f"{op}: layout 'gemv' needs group_size: its padded scales do not tell it"
            )
        if k == 0:
            raise ValueError(f"{op}: K must be 1 or more, got 0")
        groups, columns = scales.shape[-2:]
        if columns != n:
            raise ValueError(
                f"{op}: scales must have shape (K/group_size, {n}), got {tuple(scales.shape)}"
            )
        if groups == 0 or k % groups:
            raise ValueError(f"{op}: K={k} must be a multiple of the {groups} rows of scales")
        group_size = k // groups
    elif group_size != -1 and (group_size < 1 or k % group_size):
        raise ValueError(f"{op}: group_size must be -1 or a divisor of K={k}, got {group_size}")
    if layout != "gemm" and group_size != -1 and group_size % PACK_FACTOR:
        raise ValueError(
            f"{op}: layout {layout!r} needs a group_size that is a multiple of "
            f"{PACK_FACTOR}, got {group_size}"
        )
    return group_size
