"""Problems of `int8_matmul` and `int4_matmul`, and an oracle that shares no code with them."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jax_awq.ops.int4_matmul import int4_matmul
from jax_awq.ops.int8_matmul import int8_matmul
from jax_awq.testing import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class IntProblem:
    """One call of `int8_matmul` or `int4_matmul` (bits 4): numpy operands, and options."""

    bits: int
    k: int
    a: np.ndarray
    b: np.ndarray
    scale_a: np.ndarray | None
    scale_b: np.ndarray | None
    scale_c: np.ndarray | None
    bias: np.ndarray | None
    activation: str | None
    out_dtype: Any

    def run(self) -> jax.Array:
        operands = self.a, self.b, self.scale_a, self.scale_b
        options = {
            "scale_c": self.scale_c,
            "bias": self.bias,
            "activation": self.activation,
            "out_dtype": self.out_dtype,
        }
        if self.bits == 4:
            return int4_matmul(*operands, k=self.k, **options)
        return int8_matmul(*operands, **options)

    def reference(self) -> jax.Array:
        """The result of plain JAX, always on the CPU."""
        with jax.default_device(jax.devices("cpu")[0]):
            return self.run()

    def sums(self) -> np.ndarray:
        """``a @ b`` in int64."""
        a, b = (
            o if self.bits == 8 else unpack_half_bytes(o, axis, self.k)
            for o, axis in ((self.a, -1), (self.b, -2))
        )
        batch = b.shape[:-2]
        rows = a.reshape(*batch, math.prod(a.shape[len(batch) : -1]), self.k)
        # Exact: products are below 2**14, and float64 multiplies fast where numpy's int64 does not.
        sums = rows.astype(np.float64) @ b.astype(np.float64)
        return sums.astype(np.int64).reshape(*a.shape[:-1], b.shape[-1])

    def float64(self) -> np.ndarray:
        y = self.sums().astype(np.float64)
        batched = self.b.ndim == 3

        def of_columns(v):
            v = v.astype(np.float64)
            return v.reshape(v.shape[0], *[1] * (y.ndim - 2), -1) if batched and v.ndim == 2 else v

        if self.scale_a is not None:
            y = y * (self.scale_a[..., None] if self.scale_a.ndim else self.scale_a).astype(float)
        for v in (self.scale_b, self.scale_c):
            y = y if v is None else y * of_columns(v)
        y = y if self.bias is None else y + of_columns(self.bias)
        return ACTIVATIONS[self.activation](y)


def random_int_problem(
    rng: np.random.Generator,
    m: int | tuple[int, ...],
    k: int,
    n: int,
    *,
    bits: int,
    scales: str = "each",
    bias: Any = None,
    activation: str | None = None,
    out_dtype: Any = np.int32,
    batch: tuple[int, ...] = (),
) -> IntProblem:
    """Codes over their whole range; int4 with junk in the half that odd K leaves over.

    Args:
      m: rows of `a`, or its free dimensions.
      scales: "each" row and column, or "scalar" with a third one; none where the result is int32.
      bias: its dtype, or None.
    """
    rows = (m,) if isinstance(m, int) else m
    size = k if bits == 8 else (k + 1) // 2
    a = rng.integers(-128, 128, (*batch, *rows, size), dtype=np.int8)
    b = rng.integers(-128, 128, (*batch, size, n), dtype=np.int8)
    scaled, each = out_dtype != np.int32, scales == "each"

    def scale(*shape):
        return rng.uniform(0.5, 1.5, shape if each else ()).astype(np.float32) / 2**bits

    return IntProblem(
        bits=bits,
        k=k,
        a=a,
        b=b,
        scale_a=scale(*batch, *rows) if scaled else None,
        scale_b=scale(*batch, n) if scaled else None,
        scale_c=np.asarray(0.75, np.float32) if scaled and not each else None,
        bias=None
        if bias is None
        else rng.standard_normal((*batch, n)).astype(np.float32).astype(bias),
        activation=activation,
        out_dtype=out_dtype,
    )


def unpack_half_bytes(packed: np.ndarray, axis: int, k: int) -> np.ndarray:
    """The `k` signed codes of `axis`, the low half of a byte first."""
    packed = np.moveaxis(packed, axis, -1).astype(np.int64)
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int64)
    codes[..., ::2], codes[..., 1::2] = packed & 15, (packed >> 4) & 15
    return np.moveaxis(np.where(codes > 7, codes - 16, codes)[..., :k], -1, axis)
