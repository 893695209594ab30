"""`awq_gemm_w4a8` and `awq_gemm_w4a4` split over eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from shards import DP, TP, collectives, put_auto, specs_of

from jax_awq.testing_w4a8 import CODES, assert_solves, random_w4a8_problem

M, K, N = 16, 256, 64

SPLITS = pytest.mark.parametrize(
    ("x_spec", "split", "bias_spec", "result", "sums"),
    [
        (P(), None, P(), P(), 0),
        (P("dp"), None, P(), P("dp"), 0),
        (P("dp"), "N", P("tp"), P("dp", "tp"), 0),
        (P("dp", "tp"), "K", P(), P("dp"), 1),
        (P("dp", "tp"), "K, scales whole", P(), P("dp"), 1),
    ],
    ids=["replicated", "data", "column", "row", "row, scales whole"],
)
# One or both of the collectives are the largest of a row that is split, or of a split tensor.
FORMS = pytest.mark.parametrize("form", ["token", "tensor", "static", "codes"])


def make(rng, form, **options):
    granularity = "tensor" if form in ("tensor", "static") else "token"
    return random_w4a8_problem(
        rng, M, K, N, granularity=granularity, static=form == "static", bias=True, **options
    )


def call(p, form):
    def fn(x, weight, bias):
        base = dataclasses.replace(p.base, weight=weight, bias=bias)
        return dataclasses.replace(p, base=base).run(x)

    return fn, (p.quantized() if form == "codes" else p.base.x), p.base.weight, p.base.bias


def specs(x, x_spec):
    """Of an array, or of codes with a scale for each row."""
    rows = P(*x_spec[:1])
    return (
        x_spec if not hasattr(x, "q") else jax.tree.unflatten(jax.tree.structure(x), [x_spec, rows])
    )


@FORMS
@SPLITS
@pytest.mark.parametrize("layout", ["gemm", "oc_major"])
def test_auto_axes(rng, form, x_spec, split, bias_spec, result, sums, layout):
    p = make(rng, form, group_size=32, layout=layout, activation="gelu")
    fn, *operands = call(p, form)
    wanted = (specs(operands[0], x_spec), specs_of(p.base.weight, split), bias_spec)
    operands = put_auto(tuple(operands), wanted)
    y = jax.jit(fn)(*operands)
    assert_solves(y, p)
    assert y.sharding.spec == result
    found = collectives(jax.jit(fn).lower(*operands).compile())
    if form == "token":
        sums *= 2
    elif form == "tensor":
        sums += len(x_spec)  # one for each axis
    assert found == ({"all-reduce": sums} if sums else {})


@pytest.mark.parametrize("codes", CODES)
def test_one_group_is_split_at_any_row(rng, codes):
    p = make(rng, "token", codes=codes, group_size=-1)
    fn, *operands = call(p, "token")
    wanted = (P("dp", "tp"), specs_of(p.base.weight, "K, scales whole"), P())
    assert_solves(jax.jit(fn)(*put_auto(tuple(operands), wanted)), p)


def test_a_nan_on_one_device_is_seen_by_all(rng):
    p = make(rng, "token", group_size=32)
    fn, x, *others = call(p, "token")
    x = x.copy()
    x[3, 7], x[5, 200] = np.nan, -np.inf
    wanted = (P("dp", "tp"), specs_of(p.base.weight, "K"), P())
    y = np.asarray(jax.jit(fn)(*put_auto((x, *others), wanted)))
    np.testing.assert_array_equal(np.isnan(y).all(-1), np.isin(np.arange(M), [3, 5]))
    np.testing.assert_array_equal(np.isnan(y).any(-1), np.isnan(y).all(-1))


def test_experts_are_split_without_collectives(rng):
    p = make(rng, "token", group_size=32, batch=(4,))
    fn, *operands = call(p, "token")
    split = jax.tree.map(lambda _: P("tp"), p.base.weight)
    operands = put_auto(tuple(operands), (P("tp", "dp"), split, P("tp")))
    y = jax.jit(fn)(*operands)
    assert_solves(y, p)
    assert y.sharding.spec == P("tp", "dp")
    assert collectives(jax.jit(fn).lower(*operands).compile()) == {}


@FORMS
@SPLITS
def test_explicit_axes(rng, form, x_spec, split, bias_spec, result, sums):
    p = make(rng, form, group_size=32)
    fn, *operands = call(p, form)
    mesh = jax.make_mesh((DP, TP), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        wanted = (specs(operands[0], x_spec), specs_of(p.base.weight, split), bias_spec)
        y = fn(*jax.tree.map(jax.device_put, tuple(operands), wanted))
        assert jax.typeof(y).sharding.spec == P(*result, *[None] * (2 - len(result)))
        y = np.asarray(y)
    assert_solves(y, p)


@pytest.mark.parametrize("split", ["K", "N"])
def test_gradients(rng, split):
    p = make(rng, "token", group_size=32, dtype=np.float32, activation="silu")
    fn, x, weight, bias = call(p, "token")

    def loss(x, scales, bias):
        return (fn(x, dataclasses.replace(weight, scales=scales), bias) ** 2).sum()

    want = jax.grad(loss, (0, 1, 2))(x, weight.scales, bias)
    wanted = (P("dp", "tp") if split == "K" else P("dp"), specs_of(weight, split).scales, P())
    operands = put_auto((x, weight.scales, bias), wanted)
    for got, one in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*operands), want, strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-4, atol=1e-4 * float(np.abs(one).max()))


def test_explicit_free_dimensions_and_gradient(rng):
    """Of a row split: no derivative is asked of the largest of a row, nor of its exchange."""
    p = random_w4a8_problem(rng, (4, 3), K, N, group_size=32, dtype=np.float32, activation="silu")
    fn, x, weight, bias = call(p, "token")
    ct = rng.standard_normal((4, 3, N)).astype(np.float32)

    def loss(x, scales):
        return (fn(x, dataclasses.replace(weight, scales=scales), bias) * ct).sum()

    want = jax.grad(loss, (0, 1))(x, weight.scales)
    mesh = jax.make_mesh((DP, TP), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        split = jax.tree.map(jax.device_put, weight, specs_of(weight, "K"))
        ct = jax.device_put(ct, P("dp"))
        placed = jax.device_put(x, P("dp", None, "tp"))
        y = fn(placed, split, bias)
        assert jax.typeof(y).sharding.spec == P("dp", None, None)

        def split_loss(x, scales):
            return (fn(x, dataclasses.replace(split, scales=scales), bias) * ct).sum()

        got = jax.jit(jax.grad(split_loss, (0, 1)))(placed, split.scales)
        assert jax.typeof(got[0]).sharding.spec == P("dp", None, "tp")
        y, got = np.asarray(y), [np.asarray(g) for g in got]
    assert_solves(y, p)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4 * float(np.abs(w).max()))
