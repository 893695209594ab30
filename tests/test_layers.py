"""The layers of Flax and Equinox: what they compute, and what JAX does with them."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import dense_of, linear_of, problem_of

from jax_awq import AWQWeight, PermutedWeight
from jax_awq.testing import assert_close, assert_close_to_float64

eqx = pytest.importorskip("equinox")
linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
traverse_util = pytest.importorskip("flax.traverse_util")
awq_equinox = pytest.importorskip("jax_awq.equinox")
awq_flax = pytest.importorskip("jax_awq.flax")

CASES = pytest.mark.parametrize(
    ("dtype", "layout", "bias", "activation"),
    [
        (np.float16, "gemm", True, None),
        (jnp.bfloat16, "gemv", False, "silu"),
        (np.float32, "oc_major", True, "gelu"),
    ],
)


@CASES
def test_nnx(rng, dtype, layout, bias, activation):
    problem = problem_of(rng, (2, 3), dtype, layout, bias, activation)
    layer = linear_of(problem, awq_flax)
    assert_close_to_float64(layer(problem.x), problem)
    assert_close_to_float64(nnx.jit(lambda layer, x: layer(x))(layer, problem.x), problem)
    mapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, problem.x)
    assert_close_to_float64(mapped, problem)


@CASES
def test_linen(rng, dtype, layout, bias, activation):
    problem = problem_of(rng, (2, 3), dtype, layout, bias, activation)
    module, variables = dense_of(problem, awq_flax)
    assert_close_to_float64(module.apply(variables, problem.x), problem)
    assert_close_to_float64(jax.jit(module.apply)(variables, problem.x), problem)
    assert_close_to_float64(
        jax.vmap(module.apply, in_axes=(None, 0))(variables, problem.x), problem
    )


@CASES
def test_equinox(rng, dtype, layout, bias, activation):
    problem = problem_of(rng, (2, 3), dtype, layout, bias, activation)
    layer = linear_of(problem, awq_equinox)
    mapped = eqx.filter_vmap(eqx.filter_vmap(layer))
    assert_close_to_float64(mapped(problem.x), problem)
    assert_close_to_float64(eqx.filter_jit(mapped)(problem.x), problem)
    one = dataclasses.replace(problem, x=problem.x[0, 0])
    assert_close_to_float64(layer(one.x, key=jax.random.key(0)), one)


def test_linen_with_permuted_inputs(rng):
    problem = problem_of(rng, (2, 3))
    perm = rng.permutation(128).astype(np.int32)
    module, variables = dense_of(problem, awq_flax)
    variables["awq"]["kernel"] = PermutedWeight(problem.weight, perm)
    x = problem.x[..., np.argsort(perm)]
    assert_close_to_float64(module.apply(variables, x), problem)


def test_dtypes(rng):
    problem = problem_of(rng, 3, np.float16)
    layer = awq_flax.AWQLinear(
        problem.weight, problem.bias, dtype=jnp.bfloat16, preferred_element_type=jnp.float32
    )
    same = dataclasses.replace(problem, x=problem.x.astype(jnp.bfloat16), out_dtype=jnp.float32)
    assert_close_to_float64(layer(problem.x), same)
    module, variables = dense_of(problem, awq_flax)
    y = module.clone(dtype=jnp.bfloat16).apply(variables, problem.x)
    assert_close_to_float64(y, dataclasses.replace(same, out_dtype=None))


def test_attributes_are_those_of_the_layer_replaced(rng):
    problem = problem_of(rng, 3)
    ours = linear_of(problem, awq_flax)
    theirs = nnx.Linear(128, 48, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    for name in ("in_features", "out_features", "use_bias", "dtype", "preferred_element_type"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert jnp.dtype(ours.param_dtype) == theirs.param_dtype
    assert ours.bias.shape == theirs.bias.shape
    assert ours.kernel.get_value().shape == theirs.kernel.shape

    ours = linear_of(problem, awq_equinox)
    theirs = eqx.nn.Linear(128, 48, key=jax.random.key(0))
    for name in ("in_features", "out_features", "use_bias"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.bias.shape == theirs.bias.shape
    assert ours.weight.shape == theirs.weight.shape[::-1]


def test_linen_init():
    module = awq_flax.AWQDense(48, group_size=32)
    x = jnp.ones((2, 128), jnp.float16)
    variables = module.init(jax.random.key(0), x)
    dense = linen.Dense(48).init(jax.random.key(0), x)
    kernel = variables["awq"]["kernel"]
    assert isinstance(kernel, AWQWeight)
    assert (kernel.shape, kernel.group_size, kernel.dtype) == ((128, 48), 32, jnp.float16)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"bias": (48,)}
    # Half a step of the codes, and what float16 makes of it.
    step = jnp.repeat(kernel.scales, 32, axis=0)
    distance = jnp.abs(kernel.dequantize(jnp.float32) - dense["params"]["kernel"])
    assert bool((distance < 0.51 * step).all())

    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    assert shapes["awq"]["kernel"].shape == (128, 48)
    with pytest.raises(ValueError, match=r"AWQDense: kernel must have shape \(128, 40\)"):
        module.clone(features=40, use_bias=False).apply({"awq": variables["awq"]}, x)


def test_linen_kernel_that_is_missing(rng):
    problem = problem_of(rng, 2)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return awq_flax.AWQDense(48, name="up")(x)

    flat = {("up", "kernel"): problem.weight}
    variables = {
        "params": {"up": {"bias": problem.bias}},
        "awq": traverse_util.unflatten_dict(flat),
    }
    assert_close_to_float64(Model().apply(variables, problem.x), problem)
    with pytest.raises(ValueError, match="AWQDense: there is no up/kernel in the collection 'awq'"):
        Model().apply({"params": variables["params"]}, problem.x)


@pytest.mark.parametrize(
    ("features", "shape", "error", "text"),
    [
        (0, (2, 128), ValueError, "features must be 1 or more, got 0"),
        (-8, (2, 128), ValueError, "features must be 1 or more, got -8"),
        (32.0, (2, 128), TypeError, r"features must be an integer, got 32\.0"),
        (30, (2, 128), ValueError, "features must be a multiple of 8, got 30"),
        (48, (), ValueError, r"inputs must have shape \(..., K\) with K 1 or more, got \(\)"),
        (48, (2, 0), ValueError, r"inputs must have shape .* with K 1 or more, got \(2, 0\)"),
    ],
)
def test_linen_errors(features, shape, error, text):
    with pytest.raises(error, match=f"^AWQDense: {text}"):
        awq_flax.AWQDense(features).init(jax.random.key(0), jnp.ones(shape, jnp.float16))


LAYERS = 3


def stacked(rng):
    """Weights of three layers, the same one by one, and an input."""
    problem = problem_of(rng, 4, batch=(LAYERS,))
    operands = problem.weight, problem.bias
    return problem, [jax.tree.map(lambda a, i=i: a[i], operands) for i in range(LAYERS)]


def into_next(y, x):
    """Feeds 48 results back as 128 inputs, of a size that stays in the range of float16."""
    return (x + jnp.pad(y, (*[(0, 0)] * (y.ndim - 1), (0, 80)))) / 8


def test_scan_over_stacked_nnx_layers(rng):
    problem, parts = stacked(rng)
    x = problem.x[0]

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(x, layer):
        return into_next(layer(x), x)

    want = x
    for weight, bias in parts:
        want = into_next(awq_flax.AWQLinear(weight, bias)(want), want)
    np.testing.assert_array_equal(scanned(x, linear_of(problem, awq_flax)), want)


def test_scan_over_stacked_linen_layers(rng):
    problem, parts = stacked(rng)
    x = problem.x[0]

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return into_next(awq_flax.AWQDense(48, name="dense")(x), x), None

    scan = linen.scan(
        Layer, variable_axes={"params": 0, "awq": 0}, split_rngs={"params": True}, length=LAYERS
    )
    variables = scan().init(jax.random.key(0), x, None)
    assert variables["awq"]["dense"]["kernel"].shape == (LAYERS, 128, 48)
    variables = {
        "params": {"dense": {"bias": problem.bias}},
        "awq": {"dense": {"kernel": problem.weight}},
    }
    want = x
    for weight, bias in parts:
        want = into_next(awq_flax.AWQLinear(weight, bias)(want), want)
    np.testing.assert_array_equal(scan().apply(variables, x, None)[0], want)


def test_scan_over_stacked_equinox_layers(rng):
    problem, parts = stacked(rng)
    x = problem.x[0]
    arrays, static = eqx.partition(linear_of(problem, awq_equinox), eqx.is_array_like)

    @jax.jit
    def scanned(x, arrays):
        def body(x, layer):
            return into_next(jax.vmap(eqx.combine(layer, static))(x), x), None

        return jax.lax.scan(body, x, arrays)[0]

    want = x
    for weight, bias in parts:
        want = into_next(jax.vmap(awq_equinox.AWQLinear(weight, bias))(want), want)
    np.testing.assert_array_equal(scanned(x, arrays), want)


def test_stacked_layers_are_one_call_or_mapped(rng):
    problem = problem_of(rng, 4, batch=(LAYERS,))
    layer = linear_of(problem, awq_flax)
    assert (layer.in_features, layer.out_features) == (128, 48)
    assert_close_to_float64(layer(problem.x), problem)
    assert_close_to_float64(nnx.vmap(lambda layer, x: layer(x))(layer, problem.x), problem)
    layer = linear_of(problem, awq_equinox)
    mapped = eqx.filter_vmap(lambda layer, x: jax.vmap(layer)(x))
    assert_close_to_float64(mapped(layer, problem.x), problem)


def test_out_sharding(rng):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    problem = problem_of(rng, 8, np.float32)
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec("rows", None)
        y = linear_of(problem, awq_flax)(problem.x, out_sharding=spec)
        assert jax.typeof(y).sharding.spec == spec
    assert_close(y, problem.float64(), problem.reference())


@pytest.mark.parametrize("library", [awq_flax, awq_equinox])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"bias": np.zeros(8, np.float16)},
            ValueError,
            r"bias must have shape \(48,\), got \(8,\)",
        ),
        ({"bias": np.zeros(48, np.int32)}, TypeError, "bias must be float16 or"),
        (
            {"weight": np.zeros((4, 4))},
            TypeError,
            "weight must be an AWQWeight or a Perm.*, got nd",
        ),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
    ],
)
def test_errors(rng, library, change, error, text):
    arguments = {"weight": problem_of(rng, 1).weight} | change
    with pytest.raises(error, match=f"AWQLinear: {text}"):
        library.AWQLinear(**arguments)


def test_equinox_takes_a_vector(rng):
    layer = linear_of(problem_of(rng, 1), awq_equinox)
    with pytest.raises(ValueError, match=r"x must have shape \(128,\), got \(2, 128\); jax.vmap"):
        layer(jnp.ones((2, 128)))


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("flax", "flax", "flax"),
        ("equinox", "equinox", "equinox"),
        ("qwix", "qwix", "qwix"),
        ("models.flax", "flax", "models,flax"),
        ("models.equinox", "equinox", "models,equinox"),
    ],
)
def test_missing_package(module, package, extra):
    code = f"import sys; sys.modules[{package!r}] = None; import jax_awq.{module}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: jax_awq.{module} needs ")
    assert last.endswith(f": pip install 'jax_awq[{extra}]'")
