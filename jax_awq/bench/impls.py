"""What is compared: our ops, and what a JAX user would write without them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_awq
from jax_awq import _ffi
from jax_awq.ops._int8_matmul_call import unpack


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark: a (K, N) weight, and x (M, K) or M = 0 where there is none.

    group_size is that of the weight, -1 for a single group.
    """

    m: int
    k: int
    n: int
    group_size: int
    dtype: str

    @property
    def groups(self) -> int:
        return 1 if self.group_size == -1 else self.k // self.group_size

    @property
    def dense_bytes(self) -> int:
        return self.k * self.n * jnp.dtype(self.dtype).itemsize

    @property
    def packed_bytes(self) -> int:
        """Of qweight, scales and qzeros."""
        return self.k * self.n // 2 + self.groups * self.n * 2 + self.groups * self.n // 2

    @property
    def activation_bytes(self) -> int:
        """Of x and y."""
        return self.m * (self.k + self.n) * jnp.dtype(self.dtype).itemsize


def make_x(key: Array, case: Case) -> Array:
    return jax.random.normal(key, (max(case.m, 1), case.k), case.dtype)


def make_dy(key: Array, case: Case) -> Array:
    return jax.random.normal(key, (case.m, case.n), case.dtype)


def _one_row(key: Array, case: Case) -> Array:
    return make_x(key, dataclasses.replace(case, m=1))


@dataclasses.dataclass(frozen=True)
class Impl:
    """A way to compute an op.

    Attributes:
      run: from x and the arrays of a weight to the result.
      make_weight: from a random key and a case to these arrays, on the device.
      weight_bytes: of these arrays.
      moved_bytes: of weight, x and result together: what has to be moved at least.
      launches: ways to launch it, chosen by the keyword `launch` of `run`, of which the fastest
        counts; 1 where there is no choice and no keyword.
      takes_x: whether there is a row for every M, or one with M = 0.
      of_rows: whether the "weight" is what has M rows, and x is only there to be waited for.
      make_x: from a random key and a case to x, on the device.
      on_request: timed only where it is named.
      kernel: runs nowhere but where our kernels do.
    """

    run: Callable[..., Any]
    make_weight: Callable[[Array, Case], tuple[Array, ...]]
    weight_bytes: Callable[[Case], int]
    moved_bytes: Callable[[Case], int]
    launches: int = 1
    takes_x: bool = True
    of_rows: bool = False
    make_x: Callable[[Array, Case], Any] = make_x
    on_request: bool = False
    kernel: bool = False


