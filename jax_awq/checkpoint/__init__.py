"""Checkpoints as the Hugging Face Hub has them."""

from jax_awq.checkpoint.load import load_hf
from jax_awq.checkpoint.save import save_hf

__all__ = ["load_hf", "save_hf"]
