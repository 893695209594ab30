"""Whole models as modules of Flax NNX and Equinox."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_awq import AWQWeight, models

eqx = pytest.importorskip("equinox")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
awq_equinox = pytest.importorskip("jax_awq.equinox")
awq_flax = pytest.importorskip("jax_awq.flax")
in_equinox = pytest.importorskip("jax_awq.models.equinox")
in_flax = pytest.importorskip("jax_awq.models.flax")

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = np.random.default_rng(0).integers(2, 128, (2, 9)).astype(np.int32)
CASES = pytest.mark.parametrize(
    ("name", "layers"),
    [("tiny-qwen2", "unrolled"), ("tiny-llama", "stacked"), ("tiny-qwen3-moe", "unrolled")],
)
MODULES = pytest.mark.parametrize("module", [in_flax.DecoderLM, in_equinox.DecoderLM])


@functools.cache
def load(name="tiny-qwen2", layers="unrolled"):
    return models.load(GOLDEN / name, dtype="float32", layers=layers)


def is_weight(node):
    return isinstance(node, AWQWeight)


def weights_of(params):
    found = jax.tree.leaves(params, is_leaf=is_weight)
    return [leaf for leaf in found if is_weight(leaf)], [x for x in found if not is_weight(x)]


def places(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def cross_entropy(logits):
    targets = jnp.asarray(IDS[:, 1:])
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets).mean()


def assert_is_the_slope(loss, params, gradients):
    """Along the gradients, the loss falls as their squares say; only what has a gradient moves."""
    square = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients))
    assert square > 1e-4
    length = 1e-3 / square**0.5
    there, back = (
        jax.tree.map(lambda p, g, s=sign: p + s * length * g, params, gradients) for sign in (1, -1)
    )
    slope = (float(loss(there)) - float(loss(back))) / (2 * length)
    assert slope == pytest.approx(square, rel=0.02)


@CASES
def test_nnx(name, layers):
    model = load(name, layers)
    want = model.logits(IDS)
    module = in_flax.DecoderLM(model)
    np.testing.assert_array_equal(module(IDS), want)
    np.testing.assert_array_equal(nnx.jit(in_flax.DecoderLM.__call__)(module, IDS), want)

    module = in_flax.DecoderLM(model)
    jitted = nnx.jit(in_flax.DecoderLM.__call__, graph=False)
    np.testing.assert_array_equal(jitted(module, IDS), want)
    assert places(nnx.state(module)) == places(model.params)

    graph, state = nnx.split(module)
    np.testing.assert_array_equal(nnx.merge(graph, state)(IDS), want)
    packed, plain = weights_of(model.params)
    _, frozen, trained = nnx.split(module, awq_flax.AWQParam, nnx.Param)
    assert len(jax.tree.leaves(frozen)) == 3 * len(packed)
    assert len(jax.tree.leaves(trained)) == len(plain)


@CASES
def test_equinox(name, layers):
    model = load(name, layers)
    want = model.logits(IDS)
    module = in_equinox.DecoderLM(model)
    np.testing.assert_array_equal(module(IDS), want)
    np.testing.assert_array_equal(eqx.filter_jit(module)(IDS), want)

    trained, frozen = eqx.partition(module, eqx.is_inexact_array, is_leaf=awq_equinox.is_awq_weight)
    np.testing.assert_array_equal(eqx.combine(trained, frozen)(IDS), want)
    packed, plain = weights_of(model.params)
    assert len(jax.tree.leaves(frozen)) == 3 * len(packed)
    assert len(jax.tree.leaves(trained)) == len(plain)
    assert places(module) == places(model.params)


@CASES
def test_gradients_in_nnx(name, layers):
    module = in_flax.DecoderLM(load(name, layers))
    gradients = nnx.jit(nnx.grad(lambda m: cross_entropy(m(IDS))))(module)
    graph, trained, frozen = nnx.split(module, nnx.Param, ...)
    assert jax.tree.structure(gradients) == jax.tree.structure(trained)
    assert_is_the_slope(
        lambda params: cross_entropy(nnx.merge(graph, params, frozen)(IDS)), trained, gradients
    )

    before = jax.tree.map(np.asarray, frozen)
    optimizer = nnx.Optimizer(module, optax.sgd(1e-2), wrt=nnx.Param)
    loss = cross_entropy(module(IDS))
    optimizer.update(module, gradients)
    assert cross_entropy(module(IDS)) < loss
    jax.tree.map(np.testing.assert_array_equal, nnx.split(module, nnx.Param, ...)[2], before)


@CASES
def test_gradients_in_equinox(name, layers):
    trained, frozen = eqx.partition(
        in_equinox.DecoderLM(load(name, layers)),
        eqx.is_inexact_array,
        is_leaf=awq_equinox.is_awq_weight,
    )

    def loss(trained):
        return cross_entropy(eqx.combine(trained, frozen)(IDS))

    gradients = jax.jit(jax.grad(loss))(trained)
    assert_is_the_slope(loss, trained, gradients)


@MODULES
def test_padding_and_generation(module):
    model = load()
    mask = np.ones_like(IDS)
    mask[0, :4] = 0
    made = module(model)
    np.testing.assert_array_equal(
        made(IDS, jnp.array([4, 0], jnp.int32))[0, 4:], model.logits(IDS, mask)[0, 4:]
    )
    assert not np.array_equal(made(IDS)[0, 4:], model.logits(IDS, mask)[0, 4:])
    np.testing.assert_array_equal(made.as_model().generate(IDS, 5), model.generate(IDS, 5))


@MODULES
@pytest.mark.parametrize("ids", [IDS[0], IDS.astype(np.float32)])
def test_what_is_no_tokens(module, ids):
    with pytest.raises(ValueError, match=r"logits: input_ids must be integers \(B, T\), got "):
        module(load())(ids)
