"""Frozen dataclasses as pytrees."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

from jax import export
from jax.tree_util import GetAttrKey, register_pytree_with_keys

C = TypeVar("C", bound=type)


def pytree(*static: str) -> Callable[[C], C]:
    """Decorator of a frozen dataclass: fields are leaves, or pytrees, but those named in `static`.

    `jax.export` can store it, under ``jax_awq.<name of the class>``.
    """

    def register(cls: C) -> C:
        names = [field.name for field in dataclasses.fields(cls)]
        leaves = [name for name in names if name not in static]

        def flatten_with_keys(node: Any):
            keyed = [(GetAttrKey(name), getattr(node, name)) for name in leaves]
            return keyed, tuple(getattr(node, name) for name in static)

        def flatten(node: Any):
            keyed, aux = flatten_with_keys(node)
            return [value for _, value in keyed], aux

        def unflatten(aux: Any, values: Any) -> Any:
            # JAX puts in leaves that are no arrays (axes, shardings, None), so nothing is checked.
            node: Any = object.__new__(cls)
            for name, value in zip((*leaves, *static), (*values, *aux), strict=True):
                object.__setattr__(node, name, value)
            return node

        def serialize(aux: Any) -> bytes:
            try:
                return json.dumps(aux).encode()
            except TypeError:  # a symbolic dimension
                found = ", ".join(f"{n}={a}" for n, a in zip(static, aux, strict=True))
                raise ValueError(
                    f"{cls.__name__}: to be stored with an exported function, {', '.join(static)} "
                    f"must be numbers and names, got {found}; let the function take or return "
                    "arrays instead"
                ) from None

        register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"jax_awq.{cls.__name__}",
            serialize_auxdata=serialize,
            deserialize_auxdata=lambda data: tuple(json.loads(data)),
        )
        return cls

    return register
