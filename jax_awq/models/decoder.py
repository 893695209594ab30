"""The decoder as pure functions of a pytree of parameters.

    hidden_states -> block -> attend, mlp or mixture -> linear -> awq_gemm

The parameters are a dict, made by `jax_awq.models.params.assemble`:

    embed (V, H), norm (H,), and lm_head, a `Linear`, unless it is tied to embed;
    layers: a tuple of dicts, one for each layer, or one dict whose arrays have a leading layer
        dimension. A layer is input_norm, post_norm (H,); q_norm, k_norm (head_dim,) in some;
        attention: {qkv_proj or q_proj, k_proj, v_proj; o_proj}; and either
        mlp: {gate_up_proj or gate_proj, up_proj; down_proj} or
        mixture: {router, experts}, the experts like an mlp with a leading expert dimension.

A tuple is unrolled: every weight is an argument of the program and read where it lies. Stacked
layers run as one `lax.scan`: compiled once, but a custom call takes its operand whole, so XLA
copies each layer's weights out of the stack unless it can fuse the slice into the call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq.models.attention import KVCache, Span, attend
from jax_awq.models.config import DecoderConfig
from jax_awq.models.layers import dense, linear, mixture, mlp, project, rms_norm
from jax_awq.models.rope import angles, rotate

Params = dict[str, Any]


@functools.partial(jax.jit, static_argnames="config")
def logits(
    params: Params, input_ids: Array, start: Array | None = None, *, config: DecoderConfig
) -> Array:
    """Next-token logits, float32 (B, T, V), of int32 (B, T) tokens.

    Args:
      start: int32 (B,), the first token of each row that is not padding; None for no padding.
        What stands before it is undefined.

    Raises:
      ValueError: `input_ids` are no integers or not 2-D. Their values are not looked at.
    """
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(
            f"logits: input_ids must be integers (B, T), got {input_ids.dtype} {input_ids.shape}"
        )
    x, _ = hidden_states(params, input_ids, make_span(input_ids, 0, start, config), None, config)
    return output(params, x, config)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: Params, input_ids: Array, length: Array, cache: KVCache, *, config: DecoderConfig
) -> tuple[Array, KVCache]:
    """Fills an empty cache with a prompt.

    Args:
      input_ids: int32 (B, T), T at most the slots of the cache.
      length: int32 scalar; tokens from it on are filling, whatever they are, so that one compiled
        program serves many lengths.

    Returns:
      Logits (B, V) of the token before `length`, and the cache.
    """
    span = make_span(input_ids, 0, cache.start, config)
    x, cache = hidden_states(params, input_ids, span, cache, config)
    last = lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
    return output(params, last, config)[:, 0], cache._replace(length=length)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
    params: Params, token: Array, cache: KVCache, *, config: DecoderConfig
) -> tuple[Array, KVCache]:
    """Logits (B, V) after one more token, int32 (B,), and the cache with it, updated in place.

    The cache must have a free slot: a token too many would replace the last one.
    """
    ids = token[:, None]
    span = make_span(ids, cache.length, cache.start, config)
    x, cache = hidden_states(params, ids, span, cache, config)
    return output(params, x, config)[:, 0], cache._replace(length=cache.length + 1)


def hidden_states(
    params: Params, input_ids: Array, span: Span, cache: KVCache | None, config: DecoderConfig
) -> tuple[Array, Any]:
    """What the last layer gives for tokens (B, T), normalized (B, T, H), and the cache."""
    x = params["embed"][input_ids]
    run = _scanned if isinstance(params["layers"], dict) else _unrolled
    x, cache = run(params["layers"], x, span, cache, config)
    return rms_norm(x, params["norm"], config.norm_eps), cache


def output(params: Params, x: Array, config: DecoderConfig) -> Array:
    """Logits, float32 (..., V), of normalized hidden states."""
    if "lm_head" not in params:
        return dense(x, params["embed"])
    return linear(x, params["lm_head"], out_dtype=jnp.float32)


def _unrolled(layers, x, span, cache, config):
    new: list[Any] = []
    for index, layer in enumerate(layers):
        kv = None if cache is None else (cache.k[index], cache.v[index])
        x, kv = block(layer, x, span, kv, config.window(index), config)
        new.append(kv)
    if cache is not None:
        k, v = zip(*new, strict=True)
        cache = cache._replace(k=k, v=v)
    return x, cache


def _scanned(layers, x, span, cache, config):
    def step(carry, item):
        x, stack = carry
        layer, index = item
        kv = None if stack is None else tuple(part[index] for part in stack)
        x, new = block(layer, x, span, kv, config.window(0), config)
        if new is not None:
            put = lax.dynamic_update_index_in_dim
            stack = tuple(put(s, part, index, 0) for s, part in zip(stack, new, strict=True))
        return (x, stack), None

    stack = None if cache is None else (cache.k, cache.v)
    numbers = jnp.arange(config.num_layers)
    (x, stack), _ = lax.scan(step, (x, stack), (layers, numbers))
    if stack is not None:
        cache = cache._replace(k=stack[0], v=stack[1])
    return x, cache


def block(
    layer: dict[str, Any],
    x: Array,
    span: Span,
    kv: tuple[Array, Array] | None,
    window: int | None,
    config: DecoderConfig,
) -> tuple[Array, tuple[Array, Array] | None]:
    """One layer, (B, T, H) -> (B, T, H), and its part of the cache."""
    h = rms_norm(x, layer["input_norm"], config.norm_eps)
    attended, kv = attention(layer, h, span, kv, window, config)
    x = x + attended
    h = rms_norm(x, layer["post_norm"], config.norm_eps)
    if "mixture" in layer:
        assert config.experts is not None
        return x + mixture(h, layer["mixture"], config.experts), kv
    return x + mlp(h, layer["mlp"], config.intermediate_size), kv


def attention(
    layer: dict[str, Any],
    h: Array,
    span: Span,
    kv: tuple[Array, Array] | None,
    window: int | None,
    config: DecoderConfig,
) -> tuple[Array, tuple[Array, Array] | None]:
    """Attention of a layer with its linears, of normalized (B, T, H) and of that shape."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    heads["v_proj"] = config.num_kv_heads
    sizes = {name: count * config.head_dim for name, count in heads.items()}
    q, k, v = (
        part.reshape(*part.shape[:-1], count, config.head_dim)
        for part, count in zip(
            project(h, layer["attention"], "qkv_proj", sizes), heads.values(), strict=True
        )
    )
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.norm_eps)
        k = rms_norm(k, layer["k_norm"], config.norm_eps)
    q, k = (rotate(part, span.cos, span.sin) for part in (q, k))
    attended, kv = attend(q, k, v, kv, span, window, config)
    attended = attended.reshape(*h.shape[:-1], config.num_heads * config.head_dim)
    return linear(attended, layer["attention"]["o_proj"]), kv


def make_span(tokens: Array, first: Any, start: Array | None, config: DecoderConfig) -> Span:
    """Where tokens (B, T, ...) stand whose first one is in the slot `first`."""
    # Slots serve as positions even behind padding: a rotary embedding tells distances alone.
    positions = first + jnp.arange(tokens.shape[1])
    frequencies = config.rope.frequencies(config.head_dim)
    return Span(first, *angles(frequencies, positions, config.dtype), start)
