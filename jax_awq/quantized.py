"""int8 and int4 weights of one scale a column, and the linear that multiplies with their codes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

import jax_awq
from jax_awq._checks import (
    FLOATS,
    check_array,
    check_choice,
    check_dtype,
    check_shape,
    read_integer,
    read_out_dtype,
)
from jax_awq._pytree import pytree
from jax_awq.ops._activation import (
    QuantizedActivation,
    absmax_of,
    codes_of,
    pack_codes,
    packed_size,
    scale_of,
    unpack_codes,
)
from jax_awq.ops._epilogue import ACTIVATIONS
from jax_awq.ops.quantize_activation import quantize_activation


@dataclasses.dataclass(frozen=True, eq=False)
class _Weight:
    """Fields and methods that both widths share; `_bits` and `_k` tell them apart."""

    q: Any
    scale: Any

    _bits = 8

    @property
    def _k(self) -> int:
        return self.q.shape[-2]

    def __post_init__(self):
        op = type(self).__name__
        check_dtype(op, "q", self.q, "int8")
        check_dtype(op, "scale", self.scale, "float32")
        if len(self.q.shape) < 2:
            raise ValueError(f"{op}: q must have shape (..., K, N), got {tuple(self.q.shape)}")
        *batch, _, n = self.q.shape
        check_shape(op, "q", self.q, (*batch, packed_size(self._k, self._bits), n))
        check_shape(op, "scale", self.scale, (*batch, n))

    @classmethod
    def _rounded(cls, w: Any) -> tuple[Array, Array]:
        check_dtype(f"{cls.__name__}.from_float", "w", w, *FLOATS)
        if w.ndim < 2:
            raise ValueError(
                f"{cls.__name__}.from_float: w must have shape (..., K, N), got {w.shape}"
            )
        scale = scale_of(absmax_of(jnp.asarray(w), axis=-2), cls._bits)
        codes = codes_of(w, scale[..., None, :], cls._bits)
        return pack_codes(codes, cls._bits, axis=-2), scale

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N), after the batch dimensions of `q`."""
        return (*self.q.shape[:-2], self._k, self.q.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.q.shape)

    @property
    def dtype(self):
        """Dtype of the scale."""
        return self.scale.dtype

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The (K, N) weight: ``q * scale`` in float32, converted to `dtype`."""
        dtype = read_out_dtype(f"{type(self).__name__}.dequantize", dtype, *FLOATS, name="dtype")
        codes = unpack_codes(self.q, self._bits, self._k, axis=-2)
        return (codes.astype(jnp.float32) * self.scale[..., None, :]).astype(dtype)


@pytree()
@dataclasses.dataclass(frozen=True, eq=False)
class Int8Weight(_Weight):
    """A (K, N) weight in int8 codes -127 to 127 with a scale for each column, ``q * scale``.

    A pytree; stacked weights (layers, experts) have leading dimensions in both arrays.

    Attributes:
      q: int8 ``(K, N)``.
      scale: float32 ``(N,)``, weight units per code step.

    Raises:
      ValueError: the shapes disagree.
      TypeError: a dtype is not the one above.
    """

    @classmethod
    def from_float(cls, w: Any) -> "Int8Weight":
        """Rounds ``(K, N)`` float to nearest; scales and codes as in `quantize_activation`."""
        return cls(*cls._rounded(w))


@pytree("k")
@dataclasses.dataclass(frozen=True, eq=False)
class Int4Weight(_Weight):
    """A (K, N) weight in int4 codes -7 to 7 with a scale for each column, ``q * scale``.

    A pytree; stacked weights (layers, experts) have leading dimensions in both arrays.

    Attributes:
      q: int8 ``(ceil(K/2), N)``, two codes a byte, the even row in the low nibble; the last high
        nibbles of an odd K are 0.
      scale: float32 ``(N,)``, weight units per code step.
      k: K; by default what `q` holds.

    Raises:
      ValueError: the shapes disagree.
      TypeError: a dtype is not the one above.
    """

    k: int = None  # type: ignore[assignment]

    _bits = 4

    def __post_init__(self):
        if self.k is not None and read_integer("Int4Weight", "k", self.k) < 0:
            raise ValueError(f"Int4Weight: k must be 0 or more, got {self.k}")
        super().__post_init__()
        object.__setattr__(self, "k", self._k)

    @property
    def _k(self) -> int:
        return 2 * self.q.shape[-2] if self.k is None else self.k

    @classmethod
    def from_float(cls, w: Any) -> "Int4Weight":
        """Rounds ``(K, N)`` float to nearest; scales and codes as in `quantize_activation`."""
        return cls(*cls._rounded(w), k=w.shape[-2])


@pytree("activation")
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """``activation(x @ weight + bias)`` on integer tensor cores: W8A8, or W4A4.

    The inputs are rounded to the width of the weight, with a scale a row that is computed, or with
    the one that is given. For inference: no derivative goes through the codes.

    Attributes:
      weight: `Int8Weight` or `Int4Weight`, (K, N).
      bias: ``(N,)`` float, or None.
      input_scale: float32 ``()``, from ``calibrate_activation(..., granularity="tensor")``; None
        computes one for every row. (A scale for each of K cannot leave the sum over K: it would
        have to be multiplied into the weight before that is rounded.)
      activation: None, "relu", "gelu", "gelu_tanh" or "silu".

    Raises:
      ValueError: a shape disagrees, or `activation` is none of these.
      TypeError: `weight` is neither of the two, or a dtype is not float.
    """

    weight: Int8Weight | Int4Weight
    bias: Any = None
    input_scale: Any = None
    activation: str | None = None

    def __post_init__(self):
        op = "QuantizedLinear"
        if not isinstance(self.weight, Int8Weight | Int4Weight):
            raise TypeError(
                f"{op}: weight must be an Int8Weight or an Int4Weight, "
                f"got {type(self.weight).__name__}"
            )
        check_choice(
            op, "activation", self.activation, (None, *sorted(set(ACTIVATIONS) - {"none"}))
        )
        batch = self.weight.shape[:-2]
        if self.bias is not None:
            check_dtype(op, "bias", self.bias, *FLOATS)
            check_shape(op, "bias", self.bias, (*batch, self.weight.shape[-1]))
        if self.input_scale is not None:
            check_dtype(op, "input_scale", self.input_scale, "float32")
            check_shape(op, "input_scale", self.input_scale, batch)

    @classmethod
    def from_float(
        cls, w: Any, bias: Any = None, *, bits: int = 8, **options: Any
    ) -> "QuantizedLinear":
        """Of a ``(K, N)`` float weight, rounded to `bits`, 8 or 4."""
        check_choice("QuantizedLinear.from_float", "bits", bits, (8, 4))
        return cls((Int8Weight if bits == 8 else Int4Weight).from_float(w), bias, **options)

    def quantize_input(self, x: Any) -> QuantizedActivation:
        return quantize_activation(
            x,
            bits=self.weight._bits,
            granularity="token" if self.input_scale is None else "tensor",
            scale=self.input_scale,
        )

    def __call__(self, x: Any, *, out_dtype: Any = None) -> Array:
        """``(..., K)`` to ``(..., N)``, by default in the dtype of `x`."""
        if self.weight.ndim != 2:
            raise ValueError(
                "QuantizedLinear: weight must have 2 dimensions to be called, got shape "
                f"{self.weight.shape}: vmap or scan over stacked ones"
            )
        k, _ = self.weight.shape
        check_array("QuantizedLinear", "x", x)
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-1] != k:
            raise ValueError(f"QuantizedLinear: x must have shape (..., {k}), got {x.shape}")
        qa = self.quantize_input(x)
        packed = isinstance(self.weight, Int4Weight)
        matmul: Any = getattr(jax_awq, "int4_matmul" if packed else "int8_matmul")
        return matmul(
            qa.q,
            self.weight.q,
            qa.scale,
            self.weight.scale,
            bias=self.bias,
            activation=self.activation,
            **({"k": k} if packed else {}),
            out_dtype=x.dtype if out_dtype is None else out_dtype,
        )
