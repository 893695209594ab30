"""The AWQ MLP of a Llama layer as a Flax NNX module, of the library's layers.

python examples/03_flax_nnx.py
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_awq
from jax_awq.flax import AWQLinear

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama-awq-gemm-g128"
MLP = "model.layers.0.mlp"
TOLERANCE = 0.03 / 3.1  # of the output's standard deviation, float16: tests/golden/README.md


class MLPBlock(nnx.Module):
    def __init__(self, checkpoint: dict):
        self.gate = AWQLinear(checkpoint[f"{MLP}.gate_proj"], activation="silu")
        self.up = AWQLinear(checkpoint[f"{MLP}.up_proj"])
        self.down = AWQLinear(checkpoint[f"{MLP}.down_proj"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.gate(x) * self.up(x))


def main() -> int:
    block = MLPBlock(jax_awq.load_hf(GOLDEN))
    expected = np.load(GOLDEN / "expected_linears.npz")
    x = jnp.asarray(expected[f"linear_in/{MLP}.gate_proj"], jnp.float16)
    y = expected[f"linear_out/{MLP}.down_proj"]

    run = nnx.jit(lambda block, x: block(x))
    over_rows = nnx.jit(nnx.vmap(lambda block, x: block(x), in_axes=(None, 0)))
    good = report("nnx.jit", run(block, x), y)
    good &= report("nnx.jit of nnx.vmap", over_rows(block, x), y)

    gradient = nnx.jit(jax.grad(lambda x: jnp.sum(block(x), dtype=jnp.float32)))(x)
    good &= bool(jnp.isfinite(gradient).all())
    print(f"gradient of x: {gradient.shape} {gradient.dtype}")
    print("good" if good else "FAILED")
    return 0 if good else 1


def report(name: str, actual: jax.Array, expected: np.ndarray) -> bool:
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / expected.std()
    print(f"{name}: max error {error:.2e} of the standard deviation, tolerance {TOLERANCE:.2e}")
    return bool(error < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
