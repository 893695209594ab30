"""The parts of a decoder layer, as functions of arrays."""

import itertools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq._batching import aligned
from jax_awq.models.config import Experts
from jax_awq.ops.awq_gemm import awq_gemm


class Linear(NamedTuple):
    """A linear of a checkpoint.

    Attributes:
      weight: (K, N) packed, as `awq_gemm` takes it; a dense array (N, K) as in the file; or a
        pytree that multiplies by itself, called as `weight(x, bias=, out_dtype=)`.
      bias: (N,) or None.
    """

    weight: Any
    bias: Array | None = None


def linear(x: Array, part: Linear, *, out_dtype: Any = None) -> Array:
    """(..., K) -> (..., N) in `out_dtype`, by default that of `x`."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if callable(part.weight):
        return part.weight(x, bias=part.bias, out_dtype=out_dtype)
    if not isinstance(part.weight, Array):
        return awq_gemm(x, part.weight, bias=part.bias, out_dtype=out_dtype)
    y = dense(x, part.weight)
    if part.bias is not None:
        y = operator.add(*aligned(y, part.bias.astype(jnp.float32)))
    return y.astype(out_dtype)


def dense(x: Array, weight: Array) -> Array:
    """x (..., K) times the transpose of weight (N, K), in float32."""
    # Without HIGHEST a GPU would round float32 operands to 10 bits.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, weight, contract, precision=precision, preferred_element_type=jnp.float32
    )


def project(x: Array, parts: dict[str, Linear], fused: str, sizes: dict[str, int]) -> list[Array]:
    """The products with several linears of one input, which the loader fuses where it can.

    Args:
      parts: has `fused`, or every name of `sizes`.
      sizes: outputs of each linear by its name, in the order in which they are fused.
    """
    if fused not in parts:
        return [linear(x, parts[name]) for name in sizes]
    ends = list(itertools.accumulate(sizes.values()))[:-1]
    return jnp.split(linear(x, parts[fused]), ends, axis=-1)


def mlp(x: Array, parts: dict[str, Linear], size: int) -> Array:
    """down(silu(gate(x)) * up(x)) with `size` values in the middle."""
    gate, up = project(x, parts, "gate_up_proj", {"gate_proj": size, "up_proj": size})
    return linear(jax.nn.silu(gate) * up, parts["down_proj"])


def mixture(x: Array, parts: dict[str, Any], experts: Experts) -> Array:
    """Sum of the `top_k` experts that the router weighs highest, for each token of (..., K)."""
    rows = x.reshape(-1, x.shape[-1])
    scores = jax.nn.softmax(linear(rows, parts["router"]).astype(jnp.float32), axis=-1)
    shares, chosen = lax.top_k(scores, experts.top_k)
    if experts.normalize:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    shares = shares.astype(x.dtype).astype(jnp.float32)
    run = _chosen_experts if chosen.size <= experts.num_experts else _all_experts
    y = run(rows, shares, chosen, parts["experts"], experts)
    return y.astype(x.dtype).reshape(x.shape)


def _chosen_experts(x, shares, chosen, parts, experts: Experts) -> Array:
    """Each token with its own experts' weights, gathered: for a few tokens, as in decoding."""
    own = jax.tree.map(lambda leaf: leaf[chosen.reshape(-1)], parts)
    repeated = jnp.repeat(x, experts.top_k, axis=0)[:, None]
    y = jax.vmap(lambda row, part: mlp(row, part, experts.intermediate_size))(repeated, own)
    y = y.reshape(*chosen.shape, -1).astype(jnp.float32)
    return jnp.einsum("tkn,tk->tn", y, shares, precision=lax.Precision.HIGHEST)


def _all_experts(x, shares, chosen, parts, experts: Experts) -> Array:
    """All tokens through one expert after the other, each expert's weights read once."""
    one_hot = jax.nn.one_hot(chosen, experts.num_experts, dtype=jnp.float32)
    by_expert = jnp.einsum("tke,tk->et", one_hot, shares, precision=lax.Precision.HIGHEST)

    def add(total, expert):
        part, share = expert
        y = mlp(x, part, experts.intermediate_size).astype(jnp.float32)
        return total + share[:, None] * y, None

    return lax.scan(add, jnp.zeros(x.shape, jnp.float32), (parts, by_expert))[0]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis, normalized in float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return operator.mul(*aligned((wide * scale).astype(x.dtype), weight))
