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
    """Codes packed along K, zero points along N, both with 8 added; symmetric without zeros."""

    title, method, versions = (
        "compressed-tensors pack-quantized",
        "compressed-tensors",
        ("pack-quantized",),
    )
    packed = "weight_packed"

    def recognise(self, parts: Parts) -> bool:
        return "weight_packed" in parts

    def names(self, parts: Parts, config: QuantConfig) -> tuple[str, ...]:
        optional = {"weight_zero_point": config.zero_point, "weight_g_idx": config.desc_act}
        # Groups of the configuration may differ (None); then the tensors alone tell.
        there = tuple(n for n, told in optional.items() if told or (told is None and n in parts))
        return ("weight_packed", "weight_scale", "weight_shape", *there)

    def size(self, packed_shape: tuple[int, ...]) -> tuple[int, int]:
        return packed_shape[1] * PACK_FACTOR, packed_shape[0]

    def expected(self, geometry: Geometry) -> dict[str, Expected]:
        groups, n = geometry.groups, geometry.n
        return {
            "weight_scale": (FLOATS, (n, groups)),
            "weight_zero_point": (INT32, (n // PACK_FACTOR, groups)),
            "weight_shape": (("I64", "I32"), (2,)),
            "weight_g_idx": (INT32, (geometry.k,)),
        }

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
        return unpack_int4(packed, order="natural").T

    def groups(self, arrays: Arrays, geometry: Geometry) -> tuple[Any, np.ndarray]:
        shape = tuple(arrays["weight_shape"].tolist())
        if shape != (geometry.n, geometry.k):
            raise BadPart(
                "weight_shape",
                f"must be {(geometry.n, geometry.k)}, the size of weight_packed with 4-bit "
                f"codes, got {shape}",
            )
        zeros = arrays.get("weight_zero_point")
        if zeros is not None:
            zeros = unpack_int4(zeros, order="natural", axis=0).T
        return zeros, np.ascontiguousarray(arrays["weight_scale"].T)

    def permutation(self, arrays: Arrays, geometry: Geometry) -> np.ndarray | None:
        g_idx = arrays.get("weight_g_idx")
        return None if g_idx is None else sorted_by_group(g_idx, geometry, "weight_g_idx")


class Unpacked(Format):
    """A byte for each code, as with quantized activations; or float8."""

    title, method = "compressed-tensors int-quantized or float-quantized", "compressed-tensors"
    versions = ("int-quantized", "float-quantized", "naive-quantized")

    def recognise(self, parts: Parts) -> bool:
        return "weight_scale" in parts and "weight" in parts
