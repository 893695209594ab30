"""4-bit codes in int32 words, and the three layouts that AWQ weights are stored in.

| layout     | qweight           | scales        | qzeros           | order of the nibbles    |
|------------|-------------------|---------------|------------------|-------------------------|
| `gemm`     | (K, N/8) along N  | (K/G, N)      | (K/G, N/8)       | AWQ                     |
| `gemv`     | (N, K/8) along K  | (N, 8 Z)      | (N, Z) along K/G | natural, padded to Z    |
| `oc_major` | (N, K/8) along K  | (K/G, N)      | (K/G, N/8)       | natural                 |

Every function takes numpy arrays and JAX arrays, with any number of leading batch dimensions,
and answers in kind: a checkpoint is converted on the host without a copy to a device.
"""

import numbers
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

PACK_FACTOR = 8  # codes in one int32 word
LAYOUTS = ("gemm", "gemv", "oc_major")

Order = Literal["awq", "natural"]


def pack_int4(codes: Any, *, order: Order = "awq", axis: int = -1) -> Any:
    """Packs eight consecutive codes of `axis` into one int32 word.

    Args:
      codes: integers of any shape; the low four bits of each are kept.
      order: "awq" (nibble k holds code 0, 2, 4, 6, 1, 3, 5, 7) or "natural" (nibble k holds k).
      axis: the axis to pack; its length is a multiple of 8.

    Returns:
      int32, eight times shorter along `axis`; a numpy array for a numpy array.

    Raises:
      TypeError: `codes` is no array of integers.
      ValueError: `axis` is none of `codes` or not a multiple of 8 long, or `order` is unknown.

    Source: AutoAWQ 0.2.9, WQLinear_GEMM.from_linear ("awq") and WQLinear_GEMV ("natural").
    """
    _check("pack_int4", "codes", codes, "integers", np.integer, order=order, axis=axis)
    xp = _namespace(codes)
    length = codes.shape[axis]
    if length % PACK_FACTOR:
        raise ValueError(
            f"pack_int4: axis {axis} must be a multiple of {PACK_FACTOR} long, "
            f"got shape {tuple(codes.shape)}"
        )
    codes = xp.moveaxis(codes, axis, -1)
    codes = codes.reshape(*codes.shape[:-1], length // PACK_FACTOR, PACK_FACTOR)
    # The nibbles are disjoint, so the sum is their union; it wraps into the sign bit as wanted.
    shifts = _shifts(xp, order, codes.ndim)
    words = xp.sum((codes.astype(np.int32) & 0xF) << shifts, axis=-1, dtype=np.int32)
    return xp.moveaxis(words, -1, axis)


def unpack_int4(words: Any, *, order: Order = "awq", axis: int = -1) -> Any:
    """Unpacks every int32 word of `axis` into eight codes, the inverse of `pack_int4`.

    Args:
      words: int32 of any shape, or the same bits as uint32.
      order: "awq" or "natural", as in `pack_int4`.
      axis: the packed axis.

    Returns:
      int8 codes 0 to 15, eight times longer along `axis`; a numpy array for a numpy array.

    Raises:
      TypeError: `words` is no array of these.
      ValueError: `axis` is none of `words`, or `order` is unknown.
    """
    _check("unpack_int4", "words", words, "int32", np.int32, np.uint32, order=order, axis=axis)
    xp = _namespace(words)
    words = xp.moveaxis(words, axis, -1)
    codes = ((words[..., None] >> _shifts(xp, order, words.ndim + 1)) & 0xF).astype(np.int8)
    return xp.moveaxis(codes.reshape(*words.shape[:-1], words.shape[-1] * PACK_FACTOR), -1, axis)


def weight_size(qweight_shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    """(K, N) of a packed weight."""
    rows, words = qweight_shape[-2:]
    columns = words * PACK_FACTOR
    return (rows, columns) if layout == "gemm" else (columns, rows)


def group_shapes(k: int, n: int, group_size: int, layout: str):
    """Shapes of `scales` and of `qzeros`; `group_size` -1 is one group."""
    groups = 1 if group_size == -1 else k // group_size
    if layout != "gemv":
        return (groups, n), (groups, n // PACK_FACTOR)
    words = _gemv_words(groups, k if group_size == -1 else group_size)
    return (n, words * PACK_FACTOR), (n, words)


def decode_codes(qweight: Any, layout: str) -> Any:
    """Codes 0 to 15 as int8 (K, N)."""
    if layout == "gemm":
        return unpack_int4(qweight, order="awq")
    return unpack_int4(qweight, order="natural").swapaxes(-1, -2)


def canonical_groups(scales: Any, qzeros: Any, *, layout: str, groups: int) -> tuple[Any, Any]:
    """`scales` as (K/G, N) and `qzeros` as (K/G, N/8) in AWQ order, whatever the layout."""
    if layout == "gemm":
        return scales, qzeros
    if layout == "gemv":
        scales = scales[..., :groups].swapaxes(-1, -2)
    if qzeros is None:
        return scales, None
    zeros = unpack_int4(qzeros, order="natural")
    if layout == "gemv":
        zeros = zeros[..., :groups].swapaxes(-1, -2)
    return scales, pack_int4(zeros, order="awq")


def decode(qweight: Any, scales: Any, qzeros: Any, *, layout: str, group_size: int):
    """(codes (K, N), zeros (K/G, N) or None, scales (K/G, N)) of a packed weight."""
    k, _ = weight_size(qweight.shape, layout)
    groups = 1 if group_size == -1 else k // group_size
    scales, qzeros = canonical_groups(scales, qzeros, layout=layout, groups=groups)
    zeros = None if qzeros is None else unpack_int4(qzeros, order="awq")
    return decode_codes(qweight, layout), zeros, scales


def encode(codes: Any, scales: Any, zeros: Any, *, layout: str, group_size: int):
    """(qweight, scales, qzeros or None) in `layout`, the inverse of `decode`."""
    if layout == "gemm":
        return (
            pack_int4(codes, order="awq"),
            scales,
            None if zeros is None else pack_int4(zeros, order="awq"),
        )
    qweight = pack_int4(codes.swapaxes(-1, -2), order="natural")
    if layout == "gemv":
        k, n = codes.shape[-2:]
        (_, columns), _ = group_shapes(k, n, group_size, layout)
        scales = _pad_last(scales.swapaxes(-1, -2), columns)
        zeros = None if zeros is None else _pad_last(zeros.swapaxes(-1, -2), columns)
    return qweight, scales, None if zeros is None else pack_int4(zeros, order="natural")


def _shifts(xp: Any, order: str, ndim: int) -> Any:
    """Bit position of logical column 0 to 7 in a word, the last of `ndim` dimensions."""
    # An expression, not a table: `custom_partitioning` takes no function with array constants.
    column = xp.arange(PACK_FACTOR, dtype=np.int32)
    column = xp.expand_dims(column, tuple(range(ndim - 1)))
    return 4 * (column // 2 + column % 2 * 4 if order == "awq" else column)


def _check(op: str, name: str, array: Any, want: str, *kinds: Any, order: Any, axis: Any) -> None:
    found = getattr(array, "dtype", None)
    if found is None or not any(jnp.issubdtype(found, kind) for kind in kinds):
        got = type(array).__name__ if found is None else found
        raise TypeError(f"{op}: {name} must be an array of {want}, got {got}")
    if order not in ("awq", "natural"):
        raise ValueError(f"{op}: order must be 'awq' or 'natural', got {order!r}")
    if not isinstance(axis, numbers.Integral) or axis not in range(-array.ndim, array.ndim):
        raise ValueError(
            f"{op}: axis must be one of {name} of shape {tuple(array.shape)}, got {axis!r}"
        )


def _namespace(array: Any):
    return np if isinstance(array, np.ndarray) else jnp


def _gemv_words(groups: int, group_size: int) -> int:
    """Words a row of zeros, padded as AutoAWQ does: its kernels load 128 inputs at a time."""
    multiple = max(1, 128 // group_size)
    words = (groups + PACK_FACTOR - 1) // PACK_FACTOR
    return (words + multiple - 1) // multiple * multiple


def _pad_last(array: Any, length: int) -> Any:
    widths = [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])]
    return _namespace(array).pad(array, widths)
