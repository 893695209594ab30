"""`quantize`: AWQ over a whole model."""

import dataclasses
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_awq._batching import aligned
from jax_awq._checks import read_integer
from jax_awq.quantize.blocks import Block, check_blocks, decoder_blocks, weight_of
from jax_awq.quantize.rtn import check_finite, read_float, rounded_weight
from jax_awq.quantize.search import NoFiniteError, search_clip, search_scale
from jax_awq.quantize.state import State
from jax_awq.quantize.statistics import Statistics, collect_statistics
from jax_awq.weights import AWQWeight

# Of queries and keys the product counts, which clipping one of them does not see.
_NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")
_PARTS = ("qweight", "scales", "qzeros")


def is_clipped(path: str) -> bool:
    """Whether AutoAWQ searches a clip for a linear: not for queries and keys."""
    name = path.rpartition(".")[2]
    return not any(part in name for part in _NOT_CLIPPED)


class Quantizable(Protocol):
    """A model that knows its tensors and can tell what its linears get, as `models.Model`."""

    def quantization(
        self, tokens: Any
    ) -> tuple[Mapping[str, Any], Callable[[Block], Iterable[Any]], Sequence[Block]]:
        """Float tensors, inputs of a block when the model reads `tokens`, and blocks."""
        ...


def quantize(
    model: Mapping[str, Any] | Quantizable,
    calibration: Any,
    blocks: Sequence[Block] | None = None,
    *,
    group_size: int = 128,
    dtype: Any = jnp.float16,
    clip: Callable[[str], bool] = is_clipped,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> dict[str, AWQWeight | Array]:
    """Quantizes the linears of a model with AWQ; also as `jax_awq.quantize`.

    For each block the scale of its inputs is searched, folded into its weights and into the op
    before it, then the clip of every group, and the weights are rounded to nearest. Scales are
    searched on the weights as they are given.

    Args:
      model: a dense `jax_awq.models.Model` with float weights; or float tensors by their names in
        a checkpoint, ``path.weight`` (N, K) with outputs first, ``path.bias`` (N,).
      calibration: of a model, tokens (B, T) without padding, or several such batches, as arrays or
        nested lists. Of tensors, a function from a block to batches ``(..., K)`` of its input,
        which the float model has on calibration data, or a dict of them by the first linear of each
        block. The function is called at most once for a block, in their order, but together with
        the block of `previous` where that is a linear. The batches of a block with an `output` are
        kept while its scale is searched, those of others are read one by one.
      blocks: by default those of the model, or `decoder_blocks` of the tensors.
      group_size: inputs that share one scale, -1 for all of them.
      dtype: of the scales, and of the arithmetic when rounding: float16 as AutoAWQ, or bfloat16,
        float32.
      clip: whether to search a clip for the linear of a path; AutoAWQ's choice by default.
      folder: where to keep what is done; with it a run that was stopped goes on at the same block.
        Weights, blocks and settings must be the same, which is checked, and calibration data.
      progress: whether to show a bar on stderr; needs rich.

    Returns:
      As `load_hf` gives it: ``{path: AWQWeight}`` for the linears of `blocks`, every other tensor
      under its name, those that scales were folded into in their own dtype.

    Raises:
      ValueError: a tensor that is missing or misshapen, a path in two blocks, a block without
        inputs, NaN or infinity in a weight or in the inputs of a block, a weight whose scales
        `dtype` does not hold, or a file of another run or a damaged one; named. A model with packed
        weights or experts, or tokens that it does not have.
      TypeError: `dtype` is not one of the three, `group_size` is no integer, a tensor to scale or
        quantize is not float, or `model`, `calibration`, `blocks` or `clip` is nothing of the kind.
      FileExistsError: `folder` is a file.
      ImportError: rich or safetensors is needed and not installed.

    Source: AWQ, arXiv 2306.00978; AutoAWQ 0.2.9, AwqQuantizer.quantize.
    """
    dtype = read_float("quantize", dtype)
    group_size = read_integer("quantize", "group_size", group_size)
    if not callable(clip):
        raise TypeError(f"quantize: clip must be a function of a path, got {clip!r}")
    if isinstance(model, Mapping):
        params, inputs = model, _inputs(calibration)
        blocks = decoder_blocks(params) if blocks is None else blocks
    elif hasattr(model, "quantization"):
        params, inputs, own = model.quantization(_batches(calibration))
        blocks = own if blocks is None else blocks
    else:
        raise TypeError(
            f"quantize: model must be a Model or a dict of tensors, got {type(model).__name__}"
        )
    check_blocks(params, blocks, group_size)
    run = _Run(params, tuple(blocks), inputs, group_size, dtype, clip, State(folder))
    result: dict[str, AWQWeight | Array] = dict(params)
    for index in _shown(range(len(blocks)), progress):
        result |= run.quantized(index)
        for path in run.blocks[index].linears:
            del result[f"{path}.weight"]
    return result | run.folded()


def _batches(calibration: Any) -> list[np.ndarray]:
    """Tokens, of which nested lists may be one batch or several."""
    want = "quantize: calibration of a model must be integers (B, T) or several such batches"
    if not isinstance(calibration, Iterable):
        raise TypeError(f"{want}, got {type(calibration).__name__}")
    several = not hasattr(calibration, "ndim")
    try:
        batches = [np.asarray(batch) for batch in (calibration if several else [calibration])]
        if several and batches and all(batch.ndim == 1 for batch in batches):
            batches = [np.stack(batches)]  # they are the rows of one
    except ValueError as error:  # of NumPy
        raise ValueError(f"{want}, with rows of equal length") from error
    for batch in batches:
        if batch.ndim != 2 or 0 in batch.shape or not np.issubdtype(batch.dtype, np.integer):
            raise ValueError(f"{want}, got {batch.dtype} {batch.shape}")
    return batches


def _inputs(calibration: Any) -> Callable[[Block], Iterable[Any]]:
    if callable(calibration):
        return calibration
    if not isinstance(calibration, Mapping):
        raise TypeError(
            "quantize: calibration of tensors must be a function of a block or a dict of batches, "
            f"got {type(calibration).__name__}"
        )

    def inputs(block: Block) -> Iterable[Any]:
        if block.linears[0] not in calibration:
            raise ValueError(f"quantize: calibration has no inputs of {block.linears[0]}")
        return calibration[block.linears[0]]

    return inputs


@dataclasses.dataclass
class _Run:
    params: Mapping[str, Any]
    blocks: tuple[Block, ...]
    inputs: Callable[[Block], Iterable[Any]]
    group_size: int
    dtype: Any
    clip: Callable[[str], bool]
    state: State

    def __post_init__(self) -> None:
        self.scales: dict[int, Array] = {}
        self.statistics: dict[int, Statistics] = {}
        self.consumer = {block.previous: i for i, block in enumerate(self.blocks)}

    def quantized(self, index: int) -> dict[str, AWQWeight | Array]:
        block, name = self.blocks[index], f"{index:05}.weights"
        settings = self._settings(index) | {
            # A weight is divided by the scale of the block that it makes the inputs of.
            "consumers": {
                path: self._settings(self.consumer[path])
                for path in block.linears
                if path in self.consumer
            }
        }
        arrays = self.state.load(name, settings)
        if arrays is None:
            weights = {path: self._quantized(index, path) for path in block.linears}
            arrays = {
                f"{path}.{part}": getattr(weight, part)
                for path, weight in weights.items()
                for part in _PARTS
            }
            self.state.save(name, settings, arrays)
        self.statistics.pop(index, None)
        return {
            path: AWQWeight(
                *(arrays[f"{path}.{part}"] for part in _PARTS),
                group_size=self.group_size,
            )
            for path in block.linears
        }

    def folded(self) -> dict[str, Array]:
        """The float tensors that take a scale."""
        quantized = {path for block in self.blocks for path in block.linears}
        owner = {path: i for i, block in enumerate(self.blocks) for path in block.others}
        result = {}
        for path in {*owner, *filter(None, self.consumer)}:
            names = [f"{path}.bias"] if f"{path}.bias" in self.params else []
            names += [] if path in quantized else [f"{path}.weight"]
            for name in names:
                array = jnp.asarray(self.params[name])
                check_finite("quantize", name, array)
                value = array.astype(jnp.float32)
                if path in owner and name.endswith("weight"):
                    value = operator.mul(*aligned(value, self.scale(owner[path])))
                if path in self.consumer:
                    scale = self.scale(self.consumer[path])
                    value = value / scale.reshape(-1, *[1] * (value.ndim - 1))
                result[name] = value.astype(array.dtype)
                check_finite("quantize", f"{name} with its scale in {array.dtype}", result[name])
        return result

    def scale(self, index: int) -> Array:
        """``(K,)``, by which the input of a block is divided; 1 where nothing can take it."""
        block, name = self.blocks[index], f"{index:05}.scale"
        if index not in self.scales:
            settings = self._settings(index)
            arrays = self.state.load(name, settings)
            if arrays is None:
                if block.previous is None:
                    k = weight_of(self.params, block.linears[0]).shape[1]
                    scale = jnp.ones(k, jnp.float32)
                else:
                    scale = self._searched(index)
                arrays = {"scale": scale}
                self.state.save(name, settings, arrays)
            self.scales[index] = arrays["scale"]
        return self.scales[index]

    def _searched(self, index: int) -> Array:
        block = self.blocks[index]
        weights = [self._weight(path) for path in block.linears]
        batches = None if block.output is None else list(self.inputs(block))
        try:
            return search_scale(
                weights,
                self._statistics(index, batches),
                group_size=self.group_size,
                dtype=self.dtype,
                output=block.output,
                batches=batches or (),
            )
        except NoFiniteError as error:
            # Most likely a weight is too large for the dtype: say which.
            for path, weight in zip(block.linears, weights, strict=True):
                self._rounded(path, weight)
            raise ValueError(
                f"quantize: no scale of the inputs of {block.linears[0]}: {error}"
            ) from error

    def _weight(self, path: str) -> Array:
        """(K, N)."""
        weight = jnp.asarray(weight_of(self.params, path)).T
        check_finite("quantize", f"{path}.weight", weight)
        return weight

    def _rounded(self, path: str, weight: Array) -> AWQWeight:
        return rounded_weight("quantize", f"{path}.weight", weight, self.group_size, self.dtype)

    def _quantized(self, index: int, path: str) -> AWQWeight:
        weight = self._weight(path).astype(jnp.float32)
        weight = weight * self.scale(index)[:, None]
        if path in self.consumer:
            weight = weight / self.scale(self.consumer[path])[None, :]
        if self.clip(path):
            weight = search_clip(
                weight,
                self._statistics(index).scaled(self.scale(index)),
                group_size=self.group_size,
                dtype=self.dtype,
            )
        return self._rounded(path, weight)

    def _statistics(self, index: int, batches: Iterable[Any] | None = None) -> Statistics:
        if index not in self.statistics:
            block = self.blocks[index]
            batches = self.inputs(block) if batches is None else batches
            try:
                found = collect_statistics(batches)
            except ValueError as error:
                raise ValueError(f"quantize: inputs of {block.linears[0]}: {error}") from error
            k = weight_of(self.params, block.linears[0]).shape[1]
            if found.mean_abs.shape != (k,):
                raise ValueError(
                    f"quantize: inputs of {block.linears[0]} must have shape (..., {k}), "
                    f"got (..., {found.mean_abs.shape[0]})"
                )
            name = f"inputs of {block.linears[0]}, and the sums of their products,"
            check_finite("quantize", name, found.mean_abs, found.gram)
            self.statistics[index] = found
        return self.statistics[index]

    def _settings(self, index: int) -> dict[str, Any]:
        block = self.blocks[index]
        return {
            "block": {
                "linears": block.linears,
                "previous": block.previous,
                "others": block.others,
                "output": block.output is not None,
            },
            "group_size": self.group_size,
            "dtype": self.dtype.name,
            "clip": [self.clip(path) for path in block.linears],
            "crc32": [
                self.state.fingerprint(weight_of(self.params, path)) for path in block.linears
            ],
        }


def _shown(indices: range, progress: bool) -> Iterable[int]:
    if not progress:
        return indices
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError as error:
        raise ImportError("quantize needs rich for its bar: pip install 'jax_awq[cli]'") from error
    return track(indices, "AWQ", console=Console(stderr=True))
