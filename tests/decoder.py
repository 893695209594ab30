"""A small decoder in plain JAX with the tensor names of a checkpoint, for the tests of quantize."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_awq import AWQWeight

LAYERS, HIDDEN, INTERMEDIATE, HEADS = 2, 64, 96, 2


def random_params(rng):
    """Weights of which norms make a few input channels large, as in language models."""

    def normal(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    params = {"model.embed_tokens.weight": normal(32, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            params[f"{prefix}.self_attn.{name}_proj.weight"] = normal(HIDDEN, HIDDEN)
        for name in "qkv":
            params[f"{prefix}.self_attn.{name}_proj.bias"] = normal(HIDDEN)
        params[f"{prefix}.mlp.gate_proj.weight"] = normal(INTERMEDIATE, HIDDEN)
        params[f"{prefix}.mlp.up_proj.weight"] = normal(INTERMEDIATE, HIDDEN)
        params[f"{prefix}.mlp.down_proj.weight"] = normal(HIDDEN, INTERMEDIATE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = np.ones(HIDDEN, np.float32)
            gain[rng.choice(HIDDEN, 4, replace=False)] = 12
            params[f"{prefix}.{norm}.weight"] = gain
    return params


def forward(params, x, record=None):
    """(B, T, HIDDEN) to the same; `record` takes the input of every linear."""

    def linear(path, x):
        if record is not None:
            record[path] = x
        weight = params.get(path)
        y = x @ weight if isinstance(weight, AWQWeight) else x @ params[f"{path}.weight"].T
        return y + params[f"{path}.bias"][None, None] if f"{path}.bias" in params else y

    def norm(path, x):
        return (
            x
            / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
            * params[f"{path}.weight"][None, None]
        )

    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        h = norm(f"{prefix}.input_layernorm", x)
        q, k, v = (
            linear(f"{prefix}.self_attn.{name}_proj", h).reshape(*x.shape[:2], HEADS, -1)
            for name in "qkv"
        )
        mixed = jax.nn.dot_product_attention(q / 12, k / 12, v, is_causal=True).reshape(x.shape)
        x = x + linear(f"{prefix}.self_attn.o_proj", mixed)
        h = norm(f"{prefix}.post_attention_layernorm", x)
        gate, up = (linear(f"{prefix}.mlp.{name}_proj", h) for name in ("gate", "up"))
        x = x + linear(f"{prefix}.mlp.down_proj", jax.nn.silu(gate) * up)
    return x


def inputs_of(params, x):
    """What `quantize` takes: the input of a block, as two batches."""
    record = {}
    forward(params, x, record)
    return lambda block: jnp.split(record[block.linears[0]], 2)
