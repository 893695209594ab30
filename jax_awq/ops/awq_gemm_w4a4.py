"""W4A4 matmul: 4-bit activations times an AWQ 4-bit weight."""

from typing import Any

from jax import Array

from jax_awq.ops._w4a8 import matmul
from jax_awq.ops._w4a8_rules import define


def awq_gemm_w4a4(
    x: Any,
    qweight: Any,
    scales: Any = None,
    qzeros: Any = None,
    *,
    group_size: int | None = None,
    layout: str = "gemm",
    bias: Any = None,
    activation: str | None = None,
    out_dtype: Any = None,
    granularity: str = "token",
    scale: Any = None,
) -> Array:
    """Computes `awq_gemm_w4a8` with 4-bit codes of `x`, -7 to 7: the same sums of fewer values.

    The products are those of int8, to which the codes are widened.

    Differentiable as `awq_gemm_w4a8`, straight-through in a float `x`.

    Args:
      x: ``(..., K)`` float16, bfloat16 or float32, activations; or a `QuantizedActivation` of
        4 bits with a scale for each token or a single one.
      qweight, scales, qzeros, group_size, layout: an AWQ weight as for `awq_gemm`: arrays, or an
        `AWQWeight` or `PermutedWeight` in place of all of them, stacked or not.
      bias: ``(N,)`` float16, bfloat16 or float32.
      activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
      out_dtype: float16, bfloat16 or float32; default that of a float `x`, else float32.
      granularity: of the scales of a float `x`: "token", one for every row, or "tensor", a single
        one.
      scale: float ``()``, activation units per code step, for "tensor", such as from
        ``calibrate_activation(..., granularity="tensor", bits=4)``; None computes the scales.

    Returns:
      ``(..., N)``.

    Raises:
      ValueError: a shape or a value disagrees with the table above.
      TypeError: a dtype disagrees with it.
    """
    return matmul(
        awq_gemm_w4a4_p,
        x,
        qweight,
        scales,
        qzeros,
        bias,
        scale,
        codes="int4",
        granularity=granularity,
        group_size=group_size,
        layout=layout,
        activation=activation,
        out_dtype=out_dtype,
    )


awq_gemm_w4a4_p = define("awq_gemm_w4a4")
