"""W4A16 matmul: float activations times an AWQ 4-bit weight."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_awq._batching import fold_batch, fold_rows
from jax_awq._checks import FLOATS, check_choice, check_static, read_integer
from jax_awq._primitive import OpDef, Sharding, apply_explicit, bind_varying, define_primitive
from jax_awq.ops import _awq_gemm_call as call
from jax_awq.ops import _weight
from jax_awq.ops._arguments import product_operands
from jax_awq.ops._epilogue import bias_tangent, epilogue, finish_jvp

_STATIC = (
    "group_size",
    "layout",
    "activation",
    "split_k_iters",
    "deterministic",
    "out_dtype",
    "variant",
)
_DETERMINISTIC = ("run", "batch_invariant")


def awq_gemm(
    x: Any,
    qweight: Any,
    scales: Any = None,
    qzeros: Any = None,
    *,
    group_size: int | None = None,
    layout: str = "gemm",
    bias: Any = None,
    activation: str | None = None,
    split_k_iters: int | None = None,
    deterministic: str = "run",
    out_dtype: Any = None,
) -> Array:
    """Computes ``activation(x @ ((q - z) * s) + bias)`` with 4-bit codes `q` and `z`.

    Each weight is rounded to the dtype of `x` at most once (the kernels for few rows scale float32
    sums instead); sums, bias and activation are float32, and the result is rounded once.
    Differentiable in `x`, `scales` and `bias`; for the gradient in `x` that of the result is
    rounded to the dtype of `x`, whatever `out_dtype` is.

    Args:
      x: ``(..., K)`` float16, bfloat16 or float32, activations.
      qweight: ``(K, N/8)`` int32 for layout "gemm", ``(N, K/8)`` for "gemv" and "oc_major", or an
        `AWQWeight` or `PermutedWeight` in place of all weight arrays.
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
      deterministic: "run": the same call gives the same bits. "batch_invariant": so does every row,
        however many rows `x` has and wherever it stands among them, on one GPU model, build and
        sharding (sums over devices, where K is split over them, are XLA's and not promised). All
        numbers of rows then share one order of sums and one division of K, which takes longer, most
        for up to 16 rows. Where no kernel runs, rows are multiplied one after the other, which is
        slow.
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
    check_static(
        "awq_gemm",
        group_size=group_size,
        layout=layout,
        activation=activation,
        split_k_iters=split_k_iters,
        deterministic=deterministic,
        out_dtype=out_dtype,
    )
    if hasattr(qweight, "perm"):
        x, qweight = qweight.permute_inputs(x), qweight.weight
    arrays, layout, group_size = _weight.unpack_weight(
        "awq_gemm", qweight, scales, qzeros, layout, group_size
    )
    return _awq_gemm(
        x,
        *arrays,
        bias,
        group_size=group_size,
        layout=layout,
        activation=activation,
        split_k_iters=split_k_iters,
        deterministic=deterministic,
        out_dtype=out_dtype,
        variant=_weight.forced_variant(),
    )


@functools.partial(jax.jit, inline=True, static_argnames=_STATIC)
def _awq_gemm(
    x,
    qweight,
    scales,
    qzeros,
    bias,
    *,
    group_size,
    layout,
    activation,
    split_k_iters,
    deterministic,
    out_dtype,
    variant,
):
    rows, operands, params = product_operands(
        "awq_gemm",
        x,
        qweight,
        scales,
        qzeros,
        bias,
        layout=layout,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        x_dtypes=FLOATS,
    )
    if split_k_iters is not None:
        split_k_iters = read_integer("awq_gemm", "split_k_iters", split_k_iters)
        if split_k_iters < 1:
            raise ValueError(f"awq_gemm: split_k_iters must be 1 or more, got {split_k_iters}")
    check_choice("awq_gemm", "deterministic", deterministic, _DETERMINISTIC)
    (y,) = apply_explicit(
        "awq_gemm",
        _on_rows,
        rows,
        *operands,
        split_k=split_k_iters or 0,
        batch_invariant=deterministic == "batch_invariant",
        transpose=False,
        variant=variant,
        **params,
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _on_rows(x, *weight, **params):
    """Folds the free dimensions of `x` into one."""
    batch = x.shape[:1] if call.is_batched(weight, params) else ()
    rows = math.prod(x.shape[len(batch) : -1])
    (y,) = bind_varying(awq_gemm_p, x.reshape(*batch, rows, x.shape[-1]), *weight, **params)
    return (y.reshape(*x.shape[:-1], y.shape[-1]),)


def _batching(bind, operands, dims, **params):
    if all(d is None for d in dims[1:]):
        return fold_rows(bind, operands, dims[0], **params)
    return fold_batch(bind, operands, dims, call.ranks(**params), **params)


def _jvp(bind, primals, tangents, **params):
    x, qweight, scales, qzeros, _ = call.operands_of(primals, **params)
    dx, _, dscales, _, dbias = call.operands_of(tangents, **params)
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
        terms.append(bias_tangent(dbias, y))
    dy = functools.reduce(jnp.add, (jnp.broadcast_to(t, y.shape) for t in terms)) if terms else None
    return finish_jvp(y, dy, **params)


def _transpose(bind, cotangents, operands, index, **params):
    x, qweight, scales, qzeros, _ = call.operands_of(operands, **params)
    ct = cotangents[0]
    if index == 0:
        # The kernels take 16-bit operands, so the cotangent goes in with the dtype of x.
        ct = ct.astype(x.dtype)
        zeros = () if qzeros is None else (qzeros,)
        shared = len(x.shape) < ct.ndim
        (dx,) = bind(
            ct,
            qweight,
            scales,
            *zeros,
            **{
                **params,
                "transpose": not params["transpose"],
                "has_bias": False,
                "out_dtype": jnp.dtype(jnp.float32) if shared else x.dtype,
            },
        )
        return _weight.sum_batch(dx, x)
    x = x.astype(ct.dtype)  # of the result: scales may be float32, and then have its range
    left, right = (ct, x) if params["transpose"] else (x, ct)
    products = call.dot(
        left.swapaxes(-1, -2), right, None, activation="none", out_dtype=jnp.float32
    )
    return _weight.sum_over_groups(products, qweight, scales, qzeros, layout=params["layout"])


def _sharding(x, *weight, layout, group_size, transpose, **params):
    dims, whole = _weight.factors(layout, group_size)
    names = ["qweight", "scales"] + ["qzeros"] * (not params["symmetric"])
    names += ["N"] * params["has_bias"]
    ranks = call.ranks(**params)[1:]
    terms = [
        ("b " if o.ndim > r else "") + dims[name]
        for name, o, r in zip(names, weight, ranks, strict=True)
    ]
    batched = call.is_batched(weight, params)
    rows = [f"m{i}" for i in range(x.ndim - 1)]
    x_rows = ["b", *rows[1:]] if batched and x.ndim > 2 else rows
    out_rows = ["b", *rows] if batched and x.ndim == 2 else x_rows
    contracted, kept = (dims["N"], dims["K"]) if transpose else (dims["K"], dims["N"])
    rule = f"{' '.join(x_rows)} {contracted}, {', '.join(terms)} -> {' '.join(out_rows)} {kept}"
    return Sharding(rule, whole, (contracted.strip("()").split()[0],))


def _partial(summed_axes, *operands, **params):
    bias = operands[-1] if params["has_bias"] else None
    operands = operands[:-1] if params["has_bias"] else operands
    product = {
        **params,
        "activation": "none",
        "out_dtype": jnp.dtype(jnp.float32),
        "has_bias": False,
    }
    return (
        operands,
        product,
        lambda y: (
            epilogue(y, bias, activation=params["activation"], out_dtype=params["out_dtype"]),
        ),
    )


awq_gemm_p = define_primitive(
    OpDef(
        name="awq_gemm",
        out_avals=call.out_avals,
        reference=call.reference,
        plan=call.plan_call,
        kernel=call.kernel,
        batching=_batching,
        jvp=_jvp,
        transpose=_transpose,
        sharding=_sharding,
        partial=_partial,
    )
)
