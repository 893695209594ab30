"""One call of `int8_matmul` or `int4_matmul`: operands, the plain-JAX form, plan and kernel.

After `a` and `b` come those of scale_a, scale_b, scale_c and bias that are given. The parameter
`given` names them, each with what it has an entry for: "row", "column" or "one" for a scalar. All
of them have rank 1, `a` and `b` rank 2, and each may have a leading batch dimension.
"""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq import _ffi
from jax_awq._batching import aligned
from jax_awq._plan import kernel_plan, known, reference_plan, target_of, why_reference
from jax_awq.ops._epilogue import epilogue

INT32 = jnp.dtype(jnp.int32)
RAW: dict[str, Any] = {"given": (), "activation": "none", "out_dtype": INT32}  # sums alone


def ranks(given) -> list[int]:
    return [2, 2] + [1] * len(given)


def out_avals(*operands, given, out_dtype, **params):
    a, b = operands[:2]
    batch = next(
        (o.shape[:1] for o, r in zip(operands, ranks(given), strict=True) if o.ndim > r), ()
    )
    return (jax.ShapeDtypeStruct((*batch, a.shape[-2], b.shape[-1]), out_dtype),)


def contraction(a, *, packed, odd, **params):
    """K of the product."""
    return 2 * a.shape[-1] - odd if packed else a.shape[-1]


def reference(a, b, *rest, packed, odd, **params):
    if packed:
        a, b = unpack(a, -1, odd), unpack(b, -2, odd)
    return (finish(jnp.matmul(a, b, preferred_element_type=jnp.int32), *rest, **params),)


def unpack(codes, axis: int, odd: bool) -> Array:
    """int8 codes of int4 packed along `axis`, without the last half where `odd`."""
    low, high = (codes << 4) >> 4, codes >> 4  # arithmetic shifts: signs are kept
    shape = list(codes.shape)
    shape[axis] *= 2
    codes = jnp.stack([low, high], axis).reshape(shape)
    return jax.lax.slice_in_dim(codes, 0, shape[axis] - odd, axis=len(shape) + axis)


def finish(sums, *values, given, activation, out_dtype, **params) -> Array:
    """What comes after the int32 sums, in the order in which kernels do it."""
    if out_dtype == INT32:
        return sums
    by_name = {name: value for (name, _), value in zip(given, values, strict=True)}
    y = sums.astype(jnp.float32)
    if "scale_a" in by_name:
        y = operator.mul(*aligned(y, by_name["scale_a"][..., None]))
    columns = [by_name[name][..., None, :] for name in ("scale_b", "scale_c") if name in by_name]
    if columns:
        y, *columns = aligned(y, *columns)
        y = y * math.prod(columns)
    return epilogue(y, by_name.get("bias"), activation=activation, out_dtype=out_dtype)


def plan_call(op, device, *operands, **params):
    a = operands[0]
    (out,) = out_avals(*operands, **params)
    target = target_of(device)
    reason = why_reference(device, target, params["variant"])
    if not reason and any(isinstance(d, int) and d == 0 for d in (*out.shape, a.shape[-1])):
        reason = "an operand or the result is empty"
    if not reason and not all(isinstance(d, int) for d in (out.shape[-1], a.shape[-1])):
        reason = "K or N is symbolic"
    if reason or target is None:
        return dataclasses.replace(reference_plan(op, reason), accumulator="int32")
    batch = known(out.shape[0]) if len(out.shape) == 3 else 1
    found = _ffi.plan_int8_matmul(
        m=known(out.shape[-2]),
        n=out.shape[-1],
        k=contraction(a, **params),
        batch=batch,
        a_batch=batch if a.ndim == 3 else 1,
        packed=params["packed"],
        variant=params["variant"],
        arch=target.arch,
        sm_count=target.sm_count,
    )
    kernel, refused = found["variant"], dict(found["refused"])
    if kernel == "reference":
        plan = reference_plan(op, ["", *refused.values()][-1], refused)
        return dataclasses.replace(plan, accumulator="int32")
    return kernel_plan(
        op,
        kernel,
        tile=tuple(found["tile"]),
        split_k=found["split_k"],
        workspace_bytes=found["workspace_bytes"],
        accumulator="int32",
        refused=refused,
    )


def kernel(op, plan, a, b, *values, **params):
    (result,) = out_avals(a, b, *values, **params)
    by_name = {name: v for (name, _), v in zip(params["given"], values, strict=True)}
    absent = jnp.zeros((0,), jnp.float32)
    names = ("scale_a", "scale_b", "scale_c", "bias")
    return (
        _ffi.call(
            op,
            result,
            a,
            b,
            *(by_name.get(name, absent) for name in names),
            workspace_bytes=plan.workspace_bytes,
            k=contraction(a, **params),
            activation=params["activation"],
            variant=params["variant"],
        ),
    )
