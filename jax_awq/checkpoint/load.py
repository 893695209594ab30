"""`load_hf`: a Hugging Face checkpoint of 4-bit weights as JAX arrays."""

import collections
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_awq._checks import read_dtype
from jax_awq.checkpoint.config import QuantConfig, find_config, read_config
from jax_awq.checkpoint.counts import check_counts, check_modules
from jax_awq.checkpoint.files import Tensor, check_readable, find_tensors, open_tensors
from jax_awq.checkpoint.formats import BadPart, Geometry, Readable, format_of, is_linear
from jax_awq.weights import AWQWeight, PermutedWeight

_SCALES = {"scales", "weight_scale"}


class Linear(NamedTuple):
    """A quantized linear as its headers tell it; `parts` are those that make the weight."""

    format: Readable
    parts: dict[str, Tensor]
    geometry: Geometry


def load_hf(
    path: str | os.PathLike[str], *, dtype: Any = None, device: Any = None, progress: bool = False
) -> dict[str, AWQWeight | PermutedWeight | Array]:
    """Loads a checkpoint folder; AutoAWQ's gemm and gemv weights stay as they are packed on disk.

    What is quantized, and how, is decided by the tensors that are there and cross-checked with the
    configuration, which is often wrong about it. Every tensor is used or an error is raised, and
    all headers are checked before the first value is read. Weights of the other formats become
    layout "gemm" with the same codes, zero points and scales.

    Args:
      path: folder with config.json (or quant_config.json, quantize_config.json) and one safetensors
        file, or several and their index. The files are memory-mapped and read one linear at a time.
      dtype: floating dtype for the tensors that are not quantized; by default as stored, but
        float32 for float64 where jax_enable_x64 is not set. Scales stay as stored: the weight is
        rounded only once, in the product.
      device: a `jax.Device` or `Sharding` for the arrays; by default JAX's default device, which
        also converts.
      progress: whether to show on stderr how far it is.

    Returns:
      Quantized linears under their module path (``model.layers.0.mlp.down_proj``) as `AWQWeight`,
      or as `PermutedWeight` where GPTQ's act-order has changed the order of the inputs; experts
      that compressed-tensors has in one 3-D weight as one (E, K, N); every other tensor, also the
      bias of a linear, under its full name as an array.

    Raises:
      FileNotFoundError: the folder, its configuration or a file that it names is missing.
      OSError: a file cannot be read.
      ValueError: a file is damaged; a layer, an expert, a module of a Llama, Mistral, Qwen2 or
        Qwen3, or a tensor is missing; a tensor is unused, twice there or misshapen, has values that
        its format does not have, such as a scale that is not finite, is in a format or dtype that
        is not read, has 64-bit integers that JAX, which makes 32-bit ones of them, would cut
        off, or numbers too large for its dtype; or the configuration contradicts the tensors.
      TypeError: `dtype` is not floating, or `device` neither a device nor a sharding.
      ImportError: safetensors is not installed.

    Source: AutoAWQ 0.2.9, awq/modules/linear; llm-awq, awq/quantize/qmodule.py; GPTQModel 7.7.0;
      compressed-tensors 0.19.0.
    """
    if not isinstance(device, jax.Device | jax.sharding.Sharding | None):
        raise TypeError(f"load_hf: device must be a jax.Device or Sharding, got {device!r}")
    with open_hf(path, dtype=dtype, progress=progress) as tensors:
        return {name: jax.device_put(read(), device) for name, read in tensors.items()}


