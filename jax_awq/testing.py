"""Problems, a float64 oracle that shares no code with the package, and the tolerance of tests.

| what is compared                | allowed                                                        |
|---------------------------------|----------------------------------------------------------------|
| integers, packed words          | nothing                                                        |
| dequantized weights             | nothing, in every dtype                                        |
| floats, against a float64 result| 2 x the largest error of the same-dtype reference              |
|                                 | + one ulp, in the output dtype, of the largest value of the row|
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_awq import _ffi
from jax_awq.ops.awq_gemm import awq_gemm
from jax_awq.weights import AWQWeight, convert

REFERENCE_ERRORS = 2
OUTPUT_ULPS = 1

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of nibbles 0 to 7 in an AutoAWQ word
ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "gelu": lambda y: y * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(y / math.sqrt(2))),
    "gelu_tanh": lambda y: y * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of `awq_gemm`: its operands as numpy arrays, and its options."""

    x: np.ndarray
    weight: AWQWeight
    bias: np.ndarray | None
    activation: str | None
    out_dtype: Any

    def run(self, **options: Any) -> jax.Array:
        return awq_gemm(
            self.x,
            self.weight,
            bias=self.bias,
            activation=self.activation,
            out_dtype=self.out_dtype,
            **options,
        )

    def reference(self) -> jax.Array:
        """The result of plain JAX in the same dtypes, always on the CPU."""
        with jax.default_device(jax.devices("cpu")[0]):
            return self.run()

    def float64(self) -> np.ndarray:
        x, weight = self.x.astype(np.float64), dequantize_float64(self.weight)
        *batch, k, n = weight.shape
        y = x.reshape(*batch, math.prod(x.shape[len(batch) : -1]), k) @ weight
        if self.bias is not None:
            y = y + self.bias.astype(np.float64)[..., None, :]
        y = y.reshape(*x.shape[:-1], n)
        return ACTIVATIONS[self.activation](y)


def random_problem(
    rng: np.random.Generator,
    m: int | tuple[int, ...],
    k: int,
    n: int,
    *,
    group_size: int,
    dtype: Any = np.float16,
    scales_dtype: Any = None,
    layout: str = "gemm",
    symmetric: bool = False,
    bias: bool = False,
    activation: str | None = None,
    out_dtype: Any = None,
    batch: tuple[int, ...] = (),
) -> Problem:
    """A problem with every edge case of the codes in it.

    Args:
      m: rows of `x`, or its free dimensions.
      batch: () or (E,), leading dimension of `x` and of every weight array.
      dtype: of `x`, and of the bias; `scales_dtype` is the same by default.
    """
    rows = (m,) if isinstance(m, int) else m
    weight = random_weight(
        rng,
        k,
        n,
        group_size=group_size,
        dtype=scales_dtype or dtype,
        layout=layout,
        symmetric=symmetric,
        batch=batch,
    )
    return Problem(
        x=_normal(rng, (*batch, *rows, k), dtype),
        weight=weight,
        bias=_normal(rng, (*batch, n), dtype) if bias else None,
        activation=activation,
        out_dtype=out_dtype,
    )


