"""From the tensors of a checkpoint to the parameters of a decoder."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_awq.models.config import DecoderConfig, Experts
from jax_awq.models.layers import Linear
from jax_awq.weights import AWQWeight, PermutedWeight

_ARRAYS = ("qweight", "scales", "qzeros")
# The axis of N in each array of a weight, by layout.
_N_AXES = {"gemm": (-1, -1, -1), "gemv": (-2, -2, -2), "oc_major": (-2, -1, -1)}


def assemble(
    tensors: dict[str, Any],
    config: DecoderConfig,
    *,
    stacked: bool = False,
    put: Callable[[Any], Any] = lambda tree: tree,
    place: Any = "the tensors",
) -> dict[str, Any]:
    """The parameters that `jax_awq.models.decoder` takes.

    Linears of the same input are fused along N, bit for bit, where layout, group size and dtypes
    agree.

    Args:
      tensors: of `load_hf`, or the functions of `open_hf` that read them. It is emptied: each is
        freed when it has found its place, so that no second copy of the model comes to life.
      stacked: whether the layers are stacked for a scan.
      put: what each finished part goes through, such as `jax.device_put`: parts that are read as
        numpy arrays are fused on the host, and a device never holds more than the model.
      place: where the tensors are from, for messages.

    Raises:
      ValueError: a tensor is missing, unused, misshapen or of integers, or `stacked` and layers
        differ.
    """
    source = _Source(tensors, place)
    hidden, vocab = config.hidden_size, config.vocab_size
    params: dict[str, Any] = {
        "embed": put(source.array("model.embed_tokens.weight", (vocab, hidden))),
        "norm": put(source.array("model.norm.weight", (hidden,))),
    }
    if (head := _head(source, config, params["embed"])) is not None:
        params["lm_head"] = put(head)
    layers = [put(_layer(source, index, config)) for index in range(config.num_layers)]
    _drop_frequencies(source, config)
    if tensors:
        raise ValueError(
            f"load: model_type {config.model_type!r} has no place for {_some(sorted(tensors))} "
            f"in {place}"
        )
    params["layers"] = stack(layers) if stacked else tuple(layers)
    return params


def stack(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """One tree with a leading dimension of many with the same structure; `layers` is emptied."""
    structures = [jax.tree.structure(layer) for layer in layers]
    shapes = [[(a.shape, a.dtype) for a in jax.tree.leaves(layer)] for layer in layers]
    for index, found in enumerate(zip(structures, shapes, strict=True)):
        if found != (structures[0], shapes[0]):
            raise ValueError(
                f"load: {index} and 0 differ in structure or shapes, so they cannot be stacked: "
                f"{layers[index]} and {layers[0]}"
            )
    columns = [list(leaves) for leaves in zip(*map(jax.tree.leaves, layers), strict=True)]
    layers.clear()
    leaves = []
    for column in reversed(columns):
        leaves.append(_numpy_or_jax(column).stack(column))
        column.clear()
    return jax.tree.unflatten(structures[0], leaves[::-1])


def _layer(source: "_Source", index: int, config: DecoderConfig) -> dict[str, Any]:
    name = f"model.layers.{index}"
    hidden, head = config.hidden_size, config.head_dim
    heads, kv = config.num_heads * head, config.num_kv_heads * head
    attention = f"{name}.self_attn"
    bias = config.attention_bias
    layer: dict[str, Any] = {
        "input_norm": source.array(f"{name}.input_layernorm.weight", (hidden,)),
        "post_norm": source.array(f"{name}.post_attention_layernorm.weight", (hidden,)),
        "attention": fuse(
            {
                "q_proj": source.linear(f"{attention}.q_proj", hidden, heads, bias),
                "k_proj": source.linear(f"{attention}.k_proj", hidden, kv, bias),
                "v_proj": source.linear(f"{attention}.v_proj", hidden, kv, bias),
            },
            "qkv_proj",
        )
        | {"o_proj": source.linear(f"{attention}.o_proj", heads, hidden, config.output_bias)},
    }
    if config.qk_norm:
        for part in ("q_norm", "k_norm"):
            layer[part] = source.array(f"{attention}.{part}.weight", (head,))
    if not config.is_sparse(index):
        layer["mlp"] = _mlp(source, f"{name}.mlp", config.intermediate_size, config)
        return layer
    experts = config.experts
    assert experts is not None
    layer["mixture"] = {
        "router": source.linear(f"{name}.mlp.gate", hidden, experts.num_experts, False),
        "experts": _experts(source, f"{name}.mlp.experts", experts, hidden, config),
    }
    return layer


def _experts(
    source: "_Source", name: str, experts: Experts, hidden: int, config: DecoderConfig
) -> dict[str, Linear]:
    size, count = experts.intermediate_size, experts.num_experts
    if not source.has(f"{name}.gate_up_proj"):
        return stack([_mlp(source, f"{name}.{e}", size, config) for e in range(count)])
    # As transformers 5 has them: all experts in one tensor, gate before up.
    return {
        "gate_up_proj": source.linear(f"{name}.gate_up_proj", hidden, 2 * size, False, count),
        "down_proj": source.linear(f"{name}.down_proj", size, hidden, False, count),
    }


def _mlp(source: "_Source", name: str, size: int, config: DecoderConfig) -> dict[str, Linear]:
    hidden, bias = config.hidden_size, config.mlp_bias
    up = {
        part: source.linear(f"{name}.{part}", hidden, size, bias)
        for part in ("gate_proj", "up_proj")
    }
    down = source.linear(f"{name}.down_proj", size, hidden, bias)
    return fuse(up, "gate_up_proj") | {"down_proj": down}


def _head(source: "_Source", config: DecoderConfig, embed: Array) -> Linear | None:
    found = source.has("lm_head")
    if not config.tie_embeddings:
        if not found:
            raise ValueError(
                f"load: tensor lm_head.weight is missing in {source.place}, and "
                "tie_word_embeddings is false"
            )
        return source.linear(
            "lm_head", config.hidden_size, config.vocab_size, source.has("lm_head.bias")
        )
    if found:
        head = source.linear("lm_head", config.hidden_size, config.vocab_size, False)
        if _is_packed(head.weight) or not jnp.array_equal(head.weight, embed):
            raise ValueError(
                "load: lm_head.weight differs from model.embed_tokens.weight in "
                f"{source.place}, but tie_word_embeddings is true"
            )
    return None


def _drop_frequencies(source: "_Source", config: DecoderConfig) -> None:
    """Old tools wrote what the configuration already tells."""
    want = config.rope.frequencies(config.head_dim)
    for name in [n for n in source.tensors if n.endswith(".rotary_emb.inv_freq")]:
        found = np.asarray(source.take(name), np.float32)
        if found.shape != want.shape or not np.allclose(found, want, rtol=1e-2, atol=1e-7):
            raise ValueError(
                f"load: tensor {name} in {source.place} has other frequencies than config.json"
            )


def fuse(parts: dict[str, Linear], name: str) -> dict[str, Linear]:
    """`{name: one linear}` where the parts can be concatenated along N, else `parts`."""
    biases = [part.bias for part in parts.values() if part.bias is not None]
    weights = [part.weight for part in parts.values()]
    if len(biases) not in (0, len(parts)):
        return parts
    bias = _joined(biases, 0) if biases else None
    if not any(_is_packed(w) for w in weights):
        return {name: Linear(_joined(weights, 0), bias)}
    if any(_kind(w) is None or _kind(w) != _kind(weights[0]) for w in weights):
        return parts
    joined = {
        array: None
        if getattr(weights[0], array) is None
        else _joined([getattr(w, array) for w in weights], axis)
        for array, axis in zip(_ARRAYS, _N_AXES[weights[0].layout], strict=True)
    }
    return {name: Linear(dataclasses.replace(weights[0], **joined), bias)}


def _joined(arrays: list[Any], axis: int) -> Any:
    return _numpy_or_jax(arrays).concatenate(arrays, axis=axis)


def _numpy_or_jax(arrays: list[Any]) -> Any:
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp


def _is_packed(weight: Any) -> bool:
    return isinstance(weight, AWQWeight | PermutedWeight)


def _kind(weight: Any) -> Any:
    """What has to agree for weights to be fused; None for what cannot be, as with a permutation."""
    if not isinstance(weight, AWQWeight):
        return None
    dtypes = [getattr(getattr(weight, name), "dtype", None) for name in _ARRAYS]
    return weight.layout, weight.group_size, dtypes, weight.shape[0]


class _Source:
    """The tensors that are left, taken by name and with the shape they must have."""

    def __init__(self, tensors: dict[str, Any], place: Any):
        self.tensors, self.place = tensors, place

    def has(self, name: str) -> bool:
        return name in self.tensors or f"{name}.weight" in self.tensors

    def take(self, name: str) -> Any:
        found = self.tensors.pop(name)
        return found() if callable(found) else found

    def array(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self.tensors:
            raise ValueError(f"load: tensor {name} is missing in {self.place}{self._instead(name)}")
        found = self.take(name)
        if found.shape != shape:
            raise ValueError(
                f"load: tensor {name} in {self.place} must have shape {shape}, got {found.shape}"
            )
        self._check_float(name, found)
        return found

    def linear(self, name: str, k: int, n: int, bias: bool, experts: int | None = None) -> Linear:
        if name in self.tensors:
            weight = self.take(name)
            sizes = {"K": k, "N": n}
            if not _is_packed(weight):  # experts in float, which have no name of a weight
                sizes = {"N": n, "K": k}
            if experts is not None:
                sizes = {"E": experts, **sizes}
            if weight.shape != tuple(sizes.values()):
                raise ValueError(
                    f"load: linear {name} in {self.place} must have ({', '.join(sizes)}) = "
                    f"{tuple(sizes.values())}, got {weight.shape}"
                )
            if not _is_packed(weight):
                self._check_float(name, weight)
        else:
            weight = self.array(f"{name}.weight", (n, k))
        return Linear(weight, self.array(f"{name}.bias", (n,)) if bias else None)

    def _check_float(self, name: str, found: Any) -> None:
        """Integers, as of a wrong label, would be taken for values."""
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(
                f"load: tensor {name} in {self.place} must have a floating dtype, got {found.dtype}"
            )

    def _instead(self, name: str) -> str:
        parent = name.rpartition(".")[0].rpartition(".")[0]
        near = sorted(n for n in self.tensors if parent and n.startswith(parent))
        return f"; left of {parent}: {_some(near)}" if near else ""


def _some(names: list[str]) -> str:
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")
