"""The layouts that quantized linears have on disk, one class each.

A linear is the tensors `<module>.<part>`. Which format it is in is told by the parts that are
there, their dtypes and shapes; the configuration is asked only where these do not tell.
"""

import abc
from collections.abc import Mapping
from typing import Any

from jax_awq._packing import PACK_FACTOR, group_shapes, weight_size
from jax_awq.checkpoint.config import QuantConfig
from jax_awq.checkpoint.files import Tensor
from jax_awq.weights import AWQWeight

Parts = Mapping[str, Tensor]  # by the last component of the tensor's name

# A module that has one of these is a quantized linear; so is one with 2-D `scales`. (`scales` alone
# and 1-D divide an activation, in MPT or Falcon.)
_PACKED_PARTS = ("qweight", "qzeros", "scaled_zeros", "g_idx", "weight_packed")
_FLOATS = ("F16", "BF16", "F32")


class Format(abc.ABC):
    """One layout; a class that is no `Readable` is there to be refused by its name.

    Attributes:
      version: what config.json calls it.
      title: what a message calls it.
    """

    version: str
    title: str

    @abc.abstractmethod
    def recognise(self, parts: Parts) -> bool:
        """Whether these parts look like it and like nothing else."""


class Readable(Format):
    """A layout that can be loaded."""

    @abc.abstractmethod
    def geometry(self, module: str, parts: Parts, config: QuantConfig) -> tuple[list[Tensor], int]:
        """The tensors that `build` takes, checked and in its order, and the group size."""

    @abc.abstractmethod
    def build(self, arrays: list[Any], group_size: int) -> AWQWeight:
        """The weight of the arrays."""


class AutoAWQ(Readable):
    """int32 codes and zeros, float scales; `layout` is that of `AWQWeight`."""

    layout: str

    def geometry(self, module: str, parts: Parts, config: QuantConfig) -> tuple[list[Tensor], int]:
        names = ["qweight", "scales"] + (["qzeros"] if config.zero_point is not False else [])
        for name in names:
            if name not in parts:
                files = ", ".join(sorted({str(t.file) for t in parts.values()}))
                raise ValueError(
                    f"load_hf: tensor {module}.{name} is missing: {files} has only "
                    f"{', '.join(sorted(parts))} of this {self.title} linear"
                )
        for name, tensor in parts.items():
            if name not in (*names, "bias"):
                raise ValueError(
                    f"load_hf: {tensor} is unused: a {self.title} linear has "
                    f"{', '.join(names)} and maybe bias (zero_point is "
                    f"{config.zero_point} in {config.file})"
                )
        qweight = parts["qweight"]
        _check(qweight, ("I32",), None, "")
        k, n = weight_size(qweight.shape, self.layout)
        group_size = self.group_size(k, parts["scales"], config)
        scales_shape, qzeros_shape = group_shapes(k, n, group_size, self.layout)
        why = f"for K={k}, N={n} of qweight and group_size {group_size} of {config.file}"
        _check(parts["scales"], _FLOATS, scales_shape, why)
        if "qzeros" in names:
            _check(parts["qzeros"], ("I32",), qzeros_shape, why)
        if "bias" in parts:
            _check(parts["bias"], _FLOATS, (n,), why)
        return [parts[name] for name in names], group_size

    def group_size(self, k: int, scales: Tensor, config: QuantConfig) -> int:
        if config.group_size is None:
            raise ValueError(f"load_hf: {config.file} has no group_size")
        if config.group_size != -1 and (config.group_size < 1 or k % config.group_size):
            raise ValueError(
                f"load_hf: {config.file}: group_size must be -1 or a divisor of "
                f"K={k}, got {config.group_size} ({scales})"
            )
        return config.group_size

    def build(self, arrays: list[Any], group_size: int) -> AWQWeight:
        return AWQWeight(*arrays, layout=self.layout, group_size=group_size)


class Gemm(AutoAWQ):
    version, title, layout = "gemm", "AutoAWQ gemm", "gemm"

    def recognise(self, parts: Parts) -> bool:
        qweight, scales = _matrix(parts, "qweight", "I32"), _matrix(parts, "scales")
        return bool(qweight and scales and qweight[1] * PACK_FACTOR == scales[1])


