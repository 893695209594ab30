"""The AWQ MLP of a Llama layer as an Equinox module.

python examples/04_equinox.py
"""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jax_awq

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama-awq-gemm-g128"
MLP = "model.layers.0.mlp"
TOLERANCE = 0.03 / 3.1  # of the output's standard deviation, float16: tests/golden/README.md


class MLPBlock(eqx.Module):
    """An `AWQWeight` is a pytree, so it is a field like any array."""

    gate: jax_awq.AWQWeight
    up: jax_awq.AWQWeight
    down: jax_awq.AWQWeight

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jax_awq.awq_gemm(x, self.gate, activation="silu")
        return (gate * (x @ self.up)) @ self.down


def main() -> int:
    checkpoint = jax_awq.load_hf(GOLDEN)
    block = MLPBlock(*(checkpoint[f"{MLP}.{name}_proj"] for name in ("gate", "up", "down")))
    expected = np.load(GOLDEN / "expected_linears.npz")
    x = jnp.asarray(expected[f"linear_in/{MLP}.gate_proj"], jnp.float16)
    y = expected[f"linear_out/{MLP}.down_proj"]

    good = report("eqx.filter_jit", eqx.filter_jit(block)(x), y)
    over_rows = eqx.filter_jit(eqx.filter_vmap(block))
    good &= report("eqx.filter_jit of eqx.filter_vmap", over_rows(x), y)

    # The scales are floats, so a filtered gradient is one of them; the codes have none.
    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(block: MLPBlock, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(block(x.astype(jnp.float32))))

    scales = gradient(block, x).down.scales
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
