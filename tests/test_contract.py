"""What JAX promises of a function, for every op of the table."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import CASES, OF_OPS
from contract_case import E, K, auto_mesh
from jax import export
from jax.sharding import PartitionSpec as P

from jax_awq import awq_gemm
from jax_awq._primitive import OPS, OpDef
from jax_awq.testing import assert_close, dequantize_float64, random_weight

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_op = pytest.mark.parametrize("case", OF_OPS.values(), ids=OF_OPS.keys())


def test_every_op_has_a_case():
    assert {case.op for case in CASES.values()} == set(OPS)


def test_an_op_without_a_rule_cannot_be_defined():
    with pytest.raises(TypeError, match="missing 9 required keyword-only arguments"):
        OpDef(name="incomplete")


@every_case
def test_eager_and_jit(case):
    eager, jitted = case.fn(*case.operands), jax.jit(case.fn)(*case.operands)
    np.testing.assert_array_equal(eager, jitted)
    assert_close(eager, case.exact(*case.operands), case.dense(*case.float_operands))


@every_case
def test_promotion_of_ranks_may_be_an_error(case):
    """Traced and lowered, the gradient and a map too: nothing of this runs otherwise."""
    axes = [None if i in case.floats else 0 for i in range(len(case.operands))]
    stacked = [
        a if axis is None else np.stack([a, a]) for a, axis in zip(case.operands, axes, strict=True)
    ]
    mapped = jax.vmap(case.fn, axes, axis_size=2)

    def loss(floats, fn, operands):
        operands = list(operands)
        for i, value in zip(case.floats, floats, strict=True):
            operands[i] = value
        return fn(*operands).astype(jnp.float32).sum()

    floats = [case.operands[i] for i in case.floats]
    with jax.numpy_rank_promotion("raise"):
        jax.jit(case.fn).lower(*case.operands)
        jax.jit(mapped).lower(*stacked)
        for fn, operands in ((case.fn, case.operands), (mapped, stacked)):
            jax.jit(jax.grad(loss), static_argnums=1).lower(floats, fn, operands)


@every_op
def test_at_compile_time(case):
    def early(*operands):
        with jax.ensure_compile_time_eval():
            return case.fn(*operands)

    early(*case.operands)
    constant = jax.jit(lambda: early(*case.operands))()
    np.testing.assert_array_equal(constant, jax.jit(case.fn)(*case.operands))


@pytest.fixture
def compiled():
    """What JAX traces, lowers or compiles, as it happens."""
    seen = []
    listening = True

    def listen(event, _, **__):
        if listening and event.startswith("/jax/core/compile"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    listening = False


@every_case
def test_a_call_is_compiled_once(case, compiled):
    """Eagerly, which is then a look into a cache."""
    first, second = (jax.tree.map(jnp.array, case.operands) for _ in range(2))
    case.fn(*first)
    compiled.clear()
    case.fn(*second)
    assert not compiled
    jax.jit(lambda x: x + 1)(1)
    assert compiled  # so it would have been seen


# --- vmap


@every_case
def test_vmap_of_every_subset_of_operands(case):
    variants = [case.operands, *(case.another(seed) for seed in range(1, E))]
    count = len(case.operands)
    for mapped in itertools.product([False, True], repeat=count):
        if not any(mapped):
            continue
        # The mapped axis is the first of one operand, the last of the next.
        axes = [(-1 if i % 2 else 0) if mapped[i] else None for i in range(count)]
        operands = [
            np.stack([v[i] for v in variants], axes[i]) if mapped[i] else case.operands[i]
            for i in range(count)
        ]
        each = [[v[i] if mapped[i] else case.operands[i] for i in range(count)] for v in variants]
        out_axis = -1 if sum(mapped) % 2 else 0
        got = jax.vmap(case.fn, axes, out_axis)(*operands)
        assert_close(
            got,
            np.stack([case.exact(*o) for o in each], out_axis),
            jnp.stack([case.fn(*o) for o in each], out_axis),
        )


@every_case
def test_nested_vmap(case):
    """A batch of weights under an outer map of one operand, and of all: batches of batches."""
    count, inner_size = len(case.operands), 3
    inner = [count == 1, *[True] * (count - 1)]
    for outer in [*np.eye(count, dtype=bool).tolist(), [True] * count]:
        each = [
            [
                tuple(
                    case.another(inner_size * i * outer[o] + j * inner[o])[o] for o in range(count)
                )
                for j in range(inner_size)
            ]
            for i in range(E)
        ]
        operands = []
        for o in range(count):
            rows = [
                np.stack([each[i][j][o] for j in range(inner_size)]) if inner[o] else each[i][0][o]
                for i in range(E)
            ]
            operands.append(np.stack(rows) if outer[o] else rows[0])
        got = jax.vmap(
            jax.vmap(case.fn, [0 if m else None for m in inner]), [0 if m else None for m in outer]
        )(*operands)
        assert_close(
            got,
            np.stack([np.stack([case.exact(*o) for o in row]) for row in each]),
            jnp.stack([jnp.stack([case.fn(*o) for o in row]) for row in each]),
        )


# --- derivatives, against float64


def _loss(fn, cotangent):
    return lambda *floats: jnp.vdot(fn(*floats).astype(cotangent.dtype), cotangent)


def _cotangent(case):
    shape = jax.eval_shape(case.fn, *case.operands).shape
    return np.random.default_rng(9).standard_normal(shape).astype(np.float32)


def _in_float64(function, case, *more):
    """Runs `function(dense, floats, *more)` of the case in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = [np.asarray(a).astype(np.float64) for a in (*case.float_operands, *more)]
        count = len(case.floats)
        run = jax.jit(function, static_argnums=0)
        result = run(case.dense, wide[:count], *wide[count:])
        return jax.tree.map(np.asarray, result)