@contextlib.contextmanager
def open_hf(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    progress: bool = False,
    for_model: bool = False,
) -> Iterator[dict[str, Callable[[], Any]]]:
    """What `load_hf` loads, each behind a function that reads it to the host.

    AWQ's own layouts come as numpy arrays; what has to be converted, from JAX's default device. The
    files are mapped, and the functions valid, inside the context. With `for_model` a checkpoint is
    taken, too, in which neither tensors nor configuration tell of quantization, and the caller, who
    knows the model, is to see that no module is missing.
    """
    dtype = None if dtype is None else read_dtype("load_hf", dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"load_hf: dtype must be floating, got {dtype}")
    folder = Path(path)
    tensors = find_tensors(folder)
    linears: dict[str, Linear] = {}
    found = linear_parts(tensors)
    config = find_config(folder) if for_model and not found else read_config(folder)
    if config is not None:
        linears = {module: read_linear(module, parts, config) for module, parts in found.items()}
        check_quantized(folder, tensors, linears)
    check_whole(folder, tensors, linears)
    if not for_model:
        check_modules(folder, tensors)
    plain = other_tensors(tensors, linears)
    for tensor in plain.values():
        check_readable(tensor)

    with open_tensors() as read:
        report = _Progress(len(tensors), progress)

        def read_plain(tensor: Tensor) -> np.ndarray:
            array = read(tensor)
            report(1)
            _check_integers(tensor, array)
            if jnp.issubdtype(array.dtype, jnp.floating):
                array = _cast(tensor, array, array.dtype if dtype is None else dtype)
            return array

        def read_quantized(linear: Linear) -> AWQWeight | PermutedWeight:
            weight = _read_weight(linear, read)
            report(len(linear.parts))
            return weight

        yield {
            name: functools.partial(read_plain, plain[name])
            if name in plain
            else functools.partial(read_quantized, linears[name])
            for name in sorted([*linears, *plain])
        }


def linear_parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each quantized linear by its module path and the last part of their names."""
    modules: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules[module][part] = tensor
    return {module: parts for module, parts in modules.items() if is_linear(parts)}


def read_linear(module: str, parts: dict[str, Tensor], config: QuantConfig) -> Linear:
    """A linear by its headers, which are checked."""
    found = format_of(parts, config)
    geometry = found.geometry(module, parts, config)
    return Linear(found, {name: parts[name] for name in found.names(parts, config)}, geometry)


def other_tensors(tensors: dict[str, Tensor], linears: dict[str, Linear]) -> dict[str, Tensor]:
    """The tensors that are no part of a quantized weight."""
    packed = {t.name for linear in linears.values() for t in linear.parts.values()}
    return {name: t for name, t in tensors.items() if name not in packed}


def check_quantized(folder: Path, tensors: dict[str, Tensor], linears: dict[str, Linear]) -> None:
    if not linears:
        files = ", ".join(sorted({str(t.file) for t in tensors.values()}))
        raise ValueError(
            f"load_hf: {files} has no quantized linear, but the configuration in {folder} "
            "describes quantization"
        )


def check_whole(folder: Path, tensors: dict[str, Tensor], linears: dict[str, Linear]) -> None:
    """Checks what no linear tells by itself: that none is left out, and their names."""
    check_counts(folder, tensors)
    for name in linears:
        if name in tensors:
            raise ValueError(f"load_hf: {tensors[name]} has the name of a quantized linear")


def _check_integers(tensor: Tensor, array: np.ndarray) -> None:
    """Checks that 64-bit integers survive where JAX has 32 bits alone."""
    if array.dtype.kind not in "iu":
        return
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
    wrong = array[(array < limits.min) | (array > limits.max)]
    if wrong.size:
        raise ValueError(
            f"load_hf: {tensor} must have values of {limits.dtype} where jax_enable_x64 is not "
            f"set, got {wrong[0]}"
        )


def _cast(tensor: Tensor, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in the dtype that JAX has of it; what is finite must stay so."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    wrong = array[np.isfinite(array) & ~np.isfinite(cast)]
    if wrong.size:
        raise ValueError(f"load_hf: {tensor} must be finite in {dtype}, got {wrong[0]}")
    return cast


def _read_weight(linear: Linear, read: Any) -> AWQWeight | PermutedWeight:
    arrays = {name: read(tensor) for name, tensor in linear.parts.items()}
    for name in _SCALES & arrays.keys():
        if not np.isfinite(arrays[name]).all():
            raise ValueError(
                f"load_hf: {linear.parts[name]} must have finite scales, got NaN or infinity"
            )
    try:
        return linear.format.weight(arrays, linear.geometry)
    except BadPart as error:
        raise ValueError(f"load_hf: {linear.parts[error.part]} {error}") from error


class _Progress:
    def __init__(self, total: int, shown: bool):
        self.total, self.shown, self.done, self.last = total, shown, 0, 0.0

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.shown and (self.done == self.total or now - self.last > 0.1):
            self.last = now
            end = "\n" if self.done == self.total else ""
            print(
                f"\rload_hf: {self.done} of {self.total} tensors",
                end=end,
                file=sys.stderr,
                flush=True,
            )
