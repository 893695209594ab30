"""`plan`: what an op would run for given shapes on a given device, without running it."""

import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jax_awq import _ffi
from jax_awq._primitive import OPS

Route = Literal["fused", "dequantize_dot", "group_products", "reference"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """What runs for one call of an op. Equal inputs give equal bits on every route.

    Attributes:
      op: name of the op.
      route: "fused" (one custom call), "dequantize_dot" (a kernel writes the weight, XLA
        multiplies), "group_products" (a kernel rounds the activations, XLA multiplies group by
        group) or "reference" (plain JAX).
      kernel: the kernel variant; "" on the reference route.
      tile: (rows, outputs) of a thread block, () where that has no meaning.
      split_k: blocks that share the sum over K, added in a fixed order.
      workspace_bytes: scratch memory, planned by XLA.
      accumulator: dtype of the sums.
      deterministic: whether two runs give the same bits.
      batch_invariant: whether, as asked, a row's bits depend neither on the number of rows nor on
        where among them it stands.
      refused: variant -> why it cannot run.
      reason: why no fused kernel runs, or why one gets codes of activations as 16-bit floats; else
        "".
    """

    op: str
    route: Route
    kernel: str
    tile: tuple[int, ...]
    split_k: int
    workspace_bytes: int
    accumulator: str
    deterministic: bool
    batch_invariant: bool
    refused: Mapping[str, str]
    reason: str


class Target(NamedTuple):
    """A CUDA device as the planning code sees it."""

    arch: int  # 90 for sm_90
    sm_count: int
    local: bool  # whether the program runs in this process


_DEFAULT_TARGET = Target(arch=90, sm_count=132, local=False)


def plan(op: str, *args: Any, device: jax.Device | str | None = None, **kwargs: Any) -> KernelPlan:
    """Tells which kernel a call of an op would run, from shapes and dtypes alone.

    Args:
      op: name of a public op, such as "awq_gemm".
      *args: as for the op; `jax.ShapeDtypeStruct`, or an `AWQWeight` of them, stands for an array.
      device: a device, or an architecture such as "sm_90"; by default the first device of the
        default backend.
      **kwargs: as for the op.

    Returns:
      The plan for that device.

    Raises:
      ValueError: `op` or `device` is unknown, or the op refuses the arguments.
      TypeError: the op refuses a dtype.
    """
    if op not in OPS:
        raise ValueError(f"plan: op must be one of {sorted(OPS)}, got {op!r}")
    device = jax.devices()[0] if device is None else device
    public = getattr(importlib.import_module(f"jax_awq.ops.{op}"), op)
    # Positional ones under their number.
    given = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
    arrays = {name: value for name, value in given.items() if _is_traced(value)}

    def call(arrays: dict[str, Any]) -> Any:
        values = {**given, **arrays}
        positional = [values.pop(str(i)) for i in range(len(args))]
        return public(*positional, **values)

    jaxpr = jax.make_jaxpr(call)(arrays)
    eqn = next(_equations(jaxpr.jaxpr, f"jax_awq.{op}"))
    return OPS[op].plan(device, *(v.aval for v in eqn.invars), **eqn.params)


def _is_traced(value: Any) -> bool:
    """Whether an argument is of arrays; numbers and dtypes of numpy have shapes, too."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(
        hasattr(leaf, "shape") and not isinstance(leaf, (type, np.dtype, np.integer))
        for leaf in leaves
    )


def _equations(jaxpr: Any, name: str) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        elif "jaxpr" in eqn.params:  # of the jit around every public function
            yield from _equations(eqn.params["jaxpr"].jaxpr, name)


def target_of(device: jax.Device | str | None) -> Target | None:
    """The CUDA device to plan for; None for a device that is not one.

    None as `device` is a program lowered here to run elsewhere: planned for the default target.
    """
    if device is None:
        return _DEFAULT_TARGET
    if isinstance(device, str):
        match = re.fullmatch(r"sm_(\d{2,3})[af]?", device)
        if match is None:
            raise ValueError(f"plan: device must look like 'sm_90', got {device!r}")
        return _DEFAULT_TARGET._replace(arch=int(match[1]))
    if not isinstance(device, jax.Device):
        raise ValueError(f"plan: device must be a jax.Device or look like 'sm_90', got {device!r}")
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return None
    arch = int(str(device.compute_capability).replace(".", ""))
    return Target(arch=arch, sm_count=device.core_count, local=True)


def why_reference(device: jax.Device | str | None, target: Target | None, forced: str) -> str:
    """Why no kernel is considered at all, or ""."""
    if forced == "reference":
        return "JAX_AWQ_FORCE is reference"
    if target is None:
        return f"there is no kernel for platform {device.platform}"  # type: ignore[union-attr]
    return _ffi.unavailable(on_device=target.local)


def kernel_plan(
    op: str,
    kernel: str,
    *,
    route: Route = "fused",
    tile: tuple[int, ...] = (),
    split_k: int = 1,
    workspace_bytes: int = 0,
    accumulator: str = "float32",
    refused: Mapping[str, str] | None = None,
    reason: str = "",
) -> KernelPlan:
    """A plan by what is particular about it; every route gives equal bits for equal inputs."""
    return KernelPlan(
        op=op,
        route=route,
        kernel=kernel,
        tile=tile,
        split_k=split_k,
        workspace_bytes=workspace_bytes,
        accumulator=accumulator,
        deterministic=True,
        batch_invariant=False,
        refused=refused or {},
        reason=reason,
    )


def reference_plan(op: str, reason: str, refused: Mapping[str, str] | None = None) -> KernelPlan:
    return kernel_plan(op, "", route="reference", refused=refused, reason=reason)


def known(dim: Any) -> int:
    """0 for a symbolic dimension, which the planning code takes as not known."""
    return dim if isinstance(dim, int) else 0
