"""The safetensors files of a checkpoint: which tensors there are, and their values."""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_awq.checkpoint.config import read_json

INDEX = ".safetensors.index.json"
# What safetensors' own reader gives numpy arrays of, and what it would look for in numpy in vain.
_NUMPY = (
    *("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"),
    *("F16", "BF16", "F32", "F64", "C64"),
)
_FLOAT8 = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One entry of a file's header; `dtype` is safetensors' name, such as "F16"."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"tensor {self.name} in {self.file}"


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, from the headers alone.

    Raises:
      FileNotFoundError: no folder, no safetensors file in it, or a shard that the index names is
        missing.
      OSError: a file cannot be read.
      ValueError: a damaged file, a tensor that is in two files, or files and index that disagree.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"load_hf: there is no folder {folder}")
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(indices) > 1:
        raise ValueError(f"load_hf: {folder} has several indices: {_names(indices)}")
    tensors: dict[str, Tensor] = {}
    for file in _shards(indices[0]) if indices else [_single_file(folder)]:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise ValueError(f"load_hf: {tensor} is also in {tensors[tensor.name].file}")
            tensors[tensor.name] = tensor
    if indices:
        _check_index(indices[0], tensors)
    return tensors


@contextlib.contextmanager
def open_tensors() -> Iterator[Any]:
    """Gives a function from a `Tensor` to its numpy array; the files stay mapped meanwhile."""
    safe_open = import_safetensors("load_hf").safe_open
    handles: dict[Path, Any] = {}
    with contextlib.ExitStack() as stack:

        def read(tensor: Tensor) -> np.ndarray:
            if tensor.dtype in _FLOAT8:
                return _read_float8(tensor)
            if tensor.file not in handles:
                handles[tensor.file] = stack.enter_context(safe_open(tensor.file, "np"))
            return handles[tensor.file].get_tensor(tensor.name)

        yield read


def check_readable(tensor: Tensor) -> None:
    """Raises ValueError where there is no array of that dtype, as of float4."""
    if tensor.dtype not in (*_NUMPY, *_FLOAT8):
        raise ValueError(
            f"load_hf: {tensor} must be {', '.join(_NUMPY)} or {', '.join(_FLOAT8)}, got "
            f"{tensor.dtype}"
        )


def _read_float8(tensor: Tensor) -> np.ndarray:
    entries, begin = _header(tensor.file)
    first, last = dict(entries)[tensor.name]["data_offsets"]
    data = np.fromfile(tensor.file, np.uint8, last - first, offset=begin + first)
    return data.view(jnp.dtype(_FLOAT8[tensor.dtype])).reshape(tensor.shape)


def import_safetensors(function: str, module: str = "safetensors") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{function} needs safetensors: pip install 'jax_awq[hf]'") from error


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"load_hf: {folder} has no .safetensors file")
    if len(files) > 1:
        raise ValueError(
            f"load_hf: {folder} has several .safetensors files and no model{INDEX}: {_names(files)}"
        )
    return files[0]


def _shards(index: Path) -> list[Path]:
    weight_map = _weight_map(index)
    shards: dict[Path, None] = {}  # an ordered set
    for name, shard in weight_map.items():
        file = index.parent / shard
        if Path(shard).name != shard:
            raise ValueError(
                f"load_hf: {index}: the file of {name} must be in the same folder, got {shard!r}"
            )
        if not file.is_file():
            raise FileNotFoundError(
                f"load_hf: {index} says that {name} is in {shard}, but there is no such file"
            )
        shards[file] = None
    # Other stems (consolidated, adapter_model) are other artefacts and not ours to judge.
    stem = index.name.removesuffix(INDEX)
    pattern = (f"{stem}.safetensors", f"{stem}-*.safetensors")
    stray = [f for p in pattern for f in index.parent.glob(p) if f not in shards]
    if stray:
        raise ValueError(f"load_hf: {index} does not name {_names(stray)}")
    return sorted(shards)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"load_hf: {index} must map tensors to files in weight_map")
    return weight_map


def _check_index(index: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = _weight_map(index)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ValueError(
                f"load_hf: tensor {name} is missing in {index.parent / shard}, "
                f"where {index.name} has it"
            )
        if tensors[name].file.name != shard:
            raise ValueError(f"load_hf: {tensors[name]}, but {index.name} has it in {shard}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise ValueError(f"load_hf: {tensor} is not in {index.name}")


def _read_header(file: Path) -> list[Tensor]:
    """Entries of the header.

    The library validates the file. Its message names no tensor, and it takes a name that is there
    twice, so the header is read here too.
    """
    safetensors = import_safetensors("load_hf")
    try:
        # The library says that a file which it may not read is not there.
        file.open("rb").close()
        with safetensors.safe_open(file, "np"):
            pass
    except OSError as error:
        raise type(error)(f"load_hf: {file} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"load_hf: {file} is damaged: {error}{_what_is_cut(file)}") from error
    return [
        Tensor(name, file, entry["dtype"], tuple(entry["shape"]))
        for name, entry in _header(file)[0]
    ]


def _header(file: Path) -> tuple[list[tuple[str, Any]], int]:
    """(tensors and what the header says of them, byte where their data begins)."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        there = min(length, file.stat().st_size)  # of a damaged file it may be any number
        # Objects stay lists of pairs until a name that is there twice has been looked for.
        pairs = json.loads(stream.read(there), object_pairs_hook=list)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"load_hf: tensor {twice} is twice in {file}")
    return [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"], 8 + length


def _what_is_cut(file: Path) -> str:
    size = file.stat().st_size
    # The header itself may be damaged.
    with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
        entries, begin = _header(file)
        for name, entry in entries:
            end = begin + entry["data_offsets"][1]
            if end > size:
                return f": tensor {name} ends at byte {end}, the file at {size}"
    return ""


def _names(files: list[Path]) -> str:
    return ", ".join(sorted(file.name for file in files))
