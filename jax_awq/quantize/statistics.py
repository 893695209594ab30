"""What the search needs to know of the inputs of a linear, whatever the number of tokens."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("mean_abs", "gram"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Means over tokens; the mean squared error of an output is a quadratic form in `gram`.

    Attributes:
      mean_abs: ``(K,)`` float32, mean of ``|x|``.
      gram: ``(K, K)`` float32, mean of the outer product of `x` with itself.
    """

    mean_abs: Array
    gram: Array

    def scaled(self, scale: Array) -> "Statistics":
        """Those of ``x / scale``; `scale` is positive, ``(K,)``."""
        return Statistics(self.mean_abs / scale, self.gram / (scale[:, None] * scale[None, :]))


def collect_statistics(batches: Iterable[Any]) -> Statistics:
    """Statistics of all tokens of some batches, each ``(..., K)`` float.

    Raises:
      ValueError: there is no token, K is 0, or batches disagree about K.
    """
    sums, count = None, 0
    for batch in batches:
        x = jnp.asarray(batch)
        want = "K" if sums is None else sums.mean_abs.shape[0]
        if x.ndim == 0 or x.shape[-1] == 0 or want not in ("K", x.shape[-1]):
            raise ValueError(
                f"collect_statistics: a batch must have shape (..., {want}), got {x.shape}"
            )
        count += x.size // x.shape[-1]
        new = _sums(x)
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    if sums is None or not count:
        raise ValueError("collect_statistics: the batches have no token")
    return jax.tree.map(lambda a: a / count, sums)


@jax.jit
def _sums(x: Array) -> Statistics:
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return Statistics(jnp.abs(x).sum(0), jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST))
