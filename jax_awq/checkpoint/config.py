"""What a checkpoint's configuration says about its quantization."""

import dataclasses
import json
from pathlib import Path
from typing import Any

# The first name is today's, the others are those of older tools.
_KEYS = {
    "method": ("quant_method", "method"),
    "bits": ("bits", "w_bit"),
    "group_size": ("group_size", "q_group_size"),
    "zero_point": ("zero_point",),
    "version": ("version", "checkpoint_format", "format"),
}


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Quantization settings; a value that the file does not have is None.

    Attributes:
      file: what they were read from.
      method: "awq", "gptq", ...
      bits: width of a code.
      group_size: inputs that share a scale, -1 for all.
      zero_point: whether there are zero points.
      version: the layout, in lower case ("gemm", "gemv", ...).
    """

    file: Path
    method: str | None
    bits: int | None
    group_size: int | None
    zero_point: bool | None
    version: str | None

    def require(self, name: str, expected: Any, why: str) -> None:
        """Raises ValueError unless the value is `expected` or is not told."""
        value = getattr(self, name)
        if value is not None and value != expected:
            raise ValueError(
                f"load_hf: {self.file}: {_KEYS[name][0]} is {value!r}, must be {expected!r}: {why}"
            )


def read_config(folder: Path) -> QuantConfig:
    """Reads config.json and, from older tools, quant_config.json; they must agree.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: no quantization settings, not JSON, a value of a wrong type, or two files that
        contradict each other.
    """
    configs = []
    for name in ("config.json", "quant_config.json"):
        if (folder / name).is_file():
            values: Any = read_json(folder / name)
            if name == "config.json":
                values = values.get("quantization_config")
            if values is not None:
                configs.append(_parse(folder / name, values))
        elif name == "config.json" and not (folder / "quant_config.json").is_file():
            raise FileNotFoundError(
                f"load_hf: {folder} has neither config.json nor quant_config.json"
            )
    if not configs:
        raise ValueError(
            f"load_hf: {folder / 'config.json'} has no quantization_config, "
            "and there is no quant_config.json"
        )
    first = configs[0]
    for other in configs[1:]:
        for name, keys in _KEYS.items():
            if getattr(other, name) is not None:
                first.require(name, getattr(other, name), f"{other.file} says so in {keys}")
    return first


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text encoding as well as of JSON
        raise ValueError(f"load_hf: {file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load_hf: {file} must be a JSON object, got {type(values).__name__}")
    return values


def _parse(file: Path, values: Any) -> QuantConfig:
    if not isinstance(values, dict):
        raise ValueError(f"load_hf: {file}: quantization_config must be a JSON object")
    found: dict[str, Any] = {}
    types = {"bits": int, "group_size": int, "zero_point": bool}
    for name, keys in _KEYS.items():
        found[name] = next((values[key] for key in keys if values.get(key) is not None), None)
        want = types.get(name, str)
        if found[name] is not None and type(found[name]) is not want:
            raise ValueError(
                f"load_hf: {file}: {keys[0]} must be {want.__name__}, got {found[name]!r}"
            )
    for name in ("method", "version"):
        found[name] = found[name].lower() if found[name] else None
    if found["method"] is None and "w_bit" in values:
        found["method"] = "awq"  # only llm-awq and AutoAWQ wrote these keys
    return QuantConfig(file, **found)
