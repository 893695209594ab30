"""Float weights to AWQ 4-bit weights."""

from jax_awq.quantize.rtn import round_to_nearest

__all__ = ["round_to_nearest"]