@every_case
def test_grad(case):
    def gradients(fn, floats, cotangent):
        return jax.grad(_loss(fn, cotangent), tuple(range(len(floats))))(*floats)

    cotangent = _cotangent(case)
    exact = _in_float64(gradients, case, cotangent)
    reference = gradients(case.dense, case.float_operands, cotangent)
    for run in (gradients, jax.jit(gradients, static_argnums=0)):
        got = run(case.of_floats, case.float_operands, cotangent)
        for g, e, r in zip(got, exact, reference, strict=True):
            assert_close(g, e, r)


@every_case
def test_jvp(case):
    def tangent_out(fn, floats, *tangents):
        return jax.jvp(fn, tuple(floats), tuple(tangents))[1]

    rng = np.random.default_rng(10)
    tangents = [
        rng.standard_normal(f.shape).astype(np.float32).astype(f.dtype) for f in case.float_operands
    ]
    for live in [*np.eye(len(tangents)), np.ones(len(tangents))]:
        some = [t * np.asarray(on, t.dtype) for t, on in zip(tangents, live, strict=True)]
        assert_close(
            tangent_out(case.of_floats, case.float_operands, *some),
            _in_float64(tangent_out, case, *some),
            tangent_out(case.dense, case.float_operands, *some),
        )


@every_case
def test_vmap_of_grad(case):
    cotangent = _cotangent(case)
    index = tuple(range(len(case.floats)))
    stacked = [np.stack([f, f * f.dtype.type(0.5)]) for f in case.float_operands]
    gradient = jax.jit(jax.grad(_loss(case.of_floats, cotangent), index))
    got = jax.vmap(gradient)(*stacked)
    for i in range(E):
        one = gradient(*(s[i] for s in stacked))
        for batched, single in zip(got, one, strict=True):
            # Folding changes only the order of sums, which the last bits of 16-bit types show.
            np.testing.assert_allclose(
                batched[i].astype(np.float32),
                single.astype(np.float32),
                rtol=2e-2,
                atol=2e-2 * float(np.abs(single).max()),
            )


