"""Errors of every linear of a model on the activations that it makes itself, and perplexity."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_awq.calibrate import ActivationRange
from jax_awq.models import Model, decoder
from jax_awq.models.config import DecoderConfig
from jax_awq.models.layers import Linear
from jax_awq.ops.awq_gemm import awq_gemm
from jax_awq.verify.schemes import SCHEMES, Errors, Row, Scheme, product, static_scale

Visit = Callable[[str, Array, Any], None]
_TOKENS = 256  # of a row, where they come from a text or are drawn


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("path", "visit")
)
@dataclasses.dataclass(frozen=True)
class _Probe:
    """A weight that shows its inputs before it multiplies them."""

    weight: Any
    path: str
    visit: Visit

    def __call__(self, x: Array, **options: Any) -> Array:
        self.visit(self.path, x, self.weight)
        return awq_gemm(x, self.weight, **options)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weight", "scale"), meta_fields=("scheme",)
)
@dataclasses.dataclass(frozen=True)
class _SchemeWeight:
    """A weight that multiplies as a scheme has it."""

    weight: Any
    scale: Array | None
    scheme: Scheme

    def __call__(self, x: Array, **options: Any) -> Array:
        return product(self.scheme, x, self.weight, self.scale, **options)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Rows of tokens; the first quarter calibrates static scales, the others are measured.

    Attributes:
      meaningful: whether they are text, of which the perplexity tells something.
    """

    ids: np.ndarray
    meaningful: bool

    @property
    def calibration(self) -> np.ndarray:
        return self.ids[: max(len(self.ids) // 4, 1)]

    @property
    def measured(self) -> np.ndarray:
        return self.ids[max(len(self.ids) // 4, 1) :]


def read_tokens(file: Path | None, folder: Path, config: DecoderConfig) -> Tokens:
    """Tokens of a file, or of the folder where it has an expected_model.npz, or random ones.

    Raises:
      OSError, ImportError: the file cannot be read.
      ValueError: they are no tokens of that model.
    """
    if file is None and (folder / "expected_model.npz").is_file():
        file = folder / "expected_model.npz"
    if file is None:
        rng = np.random.default_rng(0)
        shape = (8, min(_TOKENS, config.max_positions))
        return Tokens(rng.integers(0, config.vocab_size, shape), meaningful=False)
    if file.suffix in (".npy", ".npz"):
        ids = _array(file)
    else:
        ids = _encoded(file, folder, min(_TOKENS, config.max_positions))
    if ids.ndim != 2 or min(ids.shape) < 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"verify: {file} must have integers (B, T), both 2 or more, got {ids.dtype} {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size or ids.shape[1] > config.max_positions:
        raise ValueError(
            f"verify: {file} must have tokens 0 to {config.vocab_size - 1}, at most "
            f"{config.max_positions} a row, got {ids.min()} to {ids.max()}, {ids.shape[1]} a row"
        )
    experts = config.experts
    if experts is not None and ids.shape[1] * experts.top_k <= experts.num_experts:
        # Then each token gathers the weights of its own experts.
        raise ValueError(
            f"verify: {file} must have more than {experts.num_experts // experts.top_k} tokens a "
            f"row, since the model has {experts.num_experts} experts, got {ids.shape[1]}"
        )
    return Tokens(ids, meaningful=True)


def _array(file: Path) -> np.ndarray:
    """Of a .npy, or valid_ids of a .npz."""
    try:
        found = np.load(file)
        kind, ids = ".npy", found
        if not isinstance(found, np.ndarray):
            with found:
                kind, ids = ".npz", found.get("valid_ids")
    except OSError:
        raise
    except Exception as error:  # of NumPy, zip and zlib, which have no class in common
        raise ValueError(f"verify: {file} must be a whole {file.suffix}, got: {error}") from error
    if kind != file.suffix:
        raise ValueError(f"verify: {file} must be a {file.suffix}, got a {kind}")
    if ids is None:
        raise ValueError(f"verify: {file} has no array valid_ids")
    return ids


def _encoded(file: Path, folder: Path, tokens: int) -> np.ndarray:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("verify needs tokenizers: pip install 'jax_awq[models]'") from error
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"verify: {folder} has no tokenizer.json for the text of {file}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"verify: {file} must be UTF-8 text, got: {error}") from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers has no class of its own
        raise ValueError(
            f"verify: {folder / 'tokenizer.json'} must be a tokenizer, got: {error}"
        ) from error
    ids = tokenizer.encode(text).ids
    tokens = min(tokens, len(ids) // 4)
    if tokens < 2:
        raise ValueError(f"verify: {file} must have 8 tokens or more, got {len(ids)}")
    return np.asarray(ids[: len(ids) // tokens * tokens]).reshape(-1, tokens)


class Inputs:
    """Shows the input of every packed linear of a model to a function."""

    def __init__(self, model: Model):
        self.model = model
        self.stacked: dict[str, int] = {}  # experts of a path

    def show(self, row: Any, visit: Visit) -> None:
        """Of one row of tokens, ``(T,)``."""
        config = self.model.config
        params = replaced(self.model.params, lambda path, weight: self._probe(path, weight, visit))
        ids = jnp.asarray(row)[None]
        # Under jit, and so in the scan over experts, inputs would have no values.
        with jax.disable_jit(config.experts is not None):
            span = decoder.make_span(ids, 0, None, config)
            x, _ = decoder.hidden_states(params, ids, span, None, config)
            decoder.output(params, x, config)

    def _probe(self, path: str, weight: Any, visit: Visit) -> _Probe:
        if weight.ndim == 3:
            self.stacked[path] = weight.shape[0]
        return _Probe(weight, path, visit)

    def parts(self, path: str, weight: Any, call: int) -> list[tuple[str, int]]:
        """Names in the checkpoint, and columns, of the linears of `weight` in the `call`-th use."""
        config, n = self.model.config, weight.shape[-1]
        prefix, _, name = path.rpartition(".")
        if path in self.stacked:
            prefix = f"{prefix}.{call % self.stacked[path]}"
        if name == "qkv_proj":
            kv = config.num_kv_heads * config.head_dim
            return [(f"{prefix}.{p}_proj", s) for p, s in (("q", n - 2 * kv), ("k", kv), ("v", kv))]
        if name == "gate_up_proj":
            return [(f"{prefix}.{p}_proj", n // 2) for p in ("gate", "up")]
        return [(f"{prefix}.{name}".lstrip("."), n)]


def replaced(params: Any, wrap: Callable[[str, Any], Any]) -> Any:
    """The parameters of a decoder with ``wrap(path, weight)`` in place of every packed weight."""

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Linear):
            if isinstance(node.weight, Array):
                return node
            return node._replace(weight=wrap(path, node.weight))
        if isinstance(node, dict):
            return {
                key: walk(value, f"{path}.{_NAMES.get(key, key)}".lstrip("."))
                for key, value in node.items()
            }
        if isinstance(node, tuple) and path == "layers":
            return tuple(walk(layer, f"model.layers.{i}") for i, layer in enumerate(node))
        return node

    return walk(params, "")


_NAMES = {"attention": "self_attn", "mixture": "mlp"}  # in a checkpoint


def calibrate(inputs: Inputs, ids: np.ndarray, advance: Callable[[], None]) -> dict[str, Any]:
    """What was seen at each path."""
    seen: dict[str, ActivationRange] = {}

    def visit(path: str, x: Array, weight: Any) -> None:
        seen[path] = seen.get(path, ActivationRange.empty()).update(x)

    for row in ids:
        inputs.show(row, visit)
        advance()
    return seen


def layer_rows(
    inputs: Inputs, ids: np.ndarray, seen: dict[str, Any], dtype: Any, advance: Callable[[], None]
) -> list[Row]:
    """Errors of every scheme at every linear."""
    errors = Errors(dtype)
    scales = {
        path: {scheme.name: static_scale(scheme, range_) for scheme in SCHEMES}
        for path, range_ in seen.items()
    }
    for row in ids:
        calls: collections.Counter[str] = collections.Counter()

        def visit(path: str, x: Array, weight: Any, calls: Any = calls) -> None:
            with jax.disable_jit(False):
                errors.add(inputs.parts(path, weight, calls[path]), x, weight, scales[path])
            calls[path] += 1

        inputs.show(row, visit)
        advance()
    return errors.rows()


def with_scheme(params: Any, scheme: Scheme, seen: dict[str, Any]) -> Any:
    """The parameters of a decoder whose packed linears multiply as the scheme has it."""

    def wrap(path: str, weight: Any) -> _SchemeWeight:
        scale = static_scale(scheme, seen[path])
        if scale is not None:
            scale = jnp.broadcast_to(scale, weight.shape[:-2])
        return _SchemeWeight(weight, scale, scheme)

    return replaced(params, wrap)


def perplexity(
    params: Any, config: DecoderConfig, ids: np.ndarray, advance: Callable[[], None]
) -> float:
    """``exp`` of the mean loss of the next token, over all rows."""
    losses = []
    for row in ids:
        row = jnp.asarray(row)[None]
        chances = jax.nn.log_softmax(decoder.logits(params, row, config=config)[:, :-1])
        losses.append(-jnp.take_along_axis(chances, row[:, 1:, None], axis=-1).mean())
        advance()
    return float(np.exp(np.mean([float(loss) for loss in losses])))
