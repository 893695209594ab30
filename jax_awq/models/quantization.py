"""A decoder for `quantize`: its blocks with the outputs that AutoAWQ compares, and its inputs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from jax_awq.models import decoder
from jax_awq.models.config import DecoderConfig
from jax_awq.models.layers import Linear, linear, mlp
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


def disassemble(params: dict[str, Any], config: DecoderConfig) -> dict[str, np.ndarray]:
    """The tensors of a dense decoder by their names in a checkpoint, the inverse of `assemble`.

    They are on the host, so that a device never holds a second copy of the model.

    Raises:
      ValueError: `config` has experts, or a linear is packed.
    """
    if config.experts is not None:
        raise ValueError(f"quantize: model must be dense, got one of {config.model_type!r}")
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["norm"]}
    if "lm_head" in params:
        tensors |= _tensors("lm_head", params["lm_head"])
    heads, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    sizes = {
        "qkv_proj": {"q_proj": heads, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size),
    }
    for index, layer in enumerate(unstacked(params["layers"], config.num_layers)):
        name = f"model.layers.{index}"
        tensors[f"{name}.input_layernorm.weight"] = layer["input_norm"]
        tensors[f"{name}.post_attention_layernorm.weight"] = layer["post_norm"]
        for part in ("q_norm", "k_norm") if config.qk_norm else ():
            tensors[f"{name}.self_attn.{part}.weight"] = layer[part]
        for part, module in (("attention", "self_attn"), ("mlp", "mlp")):
            for own, value in layer[part].items():
                tensors |= _tensors(f"{name}.{module}.{own}", value, sizes.get(own))
    return {name: np.asarray(array) for name, array in tensors.items()}


def _tensors(name: str, linear: Linear, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """Weight and bias of a linear, or of those that were fused into it."""
    if not isinstance(linear.weight, Array):
        raise ValueError(f"quantize: the weights of model must be float, {name} is packed")
    prefix, _, own = name.rpartition(".")
    ends = np.cumsum(list((sizes or {}).values()))[:-1]
    tensors = {}
    for kind, value in linear._asdict().items():
        if value is not None:
            split = np.split(np.asarray(value), ends) if sizes else [value]
            for part, array in zip(sizes or (own,), split, strict=True):
                tensors[f"{prefix}.{part}.{kind}".lstrip(".")] = array
    return tensors


def unstacked(layers: Any, count: int) -> list[dict[str, Any]]:
    """The layers one by one."""
    if not isinstance(layers, dict):
        return list(layers)
    return [jax.tree.map(lambda leaf, i=index: leaf[i], layers) for index in range(count)]


class Recorder:
    """Inputs of the blocks of a dense decoder, layer by layer, when it reads some tokens.

    Only those of one layer are kept, so blocks must be asked for in the order of their layers.

    Args:
      params: of `jax_awq.models.decoder`.
      tokens: batches, int32 (B, T).
    """

    def __init__(self, params: Mapping[str, Any], config: DecoderConfig, tokens: Sequence[Array]):
        self.layers = unstacked(params["layers"], config.num_layers)
        self.config = dataclasses.replace(config, attention="xla")
        self.hidden = [params["embed"][ids] for ids in tokens]  # before the layer `done`
        self.done = 0
        self.seen: list[dict[str, Array]] = []  # of the layer before

    def __call__(self, block: Block) -> list[Array]:
        _, _, layer, _, name = block.linears[0].split(".")
        if int(layer) < self.done - 1:
            raise ValueError(f"quantize: {block.linears[0]} comes after blocks of a later layer")
        while self.done <= int(layer):
            window = self.config.window(self.done)
            run = functools.partial(_recorded, window=window, config=self.config)
            results = [run(self.layers[self.done], x) for x in self.hidden]
            self.hidden, self.seen = [y for y, _ in results], [seen for _, seen in results]
            self.done += 1
        fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}.get(name, name)
        return [seen[fused] for seen in self.seen]


@functools.partial(jax.jit, static_argnames=("window", "config"))
def _recorded(
    layer: dict[str, Any], x: Array, *, window: int | None, config: DecoderConfig
) -> tuple[Array, dict[str, Array]]:
    """What a layer gives, and what each of its linears got."""
    seen: dict[str, Array] = {}

    def shown(name: str, part: Linear) -> Linear:
        def multiply(x: Array, *, bias: Array | None, out_dtype: Any) -> Array:
            seen[name] = x
            return linear(x, part._replace(bias=bias), out_dtype=out_dtype)

        return part._replace(weight=multiply)

    layer = layer | {
        kind: {name: shown(name, part) for name, part in layer[kind].items()}
        for kind in ("attention", "mlp")
    }
    y, _ = decoder.block(layer, x, decoder.make_span(x, 0, None, config), None, window, config)
    return y, seen


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
