"""What a matmul does to its float32 sums before the one rounding."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

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
        y = y + bias[..., None, :].astype(jnp.float32)
    return ACTIVATIONS[activation](y).astype(out_dtype)
