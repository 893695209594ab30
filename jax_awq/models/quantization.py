"""The blocks of a decoder for `quantize`, each with the output that AutoAWQ compares."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from jax_awq.models import decoder
from jax_awq.models.config import DecoderConfig
from jax_awq.models.layers import Linear, mlp
from jax_awq.quantize import Block, decoder_blocks


def quantization_blocks(params: Mapping[str, Any], config: DecoderConfig) -> list[Block]:
    """`jax_awq.quantize.decoder_blocks`, of which the scales are searched as AutoAWQ does it.

    Those of q, k, v are compared by what the attention gives, those of gate and up by what the MLP
    gives, both in float32. The inputs of q, k, v must then be batches (B, T, H) of whole texts.

    Args:
      params: float tensors of a dense Llama, Mistral, Qwen2 or Qwen3 by their names in a
        checkpoint.
      config: of the model, of `read_decoder_config`; its dtype does not count.

    Raises:
      ValueError: as for `decoder_blocks`, or a tensor that the output needs is missing, or `config`
        has experts.

    Source: AutoAWQ 0.2.9, awq/models/llama.py, module2inspect of get_layers_for_scaling.
    """
    if config.experts is not None:
        raise ValueError(
            f"quantization_blocks: config must be of a dense model, got {config.model_type!r} "
            f"with {config.experts.num_experts} experts"
        )
    config = dataclasses.replace(config, dtype="float32", attention="xla")
    blocks = []
    for block in decoder_blocks(params):
        prefix, _, name = block.linears[0].rpartition(".")
        if name == "q_proj":
            layer = int(prefix.split(".")[2])
            block = dataclasses.replace(block, output=_attention(params, prefix, layer, config))
        elif name == "gate_proj":
            block = dataclasses.replace(block, output=_mlp(params, prefix, config))
        blocks.append(block)
    return blocks


def _attention(params: Mapping[str, Any], prefix: str, layer: int, config: DecoderConfig) -> Any:
    others: dict[str, Any] = {"o_proj": _linear(params, f"{prefix}.o_proj", config.output_bias)}
    if config.attention_bias:
        others["biases"] = [_tensor(params, f"{prefix}.{name}_proj.bias") for name in "qkv"]
    if config.qk_norm:
        others |= {
            part: _tensor(params, f"{prefix}.{part}.weight") for part in ("q_norm", "k_norm")
        }
    return Partial(_attention_output(config, config.window(layer)), others)


def _mlp(params: Mapping[str, Any], prefix: str, config: DecoderConfig) -> Any:
    others: dict[str, Any] = {"down_proj": _linear(params, f"{prefix}.down_proj", config.mlp_bias)}
    if config.mlp_bias:
        others["biases"] = [
            _tensor(params, f"{prefix}.{name}_proj.bias") for name in ("gate", "up")
        ]
    return Partial(_mlp_output(config), others)


# Cached, so that the layers of a model share one function and with it one program.


@functools.cache
def _attention_output(config: DecoderConfig, window: int | None) -> Callable[..., Array]:
    def output(others: dict[str, Any], weight: Array, x: Array) -> Array:
        layer = _wide(others)
        x = x.astype(jnp.float32)
        if x.ndim != 3:
            raise ValueError(
                f"quantization_blocks: inputs of q, k, v must be (B, T, H), got shape {x.shape}"
            )
        layer["attention"] = {"qkv_proj": _fused(weight, layer), "o_proj": layer["o_proj"]}
        span = decoder.make_span(x, 0, None, config)
        return decoder.attention(layer, x, span, None, window, config)[0]

    return output


@functools.cache
def _mlp_output(config: DecoderConfig) -> Callable[..., Array]:
    def output(others: dict[str, Any], weight: Array, x: Array) -> Array:
        parts = _wide(others)
        fused = {"gate_up_proj": _fused(weight, parts), "down_proj": parts["down_proj"]}
        return mlp(x.astype(jnp.float32), fused, config.intermediate_size)

    return output


def _fused(weight: Array, others: dict[str, Any]) -> Linear:
    biases = others.get("biases")
    return Linear(weight.T, None if biases is None else jnp.concatenate(biases))


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def _linear(params: Mapping[str, Any], path: str, bias: bool) -> Linear:
    return Linear(
        _tensor(params, f"{path}.weight"), _tensor(params, f"{path}.bias") if bias else None
    )


def _tensor(params: Mapping[str, Any], name: str) -> Any:
    if name not in params:
        raise ValueError(f"quantization_blocks: there is no tensor {name}")
    return params[name]
