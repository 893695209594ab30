"""What a matmul does to its float32 sums before the one rounding."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq._batching import aligned

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda y: y,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def epilogue(y, bias, *, activation, out_dtype) -> Array:
    """``activation(y + bias)``, rounded once; `bias` is ``(..., N)`` or None."""
    if bias is not None:
        y, bias = aligned(y, bias[..., None, :].astype(jnp.float32))
        y = y + bias
    return ACTIVATIONS[activation](y).astype(out_dtype)


def bias_tangent(dbias, y):
    """A tangent of the bias as one of `y`; its transpose adds the rows in float32."""
    return jnp.broadcast_to(dbias.astype(jnp.float32)[..., None, :], y.shape).astype(y.dtype)


def finish_jvp(y, dy, *, activation, out_dtype, **params):
    """Result and tangent from those before the activation; None is a zero tangent."""
    if activation == "none":
        return [y], [dy]
    finish = functools.partial(epilogue, bias=None, activation=activation, out_dtype=out_dtype)
    if dy is None:
        return [finish(y)], [None]
    y, dy = jax.jvp(finish, (y,), (dy,))
    return [y], [dy]
