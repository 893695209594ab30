"""`DecoderLM`: a loaded model as an Equinox module."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_awq.models import decoder
from jax_awq.models.config import DecoderConfig
from jax_awq.models.model import Model

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "jax_awq.models.equinox needs Equinox: pip install 'jax_awq[models,equinox]'"
    ) from error

__all__ = ["DecoderLM"]


class DecoderLM(eqx.Module):
    """The decoder of a `Model` with its weights as leaves; no array is copied.

    To freeze the packed ones, scales and all, partition it with
    ``eqx.partition(model, eqx.is_inexact_array, is_leaf=jax_awq.equinox.is_awq_weight)``.

    Args:
      model: of `jax_awq.models.load`.

    Attributes:
      params: the tree that `jax_awq.models.decoder` describes.
      config: `DecoderConfig`, static.
    """

    params: dict[str, Any]
    config: DecoderConfig = eqx.field(static=True)

    def __init__(self, model: Model):
        self.params = model.params
        self.config = model.config

    def __call__(self, input_ids: Any, start: Any = None, *, key: Any = None) -> Array:
        """Next-token logits, float32 (B, T, V), of integer tokens (B, T); `key` is ignored.

        Unlike the layers of Equinox it takes a batch.

        Args:
          start: int32 (B,), the first token of each row that is not padding; None for no padding.

        Raises:
          ValueError: `input_ids` has another form.
        """
        return decoder.logits(self.params, jnp.asarray(input_ids), start, config=self.config)

    def as_model(self) -> Model:
        """The `Model` of these weights, which generates."""
        return Model(self.params, self.config)
