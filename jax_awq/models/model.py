"""`load`: a checkpoint as a model that gives logits and generates."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_awq._checks import read_dtype, read_integer, read_number
from jax_awq.checkpoint.load import open_hf
from jax_awq.models import decoder, sampling
from jax_awq.models.attention import KVCache, make_cache
from jax_awq.models.config import DecoderConfig, read_decoder_config
from jax_awq.models.params import assemble
from jax_awq.models.quantization import Recorder, disassemble, quantization_blocks
from jax_awq.quantize import Block

_BUCKET = 64  # lengths are rounded up to it, so that few programs serve all prompts


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    layers: Literal["unrolled", "stacked"] = "unrolled",
    attention: Literal["xla", "cudnn"] | None = None,
    device: Any = None,
    progress: bool = False,
) -> "Model":
    """Loads a Hugging Face folder with a Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE decoder.

    Args:
      path: as for `jax_awq.load_hf`; the weights stay packed. It may also be a float checkpoint,
        in which nothing tells of quantization, for `jax_awq.quantize`.
      dtype: float16, bfloat16 or float32, of activations and of what is not quantized; by default
        that of config.json.
      layers: "unrolled", a program with every layer of its own, or "stacked", one `lax.scan` over
        them, which compiles faster; see `jax_awq.models.decoder`.
      attention: what computes attention over a prompt without padding: "cudnn", which is chosen
        on CUDA devices for 16-bit dtypes where cuDNN takes the heads, or "xla".
      device, progress: as for `load_hf`.

    Raises:
      FileNotFoundError, ImportError: as for `load_hf`.
      ValueError: as for `load_hf`; the model_type or a feature of config.json is not supported, a
        value of it is out of range, or a tensor is missing, unused, misshapen or of integers;
        `attention` is "cudnn" where cuDNN cannot compute it.
      TypeError: `dtype` is none of the three.
    """
    if layers not in ("unrolled", "stacked"):
        raise ValueError(f"load: layers must be 'unrolled' or 'stacked', got {layers!r}")
    if attention not in (None, "xla", "cudnn"):
        raise ValueError(f"load: attention must be 'xla', 'cudnn' or None, got {attention!r}")
    config = read_decoder_config(Path(path))
    if dtype is not None:
        config = dataclasses.replace(config, dtype=str(read_dtype("load", dtype)))
    if config.dtype not in ("float16", "bfloat16", "float32"):
        raise TypeError(f"load: dtype must be float16, bfloat16 or float32, got {config.dtype}")
    if layers == "stacked" and len(set(config.windows)) > 1:
        raise ValueError(
            f"load: layers='stacked' needs equal layers, but their windows are {config.windows}"
        )
    with open_hf(path, dtype=config.dtype, progress=progress, for_model=True) as tensors:
        params = assemble(
            tensors,
            config,
            stacked=layers == "stacked",
            put=functools.partial(jax.device_put, device=device),
            place=path,
        )
    takes_cudnn = _cudnn_takes(config, params["embed"])
    if attention == "cudnn" and not takes_cudnn:
        raise ValueError(
            "load: attention 'cudnn' needs a CUDA device of compute capability 8.0 or more, a "
            f"16-bit dtype and heads it takes, got {next(iter(params['embed'].devices()))}, "
            f"{config.dtype} and head_dim {config.head_dim}"
        )
    if attention is None:
        attention = "cudnn" if takes_cudnn else "xla"
    return Model(params, dataclasses.replace(config, attention=attention))


def _cudnn_takes(config: DecoderConfig, array: Array) -> bool:
    device = next(iter(array.devices()))
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return False
    capability = float(device.compute_capability)
    largest = 256 if capability >= 9 else 128
    return (
        capability >= 8
        and config.dtype != "float32"
        and config.head_dim % 8 == 0
        and config.head_dim <= largest
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """Parameters and configuration of a decoder; the functions are in `jax_awq.models.decoder`.

    Padding stands on the left, as `attention_mask` tells: rows of a batch then end together.
    """

    params: dict[str, Any]
    config: DecoderConfig

    def logits(self, input_ids: Any, attention_mask: Any = None) -> Array:
        """Next-token logits, float32 (B, T, V), of tokens (B, T).

        Args:
          attention_mask: (B, T) of 0 for padding on the left, 1 for tokens; None for no padding.
            Padding on the right needs none: nothing attends to what follows it.

        Raises:
          ValueError: a token is out of the vocabulary, there are more tokens than the model has
            positions, or the mask has another form.
        """
        ids, start = self._checked("logits", input_ids, attention_mask, 0)
        return decoder.logits(self.params, jnp.asarray(ids), start, config=self.config)

    def generate(self, input_ids: Any, max_new_tokens: int, **options: Any) -> np.ndarray:
        """The tokens (B, T) with up to `max_new_tokens` new ones, int32 (B, T + new).

        Options, results and errors are those of `stream`.
        """
        new = list(self.stream(input_ids, max_new_tokens, **options))
        ids = np.asarray(input_ids, np.int32)
        return np.concatenate([ids, *(token[:, None] for token in new)], axis=1)

    def stream(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        attention_mask: Any = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields new tokens, int32 (B,), as they come.

        Args:
          input_ids: (B, T) tokens, T at least 1.
          max_new_tokens: at most so many are yielded.
          attention_mask: as for `logits`.
          temperature: 0 takes the most likely token, otherwise logits are divided by it and a
            token is drawn.
          top_p: the part of the probability from which is drawn, see `sampling.sample`.
          seed: of the random numbers; the same seed gives the same tokens.
          eos_token_id: token or tokens that end a row, which then repeats the first of them; it
            is over when all rows have ended. By default those of the checkpoint; () for none.

        Raises:
          ValueError: as for `logits`, or `temperature`, `top_p`, `seed` or `eos_token_id` is out of
            range.
          TypeError: one of these, or `max_new_tokens`, is no number.
        """
        max_new_tokens = read_integer("generate", "max_new_tokens", max_new_tokens)
        temperature = read_number("generate", "temperature", temperature)
        top_p = read_number("generate", "top_p", top_p)
        seed = read_integer("generate", "seed", seed)
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens must be 0 or more, got {max_new_tokens}")
        if not temperature >= 0:  # a NaN is refused too
            raise ValueError(f"generate: temperature must be 0 or more, got {temperature}")
        if not 0 <= top_p <= 1:
            raise ValueError(f"generate: top_p must be from 0 to 1, got {top_p}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"generate: seed must be an integer of 64 bits, got {seed}")
        ids, start = self._checked("generate", input_ids, attention_mask, max_new_tokens)
        ends = np.atleast_1d(self.config.eos_token_ids if eos_token_id is None else eos_token_id)
        if ends.size and not np.issubdtype(ends.dtype, np.integer):
            raise TypeError(f"generate: eos_token_id must be integers, got {eos_token_id!r}")
        if ends.size and (ends.min() < -(2**31) or ends.max() >= 2**31):
            raise ValueError(f"generate: eos_token_id must be integers of 32 bits, got {ends}")
        draw = None if temperature == 0 else (_key(seed), temperature, top_p)
        nucleus = draw is not None and top_p < 1
        return self._stream(ids, start, max_new_tokens, draw, nucleus, ends.astype(np.int32))

    def quantization(
        self, tokens: Any
    ) -> tuple[dict[str, np.ndarray], Callable[[Block], list[Array]], list[Block]]:
        """What `jax_awq.quantize` asks of a model: its tensors, the inputs of a block, and blocks.

        Args:
          tokens: (B, T) without padding, or several such batches.

        Raises:
          ValueError: the model has packed weights or experts, or tokens are as `logits` refuses.
        """
        params = disassemble(self.params, self.config)
        batches = [tokens] if hasattr(tokens, "ndim") else list(tokens)
        checked = [jnp.asarray(self._checked("quantize", ids, None, 0)[0]) for ids in batches]
        recorder = Recorder(self.params, self.config, checked)
        return params, recorder, quantization_blocks(params, self.config)

    def _stream(self, ids, start, max_new_tokens, draw, nucleus, ends) -> Iterator[np.ndarray]:
        if max_new_tokens == 0:
            return
        batch, tokens = ids.shape
        stacked = isinstance(self.params["layers"], dict)
        slots = cache_slots(tokens, max_new_tokens)
        cache = make_cache(self.config, batch, slots, stacked=stacked, start=start)
        filled = np.pad(ids, ((0, 0), (0, _rounded(tokens) - tokens)))
        logits, cache = decoder.prefill(
            self.params, filled, np.int32(tokens), cache, config=self.config
        )
        token = sampling.pick(logits, draw, np.int32(0), nucleus=nucleus)
        step = decode_program(self, nucleus=nucleus)
        leaves = jax.tree.leaves(self.params)
        ended = np.zeros(batch, bool)
        for count in range(1, max_new_tokens + 1):
            seen = token
            if count < max_new_tokens:
                # Before the token is looked at, so that the device need not wait for the host.
                token, cache = step(leaves, token, cache, draw, np.int32(count))
            seen = np.asarray(seen)
            if ended.any():
                seen = np.where(ended, ends[0], seen)
            yield seen
            ended = np.isin(seen, ends)
            if ended.all():
                return

    def _checked(self, name, input_ids, attention_mask, new) -> tuple[np.ndarray, Array | None]:
        try:
            ids = np.asarray(input_ids)
        except ValueError as error:  # of NumPy
            raise ValueError(
                f"{name}: input_ids must have rows of equal length: pad on the left, and tell it "
                "by attention_mask"
            ) from error
        if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{name}: input_ids must be integers (B, T) of at least one token, "
                f"got {ids.dtype} {ids.shape}"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"{name}: input_ids must be from 0 to {self.config.vocab_size - 1}, "
                f"got {ids.min()} to {ids.max()}"
            )
        if ids.shape[1] + new > self.config.max_positions:
            raise ValueError(
                f"{name}: {ids.shape[1]} tokens and {new} new ones exceed "
                f"max_position_embeddings, {self.config.max_positions}"
            )
        if attention_mask is None:
            return ids.astype(np.int32), None
        mask = np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(
                f"{name}: attention_mask must be 0 and 1 of shape {ids.shape}, got {mask.shape}"
            )
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(
                f"{name}: attention_mask must be 0 and 1, got {mask.min()} to {mask.max()}"
            )
        if (np.diff(mask.astype(np.int8), axis=1) < 0).any() or not mask[:, -1].all():
            raise ValueError(
                f"{name}: attention_mask must be 0 on the left and 1 to the end of each row: "
                "padding stands on the left"
            )
        start = (mask.shape[1] - mask.sum(axis=1)).astype(np.int32)
        return ids.astype(np.int32), jnp.asarray(start) if start.any() else None


