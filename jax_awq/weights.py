"""`AWQWeight`: the arrays of one quantized weight as one pytree; and one with permuted inputs."""

import dataclasses
import json
from typing import Any, overload

import jax.numpy as jnp
from jax import Array, export
from jax.tree_util import GetAttrKey, register_pytree_with_keys_class

from jax_awq._checks import check_array, check_choice, check_dtype, check_shape, check_weight
from jax_awq._explicit import whole
from jax_awq._packing import LAYOUTS, decode, encode, weight_size
from jax_awq.ops.awq_dequantize import awq_dequantize
from jax_awq.ops.awq_gemm import awq_gemm


@register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AWQWeight:
    """A (K, N) weight in 4-bit codes, ``(q - z) * s``.

    A pytree: the arrays are its leaves, layout and group size are static, so it goes through
    jit, vmap, scan, grad, device_put and checkpoint libraries. Stacked weights (layers, experts)
    are one `AWQWeight` whose arrays have leading batch dimensions.

    Attributes:
      qweight: int32 codes, ``(K, N/8)`` for layout "gemm", ``(N, K/8)`` for "gemv", "oc_major".
      scales: float, ``(K/group_size, N)``; ``(N, 8 * padded words)`` for "gemv".
      qzeros: int32 zero points, packed as the layout says; None is 8 everywhere.
      layout: "gemm", "gemv" or "oc_major".
      group_size: rows of K that share one scale, -1 for all of them. Given as None it is derived
        from the shapes.

    Raises:
      ValueError: the shapes of the arrays disagree.
      TypeError: a dtype is not the one above.
    """

    qweight: Any
    scales: Any
    qzeros: Any = None
    layout: str = dataclasses.field(default="gemm", kw_only=True)
    group_size: int = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self):
        group_size = check_weight(
            "AWQWeight",
            self.qweight,
            self.scales,
            self.qzeros,
            layout=self.layout,
            group_size=self.group_size,
        )
        object.__setattr__(self, "group_size", group_size)

    def tree_flatten_with_keys(self):
        names = ("qweight", "scales", "qzeros")
        return [(GetAttrKey(n), getattr(self, n)) for n in names], (self.layout, self.group_size)

    def tree_flatten(self):
        return (self.qweight, self.scales, self.qzeros), (self.layout, self.group_size)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        # JAX puts in leaves that are no arrays (axes, shardings, None), so nothing is checked.
        self = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), (*leaves, *static), strict=True):
            object.__setattr__(self, field.name, value)
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N), after the batch dimensions of `qweight`."""
        return (*self.qweight.shape[:-2], *weight_size(self.qweight.shape, self.layout))

    @property
    def ndim(self) -> int:
        return len(self.qweight.shape)

    @property
    def dtype(self):
        """Dtype of the scales, and of the weight when it is dequantized."""
        return self.scales.dtype

    def dequantize(self, dtype: Any = None) -> Array:
        """The (K, N) weight, rounded once to `dtype`, by default that of the scales."""
        return awq_dequantize(self, dtype=dtype)

    __array_ufunc__ = None  # numpy then leaves ``x @ weight`` to `__rmatmul__`

    def __rmatmul__(self, x: Any) -> Array:
        return awq_gemm(x, self)

    def __repr__(self) -> str:
        leaves = ", ".join(
            f"{key.name}={_shape_of(value)}" for key, value in self.tree_flatten_with_keys()[0]
        )
        return f"AWQWeight({leaves}, layout={self.layout!r}, group_size={self.group_size})"


@register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PermutedWeight:
    """A weight whose groups are of inputs that do not lie side by side (GPTQ's act-order).

    Row i of `weight` belongs to input ``perm[i]``, so ``x @ self`` is ``x[..., perm] @ weight``.
    A pytree like `AWQWeight`, which every transformation takes; a type of its own, so that code
    which knows the arrays of an `AWQWeight` alone cannot pass over the permutation. Inside
    `shard_map`, K must not be split.

    Attributes:
      weight: `AWQWeight`, (K, N), its rows in the order of the groups.
      perm: int32 ``(K,)``, a permutation, with the batch dimensions of the weight.

    Raises:
      ValueError: the shapes disagree.
      TypeError: `weight` is no `AWQWeight`, or `perm` is not int32.
    """

    weight: AWQWeight
    perm: Any

    def __post_init__(self):
        if not isinstance(self.weight, AWQWeight):
            raise TypeError(
                f"PermutedWeight: weight must be an AWQWeight, got {type(self.weight).__name__}"
            )
        check_dtype("PermutedWeight", "perm", self.perm, "int32")
        check_shape("PermutedWeight", "perm", self.perm, self.weight.shape[:-1])

    def tree_flatten_with_keys(self):
        return [(GetAttrKey("weight"), self.weight), (GetAttrKey("perm"), self.perm)], None

    def tree_flatten(self):
        return (self.weight, self.perm), None

    @classmethod
    def tree_unflatten(cls, static, leaves):
        self = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), leaves, strict=True):
            object.__setattr__(self, field.name, value)
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N), after the batch dimensions."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def dtype(self):
        """Dtype of the scales, and of the weight when it is dequantized."""
        return self.weight.dtype

    @property
    def layout(self) -> str:
        return self.weight.layout

    @property
    def group_size(self) -> int:
        return self.weight.group_size

    def permute_inputs(self, x: Any) -> Array:
        """``x[..., perm]``, of shape ``(..., K)`` like `x`, or ``(E, ..., K)`` for (E, K, N)."""
        *batch, k, _ = self.shape
        check_array("PermutedWeight", "x", x)
        if x.ndim <= len(batch) or (*x.shape[: len(batch)], x.shape[-1]) != (*batch, k):
            want = ", ".join(map(str, (*batch, "...", k)))
            raise ValueError(f"PermutedWeight: x must have shape ({want}), got {x.shape}")
        x, perm = whole(x, -1), whole(self.perm, -1)
        if perm.ndim == 1:
            return jnp.take(x, perm, axis=-1)
        return jnp.take_along_axis(x, jnp.expand_dims(perm, range(1, x.ndim - 1)), axis=-1)

    def restore_rows(self, dense: Any) -> Array:
        """The rows of a ``(..., K, N)`` matrix in the order of the inputs."""
        order = jnp.argsort(whole(self.perm, -1))
        dense = whole(dense, -2)
        if order.ndim == 1:
            return jnp.take(dense, order, axis=-2)
        return jnp.take_along_axis(dense, order[..., None], axis=-2)

    def dequantize(self, dtype: Any = None) -> Array:
        """The (K, N) weight, rounded once to `dtype`, by default that of the scales."""
        return awq_dequantize(self, dtype=dtype)

    __array_ufunc__ = None

    def __rmatmul__(self, x: Any) -> Array:
        return awq_gemm(x, self)

    def __repr__(self) -> str:
        return f"PermutedWeight({self.weight!r}, perm={_shape_of(self.perm)})"


WEIGHTS = (AWQWeight, PermutedWeight)  # what an op takes in place of the arrays of a weight

# Lets `jax.export` store a function that takes or gives a weight; the names are in its files.
export.register_pytree_node_serialization(
    AWQWeight,
    serialized_name="jax_awq.AWQWeight",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
)
export.register_pytree_node_serialization(
    PermutedWeight,
    serialized_name="jax_awq.PermutedWeight",
    serialize_auxdata=lambda static: b"",
    deserialize_auxdata=lambda data: None,
)


@overload
def convert(weight: AWQWeight, layout: str) -> AWQWeight: ...
@overload
def convert(weight: PermutedWeight, layout: str) -> PermutedWeight: ...
def convert(weight: Any, layout: str) -> Any:
    """The same codes, zeros and scales in another layout, bit for bit.

    Args:
      weight: any `AWQWeight` or `PermutedWeight`; numpy arrays are converted on the host.
      layout: "gemm", "gemv" or "oc_major".

    Returns:
      The weight in `layout`; `weight` itself where it is in it.

    Raises:
      ValueError: `layout` is unknown, or cannot hold the weight: "gemv" and "oc_major" need K and
        group_size to be multiples of 8.
      TypeError: `weight` is neither of the two.
    """
    check_choice("convert", "layout", layout, LAYOUTS)
    if not isinstance(weight, WEIGHTS):
        raise TypeError(
            f"convert: weight must be an AWQWeight or a PermutedWeight, got {type(weight).__name__}"
        )
    if isinstance(weight, PermutedWeight):
        return dataclasses.replace(weight, weight=convert(weight.weight, layout))
    if layout == weight.layout:
        return weight
    codes, zeros, scales = decode(
        weight.qweight,
        weight.scales,
        weight.qzeros,
        layout=weight.layout,
        group_size=weight.group_size,
    )
    qweight, scales, qzeros = encode(
        codes, scales, zeros, layout=layout, group_size=weight.group_size
    )
    return AWQWeight(qweight, scales, qzeros, layout=layout, group_size=weight.group_size)


def _shape_of(leaf: Any) -> str:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return repr(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
