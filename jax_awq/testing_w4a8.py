"""Problems of `awq_gemm_w4a8` and `awq_gemm_w4a4`, and an oracle that shares no code with them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_awq.ops._activation import QuantizedActivation
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
_KEEPS_SUMS = ("", "quantize_activation", "few_8x256", "few_16x256")  # of groups, before scales


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
        k = q.shape[-1]
        if bits == 4:  # the even code of a byte is the low one
            q = np.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, k % 2)])
            q = q[..., ::2] & 0xF | q[..., 1::2] << 4
        return QuantizedActivation(q, scale, bits=bits, granularity=self.granularity, k=k)

    def float64(self) -> np.ndarray:
        return self._result(np.float64)

    def reference(self, *, rounded_weight: bool = False) -> np.ndarray:
        """Every step in float32, and the result in the dtype that is asked for.

        Args:
          rounded_weight: the product is one of `x` with the dequantized weight in 16 bits: bfloat16
            where its scales are, else float16.
        """
        result = self._result(np.float32, rounded_weight)
        return result.astype(self.base.out_dtype or self.base.x.dtype)

    def float8_error(self) -> np.ndarray:
        """What tensor cores may lose of float8 products in one-byte arithmetic.

        Hopper aligns the products of one instruction and the sum so far to the largest of them and
        keeps about 14 bits (https://arxiv.org/abs/2412.19437, 3.3.2), so what is lost grows with
        the magnitudes of both; kernels multiply codes of the weight before the zero point is
        subtracted.
        """
        depth = 32  # of an instruction (PTX ISA, wgmma of e4m3)
        weight = self.base.weight
        none = dataclasses.replace(weight, qweight=np.zeros_like(weight.qweight))
        codes = dequantize_float64(weight) - dequantize_float64(none)  # times their scales
        q, sx = self.rounded()
        *batch, k, n = weight.shape
        rows = q.astype(np.float64).reshape(*batch, -1, k)
        products = np.abs(rows) @ codes
        sums, so_far = 0.0, 0.0
        for at in range(0, k, depth):
            so_far = so_far + rows[..., at : at + depth] @ codes[..., at : at + depth, :]
            sums = sums + np.abs(so_far)
        steepest = 1.0 if self.base.activation is None else 1.13  # slope of an activation
        return steepest * 2.0**-13 * (products + sums).reshape(*q.shape[:-1], n) * np.abs(sx)

    def _result(self, dtype: Any, rounded_weight: bool = False) -> np.ndarray:
        base, weight = self.base, self.base.weight
        q, sx = self.rounded()
        *batch, k, n = weight.shape
        rows = q.astype(np.float64).reshape(*batch, math.prod(q.shape[len(batch) : -1]), k)
        if rounded_weight:
            bf16 = weight.scales.dtype == jnp.bfloat16
            rounded = dequantize_float64(weight).astype(jnp.bfloat16 if bf16 else np.float16)
            total = rows.astype(dtype) @ rounded.astype(dtype)
        else:
            total = self._group_products(rows, dtype)
        wide = np.broadcast_to(sx, (*q.shape[:-1], 1)).reshape(*rows.shape[:-1], 1)
        total = total * wide.astype(dtype)
        if base.bias is not None:
            total = total + base.bias.astype(dtype)[..., None, :]
        return ACTIVATIONS[base.activation](total.reshape(*q.shape[:-1], n)).astype(dtype)

    def _group_products(self, rows: np.ndarray, dtype: Any) -> np.ndarray:
        weight = self.base.weight
        k, n = weight.shape[-2:]
        codes = dequantize_float64(dataclasses.replace(weight, scales=np.ones_like(weight.scales)))
        groups = 1 if weight.group_size == -1 else k // weight.group_size
        scales = _group_scales(weight, groups).astype(dtype)
        total = np.zeros((*rows.shape[:-1], n), dtype)
        wide = dtype if self.codes == "float8_e4m3fn" else np.float64  # sums of integers are exact
        for g in range(groups):
            part = slice(g * (k // groups), (g + 1) * (k // groups))
            sums = rows[..., part].astype(wide) @ codes[..., part, :].astype(wide)
            total = total + sums.astype(dtype) * scales[..., g : g + 1, :]
        return total


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


def assert_solves(y: Any, problem: W4A8Problem, kernel: str = "") -> None:
    """Asserts that `y` solves `problem` within the tolerance of `jax_awq.testing`.

    Args:
      kernel: the variant that `plan` names, by which the reference rounds weights, and a product
        of float8 is allowed what tensor cores lose.
    """
    keeps_sums = kernel.startswith(("decode_", "w4a8_")) or kernel in _KEEPS_SUMS
    also: Any = 0
    if problem.codes == "float8_e4m3fn" and kernel.startswith("w4a8_"):
        also = problem.float8_error()
    reference = problem.reference(rounded_weight=not keeps_sums)
    assert_close(y, problem.float64(), reference, also)


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
