"""A model as AWQ sees it: groups of linears that share one input."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_awq._checks import FLOATS, check_dtype, check_shape
from jax_awq._packing import PACK_FACTOR
from jax_awq.quantize.rtn import check_group_size

_FLOATS = (*FLOATS, "float64")  # NumPy's own, which JAX makes one of these


@dataclasses.dataclass(frozen=True)
class Block:
    """Linears that share one input, by the paths that their tensors have in a checkpoint.

    Attributes:
      linears: those to quantize.
      previous: the norm or linear that makes this input channel by channel and nothing else, so
        that it can be divided by a scale there; None where there is none, as after an activation
        function, and then only clipping is searched.
      others: linears of the same input that stay float, such as the router of experts.
      output: what the search of the scale compares, a function of the weights of `linears` side by
        side, float32 (K, N), inputs first, and of a batch of their input: the output of the
        attention or MLP around them. None compares the linears' own outputs. A
        `jax.tree_util.Partial` with other weights bound compiles once for all layers.
    """

    linears: tuple[str, ...]
    previous: str | None = None
    others: tuple[str, ...] = ()
    output: Callable[[Any, Any], Any] | None = dataclasses.field(default=None, compare=False)


def decoder_blocks(params: Mapping[str, Any]) -> list[Block]:
    """The blocks of a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

    Args:
      params: its tensors by name.

    Returns:
      For each layer: norm to q, k, v; v to o, where no query heads share a value; norm to gate and
      up; up to down. None has an `output`, see `jax_awq.models.quantization_blocks`.

    Raises:
      ValueError: there are no layers of that name.

    Source: AutoAWQ 0.2.9, awq/models/llama.py, get_layers_for_scaling.
    """
    found = (re.match(r"model\.layers\.(\d+)\.", name) for name in params)
    layers = sorted({int(match[1]) for match in found if match})
    if not layers:
        raise ValueError("decoder_blocks: there is no tensor model.layers.0...")
    blocks = []
    for layer in layers:
        prefix = f"model.layers.{layer}"
        q, k, v, o = (f"{prefix}.self_attn.{name}_proj" for name in "qkvo")
        gate, up, down = (f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down"))
        shapes = [getattr(params.get(f"{path}.weight"), "shape", None) for path in (v, o)]
        blocks += [
            Block((q, k, v), f"{prefix}.input_layernorm"),
            Block((o,), v if shapes[0] == shapes[1] else None),
            Block((gate, up), f"{prefix}.post_attention_layernorm"),
            Block((down,), up),
        ]
    return blocks


def check_blocks(params: Mapping[str, Any], blocks: Sequence[Block], group_size: int) -> None:
    """Raises unless every path is there, once, float, with shapes that agree."""
    if not isinstance(blocks, Sequence):
        raise TypeError(f"quantize: blocks must be a sequence, got {type(blocks).__name__}")
    seen: set[str] = set()
    consumed: set[str] = set()
    for block in blocks:
        if not isinstance(block, Block):
            raise TypeError(f"quantize: blocks must be of Block, got {block!r}")
        if not block.linears:
            raise ValueError(f"quantize: {block} has no linears")
        k = weight_of(params, block.linears[0]).shape[-1]
        for path in (*block.linears, *block.others):
            shape = tuple(weight_of(params, path).shape)
            if len(shape) != 2 or shape[1] != k:
                raise ValueError(
                    f"quantize: {path}.weight must have shape (N, {k}), as {block.linears[0]} has, "
                    f"got {shape}"
                )
            if path in seen:
                raise ValueError(f"quantize: {path} is in two blocks")
            seen.add(path)
            _check_bias(params, path)
        for path in block.linears:
            n = weight_of(params, path).shape[0]
            if n % PACK_FACTOR:
                raise ValueError(
                    f"quantize: {path}.weight: N={n} must be a multiple of {PACK_FACTOR}"
                )
            check_group_size(f"quantize: {path}.weight", k, group_size)
        if block.previous is not None:
            shape = tuple(weight_of(params, block.previous).shape)
            if shape[:1] != (k,):
                raise ValueError(
                    f"quantize: {block.previous}.weight must have {k} outputs, the inputs of "
                    f"{block.linears[0]}, got shape {shape}"
                )
            _check_bias(params, block.previous)
            if block.previous in (*block.linears, *block.others):
                raise ValueError(
                    f"quantize: previous must make the inputs of {block.linears[0]}, got "
                    f"{block.previous} of the same block"
                )
            if block.previous in consumed:
                raise ValueError(f"quantize: {block.previous} is the previous op of two blocks")
            consumed.add(block.previous)


def weight_of(params: Mapping[str, Any], path: str) -> Any:
    if f"{path}.weight" not in params:
        raise ValueError(f"quantize: there is no tensor {path}.weight")
    weight = params[f"{path}.weight"]
    check_dtype("quantize", f"{path}.weight", weight, *_FLOATS)
    return weight


def _check_bias(params: Mapping[str, Any], path: str) -> None:
    name = f"{path}.bias"
    if name in params:
        check_dtype("quantize", name, params[name], *_FLOATS)
        check_shape("quantize", name, params[name], tuple(weight_of(params, path).shape[:1]))
