"""Static scales of activations, from data: one pass over batches, whatever their number."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq._checks import FLOATS, check_choice, check_dtype, check_shape, read_number
from jax_awq._explicit import on_auto_axes
from jax_awq._pytree import pytree
from jax_awq.ops._activation import LARGEST_CODE, absmax_of, scale_of

# Bins of magnitudes: 2**_BIN_BITS to an octave, from 2**_FIRST_OCTAVE (float16's least) up to
# 2**_LAST_OCTAVE (its largest). The bits of a float32 above its last mantissa bits are its bin.
_BIN_BITS, _FIRST_OCTAVE, _LAST_OCTAVE = 5, -24, 16
_BINS = (_LAST_OCTAVE - _FIRST_OCTAVE) << _BIN_BITS
_SHIFT = 23 - _BIN_BITS
_FIRST_BIN = (127 + _FIRST_OCTAVE) << _BIN_BITS


@pytree()
@dataclasses.dataclass(frozen=True, eq=False)
class ActivationRange:
    """What a scale needs to know of the activations seen so far.

    A pytree of fixed shapes, for `jax.jit` and as the carry of `jax.lax.scan`.

    Attributes:
      absmax: float32 ``(K,)``, or ``()`` for a single scale.
      counts: int32 ``(K, bins)`` or ``(bins,)``, histograms of the magnitudes; None without
        percentiles. 5 KB a channel.
      tokens: int32, rows seen; less than 2**31 of them, times K for a single scale.
    """

    absmax: Array
    counts: Array | None
    tokens: Array

    @classmethod
    def empty(cls, k: int | None = None, *, percentiles: bool = False) -> "ActivationRange":
        """Before any data; with `k` for a scale for each of K channels, else for a single one."""
        shape = () if k is None else (k,)
        counts = jnp.zeros((*shape, _BINS), jnp.int32) if percentiles else None
        return cls(jnp.zeros(shape, jnp.float32), counts, jnp.int32(0))

    def update(self, x: Any) -> "ActivationRange":
        """With the activations `x`, ``(..., K)`` float."""
        check_dtype("ActivationRange.update", "x", x, *FLOATS)
        if x.ndim and x.shape[-1] == 0:
            raise ValueError(f"ActivationRange.update: K must be positive, got shape {x.shape}")
        if x.ndim == 0 or (self.absmax.ndim and x.shape[-1] != self.absmax.shape[0]):
            want = self.absmax.shape[0] if self.absmax.ndim else "K"
            raise ValueError(
                f"ActivationRange.update: x must have shape (..., {want}), got {x.shape}"
            )
        return on_auto_axes(ActivationRange._after, self, x)

    def _after(self, x: Array) -> "ActivationRange":
        x = jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
        seen = absmax_of(x, axis=0 if self.absmax.ndim else None)
        counts = self.counts
        if counts is not None:
            bins = (lax.bitcast_convert_type(x, jnp.int32) >> _SHIFT) - _FIRST_BIN
            bins = jnp.clip(bins, 0, _BINS - 1)
            at = (jnp.arange(x.shape[-1]), bins) if self.absmax.ndim else (bins,)
            counts = counts.at[at].add(1)
        return ActivationRange(
            absmax_of(jnp.stack([self.absmax, seen]), axis=0), counts, self.tokens + x.shape[0]
        )

    def merge(self, other: "ActivationRange") -> "ActivationRange":
        """Of both together, as from two devices; of as many channels, else ValueError."""
        check_shape("ActivationRange.merge", "absmax of the other", other.absmax, self.absmax.shape)
        counts = None
        if self.counts is not None and other.counts is not None:
            counts = self.counts + other.counts
        absmax = absmax_of(jnp.stack([self.absmax, other.absmax]), axis=0)
        return ActivationRange(absmax, counts, self.tokens + other.tokens)

    def magnitude(self, percentile: float = 100.0) -> Array:
        """A magnitude that `percentile` percent of the values do not pass, as float32.

        It is the upper end of the bin which holds that value, or absmax where that is less: never
        below the exact percentile, and above it by 1/32 at most. (Between 2**-24 and 2**16; what
        is smaller counts as 2**-24, what is larger as absmax.)

        Raises:
          ValueError: `percentile` is not in (0, 100], or below 100 and there are no histograms.
          TypeError: it is no number.
        """
        _check_percentile("ActivationRange.magnitude", percentile)
        if percentile == 100:
            return self.absmax
        if self.counts is None:
            raise ValueError(
                "ActivationRange.magnitude: percentile below 100 needs histograms: "
                "ActivationRange.empty(..., percentiles=True)"
            )
        # Counted from above: there the counts are small, and float32 holds them exactly.
        above = jnp.cumsum(self.counts[..., ::-1], axis=-1)[..., ::-1]
        allowed = above[..., :1].astype(jnp.float32) * jnp.float32(1 - percentile / 100)
        # The last bin above which no more values are allowed.
        top = (above.astype(jnp.float32) > allowed).sum(-1) - 1
        bits = (jnp.clip(top, 0, _BINS - 1) + _FIRST_BIN + 1) << _SHIFT
        upper = lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)
        return jnp.where(top == _BINS - 1, self.absmax, jnp.minimum(upper, self.absmax))

    def scale(self, *, bits: int = 8, percentile: float = 100.0) -> Array:
        """The scale for `quantize_activation`, of which the largest code is that magnitude."""
        check_choice("ActivationRange.scale", "bits", bits, tuple(LARGEST_CODE))
        return scale_of(self.magnitude(percentile), bits)


def calibrate_activation(
    batches: Iterable[Any],
    *,
    method: str = "absmax",
    percentile: float = 99.9,
    granularity: str = "channel",
    bits: int = 8,
) -> Any:
    """Static scales for `quantize_activation`, from activations that a model has seen.

    One pass; memory does not grow with the number of batches. `ActivationRange` is what it keeps,
    for use inside `jax.jit` or `jax.lax.scan`.

    Args:
      batches: pytrees of activations, each ``(..., K)`` float; all of one structure, such as
        ``{name of a linear: its input}``.
      method: "absmax", the largest magnitude, or "percentile", which a few outliers do not move.
      percentile: percent of the magnitudes that do not saturate; see `ActivationRange.magnitude`
        for how exact it is.
      granularity: "channel", a scale for each of K, or "tensor", a single one.
      bits: 8 or 4.

    Returns:
      float32 scales, ``(K,)`` or ``()``, in the structure of a batch.

    Raises:
      ValueError: there is no batch, batches disagree about structure, have no token, no channel or
        NaN or infinity, or an argument is none of these. With granularity "channel", batches
        disagree about K; for a single scale they may.
      TypeError: a batch is not float, `batches` is one dict, or `percentile` no number.
    """
    op = "calibrate_activation"
    check_choice(op, "method", method, ("absmax", "percentile"))
    check_choice(op, "granularity", granularity, ("channel", "tensor"))
    check_choice(op, "bits", bits, tuple(LARGEST_CODE))
    _check_percentile(op, percentile)
    if isinstance(batches, Mapping):
        raise TypeError(
            f"{op}: batches must be a sequence of batches, got one {type(batches).__name__}"
        )
    ranges: list[ActivationRange] | None = None
    structure: Any = None
    for batch in batches:
        leaves, found = jax.tree.flatten(batch)
        if ranges is None:
            structure = found
            ranges = [_empty(op, x, method, granularity) for x in leaves]
        if found != structure:
            raise ValueError(f"{op}: batches must have the structure {structure}, got {found}")
        ranges = [_update(seen, jnp.asarray(x)) for seen, x in zip(ranges, leaves, strict=True)]
    if ranges is None:
        raise ValueError(f"{op}: batches must have one or more entries, got none")
    for seen in ranges:
        if not seen.tokens:
            raise ValueError(f"{op}: the batches have no token")
        if not jnp.isfinite(seen.absmax).all():
            raise ValueError(f"{op}: the batches must be finite, got NaN or infinity")
    percentile = 100.0 if method == "absmax" else percentile
    return jax.tree.unflatten(
        structure, [seen.scale(bits=bits, percentile=percentile) for seen in ranges]
    )


def _check_percentile(op: str, percentile: Any) -> None:
    if not 0 < read_number(op, "percentile", percentile) <= 100:
        raise ValueError(f"{op}: percentile must be in (0, 100], got {percentile}")


_update = jax.jit(ActivationRange.update)


def _empty(op: str, x: Any, method: str, granularity: str) -> ActivationRange:
    if jnp.ndim(x) == 0:
        raise ValueError(f"{op}: a batch must have shape (..., K), got ()")
    if jnp.shape(x)[-1] == 0:
        raise ValueError(f"{op}: K must be positive, got a batch of shape {jnp.shape(x)}")
    return ActivationRange.empty(
        jnp.shape(x)[-1] if granularity == "channel" else None,
        percentiles=method == "percentile",
    )
