"""What is compared: our op, and the two programs that a JAX user would write without it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_awq


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark: a product of x (M, K) and a (K, N) weight."""

    m: int
    k: int
    n: int
    group_size: int
    dtype: str

    @property
    def dense_bytes(self) -> int:
        return self.k * self.n * jnp.dtype(self.dtype).itemsize

    @property
    def packed_bytes(self) -> int:
        """Of qweight, scales and qzeros."""
        groups = self.k // self.group_size
        return self.k * self.n // 2 + groups * self.n * 2 + groups * self.n // 2

    @property
    def activation_bytes(self) -> int:
        """Of x and y."""
        return self.m * (self.k + self.n) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Impl:
    """A way to compute the product.

    Attributes:
      op: from x and the arrays of a weight to y.
      make_weight: from a random key and a case to these arrays, on the device.
      weight_bytes: of these arrays.
    """

    op: Callable[..., Array]
    make_weight: Callable[[Array, Case], tuple[Array, ...]]
    weight_bytes: Callable[[Case], int]


def make_x(key: Array, case: Case) -> Array:
    return jax.random.normal(key, (case.m, case.k), case.dtype)


def _packed(key: Array, case: Case) -> tuple[Array, ...]:
    keys = jax.random.split(key, 3)
    groups = case.k // case.group_size
    return (
        _words(keys[0], (case.k, case.n // 8)),
        jax.random.uniform(keys[1], (groups, case.n), jnp.float32, 0.002, 0.01).astype(
            jnp.bfloat16 if case.dtype == "bfloat16" else jnp.float16
        ),
        _words(keys[2], (groups, case.n // 8)),
    )


def _words(key: Array, shape: tuple[int, int]) -> Array:
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), jnp.int32)


def _dense(key: Array, case: Case) -> tuple[Array, ...]:
    return (0.02 * jax.random.normal(key, (case.k, case.n), case.dtype),)


_SHIFTS = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of the nibble that holds column 8 j + t


def xla_unpack(x: Array, qweight: Array, scales: Array, qzeros: Array) -> Array:
    """The product in plain jnp: shift, mask, subtract the zero, scale, dot."""

    def unpack(words: Array) -> Array:
        codes = (words[..., None] >> _SHIFTS.astype(np.int32)) & 0xF
        return codes.reshape(words.shape[0], -1).astype(x.dtype)

    group_size = qweight.shape[0] // scales.shape[0]
    zeros, factors = (
        jnp.repeat(a, group_size, axis=0) for a in (unpack(qzeros), scales.astype(x.dtype))
    )
    return jnp.dot(x, (unpack(qweight) - zeros) * factors)


IMPLS = {
    "jax_awq": Impl(jax_awq.awq_gemm, _packed, lambda case: case.packed_bytes),
    "xla_dense": Impl(jnp.dot, _dense, lambda case: case.dense_bytes),
    "xla_unpack": Impl(xla_unpack, _packed, lambda case: case.packed_bytes),
}


def weights(impl: str, case: Case, copies: int) -> list[tuple[Any, ...]]:
    """Distinct random weights; never zeros, which flatter the power limit of a GPU."""
    make = jax.jit(IMPLS[impl].make_weight, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), copies)
    return [make(key, dataclasses.replace(case, m=0)) for key in keys]
