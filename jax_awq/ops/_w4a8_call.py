"""One call of `awq_gemm_w4a8` or `awq_gemm_w4a4`: operands, plain-JAX form, plan, kernels.

Operands: x, qweight, scales, [qzeros], [scale of x], [bias]. `x` is float, or int8 codes, which
then have a scale. The parameter `scale` says what a given one has an entry for: "row", "one", or ""
where there is none. Ranks are those of `ranks`, and each may have a leading batch dimension.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq._packing import weight_size
from jax_awq._plan import KernelPlan, kernel_plan, reference_plan, target_of, why_reference
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
        return steps.astype(jnp.float8_e4m3fn), scale
    return _activation.codes_of(x, scale[..., None], BITS[codes]), scale


def dequantize(x, scale, codes: str) -> Array:
    """What `x` stands for, float32; differentiable in a float `x`, as if it were not rounded."""
    q, scale = quantize(x, scale, codes)
    rounded = q.astype(jnp.float32) * scale[..., None]
    if is_codes(x):
        return rounded
    x = x.astype(jnp.float32)
    return x + lax.stop_gradient(rounded - x)


def reference(*operands, codes, **params):
    x, weight, scale, bias = operands_of(operands, **params)
    return (_finish(*quantize(x, scale, codes), weight, bias, **params),)


def _finish(q, sx, weight, bias, *, layout, activation, out_dtype, **params) -> Array:
    y = _group_products(q, *weight, layout=layout) * sx[..., None]
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
        return sums * scale[..., None, :]

    first, *rest = (jax.tree.map(lambda a, s=s: a[s], parts) for s in (0, slice(1, None)))
    total = product(first)
    if groups == 1:
        return total
    return lax.scan(lambda y, part: (y + product(part), None), total, *rest)[0]


def int8_weight(qweight, qzeros=None, *, layout) -> Array:
    """``q - z`` as int8 (..., K, N): -15 to 15."""
    codes = _weight.code_minus_zero(qweight, qzeros, layout=layout, dtype=jnp.int8)
    return codes.reshape(*codes.shape[:-3], codes.shape[-3] * codes.shape[-2], codes.shape[-1])


def plan_call(op, device, *operands, **params):
    x, weight, *_ = operands_of(operands, **params)
    (out,) = out_avals(*operands, **params)
    reason = why_reference(device, target_of(device), params["variant"])
    if not reason and any(isinstance(d, int) and d == 0 for d in (*out.shape, x.shape[-1])):
        reason = "an operand or the result is empty"
    if not reason and params["codes"] == FLOAT8:
        reason = f"there is no kernel for {FLOAT8} activations"
    if reason:
        return _with_accumulator(reference_plan(op, reason), params)
    groups = weight[1].shape[-2]
    refused, found = {"int8_matmul": f"{groups} groups have scales of their own"}, None
    if groups == 1:
        found = _plan_int8_matmul(device, operands, params)
        refused = dict(found.refused)
    if found is not None and found.route == "fused":
        return dataclasses.replace(found, op=op, route="int8_matmul")
    if found is not None:
        refused["int8_matmul"] = found.reason
    if is_codes(x):
        return _with_accumulator(reference_plan(op, refused["int8_matmul"], refused), params)
    return kernel_plan(
        op, "quantize_activation", route="group_products", accumulator="int32", refused=refused
    )


def _with_accumulator(plan: KernelPlan, params) -> KernelPlan:
    return dataclasses.replace(
        plan, accumulator="float32" if params["codes"] == FLOAT8 else "int32"
    )


def _plan_int8_matmul(device, operands, params) -> KernelPlan:
    def run(*operands):
        x, weight, scale, bias = operands_of(operands, **params)
        return _int8_operands(*quantize(x, scale, params["codes"]), weight, bias, params)

    shapes = jax.eval_shape(run, *(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands))
    return OPS["int8_matmul"].plan(device, *shapes, **_int8_params(params))


def _int8_operands(q, scale, weight, bias, params) -> tuple[Array, ...]:
    """Operands of `int8_matmul`, for a weight of one group."""
    qweight, scales, *zeros = weight
    b = int8_weight(qweight, *zeros, layout=params["layout"])
    column = scales[..., 0, :].astype(jnp.float32)
    return q, b, scale, column, *(() if bias is None else (bias,))


def _int8_params(params) -> dict[str, Any]:
    given = [("scale_a", params["scale"] or "row"), ("scale_b", "column")]
    return {
        "given": (*given, *[("bias", "column")] * params["has_bias"]),
        "activation": params["activation"],
        "out_dtype": params["out_dtype"],
        "packed": False,
        "odd": False,
        "variant": "",
    }


def kernel(op, plan, *operands, codes, **params):
    x, weight, scale, bias = operands_of(operands, **params)
    q, scale = (x, scale) if is_codes(x) else _quantize_kernel(x, scale, BITS[codes])
    if plan.route == "group_products":
        return (_finish(q, scale, weight, bias, **params),)
    operands = _int8_operands(q, scale, weight, bias, params)
    return OPS["int8_matmul"].kernel(plan, *operands, **_int8_params(params))


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