def random_weight(
    rng: np.random.Generator,
    k: int,
    n: int,
    *,
    group_size: int,
    dtype: Any = np.float16,
    layout: str = "gemm",
    symmetric: bool = False,
    batch: tuple[int, ...] = (),
) -> AWQWeight:
    """Random words; subnormal float16 scales, and zeros of 0 and of 15, are in the first word."""
    groups = 1 if group_size == -1 else k // group_size
    scales = rng.uniform(0.5, 1.5, (*batch, groups, n)) / 64
    # AutoAWQ writes 1e-5 / 15 for a group of zeros; 2**-24 is the least positive float16.
    scales[..., 0, :3] = 1e-5 / 15, 2.0**-24, 0
    qzeros = _words(rng, (*batch, groups, n // 8))
    qzeros[..., 0, 0] = 0x0F0F0F0F
    return convert(
        AWQWeight(
            _words(rng, (*batch, k, n // 8)),
            scales.astype(dtype),
            None if symmetric else qzeros,
            group_size=group_size,
        ),
        layout,
    )


def dequantize_float64(weight: AWQWeight) -> np.ndarray:
    """``(q - z) * s`` in float64, decoded nibble by nibble from the definitions of the layouts."""
    qweight = np.asarray(weight.qweight)
    scales: Any = np.asarray(weight.scales).astype(np.float64)
    qzeros = None if weight.qzeros is None else np.asarray(weight.qzeros)
    *batch, k, n = weight.shape
    group_size = k if weight.group_size == -1 else weight.group_size
    groups = k // group_size

    codes = np.empty((*batch, k, n))
    for nibble in range(8):
        values = (qweight >> (4 * nibble)) & 15
        if weight.layout == "gemm":
            codes[..., _AWQ_COLUMNS[nibble] :: 8] = values
        else:
            codes[..., nibble::8, :] = np.swapaxes(values, -1, -2)

    if weight.layout == "gemv":
        scales = np.swapaxes(scales, -1, -2)[..., :groups, :]
    zeros = np.full((*batch, groups, n), 8.0)
    if qzeros is not None and weight.layout == "gemv":
        for group in range(groups):
            zeros[..., group, :] = (qzeros[..., group // 8] >> (4 * (group % 8))) & 15
    elif qzeros is not None:
        columns = _AWQ_COLUMNS if weight.layout == "gemm" else range(8)
        for nibble, column in enumerate(columns):
            zeros[..., column::8] = (qzeros >> (4 * nibble)) & 15
    return (codes - np.repeat(zeros, group_size, -2)) * np.repeat(scales, group_size, -2)


def quantize_activation_numpy(
    x: Any, *, bits: int = 8, scale: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (..., K) and scales of activations, from the definitions in the docstrings.

    Args:
      scale: float32, with an axis for K, or of a single value; None for one a row.
    """
    x = np.asarray(x).astype(np.float32)
    largest, one = {8: 127, 4: 7}[bits], np.float32(1)
    with np.errstate(all="ignore"):
        if scale is None:
            absmax = np.abs(x).max(axis=-1, initial=0, keepdims=True)
            scale = absmax * (one / np.float32(largest))
            scale[scale < 2.0**-100] = 0
        wide = np.asarray(scale, np.float32)
        inverse = np.where((wide >= 2.0**-100) & (wide <= 2.0**125), one / wide, 0)
        steps = np.nan_to_num(x * inverse.astype(np.float32), nan=0, posinf=999, neginf=-999)
    codes = np.rint(np.clip(steps, -largest, largest)).astype(np.int8)
    return codes, wide


def unpack_bytes(q: Any, bits: int, k: int) -> np.ndarray:
    """Codes (..., K) of 8 bits, or of 4 packed two a byte, byte by byte."""
    q = np.asarray(q)
    if bits == 8:
        return q
    codes = np.empty((*q.shape[:-1], k), np.int8)
    for i in range(k):
        nibble = (q[..., i // 2].view(np.uint8) >> (i % 2 * 4)) & 15
        codes[..., i] = (nibble.astype(np.int16) ^ 8) - 8
    return codes


def planned(m: int, k: int, n: int, **changes: Any) -> dict[str, Any]:
    """The plan of `awq_gemm` on an H100 or H200: float16, groups of 128, but for `changes`."""
    arguments: dict[str, Any] = {
        "m": m, "n": n, "k": k, "batch": 1, "group_size": 128, "layout": "gemm",
        "x_dtype": "float16", "scales_dtype": "float16", "out_dtype": "float16",
        "has_zeros": True, "has_activation": False, "transpose": False, "split_k": 0,
        "variant": "", "arch": 90, "sm_count": 132,
    }  # fmt: skip
    return _ffi.plan_awq_gemm(**arguments | changes)


def assert_close_to_float64(y: Any, problem: Problem) -> None:
    """Asserts that `y`, from any device, solves `problem` within the tolerance of this module."""
    assert_close(y, problem.float64(), problem.reference())


def assert_close(actual: Any, exact: np.ndarray, reference: Any, also: Any = 0) -> None:
    """Asserts the tolerance of this module.

    Args:
      actual: the array under test.
      exact: the same in float64.
      reference: the same computed by plain JAX in the dtypes of `actual`.
      also: an error of each value that is allowed besides.
    """
    assert actual.shape == exact.shape == reference.shape, (
        f"shapes {actual.shape}, {exact.shape}, {reference.shape}"
    )
    assert actual.dtype == reference.dtype, f"dtypes {actual.dtype}, {reference.dtype}"
    if exact.size == 0:
        return
    actual64, reference64 = (np.asarray(a).astype(np.float64) for a in (actual, reference))
    row = np.max(np.abs(exact), axis=-1, keepdims=True) if exact.ndim else np.abs(exact)
    allowed = REFERENCE_ERRORS * np.max(np.abs(reference64 - exact)) + OUTPUT_ULPS * _ulp(
        row, actual.dtype
    )
    allowed = allowed + also
    error = np.abs(actual64 - exact)
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    bad = ~(error <= allowed)  # a NaN is bad
    assert not bad.any(), (
        f"{bad.sum()} of {bad.size} values are off; at {tuple(map(int, worst))} got "
        f"{actual64[worst]}, float64 gives {exact[worst]}, allowed error "
        f"{np.broadcast_to(allowed, error.shape)[worst]}"
    )


def _ulp(value: np.ndarray, dtype: Any) -> np.ndarray:
    info = jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(value, float(info.tiny))))
    return 2.0 ** (exponent - info.nmant)


def _normal(rng, shape, dtype):
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def _words(rng, shape):
    return rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)
