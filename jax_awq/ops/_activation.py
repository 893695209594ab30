"""What the ops of quantized activations share: pytree, rounding, packing, batches, factors."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_awq._batching import aligned
from jax_awq._checks import check_choice, check_dtype, check_shape
from jax_awq._pytree import pytree

LARGEST_CODE = {8: 127, 4: 7}  # by bits; -128 and -8 are not used, so that codes can be negated
GRANULARITIES = ("token", "channel", "tensor")

# Outside of it a scale or its inverse can be subnormal, which XLA flushes on a CPU and CUDA keeps.
_SCALES = (2.0**-100, 2.0**125)


@pytree("bits", "granularity", "k")
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """Activations (..., K) as integer codes, ``q * scale``.

    A pytree: the arrays are its leaves, the rest is static. Stacked ones, as `jax.vmap` gives
    them, have leading dimensions in every array.

    Attributes:
      q: int8 ``(..., K)`` for 8 bits, -127 to 127; for 4 bits ``(..., ceil(K/2))``, two codes -7
        to 7 a byte, the even column in the low nibble; the last high nibble of an odd K is 0.
      scale: float32, activation units per code step: ``(...)`` for granularity "token", ``(K,)``
        for "channel", ``()`` for "tensor".
      group_sums: int32 ``(..., K/group_size)``, sums of the codes of a group, or None.
      bits: 8 or 4.
      granularity: "token", "channel" or "tensor".
      k: K; by default what `q` holds.

    Raises:
      ValueError: the shapes of the arrays disagree.
      TypeError: a dtype is not the one above.
    """

    q: Any
    scale: Any
    group_sums: Any = None
    bits: int = dataclasses.field(default=8, kw_only=True)
    granularity: str = dataclasses.field(default="token", kw_only=True)
    k: int = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self):
        op = "QuantizedActivation"
        check_choice(op, "bits", self.bits, tuple(LARGEST_CODE))
        check_choice(op, "granularity", self.granularity, GRANULARITIES)
        check_dtype(op, "q", self.q, "int8")
        check_dtype(op, "scale", self.scale, "float32")
        if len(self.q.shape) == 0:
            raise ValueError(f"{op}: q must have shape (..., K), got ()")
        *rows, columns = self.q.shape
        if self.k is None:
            object.__setattr__(self, "k", columns if self.bits == 8 else 2 * columns)
        check_shape(op, "q", self.q, (*rows, packed_size(self.k, self.bits)))
        stacked = len(self.scale.shape) - (self.granularity == "channel")
        want = tuple(rows if self.granularity == "token" else rows[: max(stacked, 0)])
        check_shape(
            op, "scale", self.scale, (*want, self.k) if self.granularity == "channel" else want
        )
        if self.group_sums is not None:
            check_dtype(op, "group_sums", self.group_sums, "int32")
            check_shape(op, "group_sums", self.group_sums, (*rows, *self.group_sums.shape[-1:]))

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K)."""
        return (*self.q.shape[:-1], self.k)

    @property
    def ndim(self) -> int:
        return len(self.q.shape)


def absmax_of(x: Any, axis: int | None = None) -> Array:
    """The largest magnitude; NaN where there is one, else infinity where there is one.

    Magnitudes are compared as integers, which orders floats, infinity and NaN alike: XLA's maximum
    of floats loses NaN on a CPU, for some shapes.
    """
    bits = {2: jnp.int16, 4: jnp.int32}[x.dtype.itemsize]
    magnitudes = lax.bitcast_convert_type(x, bits) & jnp.iinfo(bits).max
    return lax.bitcast_convert_type(jnp.max(magnitudes, axis=axis, initial=0), x.dtype)


def scale_of(absmax: Any, bits: int) -> Array:
    """The float32 scale of values whose largest magnitude is `absmax`."""
    return scale_to(absmax, LARGEST_CODE[bits])


def scale_to(absmax: Any, largest: int) -> Array:
    """The float32 scale by which `absmax` becomes `largest`."""
    # A product, since XLA makes one of a division by a constant anyway.
    scale = absmax.astype(jnp.float32) * np.float32(1 / largest)
    return jnp.where(scale < _SCALES[0], 0.0, scale)  # NaN and infinity stay


def codes_of(x: Any, scale: Any, bits: int) -> Array:
    """``x / scale`` to the nearest code, ties to even, as int8; 0 where it is NaN."""
    return jnp.round(steps_of(x, scale, LARGEST_CODE[bits])).astype(jnp.int8)


def steps_of(x: Any, scale: Any, largest: int) -> Array:
    """``x / scale`` in float32, from `-largest` to `largest`; 0 where it is NaN."""
    usable = (scale >= _SCALES[0]) & (scale <= _SCALES[1])
    x, inverse = aligned(x, jnp.where(usable, 1 / scale, 0.0))
    steps = x.astype(jnp.float32) * inverse
    return jnp.clip(jnp.where(jnp.isnan(steps), 0.0, steps), -largest, largest)


