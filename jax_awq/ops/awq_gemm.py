"""W4A16 matmul: float activations times an AWQ 4-bit weight."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq import _ffi
from jax_awq._batching import fold_batch, fold_rows
from jax_awq._checks import FLOATS, check_choice, check_dtype, check_shape
from jax_awq._packing import weight_size
from jax_awq._plan import KernelPlan, reference_plan, target_of, why_reference
from jax_awq._primitive import (
    OPS,
    OpDef,
    Sharding,
    apply_explicit,
    bind_varying,
    define_primitive,
)
from jax_awq.ops import _weight
from jax_awq.ops._epilogue import ACTIVATIONS, epilogue

_STATIC = ("group_size", "layout", "activation", "split_k_iters", "out_dtype", "variant")


def awq_gemm(x: Any, qweight: Any, scales: Any = None, qzeros: Any = None, *,
             group_size: int | None = None, layout: str = "gemm", bias: Any = None,
             activation: str | None = None, split_k_iters: int | None = None,
             out_dtype: Any = None) -> Array:
    """Computes ``activation(x @ ((q - z) * s) + bias)`` with 4-bit codes `q` and `z`.

    Each weight is rounded once to the dtype of `x`; sums, bias and activation are float32, and the
    result is rounded once. Differentiable in `x`, `scales` and `bias`.

    Args:
      x: ``(..., K)`` float16, bfloat16 or float32, activations.
      qweight: ``(K, N/8)`` int32 for layout "gemm", ``(N, K/8)`` for "gemv" and "oc_major", or an
        `AWQWeight` in place of all weight arrays.
      scales: ``(K/group_size, N)`` float16, bfloat16 or float32, weight units per code step;
        ``(N, 8 * padded words)`` for "gemv".
      qzeros: int32 zero points 0 to 15, packed as the layout says; None is 8 everywhere.
      group_size: rows of K that share one scale, -1 for all of them; derived from `scales` where
        it can be, needed for "gemv".
      layout: "gemm" (what almost every AWQ checkpoint on Hugging Face has), "gemv" or "oc_major".
      bias: ``(N,)`` float16, bfloat16 or float32.
      activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
      split_k_iters: parts into which the sum over K is divided, added in a fixed order; None lets
        the plan choose.
      out_dtype: float16, bfloat16 or float32; default that of `x`.

      `qweight`, `scales`, `qzeros` and `bias` may have one leading batch dimension E (stacked
      layers, experts), and `x` is then ``(E, ..., K)``; an array without it is shared.

    Returns:
      ``(..., N)``.

    Raises:
      ValueError: a shape or a value disagrees with the table above.
      TypeError: a dtype disagrees with it.

    Source: AWQ, arXiv 2306.00978; layouts: AutoAWQ 0.2.9, awq/modules/linear.
    """
    arrays, layout, group_size = _weight.unpack_weight(
        "awq_gemm", qweight, scales, qzeros, layout, group_size)
    return _awq_gemm(
        x, *arrays, bias, group_size=group_size, layout=layout, activation=activation,
        split_k_iters=split_k_iters, out_dtype=out_dtype, variant=_weight.forced_variant())


@functools.partial(jax.jit, inline=True, static_argnames=_STATIC)
def _awq_gemm(x, qweight, scales, qzeros, bias, *, group_size, layout, activation, split_k_iters,
              out_dtype, variant):
    operands, params = _weight.canonical_weight(
        "awq_gemm", qweight, scales, qzeros, layout=layout, group_size=group_size)
    k, n = weight_size(qweight.shape, layout)
    check_dtype("awq_gemm", "x", x, *FLOATS)
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"awq_gemm: x must have shape (..., {k}), got {x.shape}")
    check_choice("awq_gemm", "activation", activation, (None, *sorted(set(ACTIVATIONS) - {"none"})))
    if split_k_iters is not None and split_k_iters < 1:
        raise ValueError(f"awq_gemm: split_k_iters must be 1 or more, got {split_k_iters}")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    check_dtype("awq_gemm", "the result", jax.ShapeDtypeStruct((), out_dtype), *FLOATS)
    leading = {"qweight": qweight.shape[:-2], "scales": scales.shape[:-2]}
    if qzeros is not None:
        leading["qzeros"] = qzeros.shape[:-2]
    if bias is not None:
        check_dtype("awq_gemm", "bias", bias, *FLOATS)
        check_shape("awq_gemm", "bias", bias, (*bias.shape[:-1][:1], n))
        leading["bias"] = bias.shape[:-1]
        operands = (*operands, bias)
    batch = _weight.check_batch("awq_gemm", leading)
    if batch and (x.ndim < 2 or x.shape[0] != batch[0]):
        raise ValueError(f"awq_gemm: x must have shape ({batch[0]}, ..., {k}), got {x.shape}")
    rows = x[:, None] if batch and x.ndim == 2 else x
    (y,) = apply_explicit(
        "awq_gemm", _on_rows, rows, *operands, activation=activation or "none",
        split_k=split_k_iters or 0, out_dtype=out_dtype, transpose=False,
        has_bias=bias is not None, variant=variant, **params)
    return y.reshape(*x.shape[:-1], n)


def _on_rows(x, *weight, **params):
    """Folds the free dimensions of `x` into one."""
    batch = x.shape[:1] if _is_batched(weight, params) else ()
    rows = math.prod(x.shape[len(batch):-1])
    (y,) = bind_varying(awq_gemm_p, x.reshape(*batch, rows, x.shape[-1]), *weight, **params)
    return (y.reshape(*x.shape[:-1], y.shape[-1]),)


def _is_batched(weight, params) -> bool:
    return any(o.ndim > rank for o, rank in zip(weight, _ranks(**params)[1:], strict=True))


def _ranks(*, symmetric, has_bias, **params) -> list[int]:
    return [2, 2, 2] + [2] * (not symmetric) + [1] * has_bias


def _operands(operands, *, symmetric, has_bias, **params):
    """(x, qweight, scales, qzeros or None, bias or None)."""
    x, qweight, scales, *rest = operands
    bias = rest.pop() if has_bias else None
    return x, qweight, scales, None if symmetric else rest[0], bias


def _out_avals(*operands, **params):
    k, n = weight_size(operands[1].shape, params["layout"])
    batch = next((o.shape[:1] for o, rank in zip(operands, _ranks(**params), strict=True)
                  if o.ndim > rank), ())
    shape = (*batch, operands[0].shape[-2], k if params["transpose"] else n)
    return (jax.ShapeDtypeStruct(shape, params["out_dtype"]),)


def _reference(*operands, layout, transpose, **params):
    x, qweight, scales, qzeros, bias = _operands(operands, **params)
    weight = _weight.dequantize(qweight, scales, qzeros, layout=layout, dtype=x.dtype)
    return (_dot(x, weight.swapaxes(-1, -2) if transpose else weight, bias, **params),)


def _dot(x, weight, bias, *, activation, out_dtype, **params):
    # Without HIGHEST a GPU would round float32 operands to 10 bits.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.matmul(x, weight, preferred_element_type=jnp.float32, precision=precision)
    return epilogue(y, bias, activation=activation, out_dtype=out_dtype)


def _plan(device, *operands, **params):
    x, qweight, scales, qzeros, _ = _operands(operands, **params)
    (out,) = _out_avals(*operands, **params)
    target = target_of(device)
    reason = why_reference(device, target, params["variant"])
    if not reason and any(isinstance(d, int) and d == 0 for d in (*out.shape, x.shape[-1])):
        reason = "an operand or the result is empty"
    if reason or target is None:
        return reference_plan("awq_gemm", reason)
    k, n = weight_size(qweight.shape, params["layout"])
    found = _ffi.plan_awq_gemm(
        m=_known(out.shape[-2]), n=n, k=k, batch=_known(out.shape[0]) if len(out.shape) == 3 else 1,
        group_size=_group_size(k, params), layout=params["layout"], x_dtype=str(x.dtype),
        scales_dtype=str(scales.dtype), out_dtype=str(out.dtype), has_zeros=qzeros is not None,
        transpose=params["transpose"], split_k=params["split_k"], variant=params["variant"],
        arch=target.arch, sm_count=target.sm_count)
    kernel, refused = found["variant"], dict(found["refused"])
    if kernel == "reference":
        return reference_plan("awq_gemm", next(iter(refused.values()), ""), refused)
    fused = kernel != "dequantize_dot"
    return KernelPlan(
        op="awq_gemm", route="fused" if fused else "dequantize_dot", kernel=kernel,
        tile=tuple(found["tile"]) if fused else (), split_k=found["split_k"],
        workspace_bytes=found["workspace_bytes"], accumulator="float32", deterministic=True,
        refused=refused, reason="")


def _known(dim) -> int:
    """0 for a symbolic dimension, which the planning code takes as not known."""
    return dim if isinstance(dim, int) else 0


def _group_size(k, params) -> int:
    return k if params["group_size"] == -1 else params["group_size"]


def _kernel(plan, *operands, layout, transpose, **params):
    x, qweight, scales, qzeros, bias = _operands(operands, **params)
    if plan.route == "dequantize_dot":
        weight = operands[1:-1] if params["has_bias"] else operands[1:]
        (weight,) = OPS["awq_dequantize"].kernel(
            plan, *weight, layout=layout, group_size=params["group_size"],
            symmetric=params["symmetric"], dtype=x.dtype, variant="")
        return (_dot(x, weight.swapaxes(-1, -2) if transpose else weight, bias, **params),)
    k, _ = weight_size(qweight.shape, layout)
    (result,) = _out_avals(*operands, layout=layout, transpose=transpose, **params)
    return (_ffi.call(
        "awq_gemm", result, x, qweight, scales,
        jnp.zeros((0,), jnp.int32) if qzeros is None else qzeros,
        jnp.zeros((0,), x.dtype) if bias is None else bias,
        workspace_bytes=plan.workspace_bytes, group_size=_group_size(k, params), layout=layout,
        activation=params["activation"], split_k=params["split_k"], transpose=transpose,
        variant=params["variant"]),)


def _batching(bind, operands, dims, **params):
    if all(d is None for d in dims[1:]):
        return fold_rows(bind, operands, dims[0], **params)
    return fold_batch(bind, operands, dims, _ranks(**params), **params)


def _jvp(bind, primals, tangents, **params):
    x, qweight, scales, qzeros, _ = _operands(primals, **params)
    dx, _, dscales, _, dbias = _operands(tangents, **params)
    linear = {**params, "activation": "none"}
    if params["activation"] != "none":
        linear["out_dtype"] = jnp.dtype(jnp.float32)
    (y,) = bind(*primals, **linear)

    product = functools.partial(bind, **{**linear, "has_bias": False})
    zeros = () if qzeros is None else (qzeros,)
    terms = []
    if dx is not None:
        terms += product(dx, qweight, scales, *zeros)
    if dscales is not None:
        terms += product(x, qweight, dscales, *zeros)
    if dbias is not None:
        terms.append(jnp.broadcast_to(dbias[..., None, :], y.shape).astype(y.dtype))
    dy = functools.reduce(jnp.add, (jnp.broadcast_to(t, y.shape) for t in terms)) if terms else None
    if params["activation"] == "none":
        return [y], [dy]
    finish = functools.partial(epilogue, bias=None, activation=params["activation"],
                               out_dtype=params["out_dtype"])
    if dy is None:
        return [finish(y)], [None]
    y, dy = jax.jvp(finish, (y,), (dy,))
    return [y], [dy]


def _transpose(bind, cotangents, operands, index, **params):
    x, qweight, scales, qzeros, _ = _operands(operands, **params)
    # The kernels take 16-bit operands, so the cotangent goes in with the dtype of x.
    ct = cotangents[0].astype(x.dtype)
    if index == 0:
        zeros = () if qzeros is None else (qzeros,)
        shared = len(x.shape) < ct.ndim
        (dx,) = bind(ct, qweight, scales, *zeros, **{
            **params, "transpose": not params["transpose"], "has_bias": False,
            "out_dtype": jnp.dtype(jnp.float32) if shared else x.dtype})
        return _weight.sum_batch(dx, x)
    left, right = (ct, x) if params["transpose"] else (x, ct)
    products = _dot(left.swapaxes(-1, -2), right, None, activation="none", out_dtype=jnp.float32)
    return _weight.sum_over_groups(products, qweight, scales, qzeros, layout=params["layout"])


def _sharding(x, *weight, layout, group_size, transpose, **params):
    dims, whole = _weight.factors(layout, group_size)
    names = ["qweight", "scales"] + ["qzeros"] * (not params["symmetric"])
    names += ["N"] * params["has_bias"]
    ranks = _ranks(**params)[1:]
    terms = [("b " if o.ndim > r else "") + dims[name]
             for name, o, r in zip(names, weight, ranks, strict=True)]
    batched = _is_batched(weight, params)
    rows = [f"m{i}" for i in range(x.ndim - 1)]
    x_rows = ["b", *rows[1:]] if batched and x.ndim > 2 else rows
    out_rows = ["b", *rows] if batched and x.ndim == 2 else x_rows
    contracted, kept = (dims["N"], dims["K"]) if transpose else (dims["K"], dims["N"])
    rule = (f"{' '.join(x_rows)} {contracted}, {', '.join(terms)} "
            f"-> {' '.join(out_rows)} {kept}")
    return Sharding(rule, whole, (contracted.strip("()").split()[0],))


def _partial(*operands, **params):
    bias = operands[-1] if params["has_bias"] else None
    operands = operands[:-1] if params["has_bias"] else operands
    product = {**params, "activation": "none", "out_dtype": jnp.dtype(jnp.float32),
               "has_bias": False}
    return operands, product, lambda y: (epilogue(
        y, bias, activation=params["activation"], out_dtype=params["out_dtype"]),)


awq_gemm_p = define_primitive(OpDef(
    name="awq_gemm", out_avals=_out_avals, reference=_reference, plan=_plan, kernel=_kernel,
    batching=_batching, jvp=_jvp, transpose=_transpose, sharding=_sharding, partial=_partial))
