"""The two searches of AWQ: scales of input channels, and where to clip a group."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from jax_awq.quantize.rtn import codes_of, in_groups, rounding
from jax_awq.quantize.statistics import Statistics

RATIOS = 20
SHRINK_STEPS = 10  # each by 1/20 of the largest value


class NoFiniteError(ValueError):
    """No candidate of a search has a finite error."""


def search_scale(
    weights: Sequence[Array],
    statistics: Statistics,
    *,
    group_size: int = 128,
    dtype: Any = jnp.float16,
    output: Callable[[Array, Array], Array] | None = None,
    batches: Iterable[Any] = (),
) -> Array:
    """The scale `s` of input channels with the least error of ``(x / s) @ Q(s * w)``.

    Candidates are ``mean|x|^r / mean|w|^(1 - r)`` for r = 0, 1/20, ..., 19/20, where ``|w|`` is
    relative to the largest of its group, and the geometric mean of the extremes is 1. The error is
    the mean square over calibration tokens and the outputs of all the weights, or, as AutoAWQ has
    it, those of the attention or MLP around them, which `output` then is.

    Args:
      weights: ``(K, N_i)`` float, of linears that share one input.
      statistics: of that input.
      group_size: rows of K that share one scale, -1 for all of them.
      dtype: of the arithmetic of Q, as in `round_to_nearest`.
      output: function of the weights side by side, float32 ``(K, sum of N_i)``, and one batch;
        None for their product. See `Block`.
      batches: of the input, which `output` takes; they are read once.

    Returns:
      ``(K,)`` float32, positive.

    Raises:
      ValueError: there is an `output` and no batch; or the error of no candidate is finite.

    Source: AWQ, arXiv 2306.00978, section 3.2; AutoAWQ 0.2.9, AwqQuantizer._search_best_scale.
    """
    weight = jnp.concatenate([jnp.asarray(w, jnp.float32) for w in weights], axis=-1)
    scales = _candidates(weight, statistics.mean_abs, group_size)
    if output is None:
        losses = _product_losses(weight, scales, statistics.gram, group_size, dtype)
    else:
        # As a pytree, so that other weights in it are arguments, and blocks alike compile once.
        function = output if isinstance(output, Partial) else Partial(output)
        each = [
            _output_losses(weight, scales, function, jnp.asarray(x), group_size, dtype)
            for x in batches
        ]
        if not each:
            raise ValueError("search_scale: output needs batches, got none")
        losses = sum(each[1:], each[0])
    # Otherwise the first candidate would be taken, whatever it is worth.
    known = not isinstance(losses, jax.core.Tracer)
    if known and not jnp.isfinite(losses).any():
        raise NoFiniteError(
            "search_scale: the error of some candidate must be finite, got NaN or infinity for all "
            "of them"
        )
    return scales[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))]


@functools.partial(jax.jit, static_argnums=2)
def _candidates(weight: Array, x_mean: Array, group_size: int) -> Array:
    """(RATIOS, K)."""
    groups = jnp.abs(in_groups(weight, group_size))
    relative = groups / (groups.max(-2, keepdims=True) + 1e-6)
    w_mean = relative.reshape(weight.shape).mean(-1)

    def candidate(ratio: Array) -> Array:
        scale = jnp.maximum(x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4), 1e-4)
        scale = scale / jnp.sqrt(scale.max() * scale.min())
        return jnp.where(jnp.isfinite(scale), scale, 1)

    return jax.vmap(candidate)(jnp.arange(RATIOS, dtype=jnp.float32) / RATIOS)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _product_losses(weight, scales, gram, group_size, dtype) -> Array:
    def loss(scale: Array) -> Array:
        return _squares(_rounded(weight, scale, group_size, dtype) - weight, gram)

    return lax.map(loss, scales)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _output_losses(weight, scales, output, x, group_size, dtype) -> Array:
    want = output(weight, x)

    def loss(scale: Array) -> Array:
        return ((output(_rounded(weight, scale, group_size, dtype), x) - want) ** 2).sum()

    return lax.map(loss, scales)


def _rounded(weight: Array, scale: Array, group_size: int, dtype: Any) -> Array:
    """What a weight becomes when it is quantized under a scale of its inputs."""
    scale = scale[:, None]
    return fake_quantize(weight * scale, group_size=group_size, dtype=dtype) / scale


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
