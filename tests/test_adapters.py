"""Gradients beside frozen AWQ weights: adapters learn, integers stay out of the way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import dense_of, linear_of, problem_of

eqx = pytest.importorskip("equinox")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
awq_equinox = pytest.importorskip("jax_awq.equinox")
awq_flax = pytest.importorskip("jax_awq.flax")


def adapter_gradients(problem, rank_a, rank_b):
    """Those of ``mean((x @ w + bias + x @ a @ b) ** 2)`` in float64."""
    x = problem.x.astype(np.float64)
    y = problem.float64() + x @ rank_a @ rank_b
    dy = 2 * y / y.size
    return x.T @ dy @ rank_b.T, (x @ rank_a).T @ dy


def adapters(rng):
    return (rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((128, 4), (4, 48)))


def test_lora_on_nnx(rng):
    problem = problem_of(rng, 5, np.float32)
    a, b = adapters(rng)
    lora = nnx.LoRA(128, 4, 48, base_module=linear_of(problem, awq_flax), rngs=nnx.Rngs(0))
    lora.lora_a[...], lora.lora_b[...] = a, b

    def loss(lora, x):
        return jnp.mean(lora(x) ** 2)

    gradients = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(lora, problem.x)
    want_a, want_b = adapter_gradients(problem, a, b)
    np.testing.assert_allclose(gradients["lora_a"].get_value(), want_a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients["lora_b"].get_value(), want_b, rtol=1e-4, atol=1e-5)
    assert set(gradients) == {"lora_a", "lora_b"}

    # The default takes every nnx.Param: the bias beside the adapters, never the kernel.
    everything = nnx.grad(loss)(lora, problem.x)
    assert not jax.tree.leaves(nnx.filter_state(everything, awq_flax.AWQParam))
    assert set(everything["base_module"]) == {"bias"}

    optimizer = nnx.Optimizer(lora, optax.adam(1e-2), wrt=nnx.LoRAParam)
    before = loss(lora, problem.x)
    optimizer.update(lora, gradients)
    assert loss(lora, problem.x) < before
    jax.tree.map(np.testing.assert_array_equal, lora.base_module.kernel.get_value(), problem.weight)


def test_lora_on_equinox(rng):
    problem = problem_of(rng, 5, np.float32)

    class LoRA(eqx.Module):
        base: awq_equinox.AWQLinear
        a: jax.Array
        b: jax.Array

        def __call__(self, x):
            return self.base(x) + x @ self.a @ self.b

    a, b = adapters(rng)
    base = linear_of(dataclasses.replace(problem, bias=None), awq_equinox)
    model = LoRA(base, jnp.asarray(a), jnp.asarray(b))
    trainable, frozen = eqx.partition(
        model, eqx.is_inexact_array, is_leaf=awq_equinox.is_awq_weight
    )
    assert len(jax.tree.leaves(trainable)) == 2

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(trainable, frozen, x):
        return jnp.mean(jax.vmap(eqx.combine(trainable, frozen))(x) ** 2)

    before, gradients = loss(trainable, frozen, problem.x)
    want_a, want_b = adapter_gradients(dataclasses.replace(problem, bias=None), a, b)
    np.testing.assert_allclose(gradients.a, want_a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients.b, want_b, rtol=1e-4, atol=1e-5)

    optimizer = optax.adam(1e-2)
    updates, _ = optimizer.update(gradients, optimizer.init(trainable))
    after, _ = loss(eqx.apply_updates(trainable, updates), frozen, problem.x)
    assert after < before

    # Unpartitioned, a filtered gradient has the scales, and no integers.
    whole = eqx.filter_grad(lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2))(model, problem.x)
    assert whole.base.weight.qweight is None
    assert whole.base.weight.qzeros is None
    assert whole.base.weight.scales.shape == problem.weight.scales.shape


def test_gradient_of_linen_params(rng):
    problem = problem_of(rng, 5, np.float32)
    module, variables = dense_of(problem, awq_flax)

    def loss(params, x):
        return jnp.sum(module.apply({"params": params, "awq": variables["awq"]}, x))

    gradients = jax.jit(jax.grad(loss))(variables["params"], problem.x)
    assert set(gradients) == {"bias"}
    np.testing.assert_allclose(gradients["bias"], np.full(48, 5.0))
