"""One call of `awq_gemm_w4a8` or `awq_gemm_w4a4`: operands, plain-JAX form, plan, kernels.

Operands: x, qweight, scales, [qzeros], [scale of x], [bias]. `x` is float, or int8 codes, which
then have a scale. The parameter `scale` says what a given one has an entry for: "row", "one", or ""
where there is none. Ranks are those of `ranks`, and each may have a leading batch dimension.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq import _ffi
from jax_awq._batching import aligned
from jax_awq._packing import weight_size
from jax_awq._plan import KernelPlan, kernel_plan, known, reference_plan, target_of, why_reference
from jax_awq._primitive import OPS
from jax_awq.ops import _activation, _weight
from jax_awq.ops._epilogue import epilogue

BITS = {"int8": 8, "int4": 4}
FLOAT8 = "float8_e4m3fn"
_LARGEST_FLOAT8 = 448


def ranks(*, symmetric, scale, has_bias, **params) -> list[int]:
    return [2, 2, 2] + [2] * (not symmetric) + [1] * bool(scale) + [1] * has_bias


def operands_of(operands, *, symmetric, scale, has_bias, **params):
    """(x, (qweight, scales[, qzeros]), scale of x or None, bias or None)."""
    x, *rest = operands
    bias = rest.pop() if has_bias else None
    given = rest.pop() if scale else None
    return x, tuple(rest), given, bias


def joined(weight, *others) -> tuple[Any, ...]:
    """The operands after `x`, without those that are None."""
    return (*weight, *(o for o in others if o is not None))


def out_avals(*operands, layout, out_dtype, **params):
    _, n = weight_size(operands[1].shape, layout)
    batch = next(
        (o.shape[:1] for o, rank in zip(operands, ranks(**params), strict=True) if o.ndim > rank),
        (),
    )
    return (jax.ShapeDtypeStruct((*batch, operands[0].shape[-2], n), out_dtype),)


def is_codes(x) -> bool:
    return x.dtype == jnp.int8


def scale_of(absmax: Any, codes: str) -> Array:
    if codes == FLOAT8:
        return _activation.scale_to(absmax, _LARGEST_FLOAT8)
    return _activation.scale_of(absmax, BITS[codes])


def quantize(x, scale, codes: str) -> tuple[Array, Array]:
    """Codes (..., M, K), int8 or float8, and their scale (..., M) or (..., 1)."""
    if is_codes(x):
        return x, scale
    if scale is None:
        scale = scale_of(_activation.absmax_of(x, axis=-1), codes)
    if codes == FLOAT8:
        steps = _activation.steps_of(x, scale[..., None], _LARGEST_FLOAT8)
        # Where it sees the way back to float32, XLA may leave out both conversions on a GPU.
        return lax.optimization_barrier(steps.astype(jnp.float8_e4m3fn)), scale
    return _activation.codes_of(x, scale[..., None], BITS[codes]), scale


def dequantize(x, scale, codes: str) -> Array:
    """What `x` stands for, float32; differentiable in a float `x`, as if it were not rounded."""
    q, scale = quantize(x, scale, codes)
    rounded = operator.mul(*aligned(q.astype(jnp.float32), scale[..., None]))
    if is_codes(x):
        return rounded
    x = x.astype(jnp.float32)
    return x + lax.stop_gradient(rounded - x)


def reference(*operands, codes, **params):
    x, weight, scale, bias = operands_of(operands, **params)
    return (_finish(*quantize(x, scale, codes), weight, bias, **params),)


def _finish(q, sx, weight, bias, *, layout, activation, out_dtype, **params) -> Array:
    y = operator.mul(*aligned(_group_products(q, *weight, layout=layout), sx[..., None]))
    return epilogue(y, bias, activation=activation, out_dtype=out_dtype)


def _group_products(q, qweight, scales, qzeros=None, *, layout) -> Array:
    """Sum over groups of ``scales * (q @ (codes - zeros))``, float32 (..., M, N).

    Integers are exact inside a group, products of float8 codes are, too; float32 sums of groups
    follow in ascending order. One group at a time, since all of them at once would take K / G times
    the memory of the result.
    """
    weight = int8_weight(qweight, qzeros, layout=layout)
    groups = scales.shape[-2]
    size = weight.shape[-2] // groups
    parts = (
        jnp.moveaxis(q.reshape(*q.shape[:-1], groups, size), -2, 0),
        jnp.moveaxis(_weight.grouped(weight, groups), -3, 0),
        jnp.moveaxis(scales.astype(jnp.float32), -2, 0),
    )

    def product(part):
        left, right, scale = part
        if is_codes(left):
            sums = jnp.matmul(left, right, preferred_element_type=jnp.int32).astype(jnp.float32)
        else:
            sums = jnp.matmul(
                left.astype(jnp.float32),
                right.astype(jnp.float32),
                precision=lax.Precision.HIGHEST,
            )
        return operator.mul(*aligned(sums, scale[..., None, :]))

    def add(y, part):
        return y + product(part), None

    first = product(jax.tree.map(lambda a: a[0], parts))
    if not isinstance(groups, int):  # symbolic, so that there is no telling of a rest
        return lax.scan(add, jnp.zeros_like(first), parts)[0]
    if groups == 1:
        return first
    return lax.scan(add, first, jax.tree.map(lambda a: a[1:], parts))[0]


def int8_weight(qweight, qzeros=None, *, layout) -> Array:
    """``q - z`` as int8 (..., K, N): -15 to 15."""
    codes = _weight.code_minus_zero(qweight, qzeros, layout=layout, dtype=jnp.int8)
    return codes.reshape(*codes.shape[:-3], codes.shape[-3] * codes.shape[-2], codes.shape[-1])


def plan_call(op, device, *operands, **params):
    x, (qweight, scales, *zeros), scale, _ = operands_of(operands, **params)
    (out,) = out_avals(*operands, **params)
    target = target_of(device)
    reason = why_reference(device, target, params["variant"])
    if not reason and any(isinstance(d, int) and d == 0 for d in (*out.shape, x.shape[-1])):
        reason = "an operand or the result is empty"
    if reason or target is None:
        return _with_accumulator(reference_plan(op, reason), params)
    k, n = weight_size(qweight.shape, params["layout"])
    if reason := _weight.no_kernel(k, n, params["group_size"]):
        return _composed(op, x, reason, {}, params)
    batch = known(out.shape[0]) if len(out.shape) == 3 else 1
    own_scale = scale is not None and scale.ndim == 2
    found = _ffi.plan_awq_gemm_w4a8(
        m=known(out.shape[-2]),
        n=n,
        k=k,
        batch=batch,
        x_batch=batch if x.ndim == 3 else 1,
        scale_batch=batch if own_scale else 1,
        group_size=_group_size(k, params),
        layout=params["layout"],
        x_dtype=str(x.dtype),
        scales_dtype=str(scales.dtype),
        out_dtype=str(out.dtype),
        has_zeros=bool(zeros),
        has_activation=params["activation"] != "none",
        codes=params["codes"],
        scale=params["scale"],
        variant=params["variant"],
        arch=target.arch,
        sm_count=target.sm_count,
    )
    refused = dict(found["refused"])
    if found["variant"] == "reference":
        return _composed(op, x, found["reason"], refused, params)
    fused = kernel_plan(
        op,
        found["variant"],
        tile=tuple(found["tile"]),
        split_k=found["split_k"],
        workspace_bytes=found["workspace_bytes"],
        refused=refused,
        reason=found["reason"],
    )
    return fused if found["as_floats"] else _with_accumulator(fused, params)


def _composed(op, x, reason, refused, params) -> KernelPlan:
    """Of what no fused kernel takes: a kernel that rounds is there for integers alone."""
    if is_codes(x) or params["codes"] == FLOAT8:
        plan = reference_plan(op, reason, refused)
    else:
        plan = kernel_plan(
            op, "quantize_activation", route="group_products", refused=refused, reason=reason
        )
    return _with_accumulator(plan, params)


def _group_size(k, params) -> int:
    return k if params["group_size"] == -1 else params["group_size"]


def _with_accumulator(plan: KernelPlan, params) -> KernelPlan:
    return dataclasses.replace(
        plan, accumulator="float32" if params["codes"] == FLOAT8 else "int32"
    )


def kernel(op, plan, *operands, codes, **params):
    x, weight, scale, bias = operands_of(operands, **params)
    if plan.route == "group_products":
        return (_finish(*_quantize_kernel(x, scale, BITS[codes]), weight, bias, **params),)
    qweight, scales, *zeros = weight
    k, _ = weight_size(qweight.shape, params["layout"])
    (result,) = out_avals(*operands, **params)
    return (
        _ffi.call(
            "awq_gemm_w4a8",
            result,
            x,
            qweight,
            scales,
            *(zeros or [jnp.zeros((0,), jnp.int32)]),
            jnp.zeros((0,), jnp.float32) if scale is None else scale,
            jnp.zeros((0,), jnp.float32) if bias is None else bias,
            workspace_bytes=plan.workspace_bytes,
            group_size=_group_size(k, params),
            layout=params["layout"],
            activation=params["activation"],
            codes=codes,
            variant=params["variant"],
        ),
    )


def _quantize_kernel(x, scale, bits: int) -> tuple[Array, Array]:
    operands = [x]
    if scale is not None:
        # The kernel's scales have the rank of x: a batch of scales for one x makes a batch of it.
        x = jnp.broadcast_to(x, (*scale.shape[:-1], *x.shape[-2:]))
        given = scale[..., None]
        operands = [x, jnp.broadcast_to(given, (*x.shape[:-2], *given.shape[-2:]))]
    q, *found = OPS["quantize_activation"].kernel(
        None, *operands, bits=bits, group_size=0, variant=""
    )
    return _activation.unpack_codes(q, bits, x.shape[-1]), found[0] if scale is None else scale