def _key(seed: int) -> Array:
    """Of all 64 bits; without 64-bit mode `jax.random.key` takes the lower 32."""
    key = jax.random.key(seed % 2**32)
    high = seed // 2**32 % 2**32
    return jax.random.fold_in(key, np.uint32(high)) if high else key


def decode_program(model: Model, *, nucleus: bool = False) -> jax.stages.Wrapped:
    """The program that gives `Model.stream` a token after another, jitted.

    It takes the leaves of the parameters, the last token (B,), the donated cache, and what
    `sampling.pick` takes; it returns the next token and the cache. Leaves, since to take a model's
    parameters apart costs the host as much as to start the program, every time.
    """
    return _decode_program(jax.tree.structure(model.params), model.config, nucleus)


@functools.lru_cache(maxsize=16)
def _decode_program(structure: Any, config: DecoderConfig, nucleus: bool) -> jax.stages.Wrapped:
    def step(leaves: Any, token: Array, cache: KVCache, draw: Any, count: Any) -> Any:
        params = jax.tree.unflatten(structure, leaves)
        logits, cache = decoder.decode_step(params, token, cache, config=config)
        return sampling.pick(logits, draw, count, nucleus=nucleus), cache

    return jax.jit(step, donate_argnums=2)


def cache_slots(tokens: int, max_new_tokens: int) -> int:
    """Slots of the cache that `Model.stream` makes."""
    return _rounded(_rounded(tokens) + max_new_tokens)


def _rounded(length: int) -> int:
    return math.ceil(length / _BUCKET) * _BUCKET