def _packed(key: Array, case: Case) -> tuple[Array, ...]:
    keys = jax.random.split(key, 3)
    groups = case.groups
    return (
        _words(keys[0], (case.k, case.n // 8)),
        jax.random.uniform(keys[1], (groups, case.n), jnp.float32, 0.002, 0.01).astype(
            jnp.bfloat16 if case.dtype == "bfloat16" else jnp.float16
        ),
        _words(keys[2], (groups, case.n // 8)),
    )


def _words(key: Array, shape: tuple[int, int]) -> Array:
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), jnp.int32)


def _dense(key: Array, case: Case) -> tuple[Array, ...]:
    return (0.02 * jax.random.normal(key, (case.k, case.n), case.dtype),)


def _copied(key: Array, case: Case) -> tuple[Array, ...]:
    """An array whose copy, half read and half written, moves as many bytes as dequantizing does."""
    rows = _unpacked(case) // 2 // jnp.dtype(case.dtype).itemsize // case.n
    return (jax.random.normal(key, (rows, case.n), case.dtype),)


_SHIFTS = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of the nibble that holds column 8 j + t


def xla_dequantize(dtype: Any, qweight: Array, scales: Array, qzeros: Array) -> Array:
    """The weight in plain jnp: shift, mask, subtract the zero, scale."""

    def unpack(words: Array) -> Array:
        codes = (words[..., None] >> _SHIFTS.astype(np.int32)) & 0xF
        return codes.reshape(words.shape[0], -1).astype(dtype)

    group_size = qweight.shape[0] // scales.shape[0]
    zeros, factors = (
        jnp.repeat(a, group_size, axis=0) for a in (unpack(qzeros), scales.astype(dtype))
    )
    return (unpack(qweight) - zeros) * factors


def xla_unpack(x: Array, *weight: Array) -> Array:
    return jnp.dot(x, xla_dequantize(x.dtype, *weight))


def gradient(dy: Array, *weight: Array) -> Array:
    """The gradient of x that belongs to one of the result."""
    k = weight[0].shape[0]
    x = jax.ShapeDtypeStruct((dy.shape[0], k), dy.dtype)
    return jax.linear_transpose(lambda x: jax_awq.awq_gemm(x, *weight), x)(dy)[0]


LAUNCHES = 7  # of `read` and `copy`: kMemoryShapes of src/kernels/memory.h


def read(x: Array, *weight: Array, launch: int) -> Array:
    """Streams the arrays of a weight through the device, for a benchmark only."""
    words = jax.ShapeDtypeStruct((1, 1), jnp.uint32)
    return _ffi.call("read", words, *weight, shape=launch)


def copy(x: Array, a: Array, *, launch: int) -> Array:
    """Streams an array through the device and back, for a benchmark only."""
    return _ffi.call("copy", jax.ShapeDtypeStruct(a.shape, a.dtype), a, shape=launch)


def kernels_run() -> bool:
    return jax.default_backend() == "gpu" and not _ffi.unavailable(on_device=True)


def _codes(key: Array, shape: tuple[int, int]) -> Array:
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)


def _integers(bits: int) -> dict[str, Impl]:
    """Of `int8_matmul` or `int4_matmul`, with scales for each row and column."""
    op = jax_awq.int8_matmul if bits == 8 else jax_awq.int4_matmul
    packed = 8 // bits

    def make_x(key: Array, case: Case) -> tuple[Array, Array, Any]:
        m = max(case.m, 1)
        scales = jax.random.uniform(key, (m,), jnp.float32, 0.002, 0.01)
        return _codes(key, (m, case.k // packed)), scales, jnp.zeros((), case.dtype)

    def make_weight(key: Array, case: Case) -> tuple[Array, ...]:
        codes = _codes(key, (case.k // packed, case.n))
        return codes, jax.random.uniform(key, (case.n,), jnp.float32, 0.002, 0.01)

    def ours(x: tuple[Array, Array, Array], codes: Array, scales: Array) -> Array:
        return op(x[0], codes, x[1], scales, out_dtype=x[2].dtype)

    def xla(x: tuple[Array, Array, Array], codes: Array, scales: Array) -> Array:
        """The sums alone."""
        a, b = (x[0], codes) if bits == 8 else (unpack(x[0], -1, False), unpack(codes, -2, False))
        return jax.lax.dot(a, b, preferred_element_type=jnp.int32)

    def weight_bytes(case: Case) -> int:
        return case.k // packed * case.n + 4 * case.n

    def moved(case: Case, result_bytes: int) -> int:
        return weight_bytes(case) + case.m * (case.k // packed + 4 + case.n * result_bytes)

    return {
        "jax_awq": Impl(ours, make_weight, weight_bytes, lambda c: moved(c, 2), make_x=make_x),
        "xla_int8": Impl(xla, make_weight, weight_bytes, lambda c: moved(c, 4), make_x=make_x),
        "xla_dense": _DENSE,
    }


def _packed_gemm(case: Case) -> int:
    return case.packed_bytes + case.activation_bytes


def _unpacked(case: Case) -> int:
    return case.packed_bytes + case.dense_bytes


def _activations(key: Array, case: Case) -> tuple[Array, ...]:
    return (jax.random.normal(key, (case.m, case.k), case.dtype),)


def _quantized(case: Case) -> int:
    """Bytes of x (M, K), of a code for each and of a scale for every row."""
    return case.m * (case.k * (jnp.dtype(case.dtype).itemsize + 1) + 4)


def _copied_activations(key: Array, case: Case) -> tuple[Array, ...]:
    """An array whose copy, half read and half written, moves as many bytes as quantizing does."""
    rows = _quantized(case) // 2 // jnp.dtype(case.dtype).itemsize // case.k
    return (jax.random.normal(key, (rows, case.k), case.dtype),)


def xla_quantize(x: Array) -> tuple[Array, Array]:
    """int8 codes and a scale for every row in plain jnp."""
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127
    return jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int8), scale


def _quantize_impl(run: Callable[..., Any], moved: Callable[[Case], int] = _quantized) -> Impl:
    def x_bytes(case: Case) -> int:
        return case.m * case.k * jnp.dtype(case.dtype).itemsize

    return Impl(lambda _, a: run(a), _activations, x_bytes, moved, of_rows=True, make_x=_one_row)


def _copies(
    make: Callable[[Array, Case], tuple[Array, ...]], moved: Callable[[Case], int], **of: Any
) -> dict[str, Impl]:
    """Of what `make` gives: elementwise by XLA, and by a kernel that does nothing else."""
    xla = Impl(lambda x, a: a + x[0, 0], make, lambda c: moved(c) // 2, moved, **of)
    ours = dataclasses.replace(xla, run=copy, launches=LAUNCHES, kernel=True)
    return {"copy": ours, "xla_copy": xla}


def _packed_impl(run: Callable[..., Any]) -> Impl:
    """A product with a packed weight."""
    return Impl(run, _packed, lambda c: c.packed_bytes, _packed_gemm)


_DENSE = Impl(
    jnp.dot, _dense, lambda c: c.dense_bytes, lambda c: c.dense_bytes + c.activation_bytes
)
_READ = Impl(
    read,
    _packed,
    lambda c: c.packed_bytes,
    lambda c: c.packed_bytes,
    launches=LAUNCHES,
    takes_x=False,
    kernel=True,
)

# By op, then by the name in a row.
IMPLS: dict[str, dict[str, Impl]] = {
    "awq_gemm": {
        "jax_awq": _packed_impl(jax_awq.awq_gemm),
        "xla_dense": _DENSE,
        "xla_unpack": _packed_impl(xla_unpack),
        "jax_awq_dx": Impl(
            gradient,
            _packed,
            lambda c: c.packed_bytes,
            _packed_gemm,
            make_x=make_dy,
            on_request=True,
        ),
        "xla_dense_dx": Impl(
            lambda dy, w: jnp.dot(dy, w.T),
            _dense,
            lambda c: c.dense_bytes,
            lambda c: c.dense_bytes + c.activation_bytes,
            make_x=make_dy,
            on_request=True,
        ),
        "read": _READ,
    },
    # Quantization of x is included; awq_gemm is the product of the same x that is not rounded.
    "awq_gemm_w4a8": {
        "jax_awq": _packed_impl(jax_awq.awq_gemm_w4a8),
        "jax_awq_float8": _packed_impl(
            functools.partial(jax_awq.awq_gemm_w4a8, activation_dtype="float8_e4m3fn")
        ),
        "awq_gemm": _packed_impl(jax_awq.awq_gemm),
        "xla_dense": _DENSE,
        "read": _READ,
    },
    "awq_dequantize": {
        "jax_awq": Impl(
            lambda x, *w: jax_awq.awq_dequantize(*w, dtype=x.dtype),
            _packed,
            lambda c: c.packed_bytes,
            _unpacked,
        ),
        **_copies(_copied, _unpacked),
        "xla_unpack": Impl(
            lambda x, *w: xla_dequantize(x.dtype, *w), _packed, lambda c: c.packed_bytes, _unpacked
        ),
    },
    "quantize_activation": {
        "jax_awq": _quantize_impl(jax_awq.quantize_activation),
        "jax_awq_g128": _quantize_impl(
            functools.partial(jax_awq.quantize_activation, group_size=128),
            lambda c: _quantized(c) + c.m * c.k // 128 * 4,
        ),
        "jax_awq_int4": _quantize_impl(
            functools.partial(jax_awq.quantize_activation, bits=4),
            lambda c: _quantized(c) - c.m * c.k // 2,
        ),
        **_copies(_copied_activations, _quantized, of_rows=True, make_x=_one_row),
        "xla": _quantize_impl(xla_quantize),
    },
    "int8_matmul": _integers(8),
    "int4_matmul": _integers(4),
}


def weights(impl: Impl, case: Case, copies: int) -> list[tuple[Any, ...]]:
    """Distinct random weights; never zeros, which flatter the power limit of a GPU."""
    make = jax.jit(impl.make_weight, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), copies)
    case = case if impl.of_rows else dataclasses.replace(case, m=0)
    return [make(key, case) for key in keys]