@every_case
def test_grad_of_an_operand_shared_over_a_batch(case):
    """Grad outside vmap: what the map shares collects the gradients of the whole batch."""
    cotangent = _cotangent(case)
    variants = [case.operands, case.another(1), case.another(2)]
    for shared in case.floats:
        axes = [None if i == shared else 0 for i in range(len(case.operands))]
        stacked = [np.stack(values) for values in zip(*variants, strict=True)]

        def loss(value, fn, operands, shared=shared):
            operands = [value if i == shared else o for i, o in enumerate(operands)]
            return (fn(*operands).astype(jnp.float32) * cotangent).sum()

        value = case.operands[shared]
        mapped = jax.vmap(case.fn, axes, axis_size=len(variants))
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        got = gradient(value, mapped, stacked)
        want = np.sum([np.asarray(gradient(value, case.fn, v), np.float32) for v in variants], 0)
        np.testing.assert_allclose(
            np.asarray(got, np.float32), want, rtol=2e-2, atol=2e-2 * np.abs(want).max()
        )


@every_case
def test_second_derivatives(case):
    """Forward over reverse, and reverse over reverse: the rules are closed."""
    cotangent = _cotangent(case) / 64  # squares stay far below the largest float16

    def square(fn):
        return lambda *a: (_loss(fn, cotangent)(*a)) ** 2

    def forward_over_reverse(fn, *floats):
        grad = jax.grad(square(fn), tuple(range(len(floats))))
        return jax.jvp(grad, floats, tuple(jnp.full_like(f, 1 / 64) for f in floats))[1]

    def reverse_over_reverse(fn, *floats):
        def directional(*a):
            g = jax.grad(square(fn), tuple(range(len(floats))))(*a)
            return sum(jnp.sum(x.astype(jnp.float32)) for x in g)

        return jax.grad(directional, tuple(range(len(floats))))(*floats)

    for transform in (forward_over_reverse, reverse_over_reverse):
        # One program each: many of one operation each take longer to compile.
        run = jax.jit(transform, static_argnums=0)
        got, want = (run(fn, *case.float_operands) for fn in (case.of_floats, case.dense))
        for g, r in zip(got, want, strict=True):
            assert g.dtype == r.dtype
            r = np.asarray(r, np.float32)
            np.testing.assert_allclose(
                np.asarray(g, np.float32), r, rtol=0.05, atol=0.05 * np.abs(r).max()
            )


@every_case
def test_integers_have_float0_tangents(case):
    integers = [i for i in range(len(case.operands)) if i not in case.floats]
    if not integers:
        pytest.skip("every operand is a float")
    got = jax.grad(
        lambda *o: case.fn(*o).astype(jnp.float32).sum(), tuple(integers), allow_int=True
    )(*case.operands)
    assert all(g.dtype == jax.dtypes.float0 for g in got)


def test_linear_transpose(rng):
    weight = random_weight(rng, K, 16, group_size=32)
    x, y = jnp.ones((3, K), jnp.float16), jnp.ones((3, 16), jnp.float16)
    (dx,) = jax.linear_transpose(lambda x: x @ weight, x)(y)
    np.testing.assert_array_equal(dx, jax.vjp(lambda x: x @ weight, x)[1](y)[0])


# --- control flow


@every_op
def test_scan(case):
    stacked = jax.tree.map(lambda o: jnp.stack([o, o]), case.operands)
    _, got = jax.lax.scan(lambda _, o: (0, case.fn(*o)), 0, stacked)
    want = jax.jit(case.fn)(*case.operands)
    np.testing.assert_array_equal(got, jnp.stack([want, want]))


@every_op
def test_remat(case):
    if not case.floats:
        pytest.skip("every operand is an integer")
    index = tuple(range(len(case.floats)))
    got, want = (
        jax.jit(jax.grad(lambda *f, fn=fn: fn(*f).astype(jnp.float32).sum(), index))(
            *case.float_operands
        )
        for fn in (jax.checkpoint(case.of_floats), case.of_floats)
    )
    for g, w in zip(got, want, strict=True):
        # Another program, in which XLA may add in another order.
        w = np.asarray(w, np.float32)
        np.testing.assert_allclose(
            np.asarray(g, np.float32), w, rtol=1e-2, atol=1e-3 * np.abs(w).max()
        )


