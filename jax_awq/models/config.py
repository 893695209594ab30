"""What config.json says about a decoder: sizes, rotary embedding, windows, experts."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from jax_awq.checkpoint.config import read_json, read_model_config
from jax_awq.models.rope import Rope, read_rope


@dataclasses.dataclass(frozen=True)
class Experts:
    """The sparse layers of a mixture of experts.

    Attributes:
      num_experts: of one layer.
      top_k: experts that a token goes through.
      intermediate_size: of one expert.
      normalize: whether the weights of the chosen experts are scaled to the sum 1.
      sparse: whether the layer has experts, for each layer.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    sparse: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder, hashable, so that it is static under jit.

    Attributes:
      model_type: as in config.json; one of `MODEL_TYPES`.
      windows: for each layer how many positions a token attends to, itself included; None is all.
      attention_bias: whether q, k, v have biases; `output_bias`, `mlp_bias`: the others.
      qk_norm: whether heads of q and k are normalized before the rotary embedding.
      experts: None for a dense decoder.
      dtype: of activations and of the weights that are not quantized.
      eos_token_ids: tokens that end a text.
      attention: implementation of attention over a whole prompt, "xla" or "cudnn".
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    max_positions: int
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    dtype: str = "float16"
    eos_token_ids: tuple[int, ...] = ()
    attention: str = "xla"

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def is_sparse(self, layer: int) -> bool:
        return self.experts is not None and self.experts.sparse[layer]


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
_DTYPES = ("float16", "bfloat16", "float32")
_WINDOWS = ("full_attention", "sliding_attention")
# Far beyond any model: each layer takes memory here, before a tensor is looked for.
_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class Values:
    """The entries of one JSON file, asked for by name and type."""

    file: Path
    values: dict[str, Any]

    def get(self, name: str, kind: Any, default: Any = None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if value is not None and type(value) is not kind:
            raise ValueError(f"load: {self.file}: {name} must be {kind.__name__}, got {value!r}")
        return value

    def need(self, name: str, kind: Any) -> Any:
        value = self.get(name, kind)
        if value is None:
            raise ValueError(f"load: {self.file} has no {name}")
        return value

    def need_size(self, name: str, default: int | None = None, most: float = math.inf) -> int:
        """A number of something, of which there must be one."""
        value: int = self.need(name, int) if default is None else self.get(name, int, default)
        if not 1 <= value <= most:
            want = "1 or more" if most == math.inf else f"from 1 to {most}"
            raise ValueError(f"load: {self.file}: {name} must be {want}, got {value}")
        return value

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuses a value that changes what the model computes; absent is allowed."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise ValueError(
                f"load: {self.file}: {name} must be "
                f"{' or '.join(repr(a) for a in allowed)}, got {value!r}: not supported"
            )


def read_decoder_config(folder: Path) -> DecoderConfig:
    """The decoder that config.json of a checkpoint folder describes.

    The spellings of transformers 4 and 5 are read, see `read_model_config`.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the model_type or a feature that the file asks for is not supported, or an entry
        is missing, of a wrong type or out of range.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"load: {folder} has no config.json")
    values = Values(file, read_model_config(folder))
    model_type = values.need("model_type", str)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"load: {file}: model_type must be one of {MODEL_TYPES}, got {model_type!r}"
        )
    values.must_be("hidden_act", "silu")
    values.must_be("partial_rotary_factor", 1, 1.0)
    is_moe = model_type == "qwen3_moe"
    heads = values.need_size("num_attention_heads")
    hidden = values.need_size("hidden_size")
    kv_heads = values.get("num_key_value_heads", int, heads if model_type == "llama" else None)
    if not kv_heads or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"load: {file}: num_key_value_heads must divide num_attention_heads {heads}, "
            f"got {kv_heads}"
        )
    layers = values.need_size("num_hidden_layers", most=_MOST_LAYERS)
    default_head_dim = 128 if model_type == "qwen3" else hidden // heads
    has_bias = values.get("attention_bias", bool, False)
    if has_bias and model_type in ("mistral", "qwen2"):
        raise ValueError(
            f"load: {file}: attention_bias must be False for model_type {model_type!r}, got True"
        )
    head_dim = values.need_size("head_dim", default_head_dim)
    eps = values.need("rms_norm_eps", float)
    if not 0 < eps < math.inf:
        raise ValueError(f"load: {file}: rms_norm_eps must be positive and finite, got {eps}")
    return DecoderConfig(
        model_type=model_type,
        vocab_size=values.need_size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=values.need("intermediate_size", int),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=eps,
        rope=read_rope(file, values.values, head_dim),
        max_positions=values.need_size("max_position_embeddings"),
        tie_embeddings=values.get("tie_word_embeddings", bool, False),
        windows=_windows(values, model_type, layers),
        attention_bias=has_bias or model_type == "qwen2",
        output_bias=has_bias,
        mlp_bias=model_type == "llama" and values.get("mlp_bias", bool, False),
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        experts=_experts(values, layers) if is_moe else None,
        dtype=_dtype(values),
        eos_token_ids=_eos(folder, values),
    )


def _windows(values: Values, model_type: str, layers: int) -> tuple[int | None, ...]:
    kinds = values.get("layer_types", list)
    if kinds is not None and (len(kinds) != layers or any(kind not in _WINDOWS for kind in kinds)):
        raise ValueError(
            f"load: {values.file}: layer_types must name full_attention or sliding_attention for "
            f"each of {layers} layers, got {kinds}"
        )
    # Where the file is silent, the configuration classes of Mistral and Qwen assume 4096.
    size = values.get("sliding_window", int) if "sliding_window" in values.values else 4096
    if model_type == "llama":
        values.must_be("sliding_window", None)
        size = None
    elif model_type != "mistral" and not values.get("use_sliding_window", bool, False):
        size = None
    if kinds is None:
        # Only Qwen leaves the first layers alone; 28 is what its configuration class assumes.
        full = 0 if model_type == "mistral" else values.get("max_window_layers", int, 28)
        if model_type == "qwen3_moe":
            full = 0
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    elif size is None and "sliding_attention" in kinds:
        raise ValueError(
            f"load: {values.file}: layer_types has sliding_attention without a sliding_window"
        )
    if size is not None and size < 1:
        raise ValueError(f"load: {values.file}: sliding_window must be 1 or more, got {size}")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def _experts(values: Values, layers: int) -> Experts:
    dense = values.get("mlp_only_layers", list, [])
    step = values.need_size("decoder_sparse_step", 1)
    count, top_k = values.need_size("num_experts"), values.need("num_experts_per_tok", int)
    if not 1 <= top_k <= count:
        raise ValueError(
            f"load: {values.file}: num_experts_per_tok must be 1 to {count}, got {top_k}"
        )
    return Experts(
        num_experts=count,
        top_k=top_k,
        intermediate_size=values.need_size("moe_intermediate_size"),
        normalize=values.get("norm_topk_prob", bool, False),
        sparse=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
    )


def _dtype(values: Values) -> str:
    name = values.get("dtype", str, "float16").removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"load: {values.file}: dtype must be one of {_DTYPES}, got {name!r}")
    return name


def _eos(folder: Path, values: Values) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    found = values.values.get("eos_token_id") if found is None else found
    found = [] if found is None else [found] if isinstance(found, int) else found
    if not isinstance(found, list) or not all(type(token) is int for token in found):
        raise ValueError(f"load: {folder}: eos_token_id must be one or more tokens, got {found!r}")
    return tuple(found)
