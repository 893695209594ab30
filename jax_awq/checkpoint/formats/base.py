"""What a format is: its tensors, their shapes, and the integers in them."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jax_awq._packing import PACK_FACTOR, pack_int4
from jax_awq.checkpoint.config import QuantConfig
from jax_awq.checkpoint.files import Tensor
from jax_awq.weights import AWQWeight, PermutedWeight

Parts = Mapping[str, Tensor]  # by the last component of the tensor's name
Arrays = Mapping[str, np.ndarray]
Expected = tuple[tuple[str, ...], tuple[int, ...]]  # dtypes as safetensors names them, and shape

FLOATS = ("F16", "BF16", "F32")
INT32 = ("I32",)


class BadPart(ValueError):
    """The values of one tensor of a linear are not what its format has."""

    def __init__(self, part: str, text: str):
        super().__init__(text)
        self.part = part


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A (K, N) weight, or (E, K, N) of `experts`; `group_size` is -1 for one group."""

    k: int
    n: int
    group_size: int
    experts: int | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    @property
    def group_rows(self) -> int:
        return self.k if self.group_size == -1 else self.group_size

    @property
    def groups(self) -> int:
        return self.k // self.group_rows


class Format(abc.ABC):
    """One layout; a class that is no `Readable` is there to be refused by its name.

    Attributes:
      title: what a message calls it.
      method: `quant_method` of its configuration.
      versions: what the configuration calls the layout.
    """

    title: str
    method: str
    versions: tuple[str, ...]

    @abc.abstractmethod
    def recognise(self, parts: Parts) -> bool:
        """Whether these parts look like it."""

    def is_told_by(self, config: QuantConfig) -> bool:
        return config.method in (None, self.method) and config.version in (None, *self.versions)


