"""Transforms that `awq_gemm_w4a8` and `awq_gemm_w4a4` share."""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive

from jax_awq._batching import fold_batch, fold_rows, scale_of_rows
from jax_awq._primitive import OpDef, Sharding, bind_varying, define_primitive
from jax_awq.ops import _activation, _awq_gemm_call, _weight
from jax_awq.ops import _w4a8_call as call
from jax_awq.ops._epilogue import bias_tangent, epilogue, finish_jvp
from jax_awq.ops.awq_gemm import awq_gemm_p

_BITS = {2: jnp.int16, 4: jnp.int32}


def define(op: str) -> Primitive:
    return define_primitive(
        OpDef(
            name=op,
            out_avals=call.out_avals,
            reference=call.reference,
            plan=functools.partial(call.plan_call, op),
            kernel=functools.partial(call.kernel, op),
            batching=_batching,
            jvp=_jvp,
            transpose=_transpose,
            sharding=_sharding,
            partial=_partial,
        )
    )


def _batching(bind, operands, dims, *, scale, **params):
    at = len(operands) - 1 - params["has_bias"] if scale else 0
    alone = {0, at}
    if dims[0] is None or any(d is not None for i, d in enumerate(dims) if i not in alone):
        ranks = call.ranks(scale=scale, **params)
        return fold_batch(bind, operands, dims, ranks, scale=scale, **params)
    operands = list(operands)
    if scale == "row" or (scale and dims[at] is not None):
        size, rows = operands[0].shape[dims[0]], jnp.moveaxis(operands[0], dims[0], -3).shape[-2]
        operands[at], scale = scale_of_rows(operands[at], dims[at], size, rows), "row"
    return fold_rows(bind, operands, dims[0], scale=scale, **params)


def _jvp(bind, primals, tangents, **params):
    x, weight, scale, _ = call.operands_of(primals, **params)
    dx, (_, dscales, *_), dscale, dbias = call.operands_of(tangents, **params)
    linear = {**params, "activation": "none"}
    if params["activation"] != "none":
        linear["out_dtype"] = jnp.dtype(jnp.float32)
    (y,) = bind(*primals, **linear)

    product = functools.partial(bind, **{**linear, "has_bias": False})
    terms = []
    if dx is not None:
        terms += _w4a16(dx, weight, linear)
    if dscales is not None:
        changed = (weight[0], dscales, *weight[2:])
        terms += product(x, *call.joined(changed, scale))
    if dscale is not None and call.is_codes(x):
        terms += product(x, *call.joined(weight, dscale))
    if dbias is not None:
        terms.append(bias_tangent(dbias, y))
    dy = functools.reduce(jnp.add, (jnp.broadcast_to(t, y.shape) for t in terms)) if terms else None
    return finish_jvp(y, dy, **params)


def _w4a16(dx, weight, params) -> list[Array]:
    """``dx @ weight``: the derivative in x, as if codes were not rounded."""
    return bind_varying(
        awq_gemm_p,
        dx,
        *weight,
        **{name: params[name] for name in ("layout", "group_size", "symmetric", "out_dtype")},
        activation="none",
        split_k=0,
        batch_invariant=False,
        transpose=False,
        has_bias=False,
        # Kernels of codes alone take no float x.
        variant="" if params["variant"].startswith("w4a8_") else params["variant"],
    )


def _transpose(bind, cotangents, operands, index, **params):
    x, weight, scale, _ = call.operands_of(operands, **params)
    ct = cotangents[0].astype(jnp.float32)
    if index == 2:
        left = call.dequantize(x, scale, params["codes"]).swapaxes(-1, -2)
        products = _awq_gemm_call.dot(left, ct, None, activation="none", out_dtype=jnp.float32)
        qzeros = None if params["symmetric"] else weight[2]
        return _weight.sum_over_groups(
            products, weight[0], weight[1], qzeros, layout=params["layout"]
        )
    ones = jnp.ones(scale.shape, jnp.float32)  # the scale of codes
    wide = {**params, "has_bias": False, "out_dtype": jnp.dtype(jnp.float32)}
    (y,) = bind(x, *call.joined(weight, ones), **wide)
    sums = (ct * y).sum(-1)
    if params["scale"] == "one":
        sums = sums.sum(-1, keepdims=True)
    return _weight.sum_batch(sums, scale)


def _sharding(x, *rest, layout, group_size, **params):
    dims, whole = _weight.factors(layout, group_size)
    _, weight, scale, bias = call.operands_of((x, *rest), **params)
    names = ["qweight", "scales", "qzeros"][: len(weight)] + ["N"] * params["has_bias"]
    others = [*weight, *([] if bias is None else [bias])]
    ranks = [2] * len(weight) + [1] * params["has_bias"]
    own = x.ndim - 1 if params["scale"] == "row" else 1
    batched = any(o.ndim > r for o, r in zip(others, ranks, strict=True)) or (
        scale is not None and scale.ndim > own
    )
    rows = [f"m{i}" for i in range(x.ndim - 1)]
    x_rows = ["b", *rows[1:]] if batched and x.ndim > 2 else rows
    out_rows = ["b", *rows] if batched and x.ndim == 2 else x_rows
    terms = [
        ("b " if o.ndim > r else "") + dims[name]
        for name, o, r in zip(names, others, ranks, strict=True)
    ]
    if scale is not None:
        term = " ".join(out_rows[len(out_rows) - scale.ndim :])
        if params["scale"] == "one":
            term, whole = ("b " if scale.ndim > 1 else "") + "v", {**whole, "v": 1}
        terms.insert(len(weight), term)
    rule = f"{' '.join(x_rows)} {dims['K']}, {', '.join(terms)} -> {' '.join(out_rows)} {dims['N']}"
    return Sharding(rule, whole, (dims["K"].strip("()").split()[0],))


def _partial(summed_axes, *operands, **params):
    x, weight, scale, bias = call.operands_of(operands, **params)
    product = {
        **params,
        "activation": "none",
        "out_dtype": jnp.dtype(jnp.float32),
        "has_bias": False,
    }
    if scale is None:  # the largest of a row is of the whole row; as integers, NaN is the largest
        bits = lax.bitcast_convert_type(_activation.absmax_of(x, axis=-1), _BITS[x.dtype.itemsize])
        absmax = lax.bitcast_convert_type(lax.pmax(bits, summed_axes), x.dtype)
        scale, product["scale"] = call.scale_of(absmax, params["codes"]), "row"
    return (
        (x, *call.joined(weight, scale)),
        product,
        lambda y: (
            epilogue(y, bias, activation=params["activation"], out_dtype=params["out_dtype"]),
        ),
    )
