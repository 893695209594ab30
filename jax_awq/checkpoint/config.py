"""What a checkpoint's configuration says about its model and its quantization."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The first name is AutoAWQ's, the others are those of other tools, older and newer.
_KEYS = {
    "method": ("quant_method", "method"),
    "bits": ("bits", "w_bit"),
    "group_size": ("group_size", "q_group_size"),
    "zero_point": ("zero_point",),
    "version": ("version", "checkpoint_format", "format"),
    "desc_act": ("desc_act",),
}
_TYPES = {"bits": int, "group_size": int, "zero_point": bool, "desc_act": bool}
CONFIG_FILES = ("config.json", "quant_config.json", "quantize_config.json")


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Quantization settings; a value that the file does not have is None.

    Attributes:
      file: what they were read from.
      method: "awq", "gptq", "compressed-tensors", ...
      bits: width of a code.
      group_size: inputs that share a scale, -1 for all.
      zero_point: whether there are zero points.
      version: the layout, in lower case ("gemm", "gptq_v2", "pack-quantized", ...).
      desc_act: whether the inputs may be in another order (GPTQ's act-order).
    """

    file: Path
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    zero_point: bool | None = None
    version: str | None = None
    desc_act: bool | None = None

    def require(self, name: str, expected: Any, why: str) -> None:
        """Raises ValueError unless the value is `expected` or is not told."""
        value = getattr(self, name)
        if value is not None and value != expected:
            raise ValueError(
                f"load_hf: {self.file}: {_KEYS[name][0]} is {value!r}, must be {expected!r}: {why}"
            )


def read_config(folder: Path) -> QuantConfig:
    """Reads config.json and, from older tools, quant_config.json or quantize_config.json.

    Raises:
      FileNotFoundError: there is none of them.
      ValueError: no quantization settings, not JSON, a value of a wrong type, or files that
        contradict each other.
    """
    files = _config_files(folder)
    if not files:
        raise FileNotFoundError(
            f"load_hf: {folder} has neither {', '.join(CONFIG_FILES[:-1])} nor {CONFIG_FILES[-1]}"
        )
    if (config := find_config(folder)) is None:
        raise ValueError(
            f"load_hf: {files[0]} has no quantization_config, and there is no "
            f"{' or '.join(CONFIG_FILES[1:])}"
        )
    return config


def find_config(folder: Path) -> QuantConfig | None:
    """`read_config`, or None where no file tells of quantization: a float checkpoint."""
    configs = []
    for file in _config_files(folder):
        values: Any = read_json(file)
        if file.name == "config.json":
            values = values.get("quantization_config")
        if values is not None:
            configs.append(_parse(file, values))
    if not configs:
        return None
    first = configs[0]
    for other in configs[1:]:
        for name, keys in _KEYS.items():
            if getattr(other, name) is not None:
                first.require(name, getattr(other, name), f"{other.file} says so in {keys}")
    return first


def _config_files(folder: Path) -> list[Path]:
    return [folder / name for name in CONFIG_FILES if (folder / name).is_file()]


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json under the names of transformers 5, also where version 4 wrote it.

    ``dtype`` was ``torch_dtype``, and ``rope_parameters`` was ``rope_theta`` with ``rope_scaling``.
    The settings of the language model inside a larger one (``text_config``) come first.

    Returns:
      The settings, ``rope_parameters`` with at least "rope_type" where there is a rotary embedding;
      empty if there is no config.json.

    Raises:
      ValueError: not JSON, a value of a wrong type, or an old and a new name with different values.
    """
    file = folder / "config.json"
    if not file.is_file():
        return {}
    values = read_json(file)
    values |= _typed(file, values, "text_config", dict) or {}
    _typed(file, values, "architectures", list)
    dtype = {"dtype": values.pop("torch_dtype", None)}
    rope = dict(_typed(file, values, "rope_scaling", dict) or {})
    values.pop("rope_scaling", None)
    if (theta := values.pop("rope_theta", None)) is not None:
        rope["rope_theta"] = theta
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    new = _typed(file, values, "rope_parameters", dict)
    if new is None and rope:
        new = values["rope_parameters"] = {"rope_type": "default"} | rope
    # Where each kind of layer has its own, the older names cannot have said anything.
    flat = new is not None and not any(isinstance(v, dict) for v in new.values())
    for at, old in ((values, dtype), (new, rope if flat else {})):
        for name, value in old.items():
            if value is not None and at.setdefault(name, value) != value:
                raise ValueError(
                    f"load_hf: {file}: {name} is {at[name]!r}, but the older names say {value!r}"
                )
    return values


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    # Of the text encoding as well as of JSON, which may be nested too deep to be read.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_hf: {file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load_hf: {file} must be a JSON object, got {type(values).__name__}")
    return values


def _parse(file: Path, values: Any) -> QuantConfig:
    if not isinstance(values, dict):
        raise ValueError(f"load_hf: {file}: quantization_config must be a JSON object")
    method = str(_value(file, values, "method") or _guess_method(values) or "").lower() or None
    if method == "compressed-tensors":
        return _parse_compressed_tensors(file, values)
    found = {name: _value(file, values, name) for name in _KEYS}
    found["method"] = method
    found["version"] = found["version"].lower() if found["version"] else None
    if method == "gptq":
        found["version"] = found["version"] or "gptq"  # the second version is always named
        found["zero_point"] = None
    return QuantConfig(file, **found)


def _guess_method(values: Mapping[str, Any]) -> str | None:
    """The method of files that older tools wrote without it."""
    known = {"w_bit": "awq", "config_groups": "compressed-tensors", "desc_act": "gptq"}
    return next((method for key, method in known.items() if key in values), None)


def _value(file: Path, values: Mapping[str, Any], name: str) -> Any:
    """The value under any of its names, which must agree."""
    want = _TYPES.get(name, str)
    found = {key: _typed(file, values, key, want) for key in _KEYS[name]}
    found = {key: value for key, value in found.items() if value is not None}
    if len({v.lower() if want is str else v for v in found.values()}) > 1:
        raise ValueError(f"load_hf: {file}: {' and '.join(found)} must agree, got {found}")
    return next(iter(found.values()), None)


def _typed(file: Path, values: Mapping[str, Any], key: str, want: type) -> Any:
    value = values.get(key)
    if value is not None and type(value) is not want:
        raise ValueError(f"load_hf: {file}: {key} must be {want.__name__}, got {value!r}")
    return value


def _parse_compressed_tensors(file: Path, values: Mapping[str, Any]) -> QuantConfig:
    """The settings on which all groups of linears agree; `version` there is the package's."""
    groups = _typed(file, values, "config_groups", dict) or {}
    told: list[dict[str, Any]] = []
    for name in groups:
        group = _typed(file, groups, name, dict) or {}
        weights = _typed(file, group, "weights", dict)
        if weights is None:
            continue
        symmetric = _typed(file, weights, "symmetric", bool)
        told.append(
            {
                "bits": _typed(file, weights, "num_bits", int),
                # A scale for each output is one group.
                "group_size": -1
                if weights.get("strategy") == "channel"
                else _typed(file, weights, "group_size", int),
                "zero_point": None if symmetric is None else not symmetric,
                "version": _typed(file, group, "format", str)
                or _typed(file, values, "format", str),
                "desc_act": weights.get("actorder") in ("group", "dynamic", True) or None,
            }
        )
    agreed = {
        name: told[0][name]
        for name in (told[0] if told else ())
        if all(t[name] == told[0][name] for t in told)
    }
    return QuantConfig(file, "compressed-tensors", **agreed)