class Gemv(AutoAWQ):
    version, title, layout = "gemv", "AutoAWQ gemv", "gemv"

    def recognise(self, parts: Parts) -> bool:
        qweight, scales = _matrix(parts, "qweight", "I32"), _matrix(parts, "scales")
        return bool(qweight and scales and qweight[0] == scales[0])


class GemvFast(Format):
    version, title = "gemv_fast", "AutoAWQ gemv_fast (llm-awq v2)"

    def recognise(self, parts: Parts) -> bool:
        return "scaled_zeros" in parts or bool(_matrix(parts, "qweight", "I16"))


class Gptq(Format):
    version, title = "gptq", "GPTQ"

    def recognise(self, parts: Parts) -> bool:
        qweight, scales = _matrix(parts, "qweight", "I32"), _matrix(parts, "scales")
        return "g_idx" in parts or bool(qweight and scales and qweight[1] == scales[1])


class Marlin(Format):
    version, title = "marlin", "Marlin"

    def recognise(self, parts: Parts) -> bool:
        qweight, scales = _matrix(parts, "qweight", "I32"), _matrix(parts, "scales")
        tiled = qweight and scales and qweight[1] == 2 * scales[1]
        return _is_first_marlin(parts) or bool(tiled and "qzeros" not in parts)


class CompressedTensors(Format):
    version, title = "pack-quantized", "compressed-tensors"

    def recognise(self, parts: Parts) -> bool:
        return "weight_packed" in parts


FORMATS: tuple[Format, ...] = (GemvFast(), Gptq(), CompressedTensors(), Marlin(), Gemm(), Gemv())
READABLE = tuple(f.version for f in FORMATS if isinstance(f, Readable))


def is_linear(parts: Parts) -> bool:
    return (
        any(p in parts for p in _PACKED_PARTS)
        or bool(_matrix(parts, "scales"))
        or _is_first_marlin(parts)
    )


def format_of(parts: Parts, config: QuantConfig) -> Readable:
    """The format of a quantized linear.

    Raises:
      ValueError: it is one that is not read, or `config` tells another.
    """
    tensor = parts.get("qweight") or next(iter(parts.values()))
    # A damaged linear looks like nothing; judged by what config.json says it is, the message can
    # tell what is wrong with it.
    found = next((f for f in FORMATS if f.recognise(parts)), None) or next(
        (f for f in FORMATS if f.version == config.version), None
    )
    if found is not None and not isinstance(found, Readable):
        raise ValueError(
            f"load_hf: {tensor} is in {found.title} format, which is not read; "
            f"the formats that are: {', '.join(READABLE)}"
        )
    config.require("method", "awq", f"{tensor} is packed by an AWQ tool")
    if config.version not in (None, *READABLE):
        raise ValueError(
            f"load_hf: {config.file}: version must be one of {READABLE}, "
            f"got {config.version!r} ({tensor})"
        )
    if found is None:
        raise ValueError(
            f"load_hf: {tensor} is in no known format, and {config.file} has no version"
        )
    config.require("version", found.version, f"{tensor} has the shape of {found.title}")
    config.require("bits", 4, f"{tensor} has 4-bit codes")
    return found


def _is_first_marlin(parts: Parts) -> bool:
    return "B" in parts and "s" in parts


def _matrix(parts: Parts, name: str, dtype: str | None = None) -> tuple[int, ...] | None:
    """Shape of a part that is there, 2-D and of the dtype."""
    tensor = parts.get(name)
    if tensor is None or len(tensor.shape) != 2 or dtype not in (None, tensor.dtype):
        return None
    return tensor.shape


def _check(
    tensor: Tensor, dtypes: tuple[str, ...], shape: tuple[int, ...] | None, why: str
) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"load_hf: {tensor} must be {' or '.join(dtypes)}, got {tensor.dtype}")
    if shape is None and len(tensor.shape) != 2:
        raise ValueError(f"load_hf: {tensor} must have 2 dimensions, got shape {tensor.shape}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"load_hf: {tensor} must have shape {shape}, got {tensor.shape}, {why}")