class Readable(Format):
    """A layout that can be loaded.

    Attributes:
      packed: the part that has the codes.
      packed_dtype: its dtype.
      stacked: whether the linears of all experts may lie in one tensor with a leading dimension.
    """

    packed = "qweight"
    packed_dtype = "I32"
    stacked = False

    @abc.abstractmethod
    def names(self, parts: Parts, config: QuantConfig) -> tuple[str, ...]:
        """The parts that must be there; a bias may be."""

    @abc.abstractmethod
    def size(self, packed_shape: tuple[int, ...]) -> tuple[int, int]:
        """(K, N), of the last two dimensions."""

    @abc.abstractmethod
    def expected(self, geometry: Geometry) -> dict[str, Expected]:
        """Dtypes and shape of every part that there may be."""

    @abc.abstractmethod
    def codes(self, packed: Any) -> Any:
        """Codes 0 to 15 as (K, N), or (E, K, N), from a numpy or JAX array."""

    @abc.abstractmethod
    def groups(self, arrays: Arrays, geometry: Geometry) -> tuple[Any, np.ndarray]:
        """Zeros 0 to 15 as (K/G, N), or None for 8 everywhere, and scales as (K/G, N)."""

    def permutation(self, arrays: Arrays, geometry: Geometry) -> np.ndarray | None:
        """The order of the K inputs in which groups are contiguous; None if they are."""
        return None

    def geometry(self, module: str, parts: Parts, config: QuantConfig) -> Geometry:
        """Checks every part by its header.

        Raises:
          ValueError: one is missing, unused, or of another dtype or shape.
        """
        names = self.names(parts, config)
        for name in names:
            if name not in parts:
                files = ", ".join(sorted({str(t.file) for t in parts.values()}))
                raise ValueError(
                    f"load_hf: tensor {module}.{name} is missing: {files} has only "
                    f"{', '.join(sorted(parts))} of this {self.title} linear"
                )
        for name, tensor in parts.items():
            if name not in (*names, "bias"):
                raise ValueError(
                    f"load_hf: {tensor} is unused: a {self.title} linear has "
                    f"{', '.join(names)} and maybe bias (zero_point is "
                    f"{config.zero_point} in {config.file})"
                )
        packed = parts[self.packed]
        check_dtype(packed, (self.packed_dtype,))
        dimensions = (2, 3) if self.stacked else (2,)
        if len(packed.shape) not in dimensions:
            raise ValueError(
                f"load_hf: {packed} must have {' or '.join(map(str, dimensions))} dimensions, "
                f"got shape {packed.shape}"
            )
        *batch, rows, columns = packed.shape
        k, n = self.size((rows, columns))
        if 0 in (*batch, k, n) or n % PACK_FACTOR:
            raise ValueError(
                f"load_hf: {packed}: K={k} must be positive and N={n} must be a multiple of "
                f"{PACK_FACTOR}"
            )
        geometry = Geometry(k, n, self.group_size(k, parts, config), *batch)
        for name, (dtypes, shape) in {
            **self.expected(geometry),
            "bias": (FLOATS, (*geometry.batch, n)),
        }.items():
            if name in parts:
                check_dtype(parts[name], dtypes)
                if parts[name].shape != shape:
                    raise ValueError(
                        f"load_hf: {parts[name]} must have shape {shape}, got "
                        f"{parts[name].shape}, for K={k}, N={n} of {self.packed} and group_size "
                        f"{geometry.group_size} of {config.file}"
                    )
        return geometry

    def group_size(self, k: int, parts: Parts, config: QuantConfig) -> int:
        if config.group_size is None:
            raise ValueError(f"load_hf: {config.file} has no group_size")
        if config.group_size != -1 and (config.group_size < 1 or k % config.group_size):
            raise ValueError(
                f"load_hf: {config.file}: group_size must be -1 or a divisor of "
                f"K={k}, got {config.group_size} ({parts[self.packed]})"
            )
        return config.group_size

    def weight(self, arrays: Arrays, geometry: Geometry) -> AWQWeight | PermutedWeight:
        """The weight, in layout "gemm" unless the arrays are in a layout of `AWQWeight` already.

        Raises:
          BadPart: values that the layout does not have.
        """
        zeros, scales = self.groups(arrays, geometry)
        order = self.permutation(arrays, geometry)
        weight = AWQWeight(
            _as_gemm(arrays[self.packed], order, codes=self.codes),
            scales,
            None if zeros is None else pack_int4(zeros),
            group_size=geometry.group_size,
        )
        return weight if order is None else PermutedWeight(weight, order)


# By XLA: numpy takes 30 times as long, which is minutes for a large checkpoint.
@functools.partial(jax.jit, static_argnames="codes")
def _as_gemm(packed: jax.Array, order: jax.Array | None, *, codes: Callable[[Any], Any]):
    rows = codes(packed)
    return pack_int4(rows if order is None else rows[order])


def sorted_by_group(g_idx: np.ndarray, geometry: Geometry, part: str) -> np.ndarray | None:
    """The order that makes the groups of GPTQ's `g_idx` contiguous; None if they are in order."""
    in_order = np.arange(geometry.k) // geometry.group_rows
    if np.array_equal(g_idx, in_order):
        return None
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[order], in_order):
        raise BadPart(
            part,
            f"must put {geometry.group_rows} inputs into each of the {geometry.groups} groups, "
            f"got groups {g_idx.min()} to {g_idx.max()} of {len(set(g_idx.tolist()))} sizes "
            f"{sorted(set(np.unique(g_idx, return_counts=True)[1].tolist()))}",
        )
    return order


def matrix(parts: Parts, name: str, dtype: str | None = None) -> tuple[int, ...] | None:
    """Shape of a part that is there, 2-D and of the dtype."""
    tensor = parts.get(name)
    if tensor is None or len(tensor.shape) != 2 or dtype not in (None, tensor.dtype):
        return None
    return tensor.shape


def check_dtype(tensor: Tensor, dtypes: tuple[str, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"load_hf: {tensor} must be {' or '.join(dtypes)}, got {tensor.dtype}")
