"""The weight operands that ops share: arguments, batches, sharding factors and arithmetic."""

import os

import jax.numpy as jnp
from jax import Array

from jax_awq._batching import aligned
from jax_awq._checks import check_weight
from jax_awq._packing import (
    PACK_FACTOR,
    canonical_groups,
    decode_codes,
    unpack_int4,
    weight_size,
)

SYMMETRIC_ZERO = 8  # the zero point of a weight without zeros
_KERNEL_GROUP_SIZES = (-1, 32, 64, 128)
_KERNEL_SIZE_LIMIT = 2**20  # CUDA grids count blocks of rows in 16 bits


def forced_variant() -> str:
    """`JAX_AWQ_FORCE`: the kernel variant to run, for tests. Part of every jit key."""
    return os.environ.get("JAX_AWQ_FORCE", "")


def no_kernel(k, n, group_size: int) -> str:
    """Why no kernel takes a (K, N) weight, or "". The FFI handlers refuse the same."""
    if group_size not in _KERNEL_GROUP_SIZES and group_size != k:
        return "group_size is not 32, 64, 128 or K"
    if not isinstance(k, int) or not isinstance(n, int):
        return "K or N is symbolic"
    if max(k, n) >= _KERNEL_SIZE_LIMIT:
        return f"K or N is not below {_KERNEL_SIZE_LIMIT}"
    return ""


def unpack_weight(op: str, qweight, scales, qzeros, layout, group_size):
    """((qweight, scales, qzeros), layout, group_size) of three arrays or of one `AWQWeight`."""
    if not hasattr(qweight, "qweight"):
        if scales is None:
            raise ValueError(f"{op}: scales are needed unless qweight is an AWQWeight")
        if hasattr(scales, "qweight"):
            raise TypeError(f"{op}: scales must be an array, got {type(scales).__name__}")
        return (qweight, scales, qzeros), layout, group_size
    weight = qweight
    given = [
        name
        for name, is_given in (
            ("scales", scales is not None),
            ("qzeros", qzeros is not None),
            ("layout", layout not in ("gemm", weight.layout)),
            ("group_size", group_size is not None),
        )
        if is_given
    ]
    if given:
        raise ValueError(f"{op}: an AWQWeight brings its own {', '.join(given)}")
    return (weight.qweight, weight.scales, weight.qzeros), weight.layout, weight.group_size


def canonical_weight(op: str, qweight, scales, qzeros, *, layout, group_size):
    """Operands and parameters of the primitives, which know two layouts of `qweight` only.

    The scales and zeros of "gemv" and "oc_major" are rearranged here: they are 1/32 of the weight
    or less, and the kernels then have one form of them.
    """
    group_size = check_weight(op, qweight, scales, qzeros, layout=layout, group_size=group_size)
    arrays = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    for name, array in arrays.items():
        if array is not None and array.ndim > 3:
            raise ValueError(
                f"{op}: {name} must have 2 dimensions, or 3 with a leading batch, "
                f"got shape {array.shape}"
            )
    check_batch(op, {name: a.shape[:-2] for name, a in arrays.items() if a is not None})
    k, _ = weight_size(qweight.shape, layout)
    groups = 1 if group_size == -1 else k // group_size
    scales, qzeros = canonical_groups(scales, qzeros, layout=layout, groups=groups)
    operands = (qweight, scales) if qzeros is None else (qweight, scales, qzeros)
    # One group stays -1: its size follows K where K is split over devices.
    return operands, {
        "layout": "gemm" if layout == "gemm" else "oc_major",
        "group_size": -1 if groups == 1 else group_size,
        "symmetric": qzeros is None,
    }


def check_batch(op: str, leading: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The batch dimension that operands share, as () or (E,)."""
    batched = {name: shape for name, shape in leading.items() if shape}
    if len(set(batched.values())) > 1:
        told = ", ".join(f"{name} {shape[0]}" for name, shape in batched.items())
        raise ValueError(f"{op}: leading batch dimensions must agree, got {told}")
    return next(iter(batched.values()), ())


def factors(layout: str, group_size: int) -> tuple[dict[str, str], dict[str, int]]:
    """Dimensions of a weight in the notation of Shardy, and the factors that are never split.

    K is split between groups only, and N between words of zeros.
    """
    if group_size == -1:  # the one row of scales is "u", so K may be split at any row
        rows, words = ("k", "k") if layout == "gemm" else ("(k q)", "k")
        whole, groups = {"u": 1}, "u"
    elif layout == "gemm":
        rows, words, whole, groups = "(g s)", "(g s)", {"s": group_size}, "g"
    else:
        rows, words, whole, groups = "(g w q)", "(g w)", {"w": group_size // PACK_FACTOR}, "g"
    if layout != "gemm":
        whole["q"] = PACK_FACTOR
    dims = {
        "K": rows,
        "N": "(n p)",
        "scales": f"{groups} (n p)",
        "qzeros": f"{groups} n",
        "qweight": f"{rows} n" if layout == "gemm" else f"(n p) {words}",
    }
    return dims, {**whole, "p": PACK_FACTOR}


def code_minus_zero(qweight, qzeros, *, layout, dtype=jnp.float32) -> Array:
    """The integers ``q - z`` as ``(..., K/G, G, N)``, exact in every float dtype.

    `qzeros` has one row for each group; None is one group of zeros 8.
    """
    codes = decode_codes(qweight, layout)
    zeros = (
        jnp.full((1, codes.shape[-1]), SYMMETRIC_ZERO, jnp.int8)
        if qzeros is None
        else unpack_int4(qzeros)
    )
    codes, zeros = aligned(grouped(codes, zeros.shape[-2]), zeros[..., None, :])
    return codes.astype(dtype) - zeros.astype(dtype)


def grouped(array: Array, groups: int) -> Array:
    *batch, k, n = array.shape
    return array.reshape(*batch, groups, k // groups, n)


def dequantize(qweight, scales, qzeros, *, layout, dtype) -> Array:
    codes = code_minus_zero(qweight, qzeros, layout=layout)
    codes = grouped(
        codes.reshape(*codes.shape[:-3], codes.shape[-3] * codes.shape[-2], codes.shape[-1]),
        scales.shape[-2],
    )
    # q - z has 5 bits, so its float32 product with a 16-bit scale is exact: one rounding follows.
    codes, scales = aligned(codes, scales[..., None, :])
    weight = (codes * scales.astype(jnp.float32)).astype(dtype)
    return weight.reshape(*weight.shape[:-3], weight.shape[-3] * weight.shape[-2], weight.shape[-1])


def sum_over_groups(products: Array, qweight, scales, qzeros, *, layout) -> Array:
    """Cotangent of `scales` from that of the weight, float32 (..., K, N)."""
    codes = code_minus_zero(qweight, qzeros, layout=layout)
    codes = codes.reshape(*codes.shape[:-3], codes.shape[-3] * codes.shape[-2], codes.shape[-1])
    result = grouped(products * codes, scales.shape[-2]).sum(-2)
    return sum_batch(result, scales)


def sum_batch(array: Array, like) -> Array:
    """Sums a batch dimension that `like`, an operand shared over the batch, does not have."""
    array = array.sum(0) if array.ndim > len(like.shape) else array
    return array.astype(like.dtype)
