"""GPTQ: codes packed along K, zero points along N, and perhaps inputs in another order."""

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
    Geometry,
    Parts,
    Readable,
    matrix,
    sorted_by_group,
)


class Gptq(Readable):
    """AutoGPTQ's and GPTQModel's first version, which stores every zero point less 1."""

    title, method, versions = "GPTQ v1", "gptq", ("gptq",)
    stored_less = 1

    def recognise(self, parts: Parts) -> bool:
        qweight, scales = matrix(parts, "qweight", "I32"), matrix(parts, "scales")
        return "g_idx" in parts or bool(qweight and scales and qweight[1] == scales[1])

    def names(self, parts: Parts, config: QuantConfig) -> tuple[str, ...]:
        ordered = "g_idx" in parts or bool(config.desc_act)
        return ("qweight", "scales", "qzeros") + ("g_idx",) * ordered

    def size(self, packed_shape: tuple[int, ...]) -> tuple[int, int]:
        return packed_shape[0] * PACK_FACTOR, packed_shape[1]

    def expected(self, geometry: Geometry) -> dict[str, Expected]:
        groups, n = geometry.groups, geometry.n
        return {
            "scales": (FLOATS, (groups, n)),
            "qzeros": (INT32, (groups, n // PACK_FACTOR)),
            "g_idx": (INT32, (geometry.k,)),
        }

    def codes(self, packed: Any) -> Any:
        return unpack_int4(packed, order="natural", axis=-2)

    def groups(self, arrays: Arrays, geometry: Geometry) -> tuple[Any, np.ndarray]:
        zeros = unpack_int4(arrays["qzeros"], order="natural") + np.int8(self.stored_less)
        if zeros.max() > 15:
            # Some tools take it as 16, others as 0, and some carry it into the next zero point.
            group, column = np.argwhere(zeros > 15)[0]
            raise BadPart(
                "qzeros",
                f"must be 0 to 14, got 15 at {(int(group), int(column))}: in {self.title} that is "
                "zero point 16, which has no 4-bit code, or a borrow; save it as gptq_v2",
            )
        return zeros, arrays["scales"]

    def permutation(self, arrays: Arrays, geometry: Geometry) -> np.ndarray | None:
        g_idx = arrays.get("g_idx")
        return None if g_idx is None else sorted_by_group(g_idx, geometry, "g_idx")


class GptqV2(Gptq):
    """GPTQModel's second version: zero points as they are."""

    title, versions = "GPTQ v2", ("gptq_v2",)
    stored_less = 0
