"""Arguments and transforms that `int8_matmul` and `int4_matmul` share."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive

from jax_awq._batching import fold_batch, scale_of_rows
from jax_awq._checks import (
    FLOATS,
    check_choice,
    check_dtype,
    check_shape,
    read_out_dtype,
    read_scale,
)
from jax_awq._primitive import OpDef, Sharding, apply_explicit, bind_varying, define_primitive
from jax_awq.ops import _int8_matmul_call as call
from jax_awq.ops._epilogue import ACTIVATIONS


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


def matmul(
    prim: Primitive,
    a: Any,
    b: Any,
    scale_a: Any,
    scale_b: Any,
    scale_c: Any,
    bias: Any,
    *,
    activation: str | None,
    out_dtype: Any,
    odd: bool,
    packed: bool,
    variant: str,
) -> Array:
    """Checks what follows on `a` and `b`, which are checked already, and binds the primitive."""
    op = prim.name.removeprefix("jax_awq.")
    batch, n = b.shape[:-2], b.shape[-1]
    check_choice(op, "activation", activation, (None, *sorted(set(ACTIVATIONS) - {"none"})))
    plain = all(v is None for v in (scale_a, scale_b, scale_c, bias, activation))
    if out_dtype is None:
        out_dtype = jnp.int32 if plain else jnp.float32
    out_dtype = read_out_dtype(op, out_dtype, "int32", *FLOATS)
    if out_dtype == call.INT32 and not plain:
        raise ValueError(f"{op}: an int32 result takes no scale, bias or activation")

    rows = a[:, None] if batch and a.ndim == 2 else a
    operands, given = [], []

    def give(name, kind, array):
        operands.append(array)
        given.append((name, kind))

    scale_a, scale_b, scale_c = map(read_scale, (scale_a, scale_b, scale_c))
    if scale_a is not None:
        check_dtype(op, "scale_a", scale_a, "float32")
        if scale_a.ndim == 0:
            give("scale_a", "one", scale_a.reshape(1))
        else:
            free = a.shape[:-1]
            check_shape(op, "scale_a", scale_a, (*free, 1) if scale_a.ndim == a.ndim else free)
            give("scale_a", "row", scale_a.reshape(rows.shape[:-1]))
    if scale_b is not None:
        check_dtype(op, "scale_b", scale_b, "float32")
        if scale_b.ndim == 0:
            give("scale_b", "one", scale_b.reshape(1))
        else:
            kept = scale_b[..., 0, :] if scale_b.shape[-2:] == (1, n) else scale_b
            check_shape(op, "scale_b", kept, (*(batch if kept.ndim > 1 else ()), n))
            give("scale_b", "column", kept)
    if scale_c is not None:
        check_dtype(op, "scale_c", scale_c, "float32")
        check_shape(op, "scale_c", scale_c, ())
        give("scale_c", "one", scale_c.reshape(1))
    if bias is not None:
        check_dtype(op, "bias", bias, *FLOATS)
        check_shape(op, "bias", bias, (*(batch if bias.ndim > 1 else ()), n))
        give("bias", "column", bias)
    (y,) = apply_explicit(
        op,
        functools.partial(_on_rows, prim, bool(batch)),
        rows,
        b,
        *operands,
        given=tuple(given),
        activation=activation or "none",
        out_dtype=out_dtype,
        odd=odd,
        packed=packed,
        variant=variant,
    )
    return y.reshape(*a.shape[:-1], n)


def check_operands(op: str, a: Any, b: Any, names: tuple[str, str], *dtypes: str) -> None:
    """Checks dtypes and batches of `a` (..., K) and `b` (K, N) or (E, K, N), and that K is one."""
    check_dtype(op, names[0], a, *dtypes)
    check_dtype(op, names[1], b, *dtypes)
    if b.ndim not in (2, 3):
        raise ValueError(
            f"{op}: {names[1]} must have 2 dimensions, or 3 with a leading batch, "
            f"got shape {b.shape}"
        )
    k = b.shape[-2]
    if a.ndim == 0 or a.shape[-1] != k:
        raise ValueError(f"{op}: {names[0]} must have shape (..., {k}), got {a.shape}")
    if b.ndim == 3 and (a.ndim < 2 or a.shape[0] != b.shape[0]):
        raise ValueError(
            f"{op}: {names[0]} must have shape ({b.shape[0]}, ..., {k}), got {a.shape}"
        )


def _on_rows(prim, batched, a, b, *values, given, **params):
    """Folds the free dimensions of `a` into one."""
    batch = a.shape[:1] if batched else ()
    m = math.prod(a.shape[len(batch) : -1])
    folded = [
        v.reshape(*batch, m) if kind == "row" else v
        for (_, kind), v in zip(given, values, strict=True)
    ]
    (y,) = bind_varying(prim, a.reshape(*batch, m, a.shape[-1]), b, *folded, given=given, **params)
    return (y.reshape(*a.shape[:-1], y.shape[-1]),)


def _batching(bind, operands, dims, *, given, **params):
    names = [name for name, _ in given]
    alone = {0, *(i + 2 for i, name in enumerate(names) if name == "scale_a")}
    if dims[0] is None or any(d is not None for i, d in enumerate(dims) if i not in alone):
        return fold_batch(bind, operands, dims, call.ranks(given), given=given, **params)
    # Only a and its scale are mapped: the mapped axis becomes rows.
    a = jnp.moveaxis(operands[0], dims[0], -3)
    *batch, size, m, k = a.shape
    operands, given = [a.reshape(*batch, size * m, k), *operands[1:]], list(given)
    for i, (name, kind) in enumerate(given):
        if name == "scale_a" and (kind == "row" or dims[i + 2] is not None):
            operands[i + 2] = scale_of_rows(operands[i + 2], dims[i + 2], size, m)
            given[i] = (name, "row")
    (y,) = bind(*operands, given=tuple(given), **params)
    return [y.reshape(*y.shape[:-2], size, m, y.shape[-1])], [y.ndim - 2]


def _jvp(bind, primals, tangents, **params):
    a, b, *values = primals
    live = [i for i, t in enumerate(tangents[2:]) if t is not None]
    if not live:
        return bind(*primals, **params), [None]
    (sums,) = bind(a, b, **{**params, **call.RAW})
    y, dy = jax.jvp(
        lambda *some: _finish_with(sums, values, live, some, params),
        [values[i] for i in live],
        [tangents[i + 2] for i in live],
    )
    return [y], [dy]


def _transpose(bind, cotangents, operands, index, **params):
    a, b, *values = operands
    (sums,) = bind(a, b, **{**params, **call.RAW})
    aval = operands[index]
    _, pull = jax.vjp(
        lambda value: _finish_with(sums, values, [index - 2], [value], params),
        jnp.zeros(aval.shape, aval.dtype),
    )
    return pull(cotangents[0])[0]


def _finish_with(sums, values, positions, replaced, params):
    values = list(values)
    for i, value in zip(positions, replaced, strict=True):
        values[i] = value
    return call.finish(sums, *values, **params)


def _sharding(a, b, *values, given, packed, odd, **params):
    rows = [f"m{i}" for i in range(a.ndim - 1)]
    batched = b.ndim > 2 or any(
        v.ndim > (a.ndim - 1 if kind == "row" else 1)
        for v, (_, kind) in zip(values, given, strict=True)
    )
    a_rows = ["b", *rows[1:]] if batched and a.ndim > 2 else rows
    out_rows = ["b", *rows] if batched and a.ndim == 2 else a_rows
    terms = [f"{' '.join(a_rows)} k", "b k n" if b.ndim > 2 else "k n"]
    whole = {}
    for v, (name, kind) in zip(values, given, strict=True):
        if kind == "row":
            terms.append(" ".join(out_rows[len(out_rows) - v.ndim :]))
            continue
        if kind == "one":
            whole[f"u_{name}"] = 1
        terms.append(("b " if v.ndim > 1 else "") + ("n" if kind == "column" else f"u_{name}"))
    if packed and odd:  # the last half of the last byte is nobody's
        whole["k"] = a.shape[-1]
    rule = f"{', '.join(terms)} -> {' '.join(out_rows)} n"
    return Sharding(rule, whole, () if packed and odd else ("k",))


def _partial(summed_axes, a, b, *values, **params):
    return (a, b), {**params, **call.RAW}, lambda sums: (call.finish(sums, *values, **params),)