def packed_size(k: int, bits: int) -> int:
    return k if bits == 8 else (k + 1) // 2


def pack_codes(codes: Any, bits: int, axis: int = -1) -> Array:
    """int8 codes as an op takes them: for 4 bits two a byte along `axis`, the even one low."""
    if bits == 8:
        return codes
    codes = jnp.moveaxis(codes, axis, -1)
    if (odd := codes.shape[-1] % 2) != 0:  # a symbolic K may be either
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, odd)])
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return jnp.moveaxis((pairs[..., 0] & 0xF) | (pairs[..., 1] << 4), -1, axis)


def unpack_codes(q: Any, bits: int, k: int, axis: int = -1) -> Array:
    """The inverse of `pack_codes`; `k` codes along `axis`."""
    if bits == 8:
        return q
    q = jnp.moveaxis(q, axis, -1)
    codes = jnp.stack([(q << 4) >> 4, q >> 4], axis=-1)  # shifts of int8 keep the sign
    codes = codes.reshape(*q.shape[:-1], 2 * q.shape[-1])[..., :k]
    return jnp.moveaxis(codes, -1, axis)


# The operand `scale` of the primitives has the rank of the activations, and 1 in each dimension
# that shares a scale. A primitive has the free dimensions folded: (M, K), or (E, M, K) where
# scales belong to the entries of a batch.


def fold_free(x: Any, scale: Any | None) -> tuple[Any, ...]:
    """Operands of a primitive from activations (..., K) and their scales, or without them."""
    *rows, columns = x.shape
    if scale is None:
        return (x.reshape(math.prod(rows), columns),)
    own = 0  # leading dimensions with scales of their own
    while own < len(rows) and scale.shape[own] == rows[own]:
        own += 1
    batch, shared = math.prod(rows[:own]), math.prod(rows[own:])
    if own == len(rows):
        return x.reshape(batch, columns), scale.reshape(batch, scale.shape[-1])
    if all(size == 1 for size in rows[:own]):
        return x.reshape(shared, columns), scale.reshape(1, scale.shape[-1])
    return x.reshape(batch, shared, columns), scale.reshape(batch, 1, scale.shape[-1])


def fold_batch(bind, operands, dims, **params: Any):
    """Batching rule of primitives with operands (x, scale) or (x,) as above."""
    x, *scale = operands
    if not scale or (dims[1] is None and scale[0].ndim == 2 and scale[0].shape[0] == 1):
        x = jnp.moveaxis(x, dims[0], 0)
        size, rows, columns = x.shape
        results = bind(x.reshape(size * rows, columns), *scale, **params)
        return [r.reshape(size, rows, *r.shape[1:]) for r in results], [0] * len(results)
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
    operands = [
        jnp.broadcast_to(o, (size, *o.shape)) if d is None else jnp.moveaxis(o, d, 0)
        for o, d in zip(operands, dims, strict=True)
    ]
    lead = operands[0].shape[:-2]
    results = bind(*(o.reshape(math.prod(lead), *o.shape[-2:]) for o in operands), **params)
    return [r.reshape(*lead, *r.shape[1:]) for r in results], [0] * len(results)


def factors(k: int, bits: int, group_size: int = 0) -> tuple[dict[str, str], dict[str, int]]:
    """Dimensions in the notation of Shardy, and the factors that are never split.

    K is split between groups and between bytes only.
    """
    if bits == 8 and not group_size:
        return {"K": "k", "q": "k"}, {}
    if bits == 8:
        return {"K": "(g s)", "q": "(g s)", "group_sums": "g"}, {"s": group_size}
    if k % 2 == 0 and not group_size:
        return {"K": "(h t)", "q": "h"}, {"t": 2}
    if k % 2 == 0 and group_size % 2 == 0:
        whole = {"r": group_size // 2, "t": 2}
        return {"K": "(g r t)", "q": "(g r)", "group_sums": "g"}, whole
    whole = {"k": k, "c": packed_size(k, bits)}
    if group_size:
        whole["g"] = k // group_size
    return {"K": "k", "q": "c", "group_sums": "g"}, whole


def scale_factors(shape, scale, columns: str) -> tuple[str, dict[str, int]]:
    """The term of an operand `scale` for activations of `shape`; `columns` is that of K."""
    rows = [f"m{i}" if scale.shape[i] == shape[i] else f"u{i}" for i in range(len(shape) - 1)]
    whole = {name: 1 for name in rows if name[0] == "u"}
    if scale.shape[-1] == 1:
        columns, whole["o"] = "o", 1
    return " ".join([*rows, columns]), whole
