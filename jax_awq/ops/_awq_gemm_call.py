"""One call of `awq_gemm`: its operands, the plain-JAX form, the plan and the kernel."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jax_awq import _ffi
from jax_awq._packing import weight_size
from jax_awq._plan import kernel_plan, known, reference_plan, target_of, why_reference
from jax_awq._primitive import OPS
from jax_awq.ops import _weight
from jax_awq.ops._epilogue import epilogue


def is_batched(weight, params) -> bool:
    return any(o.ndim > rank for o, rank in zip(weight, ranks(**params)[1:], strict=True))


def ranks(*, symmetric, has_bias, **params) -> list[int]:
    return [2, 2, 2] + [2] * (not symmetric) + [1] * has_bias


def operands_of(operands, *, symmetric, has_bias, **params):
    """(x, qweight, scales, qzeros or None, bias or None)."""
    x, qweight, scales, *rest = operands
    bias = rest.pop() if has_bias else None
    return x, qweight, scales, None if symmetric else rest[0], bias


def out_avals(*operands, **params):
    k, n = weight_size(operands[1].shape, params["layout"])
    batch = next(
        (o.shape[:1] for o, rank in zip(operands, ranks(**params), strict=True) if o.ndim > rank),
        (),
    )
    shape = (*batch, operands[0].shape[-2], k if params["transpose"] else n)
    return (jax.ShapeDtypeStruct(shape, params["out_dtype"]),)


def reference(*operands, layout, transpose, **params):
    x, qweight, scales, qzeros, bias = operands_of(operands, **params)
    weight = _weight.dequantize(qweight, scales, qzeros, layout=layout, dtype=x.dtype)
    weight = weight.swapaxes(-1, -2) if transpose else weight
    if not params["batch_invariant"]:
        return (dot(x, weight, bias, **params),)
    # XLA chooses the order of a sum by the number of rows, so each row is a product of its own.
    rows = jnp.moveaxis(x, -2, 0)[..., None, :]
    y = lax.map(lambda row: dot(row, weight, bias, **params), rows)
    return (jnp.moveaxis(y[..., 0, :], 0, -2),)


def dot(x, weight, bias, *, activation, out_dtype, **params):
    # Without HIGHEST a GPU would round float32 operands to 10 bits.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.matmul(x, weight, preferred_element_type=jnp.float32, precision=precision)
    return epilogue(y, bias, activation=activation, out_dtype=out_dtype)


def plan_call(device, *operands, **params):
    found = _plan_call(device, *operands, **params)
    return dataclasses.replace(found, batch_invariant=params["batch_invariant"])


def _plan_call(device, *operands, **params):
    x, qweight, scales, qzeros, _ = operands_of(operands, **params)
    (out,) = out_avals(*operands, **params)
    target = target_of(device)
    reason = why_reference(device, target, params["variant"])
    if not reason and any(isinstance(d, int) and d == 0 for d in (*out.shape, x.shape[-1])):
        reason = "an operand or the result is empty"
    k, n = weight_size(qweight.shape, params["layout"])
    reason = reason or _weight.no_kernel(k, n, params["group_size"])
    if reason or target is None:
        return reference_plan("awq_gemm", reason)
    found = _ffi.plan_awq_gemm(
        m=known(out.shape[-2]),
        n=n,
        k=k,
        batch=known(out.shape[0]) if len(out.shape) == 3 else 1,
        group_size=_group_size(k, params),
        layout=params["layout"],
        x_dtype=str(x.dtype),
        scales_dtype=str(scales.dtype),
        out_dtype=str(out.dtype),
        has_zeros=qzeros is not None,
        has_activation=params["activation"] != "none",
        transpose=params["transpose"],
        split_k=params["split_k"],
        batch_invariant=params["batch_invariant"],
        variant=params["variant"],
        arch=target.arch,
        sm_count=target.sm_count,
    )
    kernel, refused = found["variant"], dict(found["refused"])
    if kernel == "reference":
        # The last one tried takes every shape, so what it says is what no kernel can do.
        return reference_plan("awq_gemm", ["", *refused.values()][-1], refused)
    fused = kernel != "dequantize_dot"
    return kernel_plan(
        "awq_gemm",
        kernel,
        route="fused" if fused else "dequantize_dot",
        tile=tuple(found["tile"]) if fused else (),
        split_k=found["split_k"],
        workspace_bytes=found["workspace_bytes"],
        refused=refused,
    )


def _group_size(k, params) -> int:
    return k if params["group_size"] == -1 else params["group_size"]


def kernel(plan, *operands, layout, transpose, **params):
    x, qweight, scales, qzeros, bias = operands_of(operands, **params)
    if plan.route == "dequantize_dot":
        weight = operands[1:-1] if params["has_bias"] else operands[1:]
        (weight,) = OPS["awq_dequantize"].kernel(
            plan,
            *weight,
            layout=layout,
            group_size=params["group_size"],
            symmetric=params["symmetric"],
            dtype=x.dtype,
            variant="",
        )
        weight = weight.swapaxes(-1, -2) if transpose else weight
        if bias is None and params["activation"] == "none":
            # The library sums in float32 and rounds once by itself; a float32 result in between
            # would cost more than the dequantization.
            return (jnp.matmul(x, weight, preferred_element_type=params["out_dtype"]),)
        return (dot(x, weight, bias, **params),)
    k, _ = weight_size(qweight.shape, layout)
    (result,) = out_avals(*operands, layout=layout, transpose=transpose, **params)
    return (
        _ffi.call(
            "awq_gemm",
            result,
            x,
            qweight,
            scales,
            jnp.zeros((0,), jnp.int32) if qzeros is None else qzeros,
            jnp.zeros((0,), x.dtype) if bias is None else bias,
            workspace_bytes=plan.workspace_bytes,
            group_size=_group_size(k, params),
            layout=layout,
            activation=params["activation"],
            split_k=params["split_k"],
            transpose=transpose,
            batch_invariant=params["batch_invariant"],
            variant=params["variant"],
        ),
    )
