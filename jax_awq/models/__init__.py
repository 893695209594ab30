"""AWQ decoders: Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE, from a checkpoint folder to text."""

from jax_awq.models.config import DecoderConfig
from jax_awq.models.model import Model, load

__all__ = ["DecoderConfig", "Model", "load"]
