"""The two searches of AWQ: scales of input channels, and where to clip a group."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq.quantize.rtn import codes_of, in_groups, rounding
from jax_awq.quantize.statistics import Statistics

RATIOS = 20
SHRINK_STEPS = 10  # each by 1/20 of the largest value


@functools.partial(jax.jit, static_argnames=("group_size", "dtype"))
def search_scale(
    weights: Sequence[Array],
    statistics: Statistics,
    *,
    group_size: int = 128,
    dtype: Any = jnp.float16,
) -> Array:
    """The scale `s` of input channels with the least error of ``(x / s) @ Q(s * w)``.

    Candidates are ``mean|x|^r / mean|w|^(1 - r)`` for r = 0, 1/20, ..., 19/20, where ``|w|`` is
    relative to the largest of its group, and the geometric mean of the extremes is 1. The error is
    the mean square over calibration tokens and the outputs of all the weights; AutoAWQ takes that
    of the attention or MLP around them.

    Args:
      weights: ``(K, N_i)`` float, of linears that share one input.
      statistics: of that input.
      group_size: rows of K that share one scale, -1 for all of them.
      dtype: of the arithmetic of Q, as in `round_to_nearest`.

    Returns:
      ``(K,)`` float32, positive.

    Source: AWQ, arXiv 2306.00978, section 3.2; AutoAWQ 0.2.9, AwqQuantizer._search_best_scale.
    """
    weight = jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=-1)
    groups = jnp.abs(in_groups(weight, group_size))
    relative = groups / (groups.max(-2, keepdims=True) + 1e-6)
    w_mean = relative.reshape(weight.shape).mean(-1)
    x_mean = statistics.mean_abs

    def candidate(ratio: Array) -> Array:
        scale = jnp.maximum(x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4), 1e-4)
        scale = scale / jnp.sqrt(scale.max() * scale.min())
        return jnp.where(jnp.isfinite(scale), scale, 1)

    def loss(ratio: Array) -> Array:
        scale = candidate(ratio)[:, None]
        rounded = fake_quantize(weight * scale, group_size=group_size, dtype=dtype) / scale
        return _squares(rounded - weight, statistics.gram)

    ratios = jnp.arange(RATIOS, dtype=jnp.float32) / RATIOS
    losses = lax.map(loss, ratios)
    return candidate(ratios[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))])


@functools.partial(jax.jit, static_argnames=("group_size", "dtype"))
def search_clip(
    weight: Array, statistics: Statistics, *, group_size: int = 128, dtype: Any = jnp.float16
) -> Array:
    """The weight with each group clipped to where its share of the output has the least error.

    Candidates are 1, 19/20, ..., 11/20 of the largest absolute value. The error is the mean square
    over calibration tokens of ``x_g @ (Q(clip(w_g)) - w_g)``, for one group and one output; AutoAWQ
    takes 512 of the tokens.

    Args:
      weight: ``(K, N)`` float.
      statistics, group_size, dtype: as in `search_scale`.

    Returns:
      ``(K, N)`` float32.

    Source: AutoAWQ 0.2.9, AwqQuantizer._search_best_clip.
    """
    groups = in_groups(weight, group_size)
    count, size, _ = groups.shape
    index = jnp.arange(count)
    gram = statistics.gram.reshape(count, size, count, size)[index, :, index]
    largest = jnp.abs(groups).max(-2, keepdims=True)

    def clipped(step: Array) -> Array:
        limit = largest * (1 - step / (2 * SHRINK_STEPS))
        return jnp.clip(groups, -limit, limit)

    def loss(step: Array) -> Array:
        error = _fake(clipped(step), dtype) - groups
        product = jnp.matmul(gram, error, precision=lax.Precision.HIGHEST)
        return (error * product).sum(-2, keepdims=True)

    losses = lax.map(loss, jnp.arange(SHRINK_STEPS, dtype=jnp.float32))
    return clipped(jnp.argmin(losses, axis=0).astype(jnp.float32)).reshape(weight.shape)


def fake_quantize(weight: Array, *, group_size: int, dtype: Any) -> Array:
    """What `round_to_nearest` makes of a weight, dequantized; float32."""
    return _fake(in_groups(weight, group_size), dtype).reshape(weight.shape)


def _fake(groups: Array, dtype: Any) -> Array:
    codes, zeros, scales = codes_of(groups, rounding(dtype))
    return (codes - zeros) * scales


def _squares(error: Array, gram: Array) -> Array:
    """Mean square of ``x @ error`` over tokens, summed over outputs."""
    return (error * jnp.matmul(gram, error, precision=lax.Precision.HIGHEST)).sum()
