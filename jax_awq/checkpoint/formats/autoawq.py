"""AutoAWQ's layouts, and llm-awq's second one, which is AutoAWQ's gemv_fast by another name."""

from typing import Any

import numpy as np

from jax_awq._packing import PACK_FACTOR, decode, decode_codes, group_shapes, weight_size
from jax_awq.checkpoint.config import QuantConfig
from jax_awq.checkpoint.formats.base import (
    FLOATS,
    INT32,
    Arrays,
    BadPart,
    Expected,
    Geometry,
    Parts,
    Readable,
    matrix,
)
from jax_awq.weights import AWQWeight


class AutoAWQ(Readable):
    """int32 codes and zeros, float scales, in a layout that `AWQWeight` has too."""

    method = "awq"
    layout: str

    def names(self, parts: Parts, config: QuantConfig) -> tuple[str, ...]:
        return ("qweight", "scales") + ("qzeros",) * (config.zero_point is not False)

    def size(self, packed_shape: tuple[int, ...]) -> tuple[int, int]:
        return weight_size(packed_shape, self.layout)

    def expected(self, geometry: Geometry) -> dict[str, Expected]:
        scales, qzeros = group_shapes(geometry.k, geometry.n, geometry.group_size, self.layout)
        return {"scales": (FLOATS, scales), "qzeros": (INT32, qzeros)}

    def codes(self, packed: Any) -> Any:
        return decode_codes(packed, self.layout)

    def groups(self, arrays: Arrays, geometry: Geometry) -> tuple[Any, np.ndarray]:
        _, zeros, scales = decode(
            arrays["qweight"],
            arrays["scales"],
            arrays.get("qzeros"),
            layout=self.layout,
            group_size=geometry.group_size,
        )
        return zeros, scales

    def weight(self, arrays: Arrays, geometry: Geometry) -> AWQWeight:
        return AWQWeight(
            arrays["qweight"],
            arrays["scales"],
            arrays.get("qzeros"),
            layout=self.layout,
            group_size=geometry.group_size,
        )


class Gemm(AutoAWQ):
    title, versions, layout = "AutoAWQ gemm", ("gemm",), "gemm"

    def recognise(self, parts: Parts) -> bool:
        qweight, scales = matrix(parts, "qweight", "I32"), matrix(parts, "scales")
        return bool(qweight and scales and qweight[1] * PACK_FACTOR == scales[1])


class Gemv(AutoAWQ):
    title, versions, layout = "AutoAWQ gemv", ("gemv",), "gemv"

    def recognise(self, parts: Parts) -> bool:
        qweight, scales = matrix(parts, "qweight", "I32"), matrix(parts, "scales")
        return bool(qweight and scales and qweight[0] == scales[0])


class GemvFast(Readable):
    """int16 words of four outputs, and ``-(s * z)`` in place of the zero points.

    The tool rounds that product, so its ``q * s - (s * z)`` and ``(q - z) * s`` of the loaded
    weight, which AutoAWQ's own quantization had, differ in the last bits. The zero points
    themselves come back exactly, or the tensor is refused.
    """

    title, method = "AutoAWQ gemv_fast", "awq"
    versions: tuple[str, ...] = ("gemv_fast",)
    packed_dtype = "I16"
    zeros = "qzeros"

    def recognise(self, parts: Parts) -> bool:
        return self.zeros in parts and bool(matrix(parts, "qweight", "I16"))

    def names(self, parts: Parts, config: QuantConfig) -> tuple[str, ...]:
        return "qweight", "scales", self.zeros

    def size(self, packed_shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = packed_shape
        return columns, rows * 4

    def expected(self, geometry: Geometry) -> dict[str, Expected]:
        k, n = geometry.k, geometry.n
        (_, padded), _ = group_shapes(k, n, geometry.group_size, "gemv")
        return {
            "qweight": (("I16",), (n // 4, -(-k // 64) * 64)),
            "scales": (FLOATS, (padded, n)),
            self.zeros: (FLOATS, (padded, n)),
        }

    def codes(self, packed: Any) -> Any:
        rows, k = packed.shape
        nibbles = (packed[..., None] >> np.arange(0, 16, 4, dtype=np.int16)[None, None]) & 15
        # Four outputs take turns in blocks of 64 inputs.
        codes = nibbles.reshape(rows, k // 64, 4, 64).swapaxes(1, 2).reshape(rows * 4, k)
        # The tool swaps (4, 4, 2) of 32 inputs, then (4, 2) of each eight; this is the way back.
        codes = codes.reshape(rows * 4, k // 8, 2, 4).swapaxes(-1, -2)
        codes = codes.reshape(rows * 4, k // 32, 4, 4, 2).swapaxes(2, 3)
        return codes.reshape(rows * 4, k).T.astype(np.int8)

    def groups(self, arrays: Arrays, geometry: Geometry) -> tuple[Any, np.ndarray]:
        scales, products = (arrays[name][: geometry.groups] for name in ("scales", self.zeros))
        if products.dtype != scales.dtype:
            raise BadPart(
                self.zeros, f"must be {scales.dtype}, like the scales, got {products.dtype}"
            )
        wide = scales.astype(np.float32)
        nonzero = np.where(wide == 0, np.float32(1), wide)
        zeros = np.rint(-products.astype(np.float32) / nonzero)
        wrong = ((wide * -zeros).astype(scales.dtype) != products) | (zeros < 0) | (zeros > 15)
        if wrong.any():
            group, column = np.argwhere(wrong)[0]
            raise BadPart(
                self.zeros,
                "must be minus the product of the scale and a zero point of 0 to 15, got "
                f"{products[group, column]} for scale {scales[group, column]} at "
                f"{(int(group), int(column))}",
            )
        return zeros.astype(np.int8), scales


class LlmAwq(GemvFast):
    """What llm-awq writes since TinyChat 2, and GPTQModel under "llm-awq"."""

    title, versions = "llm-awq v2", ("llm-awq", "gemv_fast")
    zeros = "scaled_zeros"
