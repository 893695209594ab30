"""Float weights to AWQ 4-bit weights."""

from jax_awq.quantize.blocks import Block, decoder_blocks
from jax_awq.quantize.rtn import round_to_nearest
from jax_awq.quantize.run import is_clipped, quantize
from jax_awq.quantize.search import search_clip, search_scale
from jax_awq.quantize.statistics import Statistics, collect_statistics

__all__ = [
    "Block",
    "Statistics",
    "collect_statistics",
    "decoder_blocks",
    "is_clipped",
    "quantize",
    "round_to_nearest",
    "search_clip",
    "search_scale",
]
