"""`AWQLinear`: an Equinox layer with an AWQ weight."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq._layers import (
    LAYER_WEIGHTS,
    LayerWeight,
    Linear,
    Predicate,
    check_layer,
    match_weights,
    multiply,
)

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError("jax_awq.equinox needs Equinox: pip install 'jax_awq[equinox]'") from error

__all__ = ["AWQLinear", "is_awq_weight", "replace_linears"]

M = TypeVar("M")


class AWQLinear(eqx.Module):
    """`eqx.nn.Linear` with a 4-bit weight; like that it takes a vector and is vmapped.

    Computes ``activation(x @ weight + bias)`` in the dtype of `x`: unlike in `eqx.nn.Linear` the
    scales never promote it, since the kernels take 16-bit activations.

    Args:
      weight: `AWQWeight` or `PermutedWeight` (K, N), or stacked (E, K, N) for `eqx.filter_vmap`
        and `jax.lax.scan`; `Int8Weight` or `Int4Weight`, by which `x` is rounded as in
        `QuantizedLinear`, without a gradient.
      bias: ``(N,)`` or ``(E, N)`` float, or None.
      activation: None, "relu", "gelu", "gelu_tanh" or "silu", inside the kernel.

    Attributes:
      weight: that weight, inputs first; `eqx.nn.Linear` has outputs first.
      bias: array or None.
      in_features, out_features, use_bias: as in `eqx.nn.Linear`.

    Raises:
      ValueError: the shape of `bias`, or an unknown `activation`.
      TypeError: `weight` is none of these, or `bias` not float.
    """

    weight: LayerWeight
    bias: Array | None
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    activation: str | None = eqx.field(static=True)

    def __init__(
        self,
        weight: LayerWeight,
        bias: Any = None,
        *,
        activation: str | None = None,
    ):
        check_layer("AWQLinear", weight, bias, activation)
        self.weight = weight
        self.bias = bias
        self.in_features, self.out_features = weight.shape[-2:]
        self.use_bias = bias is not None
        self.activation = activation

    def __call__(self, x: Any, *, key: Any = None) -> Array:
        """``(K,)`` to ``(N,)``; `key` is ignored.

        Raises:
          ValueError: `x` is no vector of that length.
        """
        if jnp.shape(x) != (self.in_features,):
            raise ValueError(
                f"AWQLinear: x must have shape ({self.in_features},), got {jnp.shape(x)}; "
                "jax.vmap the layer over other axes"
            )
        return multiply(x, self.weight, self.bias, activation=self.activation)


def is_awq_weight(node: Any) -> bool:
    """Whether a node of a model is a weight that an `AWQLinear` takes.

    As `is_leaf` it keeps weights whole, so that a filter of arrays freezes them, scales and all:
    ``eqx.partition(model, eqx.is_inexact_array, is_leaf=is_awq_weight)``.
    """
    return isinstance(node, LAYER_WEIGHTS)


def replace_linears(
    model: M,
    weights: Mapping[str, LayerWeight | Array],
    predicate: Predicate | None = None,
) -> M:
    """An Equinox model with `AWQLinear` in place of `eqx.nn.Linear`.

    Args:
      model: any pytree of modules; that of ``eqx.filter_eval_shape`` too, which spends no memory on
        the weights that are replaced. Only layers of the very class `eqx.nn.Linear` are seen.
      weights: as `load_hf` gives them, ``{path: weight, path.bias: Array}``; paths are those of the
        model, ``layers.0.mlp.up_proj``. Other arrays are left to the caller.
      predicate: function of a path and its `eqx.nn.Linear`, whether to replace it; by default those
        that `weights` has are. A linear that it refuses stays, with or without a weight.

    Returns:
      A new model, which shares all arrays that it keeps.

    Raises:
      ValueError: weights that no linear of the model has the path of, chosen linears without a
        weight, shapes or biases that disagree, biases that are not float; every one is named.
      TypeError: `weights` is no dict.
    """
    nodes, structure = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: type(node) is eqx.nn.Linear
    )
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), node) for path, node in nodes]
    linears = {
        path: Linear(
            node,
            (*node.weight.shape[:-2], node.in_features, node.out_features),
            node.bias is not None,
        )
        for path, node in named
        if type(node) is eqx.nn.Linear
    }
    chosen = match_weights(linears, weights, predicate)
    return jax.tree.unflatten(
        structure,
        [AWQLinear(*chosen[path]) if path in chosen else node for path, node in named],
    )
