"""Weights and activations split over eight devices: values, result shardings, collectives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_case import auto_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from shards import DP, TP, collectives, put_auto, specs_of

from jax_awq import AWQWeight, PermutedWeight, awq_dequantize, awq_gemm
from jax_awq.testing import assert_close, assert_close_to_float64, random_problem, random_weight

M, K, N = 16, 256, 64

LAYOUTS = pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])


def run_auto(problem, x_spec, weight_specs, bias_spec=None):
    fn = jax.jit(
        lambda x, w, b: awq_gemm(
            x, w, bias=b, activation=problem.activation, out_dtype=problem.out_dtype
        )
    )
    bias = None if problem.bias is None else put_auto(problem.bias, bias_spec or P())
    operands = (put_auto(problem.x, x_spec), put_auto(problem.weight, weight_specs), bias)
    return fn(*operands), collectives(fn.lower(*operands).compile())


@LAYOUTS
@pytest.mark.parametrize(
    ("x_spec", "split", "bias_spec", "result", "found"),
    [
        (P(), None, P(), P(), {}),
        (P("dp"), None, P(), P("dp"), {}),
        (P(("dp", "tp")), None, P(), P(("dp", "tp")), {}),
        (P("dp"), "N", P("tp"), P("dp", "tp"), {}),
        (P("dp", "tp"), "K", P(), P("dp"), {"all-reduce": 1}),
        (P("dp", "tp"), "K, scales whole", P(), P("dp"), {"all-reduce": 1}),
        (P("dp"), "K", P(), P("dp"), {"all-reduce": 1}),
    ],
    ids=[
        "replicated",
        "data",
        "data over two axes",
        "column",
        "row",
        "row, scales whole",
        "row, x whole",
    ],
)
def test_auto_axes(rng, layout, x_spec, split, bias_spec, result, found):
    p = random_problem(rng, M, K, N, group_size=32, layout=layout, bias=True, activation="gelu")
    y, seen = run_auto(p, x_spec, specs_of(p.weight, split), bias_spec)
    assert_close_to_float64(y, p)
    assert y.sharding.spec == result
    assert seen == found


@LAYOUTS
@pytest.mark.parametrize(
    ("split", "result"),
    [(None, P()), ("N", P(None, "tp")), ("K", P("tp")), ("K, scales whole", P("tp"))],
)
@pytest.mark.parametrize("group_size", [32, -1])
def test_dequantize_where_the_weight_lies(rng, layout, split, result, group_size):
    weight = random_weight(rng, K, N, group_size=group_size, layout=layout)
    if group_size == -1 and split == "K":
        pytest.skip("a single row of scales cannot be split")
    fn = jax.jit(awq_dequantize)
    placed = put_auto(weight, specs_of(weight, split))
    dense = fn(placed)
    np.testing.assert_array_equal(dense, fn(weight))
    assert [*dense.sharding.spec, None, None][:2] == [*result, None, None][:2]
    assert collectives(fn.lower(placed).compile()) == {}


@LAYOUTS
def test_one_group_is_split_at_any_row(rng, layout):
    p = random_problem(rng, M, K, N, group_size=-1, layout=layout, activation="silu")
    specs = specs_of(p.weight, "K, scales whole")
    y, seen = run_auto(p, P("dp", "tp"), specs)
    assert_close_to_float64(y, p)
    assert seen == {"all-reduce": 1}


@LAYOUTS
def test_two_groups_are_not_split_over_four_devices(rng, layout):
    p = random_problem(rng, M, K, N, group_size=128, layout=layout)
    y, seen = run_auto(p, P("dp", "tp"), specs_of(p.weight, "K, scales whole"))
    assert_close_to_float64(y, p)
    assert "all-reduce" not in seen


@LAYOUTS
def test_computed_scales_do_not_split_half_an_axis(rng, layout):
    """Shardy splits an intermediate over half of tp here, which JAX itself cannot decode."""
    p = random_problem(rng, M, K, N, group_size=128, layout=layout)
    x = put_auto(p.x, P("dp", "tp"))
    y = jax.jit(lambda x, w: awq_gemm(x * 1, jax.tree.map(lambda a: a * 1, w)))(x, p.weight)
    assert_close_to_float64(y, p)


@LAYOUTS
def test_clashing_axes_are_gathered(rng, layout):
    p = random_problem(rng, M, K, N, group_size=32, layout=layout, bias=True)
    y, _ = run_auto(p, P("dp", "tp"), specs_of(p.weight, "N"))
    assert_close_to_float64(y, p)


def test_experts_are_split_without_collectives(rng):
    p = random_problem(rng, M, K, N, group_size=32, batch=(4,), bias=True, activation="relu")
    y, seen = run_auto(p, P("tp", "dp"), jax.tree.map(lambda _: P("tp"), p.weight), P("tp"))
    assert_close_to_float64(y, p)
    assert y.sharding.spec == P("tp", "dp")
    assert seen == {}


def test_row_split_rounds_once(rng):
    """The partial sums travel in float32: the result is as good as without the split."""
    p = random_problem(rng, M, K, N, group_size=32, dtype=jnp.bfloat16, bias=True)
    fn = jax.jit(lambda x, w, b: awq_gemm(x, w, bias=b))
    operands = put_auto((p.x, p.weight, p.bias), (P("dp", "tp"), specs_of(p.weight, "K"), P()))
    text = fn.lower(*operands).compile().as_text()
    assert re.findall(r"= (\w+)\[[^=]* all-reduce\(", text) == ["f32"]


@LAYOUTS
@pytest.mark.parametrize("split", ["K", "N"])
def test_gradients(rng, layout, split):
    p = random_problem(rng, M, K, N, group_size=32, layout=layout, dtype=np.float32, bias=True)

    def loss(x, scales, bias):
        w = AWQWeight(p.weight.qweight, scales, p.weight.qzeros, layout=layout, group_size=32)
        return (awq_gemm(x, w, bias=bias, activation="silu") ** 2).sum()

    want = jax.grad(loss, (0, 1, 2))(p.x, p.weight.scales, p.bias)
    specs = (P("dp", "tp") if split == "K" else P("dp"), specs_of(p.weight, split).scales, P())
    operands = put_auto((p.x, p.weight.scales, p.bias), specs)
    for got, one in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*operands), want, strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-4, atol=1e-4 * float(jnp.abs(one).max()))


# --- Explicit axes


@pytest.fixture
def explicit():
    mesh = jax.make_mesh((DP, TP), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def put_explicit(tree, specs):
    return jax.tree.map(jax.device_put, tree, specs)


@pytest.mark.usefixtures("explicit")
@LAYOUTS
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("x_spec", "split", "bias_spec", "result"),
    [
        (P(), None, P(), P(None, None)),
        (P("dp"), "N", P("tp"), P("dp", "tp")),
        (P("dp", "tp"), "K", P(), P("dp", None)),
        (P("dp", "tp"), "N", P("tp"), P("dp", None)),
    ],
    ids=["replicated", "column", "row", "clash"],
)
def test_explicit_axes(rng, layout, wrap, x_spec, split, bias_spec, result):
    p = random_problem(rng, M, K, N, group_size=32, layout=layout, bias=True, activation="gelu")
    operands = put_explicit((p.x, p.weight, p.bias), (x_spec, specs_of(p.weight, split), bias_spec))
    y = wrap(lambda x, w, b: awq_gemm(x, w, bias=b, activation="gelu"))(*operands)
    assert jax.typeof(y).sharding.spec == result
    with jax.set_mesh(jax.sharding.Mesh(jax.devices()[:1], "one")):
        assert_close(np.asarray(y), p.float64(), np.asarray(p.reference()))


def test_explicit_arrays_outside_their_mesh(rng):
    p = random_problem(rng, M, K, N, group_size=32)
    mesh = jax.make_mesh((DP, TP), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    x, weight = jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh, s)),
        (p.x, p.weight),
        (P("dp"), specs_of(p.weight, "N")),
    )
    y = x @ weight
    assert jax.typeof(y).sharding.spec == P("dp", "tp")
    assert_close_to_float64(y, p)


@pytest.mark.usefixtures("explicit")
def test_explicit_free_dimensions_and_gradient(rng):
    p = random_problem(rng, (4, 3), K, N, group_size=32, dtype=np.float32)
    x, weight = put_explicit((p.x, p.weight), (P("dp", None, "tp"), specs_of(p.weight, "K")))
    y = awq_gemm(x, weight)
    assert jax.typeof(y).sharding.spec == P("dp", None, None)
    np.testing.assert_allclose(y, p.float64(), rtol=1e-4, atol=1e-5)

    grad = jax.jit(jax.grad(lambda x: awq_gemm(x, weight).sum()))(x)
    assert jax.typeof(grad).sharding.spec == P("dp", None, "tp")
    want = np.ones((4, 3, N)) @ np.asarray(weight.dequantize(np.float32)).T
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("split", ["K", "N"])
def test_explicit_permuted(rng, wrap, split):
    p = random_problem(rng, M, K, N, group_size=32, dtype=np.float32)
    perm = rng.permutation(K).astype(np.int32)
    inverse = np.argsort(perm)  # row i of the weight is of input perm[i]
    x, weight, order = put_explicit(
        (p.x[:, inverse], p.weight, perm),
        (P("dp", "tp"), specs_of(p.weight, split), P("tp")),
    )
    permuted = PermutedWeight(weight, order)
    y = wrap(awq_gemm)(x, permuted)
    assert jax.typeof(y).sharding.spec[0] == "dp"
    np.testing.assert_allclose(y, p.float64(), rtol=1e-4, atol=1e-5)

    grad = wrap(jax.grad(lambda x: awq_gemm(x, permuted).sum()))(x)
    dense = np.asarray(p.weight.dequantize(np.float32))[inverse]
    assert jax.typeof(grad).sharding.spec == P("dp", "tp")
    np.testing.assert_allclose(grad, np.ones((M, N)) @ dense.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(wrap(awq_dequantize)(permuted), dense)


@pytest.mark.usefixtures("explicit")
def test_explicit_permuted_experts(rng):
    p = random_problem(rng, M, K, N, group_size=32, batch=(4,), dtype=np.float32)
    perm = np.stack([rng.permutation(K) for _ in range(4)]).astype(np.int32)
    x = np.take_along_axis(p.x, np.argsort(perm)[:, None], axis=-1)
    x, weight, order = put_explicit(
        (x, p.weight, perm),
        (P("tp", "dp"), jax.tree.map(lambda _: P("tp"), p.weight), P("tp", "dp")),
    )
    y = awq_gemm(x, PermutedWeight(weight, order))
    assert jax.typeof(y).sharding.spec == P("tp", "dp", None)
    np.testing.assert_allclose(y, p.float64(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("explicit")
def test_explicit_experts_dequantize_and_vmap(rng):
    p = random_problem(rng, M, K, N, group_size=32, batch=(4,), dtype=np.float32)
    x, weight = put_explicit(
        (p.x, p.weight), (P("tp", "dp"), jax.tree.map(lambda _: P("tp"), p.weight))
    )
    y = awq_gemm(x, weight)
    assert jax.typeof(y).sharding.spec == P("tp", "dp", None)
    np.testing.assert_allclose(y, p.float64(), rtol=1e-4, atol=1e-5)
    assert jax.typeof(weight.dequantize()).sharding.spec == P("tp", None, None)

    mapped = jax.vmap(awq_gemm)(x, weight)
    np.testing.assert_allclose(mapped, p.float64(), rtol=1e-4, atol=1e-5)


def test_part_of_the_mesh_manual(rng):
    weight = random_weight(rng, K, N, group_size=32)
    x = rng.standard_normal((M, K)).astype(np.float16)
    fn = jax.shard_map(
        awq_gemm,
        mesh=auto_mesh(dp=DP, tp=TP),
        axis_names={"dp"},
        in_specs=(P("dp"), jax.tree.map(lambda _: P(), weight)),
        out_specs=P("dp"),
    )
    np.testing.assert_array_equal(jax.jit(fn)(x, weight), awq_gemm(x, weight))
