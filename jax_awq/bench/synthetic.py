"""A checkpoint of random weights, as large as a real one and made in seconds."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_awq
from jax_awq.models.config import DecoderConfig


def checkpoint(config: DecoderConfig, *, group_size: int, seed: int = 0) -> dict[str, Any]:
    """Random parameters of a Llama in host memory, by their names in a checkpoint."""
    rng = np.random.Generator(np.random.SFC64(seed))
    hidden, middle, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_heads * head, config.num_kv_heads * head
    linears = {
        "self_attn.q_proj": (hidden, heads),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (heads, hidden),
        "mlp.gate_proj": (hidden, middle),
        "mlp.up_proj": (hidden, middle),
        "mlp.down_proj": (middle, hidden),
    }
    ones = np.ones(hidden, config.dtype)
    params: dict[str, Any] = {
        "model.embed_tokens.weight": _floats(rng, (config.vocab_size, hidden), config.dtype),
        "model.norm.weight": ones,
        "lm_head.weight": _floats(rng, (config.vocab_size, hidden), config.dtype),
    }
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            params[f"{prefix}.{name}.weight"] = ones
        for name, (k, n) in linears.items():
            params[f"{prefix}.{name}"] = _weight(rng, k, n, group_size, config.dtype)
    return params


def _weight(rng: np.random.Generator, k: int, n: int, group_size: int, dtype: str) -> Any:
    groups = k // group_size
    scales = rng.uniform(0.5, 1.5, (groups, n)) / (6.5 * math.sqrt(k))  # outputs near 1
    return jax_awq.AWQWeight(
        _bits(rng, (k, n // 8), np.int32),
        scales.astype(dtype),
        _bits(rng, (groups, n // 8), np.int32),
        group_size=group_size,
    )


def _floats(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Of 2**-7 to 2**-6 and any sign: a random sign and mantissa, since this is a gigabyte."""
    bits = _bits(rng, shape, np.uint16)
    bits &= np.uint16(0x8000 | (1 << jnp.finfo(dtype).nmant) - 1)
    bits |= np.array(2.0**-7, dtype).view(np.uint16)
    return bits.view(dtype)


def _bits(rng: np.random.Generator, shape: tuple[int, int], dtype: Any) -> np.ndarray:
    count = math.prod(shape) * np.dtype(dtype).itemsize
    words = rng.integers(0, 2**64, -(-count // 8), np.uint64)  # eight bytes at once: the fastest
    return words.view(np.uint8)[:count].view(dtype).reshape(shape)


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a Llama of these sizes."""
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
    }
