"""Round to nearest: the last step of AWQ, with the rounding of AutoAWQ."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_awq._checks import FLOATS, check_dtype, read_dtype, read_integer
from jax_awq._packing import PACK_FACTOR, pack_int4
from jax_awq.weights import AWQWeight

LARGEST_CODE = 15


def round_to_nearest(weight: Any, *, group_size: int = 128, dtype: Any = jnp.float16) -> AWQWeight:
    """Quantizes a weight as it is, without activations: codes, zeros and scales of each group.

    ``s = max(max(w) - min(w), 1e-5) / 15``, ``z = clip(-round(min(w) / s), 0, 15)`` and
    ``q = clip(round(w / s) + z, 0, 15)``, every operation rounded to `dtype`. The range of a group
    need not hold 0, as in AutoAWQ: of a group of values far from it only one end is kept.

    Args:
      weight: ``(..., K, N)`` float16, bfloat16 or float32, finite, inputs first.
      group_size: rows of K that share one scale, -1 for all of them.
      dtype: of the arithmetic and of the scales; float16 gives AutoAWQ's bits.

    Returns:
      `AWQWeight` in layout "gemm", with zero points.

    Raises:
      ValueError: a size that no weight can have; or, where the values are known, that is outside
        of `jax.jit` and the like, NaN, infinity, or a range whose scale `dtype` does not hold.
      TypeError: a dtype that is not one of the three, or `group_size` is no integer.

    Source: AutoAWQ 0.2.9, pseudo_quantize_tensor and WQLinear_GEMM.from_linear.
    """
    weight = jnp.asarray(weight)
    check_dtype("round_to_nearest", "weight", weight, *FLOATS)
    dtype = read_float("round_to_nearest", dtype)
    if weight.ndim < 2:
        raise ValueError(f"round_to_nearest: weight must be (..., K, N), got {weight.shape}")
    k, n = weight.shape[-2:]
    if n % PACK_FACTOR:
        raise ValueError(f"round_to_nearest: N={n} must be a multiple of {PACK_FACTOR}")
    group_size = read_integer("round_to_nearest", "group_size", group_size)
    check_group_size("round_to_nearest", k, group_size)
    return rounded_weight("round_to_nearest", "weight", weight, group_size, dtype)


def read_float(op: str, dtype: Any) -> np.dtype:
    """The dtype of the arithmetic."""
    found: Any = None if dtype is None else read_dtype(op, dtype)  # None would be float64
    if str(found) not in FLOATS:
        raise TypeError(f"{op}: dtype must be {' or '.join(FLOATS)}, got {found}")
    return found


def rounded_weight(op: str, name: str, weight: Array, group_size: int, dtype: Any) -> AWQWeight:
    """`round_to_nearest` of a weight whose dtype and shape are checked, under its own name."""
    check_finite(op, name, weight)
    result = _round_to_nearest(weight, group_size=group_size, dtype=dtype)
    if not is_finite(result.scales):
        raise ValueError(
            f"{op}: {name} must have groups whose scale is finite in {dtype}, got values from "
            f"{float(weight.min()):.4g} to {float(weight.max()):.4g}"
        )
    return result


def check_finite(op: str, name: str, *arrays: Array) -> None:
    if not all(is_finite(array) for array in arrays):
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")


def is_finite(array: Array) -> bool:
    """Whether all values are; True of a tracer, whose values nobody knows yet."""
    if isinstance(array, jax.core.Tracer):
        return True
    found = _all_finite(array)
    # Inside `jax.jit` what is computed of a constant is a tracer, too.
    return isinstance(found, jax.core.Tracer) or bool(found)


@jax.jit
def _all_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def check_group_size(op: str, k: int, group_size: int) -> None:
    if k < 1:
        raise ValueError(f"{op}: K must be positive, got {k}")
    if group_size != -1 and (group_size < 1 or k % group_size):
        raise ValueError(f"{op}: group_size must be -1 or a divisor of K={k}, got {group_size}")


@functools.partial(jax.jit, static_argnames=("group_size", "dtype"))
def _round_to_nearest(weight, *, group_size, dtype):
    codes, zeros, scales = codes_of(in_groups(weight, group_size), rounding(dtype))
    return AWQWeight(
        pack_int4(codes.astype(jnp.int8).reshape(weight.shape)),
        scales.squeeze(-2).astype(dtype),
        pack_int4(zeros.astype(jnp.int8).squeeze(-2)),
        group_size=group_size,
    )


def in_groups(weight: Array, group_size: int) -> Array:
    """(..., K, N) as float32 (..., K/G, G, N)."""
    *batch, k, n = weight.shape
    size = k if group_size == -1 else group_size
    return weight.astype(jnp.float32).reshape(*batch, k // size, size, n)


def codes_of(weight: Array, rounded: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """Codes (..., K/G, G, N), zeros and scales (..., K/G, 1, N) of a weight in groups, float32."""
    weight = rounded(weight)
    top = weight.max(-2, keepdims=True)
    bottom = weight.min(-2, keepdims=True)
    scales = rounded(jnp.maximum(rounded(top - bottom), rounded(jnp.float32(1e-5))) / LARGEST_CODE)
    zeros = jnp.clip(-jnp.round(rounded(bottom / scales)), 0, LARGEST_CODE)
    codes = jnp.clip(jnp.round(rounded(weight / scales)) + zeros, 0, LARGEST_CODE)
    return codes, zeros, scales


def rounding(dtype: Any) -> Callable[[Array], Array]:
    """A function that rounds float32 values to those of `dtype`, also where XLA may drop casts.

    A cast there and back is one that `xla_allow_excess_precision`, the default, lets it drop.
    """
    if dtype == jnp.float32:
        return lambda x: x
    info = jnp.finfo(dtype)
    reduce = functools.partial(
        lax.reduce_precision, exponent_bits=info.nexp, mantissa_bits=info.nmant
    )
    if dtype == jnp.bfloat16:
        return reduce
    least = float(info.smallest_subnormal)

    def rounded(x: Array) -> Array:
        # `reduce_precision` flushes subnormal results, and the scale of a group of zeros is one.
        return jnp.where(jnp.abs(x) < float(info.tiny), jnp.round(x / least) * least, reduce(x))

    return rounded
