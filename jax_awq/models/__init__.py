"""AWQ decoders: Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE, from a checkpoint folder to text."""

from jax_awq.models.config import DecoderConfig, read_decoder_config
from jax_awq.models.model import Model, load
from jax_awq.models.quantization import quantization_blocks

__all__ = ["DecoderConfig", "Model", "load", "quantization_blocks", "read_decoder_config"]
