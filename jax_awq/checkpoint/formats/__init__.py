"""The layouts that quantized linears have on disk, one class each.

A linear is the tensors `<module>.<part>`. Which format it is in is told by the parts that are
there, their dtypes and shapes; the configuration is asked where these do not tell, and must not
contradict them.
"""

from jax_awq.checkpoint.config import QuantConfig
from jax_awq.checkpoint.formats.autoawq import Gemm, Gemv, GemvFast, LlmAwq
from jax_awq.checkpoint.formats.base import BadPart, Format, Geometry, Parts, Readable, matrix
from jax_awq.checkpoint.formats.compressed_tensors import PackQuantized, Unpacked
from jax_awq.checkpoint.formats.gptq import Gptq, GptqV2

__all__ = ["FORMATS", "READABLE", "BadPart", "Geometry", "Readable", "format_of", "is_linear"]


class Marlin(Format):
    title, method, versions = "Marlin", "awq", ("marlin",)

    def recognise(self, parts: Parts) -> bool:
        qweight, scales = matrix(parts, "qweight", "I32"), matrix(parts, "scales")
        tiled = qweight and scales and qweight[1] == 2 * scales[1]
        return _is_first_marlin(parts) or bool(tiled and "qzeros" not in parts)


FORMATS: tuple[Format, ...] = (
    Gemm(),
    Gemv(),
    GemvFast(),
    LlmAwq(),
    PackQuantized(),
    Gptq(),
    GptqV2(),
    Marlin(),
    Unpacked(),
)
READABLE: tuple[Readable, ...] = tuple(f for f in FORMATS if isinstance(f, Readable))

# A module that has one of these is a quantized linear; so is one with 2-D `scales`. (`scales` alone
# and 1-D divide an activation, in MPT or Falcon.)
_PACKED_PARTS = (
    *("qweight", "qzeros", "scaled_zeros", "g_idx"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
)


def is_linear(parts: Parts) -> bool:
    return (
        any(p in parts for p in _PACKED_PARTS)
        or bool(matrix(parts, "scales"))
        or _is_first_marlin(parts)
    )


def format_of(parts: Parts, config: QuantConfig) -> Readable:
    """The format of a quantized linear.

    Raises:
      ValueError: it is one that is not read, it cannot be told, or `config` tells another.
    """
    tensor = parts.get("qweight") or parts.get("weight_packed") or next(iter(parts.values()))
    like = [f for f in FORMATS if f.recognise(parts)]
    told = [f for f in FORMATS if f.is_told_by(config)]
    found = [f for f in like if f in told] or like
    if not found and config.version is not None:
        # A damaged linear looks like nothing; judged by what the configuration says it is, the
        # message can tell what is wrong with it.
        found = told[:1]
    first = found[0] if found else None
    if first is not None and not isinstance(first, Readable):
        raise ValueError(
            f"load_hf: {tensor} is in {first.title} format, which is not read; the formats that "
            f"are: {', '.join(f.title for f in READABLE)}"
        )
    if first is not None:
        config.require("method", first.method, f"{tensor} has the shape of {first.title}")
    versions = [v for f in READABLE if config.method in (None, f.method) for v in f.versions]
    if config.version not in (None, *versions):
        raise ValueError(
            f"load_hf: {config.file}: version must be one of {sorted(set(versions))}, got "
            f"{config.version!r} ({tensor})"
        )
    if first is None:
        raise ValueError(
            f"load_hf: {tensor} is in no known format, and {config.file} has no version"
        )
    if first not in told:
        config.require("version", first.versions[0], f"{tensor} has the shape of {first.title}")
    if len(found) > 1:
        raise ValueError(
            f"load_hf: {tensor} may be in {' or '.join(f.title for f in found)} format; "
            f"quant_method and version in {config.file} must tell which"
        )
    config.require("bits", 4, f"{tensor} has 4-bit codes")
    return first


def _is_first_marlin(parts: Parts) -> bool:
    return "B" in parts and "s" in parts
