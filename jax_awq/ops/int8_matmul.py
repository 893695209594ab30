"""W8A8 matmul: int8 activations times an int8 weight, with int32 sums."""

import functools
from typing import Any

import jax
from jax import Array

from jax_awq._checks import check_static
from jax_awq.ops import _int8_matmul as shared
from jax_awq.ops._weight import forced_variant


def int8_matmul(
    a: Any,
    b: Any,
    scale_a: Any = None,
    scale_b: Any = None,
    *,
    scale_c: Any = None,
    bias: Any = None,
    activation: str | None = None,
    out_dtype: Any = None,
) -> Array:
    """Computes ``act((a * scale_a) @ (b * scale_b) * scale_c + bias)``, or ``a @ b`` in int32.

    Sums are int32 whatever the result is: exact for K up to 131071, and wrapping beyond. Scales,
    bias and activation are float32, and the result is rounded once. Differentiable in the scales
    and `bias`.

    Args:
      a: ``(..., K)`` int8.
      b: ``(K, N)`` int8.
      scale_a: float32, value of one step of `a`: a scalar, or ``a.shape[:-1]`` with one for each
        row, to which a last dimension of 1 may be added.
      scale_b: float32, value of one step of `b`: a scalar, ``(N,)`` or ``(1, N)``.
      scale_c: float32 scalar.
      bias: ``(N,)`` float16, bfloat16 or float32.
      activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
      out_dtype: int32 for the sums, where there is no scale, bias or activation, or float16,
        bfloat16 or float32. Default int32, with any of them float32.

      `b` may have one leading batch dimension E (stacked layers, experts); `a` is then
      ``(E, ..., K)``, and `scale_b` and `bias` may have it, too.

    Returns:
      ``(..., N)``.

    Raises:
      ValueError: a shape or a value disagrees with the table above.
      TypeError: a dtype disagrees with it.
    """
    check_static("int8_matmul", activation=activation, out_dtype=out_dtype)
    return _int8_matmul(
        a,
        b,
        scale_a,
        scale_b,
        scale_c,
        bias,
        activation=activation,
        out_dtype=out_dtype,
        variant=forced_variant(),
    )


@functools.partial(jax.jit, inline=True, static_argnames=("activation", "out_dtype", "variant"))
def _int8_matmul(a, b, *rest, activation, out_dtype, variant):
    shared.check_operands("int8_matmul", a, b, ("a", "b"), "int8")
    return shared.matmul(
        int8_matmul_p,
        a,
        b,
        *rest,
        activation=activation,
        out_dtype=out_dtype,
        odd=False,
        packed=False,
        variant=variant,
    )


int8_matmul_p = shared.define("int8_matmul")
