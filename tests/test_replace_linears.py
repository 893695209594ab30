"""`replace_linears` of Flax NNX and of Equinox."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_awq import PermutedWeight
from jax_awq.testing import assert_close_to_float64, random_problem

eqx = pytest.importorskip("equinox")
nnx = pytest.importorskip("flax.nnx")
awq_equinox = pytest.importorskip("jax_awq.equinox")
awq_flax = pytest.importorskip("jax_awq.flax")

WIDTH = 64
PATHS = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down")


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])
        self.head = nnx.Linear(WIDTH, 8, rngs=rngs)


class EqxBlock(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        self.up = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=key)
        self.down = eqx.nn.Linear(2 * WIDTH, WIDTH, use_bias=False, key=key)


class EqxModel(eqx.Module):
    layers: list
    head: eqx.nn.Linear

    def __init__(self, key):
        self.layers = [EqxBlock(key), EqxBlock(key)]
        self.head = eqx.nn.Linear(WIDTH, 8, key=key)


def make(library, abstract=False):
    if library is awq_flax:
        return nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))) if abstract else NnxModel(nnx.Rngs(0))
    key = jax.random.key(0)
    return eqx.filter_eval_shape(EqxModel, key) if abstract else EqxModel(key)


def float_linear(library):
    return nnx.Linear if library is awq_flax else eqx.nn.Linear


def at(model, path):
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


@pytest.fixture
def problems(rng):
    sizes = {"up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}
    return {
        path: random_problem(rng, (), *sizes[path[9:]], group_size=32, bias=path.endswith("up"))
        for path in PATHS
    }


@pytest.fixture
def weights(problems):
    biases = {f"{path}.bias": p.bias for path, p in problems.items() if p.bias is not None}
    return {path: p.weight for path, p in problems.items()} | biases


LIBRARIES = pytest.mark.parametrize("library", [awq_flax, awq_equinox])


@LIBRARIES
@pytest.mark.parametrize("abstract", [False, True])
def test_all(library, abstract, problems, weights):
    # Arrays of no linear, such as embeddings, are the caller's.
    model = library.replace_linears(
        make(library, abstract), weights | {"embed.weight": np.zeros((4, 4)), "norm.bias": 0}
    )
    for path, problem in problems.items():
        layer = at(model, path)
        assert type(layer) is library.AWQLinear
        assert_close_to_float64(layer(problem.x), problem)
    assert type(model.head) is float_linear(library)


@LIBRARIES
def test_permuted_inputs(library, problems, weights, rng):
    perms = {path: rng.permutation(p.x.shape[-1]).astype(np.int32) for path, p in problems.items()}
    weights |= {path: PermutedWeight(weights[path], perm) for path, perm in perms.items()}
    model = library.replace_linears(make(library), weights)
    for path, problem in problems.items():
        layer = at(model, path)
        assert type(layer) is library.AWQLinear
        assert_close_to_float64(layer(problem.x[..., np.argsort(perms[path])]), problem)
    # Neither scales nor permutations are to be trained: biases, and the head.
    if library is awq_flax:
        trained = nnx.state(model, nnx.Param)
    else:
        is_leaf = awq_equinox.is_awq_weight
        trained, _ = eqx.partition(model, eqx.is_inexact_array, is_leaf=is_leaf)
    assert len(jax.tree.leaves(trained)) == 4


@LIBRARIES
def test_the_model_given_stays_and_shares_what_is_kept(library, weights):
    model = make(library)
    replaced = library.replace_linears(model, weights)
    assert all(type(at(model, path)) is float_linear(library) for path in PATHS)
    assert replaced.head.bias is model.head.bias
    assert type(replaced) is type(model)


@LIBRARIES
def test_predicate(library, weights):
    seen = {}

    def predicate(path, linear):
        seen[path] = linear
        return path.startswith("layers.1")

    model = make(library)
    replaced = library.replace_linears(model, weights, predicate)
    assert set(seen) == {*PATHS, "head"}
    assert type(at(replaced, "layers.0.up")) is float_linear(library)
    assert type(at(replaced, "layers.1.up")) is library.AWQLinear
    # A linear that is not chosen needs no weight.
    half = {path: value for path, value in weights.items() if path.startswith("layers.1")}
    library.replace_linears(model, half, predicate)


def test_settings_of_an_nnx_linear_are_kept(weights):
    model = make(awq_flax)
    model.layers[0].up.dtype = jnp.bfloat16
    model.layers[0].up.preferred_element_type = jnp.float32
    layer = awq_flax.replace_linears(model, weights).layers[0].up
    assert (layer.dtype, layer.preferred_element_type) == (jnp.bfloat16, jnp.float32)


@LIBRARIES
def test_stacked(library, rng):
    problem = random_problem(rng, 4, WIDTH, 2 * WIDTH, group_size=32, bias=True, batch=(3,))
    if library is awq_flax:
        make_stack = nnx.vmap(lambda rngs: nnx.Dict(up=nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)))
        model = make_stack(nnx.Rngs(0).split(3))
    else:
        keys = jax.random.split(jax.random.key(0), 3)
        model = {"up": eqx.filter_vmap(lambda k: eqx.nn.Linear(WIDTH, 2 * WIDTH, key=k))(keys)}
    layer = library.replace_linears(model, {"up": problem.weight, "up.bias": problem.bias})["up"]
    if library is awq_flax:
        y = layer(problem.x)
    else:
        y = eqx.filter_vmap(lambda layer, x: jax.vmap(layer)(x))(layer, problem.x)
    assert_close_to_float64(y, problem)


@LIBRARIES
@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (
            lambda w: {"model.norm_proj": w["layers.0.up"], "other": w["layers.0.up"]},
            [
                "model.norm_proj is unused: the model has no linear of that path",
                "other is unused: the model has no linear of that path",
                "the linears of the model are ",
                "layers.1.down",
            ],
        ),
        (
            lambda w: {"layers.1.down": w["layers.1.up"]},
            ["layers.1.down must have shape (128, 64), got (64, 128)"],
        ),
        (
            lambda w: {"layers.0.up.bias": None},
            ["layers.0.up.bias is missing: the linear has a bias"],
        ),
        (
            lambda w: {"layers.0.up.bias": np.zeros(64, np.float16)},
            ["layers.0.up.bias must have shape (128,), got (64,)"],
        ),
        (
            lambda w: {
                "layers.0.up.bias": [0.0] * 128,
                "layers.1.up.bias": np.zeros(128, np.int32),
            },
            [
                "layers.0.up.bias must be float16 or bfloat16 or float32, got list",
                "layers.1.up.bias must be float16 or bfloat16 or float32, got int32",
            ],
        ),
        (
            lambda w: {"layers.0.down.bias": np.zeros(64, np.float16)},
            ["layers.0.down.bias is unused: the linear has no bias"],
        ),
    ],
)
def test_errors_name_the_weight(library, change, texts, weights):
    with pytest.raises(ValueError, match=r"replace_linears: ") as caught:
        library.replace_linears(make(library), weights | change(weights))
    assert all(text in str(caught.value) for text in texts)


@LIBRARIES
def test_a_chosen_linear_without_a_weight(library, weights):
    with pytest.raises(ValueError, match="replace_linears: head is missing: the linear of that"):
        library.replace_linears(make(library), weights, lambda path, linear: True)


@LIBRARIES
@pytest.mark.parametrize("weights", [None, ["up"]])
def test_weights_that_are_no_dict(library, weights):
    text = f"^replace_linears: weights must be a dict by path, got {type(weights).__name__}$"
    with pytest.raises(TypeError, match=text):
        library.replace_linears(make(library), weights)


@LIBRARIES
def test_subclasses_are_not_seen(library, weights):
    model = make(library)

    class Special(float_linear(library)):
        pass

    if library is awq_flax:
        model.layers[0].up = Special(WIDTH, 2 * WIDTH, rngs=nnx.Rngs(0))
    else:
        special = Special(WIDTH, 2 * WIDTH, key=jax.random.key(0))
        model = eqx.tree_at(lambda m: m.layers[0].up, model, special)
    with pytest.raises(ValueError, match=r"layers\.0\.up is unused"):
        library.replace_linears(model, weights)
