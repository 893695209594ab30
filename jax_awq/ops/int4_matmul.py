"""W4A4 matmul: signed int4 activations times a signed int4 weight, both two to a byte."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq._checks import check_static, read_integer
from jax_awq.ops import _int8_matmul as shared
from jax_awq.ops._weight import forced_variant


def int4_matmul(
    a_packed: Any,
    b_packed: Any,
    scale_a: Any = None,
    scale_b: Any = None,
    *,
    k: int | None = None,
    scale_c: Any = None,
    bias: Any = None,
    activation: str | None = None,
    out_dtype: Any = None,
) -> Array:
    """Computes what `int8_matmul` does, of codes -8 to 7 that are packed two to a byte along K.

    Sums are int32 whatever the result is: exact for K up to 131071. Differentiable in the scales
    and `bias`. No GPU of compute capability 9.0 or later multiplies int4: kernels widen it.

    Args:
      a_packed: ``(..., ceil(K/2))`` int8 or uint8; the low half of a byte has the even index of K.
      b_packed: ``(ceil(K/2), N)`` int8 or uint8, packed likewise.
      scale_a: float32, value of one step of `a`: a scalar, or ``a_packed.shape[:-1]`` with one
        for each row, to which a last dimension of 1 may be added.
      scale_b: float32, value of one step of `b`: a scalar, ``(N,)`` or ``(1, N)``.
      k: K; default twice the bytes. Where it is odd, the high half of the last byte of a row of
        `a_packed` and of the last row of `b_packed` counts as zero, whatever it holds.
      scale_c: float32 scalar.
      bias: ``(N,)`` float16, bfloat16 or float32.
      activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
      out_dtype: int32 for the sums, where there is no scale, bias or activation, or float16,
        bfloat16 or float32. Default int32, with any of them float32.

      `b_packed` may have one leading batch dimension E (stacked layers, experts); `a_packed` is
      then ``(E, ..., ceil(K/2))``, and `scale_b` and `bias` may have it, too.

    Returns:
      ``(..., N)``.

    Raises:
      ValueError: a shape or a value disagrees with the table above.
      TypeError: a dtype disagrees with it.
    """
    check_static("int4_matmul", k=k, activation=activation, out_dtype=out_dtype)
    return _int4_matmul(
        a_packed,
        b_packed,
        scale_a,
        scale_b,
        scale_c,
        bias,
        k=k,
        activation=activation,
        out_dtype=out_dtype,
        variant=forced_variant(),
    )


@functools.partial(
    jax.jit, inline=True, static_argnames=("k", "activation", "out_dtype", "variant")
)
def _int4_matmul(a, b, *rest, k, activation, out_dtype, variant):
    shared.check_operands("int4_matmul", a, b, ("a_packed", "b_packed"), "int8", "uint8")
    size = b.shape[-2]
    if k is not None:
        k = read_integer("int4_matmul", "k", k)
    k = 2 * size if k is None else k
    if (k + 1) // 2 != size:
        raise ValueError(f"int4_matmul: k must be {2 * size - 1} or {2 * size}, got {k}")
    return shared.matmul(
        int4_matmul_p,
        *(lax.bitcast_convert_type(o, jnp.int8) for o in (a, b)),
        *rest,
        activation=activation,
        out_dtype=out_dtype,
        odd=k % 2 == 1,
        packed=True,
        variant=variant,
    )


int4_matmul_p = shared.define("int4_matmul")
