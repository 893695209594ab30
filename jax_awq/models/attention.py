"""Attention and its cache of keys and values."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq.models.config import DecoderConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, a pytree.

    Attributes:
      k: for each layer (B, kv_heads, slots, head_dim); one array with a leading layer dimension
        where the layers are stacked. Heads lie before slots, so that both products of attention
        are batched matrix products without a copy.
      v: like `k`.
      length: int32 scalar, slots that are filled, the same for every row.
      start: int32 (B,), the first slot of each row that is not padding; None for no padding.
    """

    k: Any
    v: Any
    length: Array
    start: Array | None


class Span(NamedTuple):
    """Where the tokens of one call stand.

    Attributes:
      first: slot of the first token; the integer 0 where a prompt begins, whose tokens attend to
        each other only and need no cache.
      cos, sin: of their rotary embedding.
      start: as in `KVCache`.
    """

    first: Array | int
    cos: Array
    sin: Array
    start: Array | None


def make_cache(
    config: DecoderConfig, batch: int, slots: int, *, stacked: bool, start: Array | None = None
) -> KVCache:
    """An empty cache for `batch` rows of at most `slots` tokens."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)

    def zeros() -> Any:
        if stacked:
            return jnp.zeros((config.num_layers, *shape), config.dtype)
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

    return KVCache(zeros(), zeros(), jnp.zeros((), jnp.int32), start)


def attend(
    q: Array,
    k: Array,
    v: Array,
    kv: tuple[Array, Array] | None,
    span: Span,
    window: int | None,
    config: DecoderConfig,
) -> tuple[Array, tuple[Array, Array] | None]:
    """Causal attention of new tokens to themselves and to the cached ones.

    Args:
      q: (B, T, heads, head_dim).
      k, v: (B, T, kv_heads, head_dim), of the new tokens.
      kv: a layer's part of the cache, or None.

    Returns:
      (B, T, heads, head_dim), and `kv` with the new tokens written to it.
    """
    fresh = isinstance(span.first, int)
    if kv is not None:
        # Where JAX has 64 bits, a plain 0 would not be of the dtype that an array has.
        zero = 0 if fresh else jnp.zeros_like(span.first)
        at = (zero, zero, span.first, zero)
        kv = tuple(
            lax.dynamic_update_slice(old, new.swapaxes(1, 2), at)
            for old, new in zip(kv, (k, v), strict=True)
        )  # type: ignore[assignment]
    if not fresh:
        assert kv is not None
        k, v = (a.swapaxes(1, 2) for a in kv)
    if fresh and span.start is None:
        local = None if window is None else (window - 1, 0)
        options = {"is_causal": True, "local_window_size": local}
        return _product(q, k, v, implementation=config.attention, **options), kv
    mask = _mask(q.shape[1], k.shape[1], span, window)
    return _product(q, k, v, mask=mask, implementation="xla"), kv


def _product(q: Array, k: Array, v: Array, *, implementation: str, **options: Any) -> Array:
    run = functools.partial(jax.nn.dot_product_attention, implementation=implementation, **options)
    if q.dtype == jnp.float32:
        with jax.default_matmul_precision("highest"):  # a GPU would round to 10 bits
            return run(q, k, v)
    if q.dtype == jnp.float16 and implementation == "xla":
        # It asks for a product of float16 in float32 by name, which only a GPU has.
        return lax.platform_dependent(q, k, v, cuda=run, default=functools.partial(_wide, run))
    return run(q, k, v)


def _wide(run: Any, *operands: Array) -> Array:
    return run(*(a.astype(jnp.float32) for a in operands)).astype(operands[0].dtype)


def _mask(tokens: int, slots: int, span: Span, window: int | None) -> Array:
    """(B or 1, 1, T, slots): which slots a token attends to."""
    query = span.first + jnp.arange(tokens)[None, None, :, None]
    slot = jnp.arange(slots)[None, None, None]
    seen = slot <= query
    if window is not None:
        seen &= slot > query - window
    if span.start is not None:
        seen = seen & (slot >= span.start[:, None, None, None])
    return seen
