"""Meshes with Explicit axes, where every op of a program has to know how its result is split."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def explicit_mesh(*operands: Any) -> AbstractMesh | None:
    """The mesh of the context or of an operand that has Explicit axes, if there is one."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(o).sharding.mesh for o in operands)]
    return next((m for m in meshes if m.explicit_axes), None)


def whole(a: Any, axis: int) -> Array:
    """`a`, and where Explicit axes split dimension `axis` of it, that gathered."""
    sharding = jax.typeof(a).sharding
    spec = list(sharding.spec)
    if not sharding.mesh.explicit_axes or spec[axis] is None:
        return a
    spec[axis] = None
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def on_auto_axes(fn: Callable[..., Any], state: Any, x: Any) -> Any:
    """``fn(state, x)``, its result split as `state` is, and how is left to the partitioner."""
    mesh = explicit_mesh(*jax.tree.leaves(state), x)
    if mesh is None:
        return fn(state, x)
    shardings = jax.tree.map(lambda a: NamedSharding(mesh, jax.typeof(a).sharding.spec), state)
    return jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=shardings)(state, x)
