"""`save_hf`: weights as a Hugging Face folder in AutoAWQ's gemm format, for other engines."""

import contextlib
import functools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_awq._checks import FLOATS, check_dtype, check_shape, read_integer
from jax_awq._packing import group_shapes
from jax_awq.checkpoint.config import CONFIG_FILES
from jax_awq.checkpoint.files import INDEX, Tensor, import_safetensors
from jax_awq.checkpoint.formats import is_linear
from jax_awq.weights import AWQWeight, PermutedWeight, convert

_ZEROS_OF_8 = -0x77777778  # 0x88888888 in int32: what stands for no zero points in a word
# Of which safetensors writes arrays.
_DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
_BLOCK = re.compile(r"(.*?\.)\d+\.")


class _Entry(NamedTuple):
    """The tensors of one parameter: their sizes, and their values once these are needed."""

    bytes: dict[str, int]
    arrays: Callable[[], dict[str, np.ndarray]]


def save_hf(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder in AutoAWQ's "gemm" format, the inverse of `load_hf`.

    Codes, zero points, scales and other tensors keep their bits; weights in another layout are
    converted, and a weight without zero points gets 8 for all of them. Everything is written to a
    hidden folder and then renamed, config.json last: a folder that loads is complete, and what it
    held before is there again where that fails. Files of the tokenizer are the caller's to copy.

    Args:
      path: the folder, made if it is not there.
      params: as `load_hf` gives them: module path -> `AWQWeight` (K, N) with float16 or bfloat16
        scales, tensor name -> array.
      config: config.json of the model (``model_type``, sizes, ...); its ``quantization_config`` is
        replaced.
      max_shard_bytes: above it the tensors are divided over several files with an index. The three
        of a weight stay in one file, which may be larger for them.
      overwrite: whether the weights and configuration of a model that is in the folder may be
        replaced. Other files stay.

    Raises:
      FileExistsError: the folder holds a model and `overwrite` is false, it is no folder, or in it
        a folder has the name of a model's file.
      ValueError: no weight is quantized, one is stacked or has permuted inputs, their group sizes
        differ, two tensors have one name, or an array has a name or shape which `load_hf` refuses
        beside the weights.
      TypeError: a value is no array, or of a dtype that safetensors does not write, scales are
        float32, `config` is not JSON, or an argument is of another type.
      ImportError: safetensors is not installed.

    Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and awq/models/_config.py.
    """
    if read_integer("save_hf", "max_shard_bytes", max_shard_bytes) < 1:
        raise ValueError(f"save_hf: max_shard_bytes must be 1 or more, got {max_shard_bytes}")
    _check_mapping("params", params)
    _check_mapping("config", config)
    save_file = import_safetensors("save_hf", "safetensors.numpy").save_file
    folder = Path(path).absolute()
    _check_target(folder, overwrite)
    entries = _entries(params)
    text = _json({**config, "quantization_config": _quantization_config(params)})

    with _temporary_for(folder) as temporary:
        shards = _shards(entries, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = "model" + f"-{number:05}-of-{len(shards):05}" * (len(shards) > 1)
            arrays = {n: a for entry in shard for n, a in entry.arrays().items()}
            weight_map |= dict.fromkeys(arrays, f"{file}.safetensors")
            # transformers refuses a file that does not name a framework.
            save_file(
                # Reshaped, since of () it makes (1,).
                {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in arrays.items()},
                temporary / f"{file}.safetensors",
                metadata={"format": "pt"},
            )
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(sum(e.bytes.values()) for e in entries)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (temporary / f"model{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
        (temporary / "config.json").write_text(text + "\n")
        _move(temporary, folder)


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"save_hf: {name} must be a mapping, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"save_hf: {name} must have strings as keys, got {key!r}")


def _json(config: dict[str, Any]) -> str:
    try:
        return json.dumps(config, indent=2, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"save_hf: config must be JSON, with strings as keys, got: {error}"
        ) from error


def _entries(params: Mapping[str, Any]) -> list[_Entry]:
    entries, owners = [], dict[str, str]()
    for name in sorted(params):
        entry = _entry(name, params[name])
        for tensor in entry.bytes:
            if tensor in owners:
                raise ValueError(
                    f"save_hf: tensor {tensor} must come from one parameter, got "
                    f"{owners[tensor]} and {name}"
                )
            owners[tensor] = name
        entries.append(entry)
    _check_beside_weights(params)
    return entries


def _check_beside_weights(params: Mapping[str, Any]) -> None:
    """Checks that `load_hf` takes no array for a part of a quantized linear, or for nothing."""
    weights = {name: value for name, value in params.items() if isinstance(value, AWQWeight)}
    modules: dict[str, dict[str, Tensor]] = {}
    for name in sorted(params.keys() - weights.keys()):
        if name == "__metadata__":
            raise ValueError(f"save_hf: {name} must have another name: safetensors has it itself")
        array = params[name]
        module, _, part = name.rpartition(".")
        if module not in weights:
            dtype = "I32" if array.dtype == np.int32 else ""
            tensor = Tensor(name, Path(), dtype, tuple(array.shape))
            modules.setdefault(module, {})[part] = tensor
        elif part != "bias":
            raise ValueError(
                f"save_hf: {name} must have another name: beside the AWQWeight {module} there may "
                "only be its bias"
            )
        else:
            check_dtype("save_hf", name, array, *FLOATS)
            check_shape("save_hf", name, array, weights[module].shape[-1:])
    for parts in modules.values():
        if is_linear(parts):
            names = ", ".join(sorted(tensor.name for tensor in parts.values()))
            raise ValueError(
                f"save_hf: {names} must have other names: they are those of a quantized linear, "
                "which must be an AWQWeight"
            )


def _entry(name: str, value: Any) -> _Entry:
    if isinstance(value, PermutedWeight):
        raise ValueError(
            f"save_hf: {name} has permuted inputs (GPTQ's act-order), for which AutoAWQ's format "
            "has no place"
        )
    if not isinstance(value, AWQWeight):
        known = isinstance(value, np.ndarray | np.generic | jax.Array)
        if not known or isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"save_hf: {name} must be an AWQWeight or an array, got {type(value).__name__}"
            )
        check_dtype("save_hf", name, value, *_DTYPES)
        return _Entry({name: value.nbytes}, lambda: {name: np.asarray(value)})
    if value.ndim != 2:
        raise ValueError(f"save_hf: {name} must be (K, N), got shape {value.shape}")
    check_dtype("save_hf", f"scales of {name}", value.scales, "float16", "bfloat16")
    k, n = value.shape
    scales, qzeros = group_shapes(k, n, value.group_size, "gemm")
    sizes = {"qweight": k * n // 2, "qzeros": 4 * np.prod(qzeros), "scales": 2 * np.prod(scales)}
    return _Entry(
        {f"{name}.{part}": int(size) for part, size in sizes.items()},
        functools.partial(_arrays, name, value),
    )


def _arrays(name: str, weight: AWQWeight) -> dict[str, np.ndarray]:
    weight = convert(jax.device_get(weight), "gemm")
    k, n = weight.shape
    _, shape = group_shapes(k, n, weight.group_size, "gemm")
    qzeros = weight.qzeros
    return {
        f"{name}.qweight": weight.qweight,
        f"{name}.qzeros": np.full(shape, _ZEROS_OF_8, np.int32) if qzeros is None else qzeros,
        f"{name}.scales": weight.scales,
    }


def _quantization_config(params: Mapping[str, Any]) -> dict[str, Any]:
    weights = {name: w for name, w in params.items() if isinstance(w, AWQWeight)}
    if not weights:
        raise ValueError("save_hf: params must have an AWQWeight, got none")
    # One group may be called -1 or K; the configuration has one number for all weights.
    names = {n: {w.group_size, *_names_of_one_group(w)} for n, w in weights.items()}
    common = set.intersection(*names.values())
    if not common:
        told = ", ".join(f"{n} {w.group_size}" for n, w in weights.items())
        raise ValueError(f"save_hf: all weights must have the same group_size, got {told}")
    first = next(iter(weights.values())).group_size
    return {
        "bits": 4,
        "group_size": first if first in common else max(common),
        "modules_to_not_convert": _left_out(params, weights),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def _names_of_one_group(weight: AWQWeight) -> tuple[int, ...]:
    k, _ = weight.shape
    return (-1, k) if weight.group_size in (-1, k) else ()


def _left_out(params: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str] | None:
    """The linears that other tools would take for quantized: those in a stack that has some."""
    stacks = {match[1] for name in weights if (match := _BLOCK.match(name))}
    found = [
        name.removesuffix(".weight")
        for name, value in params.items()
        if name.endswith(".weight") and name not in weights and len(value.shape) == 2
        if (match := _BLOCK.match(name)) and match[1] in stacks
    ]
    return sorted(found) or None


def _shards(entries: list[_Entry], limit: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        more = sum(entry.bytes.values())
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += more
    return shards


def _check_target(folder: Path, overwrite: bool) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        found = "a file" if folder.exists() else "a link to nothing"
        raise FileExistsError(f"save_hf: {folder} must be a folder, got {found}")
    files = _model_files(folder)
    for file in files:
        if file.is_dir():
            raise FileExistsError(f"save_hf: {file} must be a file, got a folder")
    if files and not overwrite:
        raise FileExistsError(
            f"save_hf: {folder} holds a model already ({', '.join(f.name for f in files)}); "
            "overwrite=True replaces it"
        )


def _model_files(folder: Path) -> list[Path]:
    """Configurations first: a folder that has lost them does not load."""
    configs = [folder / name for name in CONFIG_FILES]
    patterns = (f"*{INDEX}", "*.safetensors")
    there = [file for file in configs if os.path.lexists(file)]
    return there + sorted(file for pattern in patterns for file in folder.glob(pattern))


@contextlib.contextmanager
def _temporary_for(folder: Path) -> Iterator[Path]:
    """A hidden folder on the filesystem of `folder`, which may be a mount point: inside it."""
    parent = folder if folder.exists() else folder.parent
    temporary = parent / f".save_hf-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, folder: Path) -> None:
    """Moves the new files in and the old ones out, or none of them where one move fails."""
    if not folder.exists():
        temporary.rename(folder)
        return
    new = sorted(temporary.iterdir(), key=lambda f: f.name == "config.json")
    # Not in the temporary folder, which is removed even if the old files could not be put back.
    aside = temporary.with_suffix(".old")
    aside.mkdir()
    with contextlib.ExitStack() as undo:
        undo.callback(aside.rmdir)
        for file in _model_files(folder):
            _rename(file, aside / file.name, undo)
        for file in new:
            _rename(file, folder / file.name, undo)
        undo.pop_all()
    shutil.rmtree(aside, ignore_errors=True)


def _rename(source: Path, target: Path, undo: contextlib.ExitStack) -> None:
    # The way back comes first: an interrupt may follow the move at once.
    undo.callback(lambda: os.path.lexists(source) or target.replace(source))
    source.replace(target)
