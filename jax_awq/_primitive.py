"""Turns one `OpDef` into a JAX primitive. The only module that touches JAX internals."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

# No public names yet: for what `jax.ensure_compile_time_eval` sets, see `_partitioned`; for the
# primitives to which JAX passes the devices of the program, as `custom_partitioning` inside a
# lowering needs; and for how a sharding is decoded, see `_decoded`.
from jax._src.config import eager_constant_folding
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import NamedSharding, PartitionSpec

from jax_awq._explicit import explicit_mesh

Rule = Callable[..., Any]


class Sharding(NamedTuple):
    """Shardy rule; the first factor of a compound dimension may be split, the others never."""

    rule: str  # for example "m (g s), (g s) n -> m n"
    whole: dict[str, int]  # factors that are never split -> size
    summed: tuple[str, ...]  # factors whose split makes the results partial sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpDef:
    """One op. No field has a default, so an op that lacks a rule fails at import."""

    name: str  # stem of all the op's files; FFI target "jax_awq.<name>"
    out_avals: Rule  # (*operands, **params) -> (ShapeDtypeStruct, ...); the public op has checked
    reference: Rule  # (*operands, **params) -> (Array, ...); plain jnp, the test oracle
    plan: Rule  # (device or None, *operands, **params) -> KernelPlan; needs shapes only
    kernel: Rule  # (KernelPlan, *operands, **params) -> (Array, ...); calls the FFI target
    batching: Rule  # (bind, operands, batch_dims, **params) -> (results, result_dims)
    jvp: Rule  # (bind, primals, tangents, **params) -> (results, tangents); None is a zero tangent
    transpose: Rule  # (bind, cotangents, operands, index, **params) -> cotangent of that operand
    sharding: Rule  # (*operands, **params) -> Sharding
    # (summed_axes, *operands, **params) -> (operands, params, finish): finish(sum of results)
    partial: Rule


OPS: dict[str, OpDef] = {}  # read by `plan`, the contract tests and the benchmark


def define_primitive(op: OpDef) -> Primitive:
    OPS[op.name] = op
    prim = Primitive(f"jax_awq.{op.name}")
    prim.multiple_results = True
    bind = functools.partial(bind_varying, prim)
    prim.def_impl(functools.partial(xla.apply_primitive, prim))
    prim.def_abstract_eval(functools.partial(_abstract_eval, op))
    batching.primitive_batchers[prim] = functools.partial(op.batching, bind)
    ad.primitive_jvps[prim] = functools.partial(_jvp, op, bind)
    ad.primitive_transposes[prim] = functools.partial(_transpose, op, bind)
    mlir.register_lowering(prim, _lowering(op, on_cuda=False))
    mlir.register_lowering(prim, _lowering(op, on_cuda=True), platform="cuda")
    prim_requires_devices_during_lowering.add(prim)
    return prim


def bind_varying(prim: Primitive, *operands: Any, **params: Any) -> list[jax.Array]:
    """Binds after giving every operand the same varying axes, as shard_map's check_vma asks.

    The transpose of the cast is the sum over devices that a gradient of a replicated operand needs.
    """
    own = [_varying(jax.typeof(o)) for o in operands]
    union = frozenset[str]().union(*own)
    return prim.bind(
        *(
            lax.pcast(o, tuple(sorted(union - v)), to="varying") if union - v else o
            for o, v in zip(operands, own, strict=True)
        ),
        **params,
    )


def apply_explicit(name: str, fn: Rule, *operands: Any, **params: Any) -> tuple[jax.Array, ...]:
    """`fn(*operands, **params)`, in a shard_map where the mesh has Explicit axes.

    `custom_partitioning` in the lowering serves Auto axes; XLA refuses it under an Explicit mesh.
    """
    op, avals = OPS[name], [jax.typeof(o) for o in operands]
    mesh = explicit_mesh(*operands)
    if mesh is None:
        return fn(*operands, **params)
    sharding = op.sharding(*avals, **params)
    ins, outs = _parse(sharding.rule)
    axes = _split_factors(
        sharding, ins, [a.shape for a in avals], [a.sharding.spec for a in avals], mesh.shape
    )
    in_specs, out_specs = (tuple(_spec(dims, axes) for dims in terms) for terms in (ins, outs))
    run = jax.shard_map(
        functools.partial(_on_shard, op, fn, params, _summed_axes(sharding, axes)),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
    )
    return run(
        *(
            jax.sharding.reshard(o, NamedSharding(mesh, spec))
            for o, spec in zip(operands, in_specs, strict=True)
        )
    )


def _abstract_eval(op, *avals, **params):
    # The axes that vary, and the mesh with no axis used, are those of any operand.
    like = avals[0]
    return [
        like.update(
            shape=o.shape,
            dtype=o.dtype,
            weak_type=False,
            sharding=like.sharding.update(spec=PartitionSpec(*[None] * len(o.shape))),
        )
        for o in op.out_avals(*avals, **params)
    ]


def _varying(aval) -> frozenset[str]:
    return aval.manual_axis_type.varying  # `aval.vma` is gone, and a default here would be wrong


def _jvp(op, bind, primals, tangents, **params):
    tangents = [None if type(t) is ad.Zero else t for t in tangents]
    results, result_tangents = op.jvp(bind, primals, tangents, **params)
    return results, [
        ad.Zero(jax.typeof(r).to_tangent_aval()) if t is None else t
        for r, t in zip(results, result_tangents, strict=True)
    ]


def _transpose(op, bind, cotangents, *operands, **params):
    (index,) = (i for i, o in enumerate(operands) if ad.is_undefined_primal(o))
    aval = operands[index].aval
    if all(type(ct) is ad.Zero for ct in cotangents):
        result = ad.Zero(aval)
    else:
        known = [o.aval if i == index else o for i, o in enumerate(operands)]
        result = op.transpose(bind, cotangents, known, index, **params)
    return [result if i == index else None for i in range(len(operands))]


def _lowering(op, *, on_cuda):
    def rule(ctx, *operands, **params):
        run = functools.partial(_run, op, _first_device(ctx)) if on_cuda else op.reference
        if any(aval.sharding.mesh.explicit_axes for aval in ctx.avals_in):
            # A vmap over an Explicit axis, which `apply_explicit` does not see.
            fn = functools.partial(run, **params)
        else:
            fn = functools.partial(_partitioned, op, run, params)
        return mlir.lower_fun(fn, multiple_results=True)(ctx, *operands)

    return rule


def _run(op, device, *operands, **params):
    plan = op.plan(device, *operands, **params)
    if plan.route == "reference":
        return op.reference(*operands, **params)
    return op.kernel(plan, *operands, **params)


def _first_device(ctx) -> jax.Device | None:
    """A CUDA device that the program is lowered for, or None where it will run elsewhere."""
    context = ctx.module_context.axis_context
    devices = getattr(context, "device_assignment", None)
    if devices is None and hasattr(context, "mesh"):
        devices = getattr(context.mesh, "_flat_devices_tuple", None)
    return devices[0] if devices and devices[0].platform == "gpu" else None


def _partitioned(op, run, params, *operands):
    if any(isinstance(d, int) and d == 0 for o in operands for d in o.shape):
        return run(*operands, **params)  # nothing to split, and Shardy has no factor of size 0
    sharding = op.sharding(*operands, **params)
    ins, outs = _parse(sharding.rule)
    # Shardy wants the factors in order of appearance, and no size of one that is a dimension.
    order = dict.fromkeys(f for dims in ins + outs for dim in dims for f in dim)
    alone = {dim[0] for dims in ins + outs for dim in dims if len(dim) == 1}
    sizes = {f: size for f, size in sharding.whole.items() if f not in alone}
    for dims, operand in zip(ins, operands, strict=True):
        for (lead, *rest), extent in zip(dims, operand.shape, strict=True):
            if lead not in alone:
                sizes[lead] = extent // math.prod(sharding.whole[f] for f in rest)

    def partition(mesh, args, results):
        axes = _split_factors(
            sharding,
            ins + outs,
            [a.shape for a in (*args, *results)],
            [_decoded(mesh, a.sharding) for a in (*args, *results)],
            mesh.shape,
        )
        named = [
            tuple(NamedSharding(mesh, _spec(dims, axes)) for dims in terms) for terms in (outs, ins)
        ]
        return (
            mesh,
            functools.partial(_on_shard, op, run, params, _summed_axes(sharding, axes)),
            *named,
        )

    fn = custom_partitioning(lambda *args: tuple(run(*args, **params)))
    fn.def_partition(
        partition=partition,
        decode_shardings=False,
        sharding_rule=sharding.rule,
        reduction_factors=sharding.summed,
        need_replication_factors=tuple(f for f in order if f in sharding.whole),
        **sizes,
    )
    # `custom_partitioning` takes no function with array constants, of which
    # `jax.ensure_compile_time_eval` makes some.
    with eager_constant_folding(False):
        return fn(*operands)


def _decoded(mesh, sharding) -> PartitionSpec:
    """Spec of a sharding that Shardy chose; nothing is split where no spec says it.

    For two groups on four devices Shardy splits half a mesh axis, at which JAX's own decoding
    (`decode_shardings=True`) fails the compilation.
    """
    try:
        return parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0]
    except (ValueError, KeyError):
        return PartitionSpec()


def _on_shard(op, run, params, summed_axes, *operands):
    if not summed_axes:
        return tuple(run(*operands, **params))
    operands, params, finish = op.partial(summed_axes, *operands, **params)
    return tuple(finish(*(lax.psum(r, summed_axes) for r in run(*operands, **params))))


def _parse(rule: str) -> list[list[list[list[str]]]]:
    """Operands and results of a rule, each a list of dimensions, each a list of factors."""
    return [
        [
            [dim.strip("()").split() for dim in re.findall(r"\([^)]*\)|\S+", term)]
            for term in side.split(",")
        ]
        for side in rule.split("->")
    ]


def _split_factors(
    sharding: Sharding, terms, shapes: Sequence[tuple[int, ...]], specs, mesh_shape
) -> dict[str, tuple[str, ...]]:
    """Factor -> mesh axes that split it; the first operand that splits a factor decides."""
    axes: dict[str, tuple[str, ...]] = {}
    for dims, shape, spec in zip(terms, shapes, specs, strict=True):
        # A spec may be shorter than the shape: the dimensions it leaves out are not split.
        for (lead, *rest), extent, entry in zip(dims, shape, spec, strict=False):
            names = (entry,) if isinstance(entry, str) else tuple(entry or ())
            taken = {name for other in axes.values() for name in other}
            size = extent // math.prod(sharding.whole[f] for f in rest)
            if (
                names
                and lead not in axes
                and lead not in sharding.whole
                and taken.isdisjoint(names)
                and size % math.prod(mesh_shape[name] for name in names) == 0
            ):
                axes[lead] = names
    return axes


def _spec(dims: list[list[str]], axes: dict[str, tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(lead) for lead, *_ in dims))


def _summed_axes(sharding: Sharding, axes: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(name for factor in sharding.summed for name in axes.get(factor, ()))
