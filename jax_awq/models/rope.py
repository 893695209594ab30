"""Rotary position embedding, with the scalings that extend a trained context."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_awq._batching import aligned

_KINDS = ("default", "linear", "llama3")
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_DEFAULT_THETA = 10000.0  # of every supported architecture's configuration class


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies ``theta ** (-2 i / head_dim)``, then scaled.

    Attributes:
      kind: "default", "linear" (all divided by `factor`) or "llama3" (wavelengths above
        original / low are divided by `factor`, those below original / high kept, between them
        interpolated).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: float = 0.0

    def frequencies(self, head_dim: int) -> np.ndarray:
        """float32 (head_dim / 2,), radians per position."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        base = 1.0 / np.float32(self.theta) ** exponents
        if self.kind == "default":
            return base
        if self.kind == "linear":
            return base / np.float32(self.factor)
        wavelengths = 2 * math.pi / base
        ratio = self.original_max_position_embeddings / wavelengths
        kept = np.clip(
            (ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1
        )
        return (base * kept + base / self.factor * (1 - kept)).astype(np.float32)


def read_rope(file: Path, values: dict[str, Any], head_dim: int) -> Rope:
    """The rotary embedding that `rope_parameters` of a config.json describes.

    Raises:
      ValueError: a kind or a parameter that is not known, or one that is missing or out of range.
    """
    if head_dim % 2:
        raise ValueError(f"load: {file}: head_dim must be even, got {head_dim}")
    name = "rope_parameters"
    found = values.get(name) or {}
    if any(isinstance(v, dict) for v in found.values()):
        raise ValueError(f"load: {file}: {name} must be one flat object, got {found!r}")
    found = {key: value for key, value in found.items() if value is not None}
    theta = found.pop("rope_theta", _DEFAULT_THETA)
    kinds = [found.pop(key) for key in ("rope_type", "type") if key in found] or ["default"]
    kind = kinds[0]
    if any(other != kind or other not in _KINDS for other in kinds):
        raise ValueError(f"load: {file}: rope_type must be one of {_KINDS}, got {kinds}")
    needed = _NEEDED[kind]
    # A copy of the top level's value that some tools put there.
    if found.get("partial_rotary_factor") == 1:
        del found["partial_rotary_factor"]
    for key in needed:
        if key not in found:
            raise ValueError(f"load: {file}: {name} of type {kind!r} has no {key}")
    for key, value in {**found, "rope_theta": theta}.items():
        if key not in (*needed, "rope_theta"):
            raise ValueError(
                f"load: {file}: {name} of type {kind!r} has {key}, which is not supported"
            )
        if type(value) not in (int, float):
            raise ValueError(f"load: {file}: {key} must be a number, got {value!r}")
        if not _LEAST <= value <= _MOST:
            raise ValueError(
                f"load: {file}: {key} must be positive and finite in float32, got {value!r}"
            )
    rope = Rope(float(theta), kind, **{key: float(found[key]) for key in needed})
    if kind == "llama3" and not rope.high_freq_factor > rope.low_freq_factor:
        raise ValueError(
            f"load: {file}: high_freq_factor must be above low_freq_factor "
            f"{rope.low_freq_factor}, got {rope.high_freq_factor}"
        )
    return rope


def angles(frequencies: np.ndarray, positions: Array, dtype: Any) -> tuple[Array, Array]:
    """cos and sin (..., T, 1, head_dim) of positions (..., T), computed in float32."""
    positions, rates = aligned(positions[..., None].astype(jnp.float32), frequencies)
    angle = positions * rates
    angle = jnp.concatenate([angle, angle], axis=-1)[..., None, :]
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + head_dim / 2) of x (..., T, heads, head_dim)."""
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    x, turned, cos, sin = aligned(x, turned, cos, sin)
    return x * cos + turned * sin
