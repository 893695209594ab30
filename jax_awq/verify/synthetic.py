"""Errors on activations that are made up: normal ones, with some channels that stand out."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_awq.calibrate import ActivationRange
from jax_awq.quantize import round_to_nearest
from jax_awq.verify.schemes import SCHEMES, Errors, Row, static_scale

_ROWS = 128


def synthetic_weights() -> dict[str, Any]:
    """Normal weights, rounded to nearest."""
    rng = np.random.default_rng(0)
    return {
        f"{k} x {n}, group {group}": round_to_nearest(
            rng.standard_normal((k, n), np.float32) / np.float32(k**0.5), group_size=group
        )
        for k, n, group in ((512, 1536, 128), (1536, 512, 64), (512, 512, 32), (1024, 256, -1))
    }


def synthetic_rows(
    weights: Mapping[str, Any], dtype: Any, advance: Callable[[], None]
) -> list[Row]:
    """Errors of every scheme on `weights`, (K, N) or (E, K, N)."""
    errors, rng = Errors(dtype), np.random.default_rng(1)
    for name, weight in weights.items():
        batch = weight.shape[:-2]
        for index in np.ndindex(*batch):
            one = jax.tree.map(lambda a, index=index: jnp.asarray(a)[index], weight)
            k, n = one.shape
            size = np.exp(rng.standard_normal(k) / 2)
            size[rng.permutation(k)[: max(k // 256, 1)]] *= 8
            first, second = (rng.standard_normal((2, _ROWS, k)) * size).astype(np.float32)
            seen = ActivationRange.empty().update(jnp.asarray(first))
            scales = {scheme.name: static_scale(scheme, seen) for scheme in SCHEMES}
            label = ".".join([name, *map(str, index)])
            errors.add([(label, n)], jnp.asarray(second), one, scales)
        advance()
    return errors.rows()
