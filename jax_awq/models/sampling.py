"""From logits to the next token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.jit, static_argnames="nucleus")
def pick(logits: Array, draw: Any, step: Any, *, nucleus: bool) -> Array:
    """`greedy` where `draw` is None, else `sample` with its key, temperature and top_p."""
    if draw is None:
        return greedy(logits)
    key, temperature, top_p = draw
    return sample(logits, key, step, temperature, top_p, nucleus=nucleus)


@jax.jit
def greedy(logits: Array) -> Array:
    """The most likely token, int32 (B,), of logits (B, V)."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="nucleus")
def sample(
    logits: Array, key: Array, step: Any, temperature: Any, top_p: Any, *, nucleus: bool = True
) -> Array:
    """A random token, int32 (B,), of logits (B, V) divided by `temperature`.

    Args:
      step: number of the token; with `key` it decides what is drawn.
      top_p: only the most likely tokens are drawn whose probabilities just reach it together.
      nucleus: False where `top_p` is 1, to leave out the sorting.

    Source: nucleus sampling, arXiv 1904.09751.
    """
    logits = logits.astype(jnp.float32)
    # Below the largest, so that no temperature makes infinities of the likely ones; what is
    # subnormal would count as 0.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    divided = below / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    if nucleus:
        divided = jnp.where(_nucleus(logits, divided, top_p), divided, -jnp.inf)
    return jax.random.categorical(jax.random.fold_in(key, step), divided).astype(jnp.int32)


def _nucleus(logits: Array, divided: Array, top_p: Any) -> Array:
    order = jnp.argsort(logits, axis=-1, descending=True)
    chances = jax.nn.softmax(jnp.take_along_axis(divided, order, axis=-1), axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    # The first is always kept, so that top_p = 0 is the most likely token.
    kept = (before < top_p).at[..., 0].set(True)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, order].set(kept)
