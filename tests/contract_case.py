"""What a case of the contract tests is."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_awq import AWQWeight
from jax_awq.testing import dequantize_float64

K, N, M, E = 64, 16, 3, 2  # E: length of every mapped axis


def auto_mesh(**sizes: int) -> jax.sharding.Mesh:
    """Axes that the partitioner may use as it likes; `jax.make_mesh` alone makes Explicit ones."""
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        devices=jax.devices()[:count],
        axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """An op with its options bound, as a function of arrays.

    Attributes:
      fn: the public op on `operands`.
      exact: the same in float64, by the oracle of `jax_awq.testing`.
      dense: a plain JAX program of the floating operands, run in their dtype or in float64.
      floats: positions of the floating operands.
    """

    op: str
    fn: Callable[..., jax.Array]
    exact: Callable[..., np.ndarray]
    dense: Callable[..., jax.Array]
    operands: tuple[np.ndarray, ...]
    floats: tuple[int, ...]

    def another(self, seed: int) -> tuple[np.ndarray, ...]:
        """Operands of the same shapes with other values."""
        rng = np.random.default_rng(seed)
        return tuple(rng.permutation(o.reshape(-1)).reshape(o.shape) for o in self.operands)

    def of_floats(self, *values: Any) -> jax.Array:
        operands = list(self.operands)
        for position, value in zip(self.floats, values, strict=True):
            operands[position] = value
        return self.fn(*operands)

    @property
    def float_operands(self) -> tuple[np.ndarray, ...]:
        return tuple(self.operands[i] for i in self.floats)


def _canonical_scales(scales, layout, group_size):
    return scales if layout != "gemv" else scales[..., : K // group_size].swapaxes(-1, -2)


def dense_weight(weight: AWQWeight, scales, rounded):
    """``(q - z) * s`` as a function of the scales; `rounded` is the dtype, or None for float64."""
    ones = dataclasses.replace(weight, scales=np.ones_like(weight.scales))
    codes = dequantize_float64(ones)
    group_size = K if weight.group_size == -1 else weight.group_size
    scales = jnp.repeat(_canonical_scales(scales, weight.layout, group_size), group_size, -2)
    if scales.dtype == jnp.float64:
        return codes * scales
    return (codes.astype(np.float32) * scales.astype(jnp.float32)).astype(rounded)


ACTIVATIONS = {
    None: lambda y: y,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda y: jax.nn.gelu(y, approximate=False),
    "gelu_tanh": lambda y: jax.nn.gelu(y, approximate=True),
}
