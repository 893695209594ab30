"""An Equinox model of one's own, its linears replaced by those of an AWQ checkpoint.

python examples/06_replace_layers.py
"""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jax_awq
from jax_awq.equinox import replace_linears

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama-awq-gemm-g128"
TOLERANCE = 0.03 / 3.1  # of the output's standard deviation, float16: tests/golden/README.md
LAYERS, HIDDEN, INTERMEDIATE = 3, 512, 1536


class MLP(eqx.Module):
    gate_proj: eqx.nn.Linear
    up_proj: eqx.nn.Linear
    down_proj: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.gate_proj = eqx.nn.Linear(HIDDEN, INTERMEDIATE, use_bias=False, key=keys[0])
        self.up_proj = eqx.nn.Linear(HIDDEN, INTERMEDIATE, use_bias=False, key=keys[1])
        self.down_proj = eqx.nn.Linear(INTERMEDIATE, HIDDEN, use_bias=False, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(eqx.Module):
    mlp: MLP
    norm: eqx.nn.RMSNorm

    def __init__(self, key: jax.Array):
        self.mlp = MLP(key)
        self.norm = eqx.nn.RMSNorm(HIDDEN, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.norm(x))


class Model(eqx.Module):
    layers: list[Layer]

    def __init__(self, key: jax.Array):
        self.layers = [Layer(k) for k in jax.random.split(key, LAYERS)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def main() -> int:
    model = Model(jax.random.key(0))
    print(f"float: {size_of(model)} bytes")

    # The checkpoint says model.layers.0.mlp.up_proj, this model layers.0.mlp.up_proj.
    checkpoint = jax_awq.load_hf(GOLDEN)
    weights = {name.removeprefix("model."): w for name, w in checkpoint.items() if ".mlp." in name}
    model = replace_linears(model, weights)
    print(f"AWQ: {size_of(model)} bytes")

    name = "model.layers.0.mlp"
    expected = np.load(GOLDEN / "expected_linears.npz")
    x = jnp.asarray(expected[f"linear_in/{name}.gate_proj"], jnp.float16)
    y = expected[f"linear_out/{name}.down_proj"]
    mlp = eqx.filter_jit(eqx.filter_vmap(eqx.filter_vmap(model.layers[0].mlp)))
    good = report("first MLP", mlp(x), y)

    whole = eqx.filter_jit(eqx.filter_vmap(eqx.filter_vmap(model)))(x)
    good &= bool(jnp.isfinite(whole).all())
    print(f"whole model: {whole.shape} {whole.dtype}")
    print("good" if good else "FAILED")
    return 0 if good else 1


def size_of(model: eqx.Module) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model) if eqx.is_array(leaf))


def report(name: str, actual: jax.Array, expected: np.ndarray) -> bool:
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / expected.std()
    print(f"{name}: max error {error:.2e} of the standard deviation, tolerance {TOLERANCE:.2e}")
    return bool(error < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
