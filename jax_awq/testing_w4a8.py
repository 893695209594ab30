"""Problems of `awq_gemm_w4a8` and `awq_gemm_w4a4`, and an oracle that shares no code with them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_awq.ops._activation import QuantizedActivation, pack_codes
from jax_awq.ops.awq_gemm_w4a4 import awq_gemm_w4a4
from jax_awq.ops.awq_gemm_w4a8 import awq_gemm_w4a8
from jax_awq.testing import (
    ACTIVATIONS,
    Problem,
    assert_close,
    dequantize_float64,
    quantize_activation_numpy,
    random_problem,
)

CODES = ("int8", "int4", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class W4A8Problem:
    """One call of either op: the operands and options of `awq_gemm`, and how `x` is rounded."""

    base: Problem
    codes: str = "int8"
    granularity: str = "token"
    scale: np.ndarray | None = None  # float32 (), for "tensor"

    def run(self, x: Any = None) -> jax.Array:
        """Of `x`, by default the float one; for a `QuantizedActivation` its scale is in it."""
        x = self.base.x if x is None else x
        options: dict[str, Any] = {
            "bias": self.base.bias,
            "activation": self.base.activation,
            "out_dtype": self.base.out_dtype or self.base.x.dtype,
        }
        if not isinstance(x, QuantizedActivation):
            options |= {"granularity": self.granularity, "scale": self.scale}
        if self.codes == "int4":
            return awq_gemm_w4a4(x, self.base.weight, **options)
        return awq_gemm_w4a8(x, self.base.weight, activation_dtype=self.codes, **options)

    def rounded(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes of x, and float32 scales with an axis for K."""
        x = self.base.x.astype(np.float32)
        if self.codes == "float8_e4m3fn":
            return _float8(x, self._given(448))
        bits = 4 if self.codes == "int4" else 8
        return quantize_activation_numpy(x, bits=bits, scale=self._given(2 ** (bits - 1) - 1))

    def _given(self, largest: int) -> np.ndarray | None:
        if self.granularity == "token":
            return None
        if self.scale is None:
            absmax = np.abs(self.base.x.astype(np.float32)).max(initial=0)
            return absmax * np.float32(1 / largest)
        return self.scale.astype(np.float32)

    def quantized(self) -> QuantizedActivation:
        """`x` as a caller has it who rounds it himself."""
        q, scale = self.rounded()
        bits = 4 if self.codes == "int4" else 8
        scale = scale[..., 0] if self.granularity == "token" else scale
        return QuantizedActivation(
            np.asarray(pack_codes(jnp.asarray(q), bits)),
            scale,
            bits=bits,
            granularity=self.granularity,
            k=q.shape[-1],
        )

    def float64(self) -> np.ndarray:
        return self._result(np.float64)

    def reference(self) -> np.ndarray:
        """Every step in float32, and the result in the dtype that is asked for."""
        return self._result(np.float32).astype(self.base.out_dtype or self.base.x.dtype)

    def _result(self, dtype: Any) -> np.ndarray:
        base, weight = self.base, self.base.weight
        q, sx = self.rounded()
        *batch, k, n = weight.shape
        codes = dequantize_float64(dataclasses.replace(weight, scales=np.ones_like(weight.scales)))
        groups = 1 if weight.group_size == -1 else k // weight.group_size
        rows = q.astype(np.float64).reshape(*batch, math.prod(q.shape[len(batch) : -1]), k)
        scales = _group_scales(weight, groups).astype(dtype)
        total = np.zeros((*rows.shape[:-1], n), dtype)
        for g in range(groups):
            part = slice(g * (k // groups), (g + 1) * (k // groups))
            sums = rows[..., part] @ codes[..., part, :]  # exact: integers, or multiples of 2**-9
            total = total + sums.astype(dtype) * scales[..., g : g + 1, :]
        wide = np.broadcast_to(sx, (*q.shape[:-1], 1)).reshape(*rows.shape[:-1], 1)
        total = total * wide.astype(dtype)
        if base.bias is not None:
            total = total + base.bias.astype(dtype)[..., None, :]
        return ACTIVATIONS[base.activation](total.reshape(*q.shape[:-1], n)).astype(dtype)


def random_w4a8_problem(
    rng: np.random.Generator,
    m: int | tuple[int, ...],
    k: int,
    n: int,
    *,
    codes: str = "int8",
    granularity: str = "token",
    static: bool = False,
    **options: Any,
) -> W4A8Problem:
    """Options of `random_problem`; `static` gives the scale of "tensor", by which some saturate."""
    base = random_problem(rng, m, k, n, **options)
    scale = None
    if static:
        scale = np.asarray(3 / {"int8": 127, "int4": 7, "float8_e4m3fn": 448}[codes], np.float32)
    return W4A8Problem(base, codes, granularity, scale)


def assert_solves(y: Any, problem: W4A8Problem) -> None:
    """Asserts that `y` solves `problem` within the tolerance of `jax_awq.testing`."""
    assert_close(y, problem.float64(), problem.reference())


def _float8(x: np.ndarray, scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Nearest values of 4 significant bits that are multiples of 2**-9, ties to even."""
    if scale is None:
        scale = np.abs(x).max(-1, initial=0, keepdims=True) * np.float32(1 / 448)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    steps = np.clip(x * inverse, -448, 448).astype(np.float64)
    exponent = np.floor(np.log2(np.maximum(np.abs(steps), 2.0**-6)))
    unit = 2.0 ** (exponent - 3)
    return np.rint(steps / unit) * unit, scale


def _group_scales(weight: Any, groups: int) -> np.ndarray:
    """(..., groups, N) of any layout."""
    scales = np.asarray(weight.scales).astype(np.float64)
    return scales if weight.layout != "gemv" else np.swapaxes(scales, -1, -2)[..., :groups, :]
