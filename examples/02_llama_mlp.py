"""The AWQ MLP of a Llama layer, from a checkpoint that AutoAWQ wrote, under jit and vmap.

    python examples/02_llama_mlp.py [FOLDER]

FOLDER is by default tests/golden/llama-awq-gemm-g128 of this repository; another needs the same
expected_linears.npz beside the model. Exits with 1 where an error exceeds its tolerance.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_awq

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama-awq-gemm-g128"
MLP = "model.layers.0.mlp"

# From tests/golden/README.md: the largest error of a computation wholly in this dtype, for outputs
# of standard deviation 3.1. Outputs of another size are scaled to it.
TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.13}
TOLERANCE_STD = 3.1


def mlp(x: jax.Array, params: dict[str, jax_awq.AWQWeight]) -> jax.Array:
    """down(silu(gate(x)) * up(x))"""
    gate = jax_awq.awq_gemm(x, params["gate_proj"], activation="silu")
    return jax_awq.awq_gemm(gate * (x @ params["up_proj"]), params["down_proj"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=GOLDEN)
    folder = parser.parse_args().folder
    checkpoint = jax_awq.load_hf(folder)
    params = {name: checkpoint[f"{MLP}.{name}"] for name in ("gate_proj", "up_proj", "down_proj")}
    expected = np.load(folder / "expected_linears.npz")
    # Layer 0's inputs and outputs, as the transformers library computed them in float32.
    gate_in, gate_out = (expected[f"linear_{side}/{MLP}.gate_proj"] for side in ("in", "out"))
    down_in, down_out = (expected[f"linear_{side}/{MLP}.down_proj"] for side in ("in", "out"))

    device = jax.devices()[0]
    print(f"device: {device.platform} {device.device_kind}, jax {jax.__version__}")
    print(f"jax_awq: {jax_awq.build_info()}")
    good = True
    for dtype in TOLERANCE:
        plan = jax_awq.plan("awq_gemm", jnp.asarray(gate_in, dtype), params["gate_proj"])
        print(f"\n{dtype}: {plan.kernel or plan.route}{plan.reason and f' ({plan.reason})'}")

        check = functools.partial(report, dtype)
        good &= check("gate_proj", linear(gate_in, params["gate_proj"], dtype), gate_out)
        good &= check("down_proj", linear(down_in, params["down_proj"], dtype), down_out)
        x = jnp.asarray(gate_in, dtype)
        good &= check("mlp, jit", jax.jit(mlp)(x, params), down_out)
        over_rows = jax.jit(jax.vmap(mlp, in_axes=(0, None)))
        good &= check("mlp, jit of vmap", over_rows(x, params), down_out)
    print("\nevery error is within its tolerance" if good else "\nFAILED")
    return 0 if good else 1


@functools.partial(jax.jit, static_argnums=2)
def linear(x: jax.Array, weight: jax_awq.AWQWeight, dtype: str) -> jax.Array:
    return jax_awq.awq_gemm(x.astype(dtype), weight)


def report(dtype: str, name: str, actual: jax.Array, expected: np.ndarray) -> bool:
    largest = np.abs(np.asarray(actual, np.float64) - expected).max()
    error = largest * TOLERANCE_STD / expected.std()
    good = bool(error < TOLERANCE[dtype])
    print(
        f"  {name:17} max error {error:.2e}, tolerance {TOLERANCE[dtype]:g}"
        f"{'' if good else ' EXCEEDED'} (unscaled {largest:.2e} at std {expected.std():.1f})"
    )
    return good


if __name__ == "__main__":
    sys.exit(main())
