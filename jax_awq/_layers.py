"""What the layers of every framework share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

from jax_awq._checks import FLOATS, check_choice, check_dtype, check_shape
from jax_awq.ops._epilogue import ACTIVATIONS
from jax_awq.ops.awq_gemm import awq_gemm
from jax_awq.quantized import Int4Weight, Int8Weight, QuantizedLinear
from jax_awq.weights import WEIGHTS, AWQWeight, PermutedWeight

LAYER_WEIGHTS = (*WEIGHTS, Int8Weight, Int4Weight)
LayerWeight = AWQWeight | PermutedWeight | Int8Weight | Int4Weight

_SHOWN = 8  # linears of a model in a message

Predicate = Callable[[str, Any], bool]


class Linear(NamedTuple):
    """A float linear of a model."""

    module: Any
    shape: tuple[Any, ...]  # (..., K, N)
    has_bias: bool


def check_layer(op: str, weight: Any, bias: Any, activation: str | None) -> None:
    if not isinstance(weight, LAYER_WEIGHTS):
        raise TypeError(
            f"{op}: weight must be an AWQWeight or a PermutedWeight, an Int8Weight or an "
            f"Int4Weight, got {type(weight).__name__}"
        )
    if bias is not None:
        check_dtype(op, "bias", bias, *FLOATS)
        check_shape(op, "bias", bias, (*weight.shape[:-2], weight.shape[-1]))
    check_choice(op, "activation", activation, (None, *sorted(set(ACTIVATIONS) - {"none"})))


def multiply(
    x: Any, weight: Any, bias: Any, *, activation: str | None, out_dtype: Any = None
) -> Array:
    """``activation(x @ weight + bias)``; x is rounded to int8 or int4 for a weight of these."""
    if isinstance(weight, WEIGHTS):
        return awq_gemm(x, weight, bias=bias, activation=activation, out_dtype=out_dtype)
    return QuantizedLinear(weight, bias, activation=activation)(x, out_dtype=out_dtype)


def match_weights(
    linears: Mapping[str, Linear], weights: Mapping[str, Any], predicate: Predicate | None
) -> dict[str, tuple[LayerWeight, Any]]:
    """{path: (weight, bias or None)} of the linears to replace.

    Raises:
      ValueError: a weight or a linear without its counterpart or of another shape, or a bias that
        is not float; every one is named.
      TypeError: `weights` is no dict.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"replace_linears: weights must be a dict by path, got {type(weights).__name__}"
        )
    quantized = {path: w for path, w in weights.items() if isinstance(w, LAYER_WEIGHTS)}
    unmatched = [path for path in quantized if path not in linears]
    problems = [f"{path} is unused: the model has no linear of that path" for path in unmatched]
    if unmatched:
        known = list(linears)
        more = ", ..." if len(known) > _SHOWN else ""
        problems.append(f"the linears of the model are {', '.join(known[:_SHOWN])}{more}")
    result = {}
    for path, linear in linears.items():
        if not (path in quantized if predicate is None else predicate(path, linear.module)):
            continue
        if path not in quantized:
            problems.append(f"{path} is missing: the linear of that path was chosen")
            continue
        weight, bias = quantized[path], weights.get(f"{path}.bias")
        if weight.shape != linear.shape:
            problems.append(f"{path} must have shape {linear.shape}, got {weight.shape}")
        want = (*linear.shape[:-2], linear.shape[-1])
        if linear.has_bias and bias is None:
            problems.append(f"{path}.bias is missing: the linear has a bias")
        elif bias is not None and not linear.has_bias:
            problems.append(f"{path}.bias is unused: the linear has no bias")
        elif bias is not None and (got := _dtype_name(bias)) not in FLOATS:
            problems.append(f"{path}.bias must be {' or '.join(FLOATS)}, got {got}")
        elif bias is not None and tuple(bias.shape) != want:
            problems.append(f"{path}.bias must have shape {want}, got {tuple(bias.shape)}")
        result[path] = weight, bias
    if problems:
        raise ValueError("replace_linears: " + "\n".join(problems))
    return result


def _dtype_name(array: Any) -> str:
    return str(getattr(array, "dtype", type(array).__name__))