def test_scan_over_layers_with_remat(rng):
    """A stack of square layers as one scan equals the loop, and so do its gradients."""
    weights = random_weight(rng, K, K, group_size=32, batch=(3,))
    x = rng.standard_normal((2, K)).astype(np.float16)

    def layer(x, weight):
        return awq_gemm(x, weight, activation="silu"), None

    def looped(x):
        for i in range(3):
            x, _ = layer(x, jax.tree.map(lambda a, i=i: a[i], weights))
        return x

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0]

    np.testing.assert_array_equal(jax.jit(scanned)(x), looped(x))
    gradients = [
        jax.grad(lambda x, f=f: f(x).astype(jnp.float32).sum())(x) for f in (scanned, looped)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-2, atol=1e-4)


# --- export


@every_op
def test_export_for_both_platforms_and_reload(case):
    checks = [export.DisabledSafetyCheck.custom_call(f"jax_awq.{op}") for op in OPS]
    exported = export.export(jax.jit(case.fn), platforms=("cpu", "cuda"), disabled_checks=checks)(
        *case.operands
    )
    again = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(*case.operands), jax.jit(case.fn)(*case.operands))


# --- shard_map


@pytest.mark.parametrize("check_vma", [True, False])
@every_case
def test_shard_map(case, check_vma):
    """Replicated operands in a manual region: gradients are summed over devices."""
    mesh = auto_mesh(i=2)
    shape = jax.eval_shape(case.fn, *case.operands).shape
    scale = np.asarray([1, 3], np.float32)

    def local(scale, *floats):
        return case.of_floats(*floats).astype(jnp.float32)[None] * scale.reshape(1, 1, 1)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("i"), *[P()] * len(case.floats)),
        out_specs=P("i"),
        check_vma=check_vma,
    )
    want = case.fn(*case.operands).astype(jnp.float32)
    got = jax.jit(mapped)(scale, *case.float_operands)
    assert got.shape == (2, *shape)
    np.testing.assert_array_equal(got, want[None] * scale.reshape(2, 1, 1))

    index = tuple(range(len(case.floats)))
    gradients = jax.jit(jax.grad(lambda *f: mapped(scale, *f).sum(), index))(*case.float_operands)
    single = jax.jit(jax.grad(lambda *f: 4 * case.of_floats(*f).astype(jnp.float32).sum(), index))(
        *case.float_operands
    )
    for g, s in zip(gradients, single, strict=True):
        np.testing.assert_allclose(
            np.asarray(g, np.float32),
            np.asarray(s, np.float32),
            rtol=2e-2,
            atol=1e-2 * float(np.abs(np.asarray(s, np.float32)).max()),
        )


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_of_a_split_x_and_a_replicated_weight(rng, check_vma):
    """Operands that vary over different axes are brought together, or gradients would be wrong."""
    mesh = auto_mesh(m=2, n=2)
    weight = random_weight(rng, K, 16, group_size=32, dtype=np.float32)
    x = rng.standard_normal((4, K)).astype(np.float32)
    columns = jax.tree.map(lambda _: P(None, "n"), weight)
    mapped = jax.shard_map(
        awq_gemm, mesh=mesh, in_specs=(P("m"), columns), out_specs=P("m", "n"), check_vma=check_vma
    )

    def loss(fn, x, scales):
        return (
            fn(
                x,
                jax.tree.unflatten(
                    jax.tree.structure(weight), [weight.qweight, scales, weight.qzeros]
                ),
            )
            ** 2
        ).sum()

    exact = x.astype(np.float64) @ dequantize_float64(weight)
    assert_close(jax.jit(mapped)(x, weight), exact, awq_gemm(x, weight))
    for got, want in zip(
        *(
            jax.jit(jax.grad(functools.partial(loss, fn), (0, 1)))(x, weight.scales)
            for fn in (mapped, awq_gemm)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
