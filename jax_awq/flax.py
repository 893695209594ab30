"""Flax layers with AWQ weights: `AWQLinear` for NNX, `AWQDense` for Linen."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq._checks import check_shape, read_integer
from jax_awq._layers import LayerWeight, Linear, Predicate, check_layer, match_weights, multiply
from jax_awq._packing import PACK_FACTOR
from jax_awq.quantize.rtn import round_to_nearest
from jax_awq.weights import AWQWeight

try:
    from flax import linen, nnx
except ImportError as error:
    raise ImportError("jax_awq.flax needs Flax: pip install 'jax_awq[flax]'") from error

__all__ = ["AWQDense", "AWQLinear", "AWQParam", "replace_linears"]

M = TypeVar("M", bound=nnx.Module)


class AWQParam(nnx.Variable):
    """The variable of a 4-bit weight. It is no `nnx.Param`, so gradients and optimizers of
    `nnx.Param`, their default, or of `nnx.LoRAParam` leave its integers alone.
    """


class AWQLinear(nnx.Module):
    """`nnx.Linear` with a frozen 4-bit kernel.

    Computes ``activation(inputs @ kernel + bias)`` in the dtype of `inputs`: unlike in `nnx.Linear`
    the scales never promote it, since the kernels take 16-bit activations.

    Args:
      weight: `AWQWeight` or `PermutedWeight` (K, N), or stacked (E, K, N) for inputs (E, ..., K);
        `Int8Weight` or `Int4Weight` (K, N), by which the inputs are rounded as in
        `QuantizedLinear`, without a gradient.
      bias: ``(N,)`` or ``(E, N)`` float, or None.
      dtype: to which the inputs are cast; None leaves them as they are.
      preferred_element_type: dtype of the result, by default that of the (cast) inputs.
      activation: None, "relu", "gelu", "gelu_tanh" or "silu", inside the kernel.

    Attributes:
      kernel: `AWQParam` of that weight.
      bias: `nnx.Param` or None.
      in_features, out_features, use_bias, dtype, param_dtype: as in `nnx.Linear`; `param_dtype` is
        the dtype of the scales.

    Raises:
      ValueError: the shape of `bias`, or an unknown `activation`.
      TypeError: `weight` is none of these, or `bias` not float.
    """

    def __init__(
        self,
        weight: LayerWeight,
        bias: Any = None,
        *,
        dtype: Any = None,
        preferred_element_type: Any = None,
        activation: str | None = None,
    ):
        check_layer("AWQLinear", weight, bias, activation)
        self.kernel = AWQParam(weight)
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.in_features, self.out_features = weight.shape[-2:]
        self.use_bias = bias is not None
        self.dtype = dtype
        self.param_dtype = weight.dtype
        self.preferred_element_type = preferred_element_type
        self.activation = activation

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Array:
        """``(..., K)`` to ``(..., N)``, in `out_sharding` where it is given."""
        y = multiply(
            jnp.asarray(inputs, self.dtype),
            self.kernel.get_value(),
            None if self.bias is None else self.bias.get_value(),
            activation=self.activation,
            out_dtype=self.preferred_element_type,
        )
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


class AWQDense(linen.Module):
    """`linen.Dense` with a frozen 4-bit kernel.

    The bias is in the collection "params", the kernel, an `AWQWeight` or `PermutedWeight`, in
    "awq": gradients and optimizers of "params" never see its integers. `init` rounds a random
    kernel to nearest; that of a checkpoint is put in its place: ``variables["awq"]`` is what
    `flax.traverse_util.unflatten_dict` makes of ``{(*path.split("."), "kernel"): weight}``.

    Attributes:
      features, use_bias, kernel_init, bias_init: as in `linen.Dense`.
      dtype: to which the inputs are cast; None leaves them as they are.
      param_dtype: of the scales and the bias of `init`.
      group_size: inputs that share one scale in the kernel of `init`, -1 for all of them.
      activation: None, "relu", "gelu", "gelu_tanh" or "silu", inside the kernel.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float16
    kernel_init: Any = linen.linear.default_kernel_init
    bias_init: Any = linen.initializers.zeros_init()
    group_size: int = 128
    activation: str | None = None

    @linen.compact
    def __call__(self, inputs: Any) -> Array:
        """``(..., K)`` to ``(..., features)``.

        Raises:
          ValueError: there is no kernel in "awq", or it has another shape; `features` is not
            positive or, in `init`, no multiple of 8; `inputs` has no channels.
          TypeError: `features` is no integer.
        """
        if read_integer("AWQDense", "features", self.features) < 1:
            raise ValueError(f"AWQDense: features must be 1 or more, got {self.features}")
        inputs = jnp.asarray(inputs, self.dtype)
        if inputs.ndim == 0 or inputs.shape[-1] == 0:
            raise ValueError(
                f"AWQDense: inputs must have shape (..., K) with K 1 or more, got {inputs.shape}"
            )
        size = (inputs.shape[-1], self.features)

        def init() -> AWQWeight:
            if self.features % PACK_FACTOR:
                raise ValueError(
                    f"AWQDense: features must be a multiple of {PACK_FACTOR}, got {self.features}"
                )
            kernel = self.kernel_init(self.make_rng("params"), size, jnp.float32)
            return round_to_nearest(kernel, group_size=self.group_size, dtype=self.param_dtype)

        if not (self.has_variable("awq", "kernel") or self.is_mutable_collection("awq")):
            path = "/".join((*self.path, "kernel"))
            raise ValueError(f"AWQDense: there is no {path} in the collection 'awq'")
        kernel = self.variable("awq", "kernel", init).value
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        check_layer("AWQDense", kernel, bias, self.activation)
        check_shape("AWQDense", "kernel", kernel, size)
        return multiply(inputs, kernel, bias, activation=self.activation)


def replace_linears(
    model: M,
    weights: Mapping[str, LayerWeight | Array],
    predicate: Predicate | None = None,
) -> M:
    """An NNX model with `AWQLinear` in place of `nnx.Linear`.

    Args:
      model: any NNX module; that of ``nnx.eval_shape`` too, which spends no memory on the kernels
        that are replaced. Only layers of the very class `nnx.Linear` are seen.
      weights: as `load_hf` gives them, ``{path: weight, path.bias: Array}``; paths are those of
        the model, ``layers.0.mlp.up_proj``, of a shared layer the first that `nnx.iter_modules`
        gives. Other arrays are left to the caller.
      predicate: function of a path and its `nnx.Linear`, whether to replace it; by default those
        that `weights` has are. A linear that it refuses stays, with or without a weight.

    Returns:
      A new model, which shares all variables that it keeps; `dtype` and `preferred_element_type`
      of a linear are those of the layer in its place.

    Raises:
      ValueError: weights that no linear of the model has the path of, chosen linears without a
        weight, shapes or biases that disagree, biases that are not float; every one is named.
      TypeError: `weights` is no dict.
    """
    linears = {
        _dotted(path): Linear(
            module, tuple(module.kernel.get_value().shape), module.bias is not None
        )
        for path, module in nnx.iter_modules(model)
        if type(module) is nnx.Linear
    }
    chosen = match_weights(linears, weights, predicate)

    def replace(path: tuple[Any, ...], node: Any) -> Any:
        if type(node) is not nnx.Linear or _dotted(path) not in chosen:
            return node
        return AWQLinear(
            *chosen[_dotted(path)],
            dtype=node.dtype,
            preferred_element_type=node.preferred_element_type,
        )

    return nnx.recursive_map(replace, model)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
