"""W4A8 matmul: 8-bit activations times an AWQ 4-bit weight."""

from typing import Any

from jax import Array

from jax_awq._checks import check_choice
from jax_awq.ops._w4a8 import matmul
from jax_awq.ops._w4a8_rules import define


def awq_gemm_w4a8(
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
    activation_dtype: str = "int8",
    granularity: str = "token",
    scale: Any = None,
) -> Array:
    """Computes ``activation((xq @ ((q - z) * s)) * sx + bias)`` with 8-bit codes `xq` of `x`.

    The weight stays as AWQ made it. With `sx` the scale of a row, g a group of rows of K, this is
    ``sx * sum_g(s[g] * (sum_k(xq * q) - z[g] * sum_k(xq)))``. The sums of a group are exact
    integers, for groups below 2**20; as float32 they are multiplied by their scales and added in
    a fixed order. Bias and activation are float32, and the result is rounded once. A kernel that
    gets the codes as floats of 16 bits (`plan` says so) sums in float32: exact below 2**24, which
    only a single group of more than 8800 rows can exceed.

    Where `plan` names a kernel that `awq_gemm` has for more than 16 rows (for groups of 32 and 64,
    or on a GPU other than Hopper), the product is that of the codes with the weight rounded to
    16 bits; that is for results of 16 bits alone.

    Codes and scales of a float `x` are those of `quantize_activation`, with its treatment of zeros,
    NaN and infinity. With "float8_e4m3fn" a code is ``x / sx`` rounded to that type, `sx` the
    largest magnitude over 448, and the sums of a group are float32, of which the tensor cores of
    Hopper keep about 14 bits.

    Differentiable in `scales` and `bias`, and in the scale of a `QuantizedActivation`. The
    derivative in a float `x` is straight-through: that of `awq_gemm`, as if `x` were not rounded
    (nor clipped); none goes through a scale of it.

    Args:
      x: ``(..., K)`` float16, bfloat16 or float32, activations; or a `QuantizedActivation` of
        8 bits with a scale for each token or a single one.
      qweight, scales, qzeros, group_size, layout: an AWQ weight as for `awq_gemm`: arrays, or an
        `AWQWeight` or `PermutedWeight` in place of all of them, stacked or not.
      bias: ``(N,)`` float16, bfloat16 or float32.
      activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
      out_dtype: float16, bfloat16 or float32; default that of a float `x`, else float32.
      activation_dtype: "int8" or "float8_e4m3fn", what `x` is rounded to.
      granularity: of the scales of a float `x`: "token", one for every row, or "tensor", a single
        one.
      scale: float ``()``, activation units per code step, for "tensor", such as from
        ``calibrate_activation(..., granularity="tensor")``; None computes the scales.

    Returns:
      ``(..., N)``.

    Raises:
      ValueError: a shape or a value disagrees with the table above.
      TypeError: a dtype disagrees with it.
    """
    check_choice("awq_gemm_w4a8", "activation_dtype", activation_dtype, ("int8", "float8_e4m3fn"))
    return matmul(
        awq_gemm_w4a8_p,
        x,
        qweight,
        scales,
        qzeros,
        bias,
        scale,
        codes=activation_dtype,
        granularity=granularity,
        group_size=group_size,
        layout=layout,
        activation=activation,
        out_dtype=out_dtype,
    )


awq_gemm_w4a8_p = define("awq_gemm_w4a8")
