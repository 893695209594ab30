"""The AWQ MLP of a Llama layer as an Equinox module, of the library's layers.

python examples/04_equinox.py
"""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jax_awq
from jax_awq.equinox import AWQLinear

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama-awq-gemm-g128"
MLP = "model.layers.0.mlp"
TOLERANCE = 0.03 / 3.1  # of the output's standard deviation, float16: tests/golden/README.md


class MLPBlock(eqx.Module):
    gate: AWQLinear
    up: AWQLinear
    down: AWQLinear

    def __init__(self, checkpoint: dict):
        self.gate = AWQLinear(checkpoint[f"{MLP}.gate_proj"], activation="silu")
        self.up = AWQLinear(checkpoint[f"{MLP}.up_proj"])
        self.down = AWQLinear(checkpoint[f"{MLP}.down_proj"])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of one token, as `eqx.nn.Linear` would have it."""
        return self.down(self.gate(x) * self.up(x))


def main() -> int:
    block = MLPBlock(jax_awq.load_hf(GOLDEN))
    expected = np.load(GOLDEN / "expected_linears.npz")
    x = jnp.asarray(expected[f"linear_in/{MLP}.gate_proj"], jnp.float16)
    y = expected[f"linear_out/{MLP}.down_proj"]

    one = eqx.filter_jit(block)(x[0, 0])
    good = report("eqx.filter_jit of one token", one, y[0, 0])
    run = eqx.filter_jit(eqx.filter_vmap(eqx.filter_vmap(block)))
    good &= report("eqx.filter_jit of eqx.filter_vmap", run(x), y)

    # The scales are floats, so a filtered gradient is one of them; the codes have none.
    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(block: MLPBlock, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jax.vmap(jax.vmap(block))(x.astype(jnp.float32))))

    scales = gradient(block, x).down.weight.scales
    good &= bool(jnp.isfinite(scales).all())
    print(f"gradient of down.scales: {scales.shape} {scales.dtype}")
    print("good" if good else "FAILED")
    return 0 if good else 1


def report(name: str, actual: jax.Array, expected: np.ndarray) -> bool:
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / expected.std()
    print(f"{name}: max error {error:.2e} of the standard deviation, tolerance {TOLERANCE:.2e}")
    return bool(error < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
