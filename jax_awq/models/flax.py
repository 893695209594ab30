"""`DecoderLM`: a loaded model as a Flax NNX module."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq.models import decoder
from jax_awq.models.model import Model
from jax_awq.weights import WEIGHTS

try:
    from flax import nnx

    from jax_awq.flax import AWQParam
except ImportError as error:
    raise ImportError(
        "jax_awq.models.flax needs Flax: pip install 'jax_awq[models,flax]'"
    ) from error

__all__ = ["DecoderLM"]


class DecoderLM(nnx.Module):
    """The decoder of a `Model` with its weights in NNX variables; no array is copied.

    Packed weights are `AWQParam`, everything else (embedding, norms, biases, dense linears) is
    `nnx.Param`, so that `nnx.grad` and `nnx.Optimizer(..., wrt=nnx.Param)` leave the former alone.

    A call is compiled as it is. Around it take ``nnx.jit(..., graph=False)`` where no variable
    changes: by default `nnx.jit` gives back every variable, a copy of all weights for each call.

    Args:
      model: of `jax_awq.models.load`.

    Attributes:
      params: the tree that `jax_awq.models.decoder` describes, with variables as its leaves.
      config: `DecoderConfig`.
    """

    def __init__(self, model: Model):
        self.params = nnx.data(jax.tree.map(_variable, model.params, is_leaf=_is_weight))
        self.config = model.config

    def __call__(self, input_ids: Any, start: Any = None) -> Array:
        """Next-token logits, float32 (B, T, V), of integer tokens (B, T).

        Args:
          start: int32 (B,), the first token of each row that is not padding; None for no padding.

        Raises:
          ValueError: `input_ids` has another form.
        """
        params = self.as_model().params
        return decoder.logits(params, jnp.asarray(input_ids), start, config=self.config)

    def as_model(self) -> Model:
        """The `Model` of the weights as they are now, which generates."""
        values = jax.tree.map(lambda v: v.get_value(), self.params, is_leaf=_is_variable)
        return Model(values, self.config)


def _variable(value: Any) -> nnx.Variable:
    return AWQParam(value) if _is_weight(value) else nnx.Param(value)


def _is_weight(node: Any) -> bool:
    return isinstance(node, WEIGHTS)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
