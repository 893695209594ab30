"""`load_hf`: a Hugging Face AWQ checkpoint as JAX arrays."""

import collections
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_awq.checkpoint.config import QuantConfig, read_config
from jax_awq.checkpoint.files import Tensor, find_tensors, open_tensors
from jax_awq.checkpoint.formats import Readable, format_of, is_linear
from jax_awq.weights import AWQWeight


def load_hf(
    path: str | os.PathLike[str], *, dtype: Any = None, device: Any = None, progress: bool = False
) -> dict[str, AWQWeight | Array]:
    """Loads a checkpoint folder; weights stay as they are packed on disk.

    What is quantized is decided by the tensors that are there and cross-checked with the
    configuration, which is often wrong about it. Every tensor is used or an error is raised, and
    all headers are checked before the first value is read.

    Args:
      path: folder with config.json (or quant_config.json) and one safetensors file, or several
        and their index. The files are memory-mapped and read one tensor at a time.
      dtype: floating dtype for the tensors that are not quantized; by default as stored. Scales
        stay as stored: the weight is rounded only once, in the product.
      device: a `jax.Device` or `Sharding` for the arrays; by default JAX's default device.
      progress: whether to show on stderr how far it is.

    Returns:
      Quantized linears under their module path (``model.layers.0.mlp.down_proj``) as `AWQWeight`,
      every other tensor, also the bias of a linear, under its full name as an array.

    Raises:
      FileNotFoundError: the folder, its configuration or a file that it names is missing.
      ValueError: a file is damaged, a tensor is missing, unused, twice there or misshapen, the
        configuration contradicts the tensors, or the format is not one of AutoAWQ's "gemm" and
        "gemv".
      TypeError: `dtype` is not floating.
      ImportError: safetensors is not installed.

    Source: AutoAWQ 0.2.9, awq/models/base.py and awq/modules/linear.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"load_hf: dtype must be floating, got {jnp.dtype(dtype)}")
    folder = Path(path)
    tensors = find_tensors(folder)
    config = read_config(folder)
    linears = _find_linears(tensors, config)
    packed = {t.name for _, parts, _ in linears.values() for t in parts}
    plain = {name: t for name, t in tensors.items() if name not in packed}
    for name in linears:
        if name in plain:
            raise ValueError(f"load_hf: {plain[name]} has the name of a quantized linear")

    result: dict[str, AWQWeight | Array] = {}
    done = 0
    with open_tensors() as read:
        report = _Progress(len(tensors), progress)

        def load(tensor: Tensor, cast: Any = None) -> Array:
            nonlocal done
            array = read(tensor)
            if cast is not None and jnp.issubdtype(array.dtype, jnp.floating):
                array = array.astype(np.dtype(cast))
            done += 1
            report(done)
            return jax.device_put(array, device)

        for name in sorted([*linears, *plain]):
            if name in plain:
                result[name] = load(plain[name], dtype)
            else:
                found, parts, group_size = linears[name]
                try:
                    result[name] = found.build([load(t) for t in parts], group_size)
                except ValueError as error:  # a size that no op takes, such as N = 12
                    raise ValueError(f"load_hf: {parts[0]}: {error}") from error
    return result


def _find_linears(
    tensors: dict[str, Tensor], config: QuantConfig
) -> dict[str, tuple[Readable, list[Tensor], int]]:
    modules: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules[module][part] = tensor
    linears = {}
    for module, parts in modules.items():
        if is_linear(parts):
            found = format_of(parts, config)
            linears[module] = found, *found.geometry(module, parts, config)
    if not linears:
        files = ", ".join(sorted({str(t.file) for t in tensors.values()}))
        raise ValueError(
            f"load_hf: {files} has no quantized linear, but {config.file} describes quantization"
        )
    return linears


class _Progress:
    def __init__(self, total: int, shown: bool):
        self.total, self.shown, self.last = total, shown, 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.shown and (done == self.total or now - self.last > 0.1):
            self.last = now
            end = "\n" if done == self.total else ""
            print(
                f"\rload_hf: {done} of {self.total} tensors", end=end, file=sys.stderr, flush=True
            )
