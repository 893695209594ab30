"""compressed-tensors, which llm-compressor writes."""

from typing import Any

import numpy as np

from jax_awq._packing import PACK_FACTOR, unpack_int4
from jax_awq.checkpoint.config import QuantConfig
from jax_awq.checkpoint.formats.base import (
    FLOATS,
    INT32,
    Arrays,
    BadPart,
    Expected,
    Format,
    Geometry,
    Parts,
    Readable,
    sorted_by_group,
)


class PackQuantized(Readable):
    """Codes packed along K, zero points along N, both with 8 added; symmetric without zeros.

    Of experts that are one 3-D weight each is packed like a weight of its own, and the results are
    stacked.
    """

    title, method, versions = (
        "compressed-tensors pack-quantized",
        "compressed-tensors",
        ("pack-quantized",),
    )
    packed = "weight_packed"
    stacked = True

    def recognise(self, parts: Parts) -> bool:
        return "weight_packed" in parts

    def names(self, parts: Parts, config: QuantConfig) -> tuple[str, ...]:
        optional = {"weight_zero_point": config.zero_point, "weight_g_idx": config.desc_act}
        # Groups of the configuration may differ (None); then the tensors alone tell.
        there = tuple(n for n, told in optional.items() if told or (told is None and n in parts))
        return ("weight_packed", "weight_scale", "weight_shape", *there)

    def size(self, packed_shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = packed_shape
        return columns * PACK_FACTOR, rows

    def expected(self, geometry: Geometry) -> dict[str, Expected]:
        batch, groups, n = geometry.batch, geometry.groups, geometry.n
        return {
            "weight_scale": (FLOATS, (*batch, n, groups)),
            "weight_zero_point": (INT32, (*batch, n // PACK_FACTOR, groups)),
            "weight_shape": (("I64", "I32"), (len(batch) + 2,)),
            "weight_g_idx": (INT32, (geometry.k,)),
        }

    def geometry(self, module: str, parts: Parts, config: QuantConfig) -> Geometry:
        geometry = super().geometry(module, parts, config)
        if geometry.batch and "weight_g_idx" in parts:
            raise ValueError(
                f"load_hf: {parts['weight_g_idx']} is act-order, which is not read of experts in "
                "one tensor"
            )
        return geometry

    def group_size(self, k: int, parts: Parts, config: QuantConfig) -> int:
        if config.group_size is not None:
            return super().group_size(k, parts, config)
        scale = parts["weight_scale"]
        groups = scale.shape[-1] if scale.shape else 0
        if groups < 1 or k % groups:
            raise ValueError(
                f"load_hf: {scale} must have a divisor of K={k} columns, got shape {scale.shape}"
            )
        return -1 if groups == 1 else k // groups

    def codes(self, packed: Any) -> Any:
        return unpack_int4(packed, order="natural").swapaxes(-1, -2)

    def groups(self, arrays: Arrays, geometry: Geometry) -> tuple[Any, np.ndarray]:
        shape = tuple(arrays["weight_shape"].tolist())
        wanted = (*geometry.batch, geometry.n, geometry.k)
        if shape != wanted:
            raise BadPart(
                "weight_shape",
                f"must be {wanted}, the size of weight_packed with 4-bit codes, got {shape}",
            )
        zeros = arrays.get("weight_zero_point")
        if zeros is not None:
            zeros = unpack_int4(zeros, order="natural", axis=-2).swapaxes(-1, -2)
        return zeros, np.ascontiguousarray(arrays["weight_scale"].swapaxes(-1, -2))

    def permutation(self, arrays: Arrays, geometry: Geometry) -> np.ndarray | None:
        g_idx = arrays.get("weight_g_idx")
        return None if g_idx is None else sorted_by_group(g_idx, geometry, "weight_g_idx")


class Unpacked(Format):
    """A byte for each code, as with quantized activations; or float8."""

    title, method = "compressed-tensors int-quantized or float-quantized", "compressed-tensors"
    versions = ("int-quantized", "float-quantized", "naive-quantized")

    def recognise(self, parts: Parts) -> bool:
        return "weight_scale" in parts and "weight" in parts
