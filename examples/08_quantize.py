"""AWQ itself: the MLPs of a small float model, quantized with calibration data, saved and loaded.

python examples/08_quantize.py
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_awq import AWQWeight, load_hf, save_hf
from jax_awq.quantize import Block, quantize, round_to_nearest

LAYERS, HIDDEN, INTERMEDIATE, GROUP_SIZE = 2, 256, 512, 64


def random_params(rng: np.random.Generator) -> dict:
    """Outputs first, as in checkpoints; the norms make a few channels large, as training does."""
    params = {}
    for layer in range(LAYERS):
        shapes = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN)}
        for name, shape in (shapes | {"down": (HIDDEN, INTERMEDIATE)}).items():
            weight = rng.standard_normal(shape) / np.sqrt(shape[1])
            params[f"layers.{layer}.{name}.weight"] = jnp.asarray(weight, jnp.float32)
        gain = jnp.ones(HIDDEN).at[rng.choice(HIDDEN, 8, replace=False)].set(15)
        params[f"layers.{layer}.norm.weight"] = gain
    return params


def forward(params: dict, x: jax.Array, record: dict | None = None) -> jax.Array:
    """The model, float or quantized; `record` takes the input of every linear."""

    def linear(path: str, x: jax.Array) -> jax.Array:
        if record is not None:
            record[path] = x
        return x @ params[path] if path in params else x @ params[f"{path}.weight"].T

    for layer in range(LAYERS):
        prefix = f"layers.{layer}"
        size = jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))
        h = x / size * params[f"{prefix}.norm.weight"]
        h = jax.nn.silu(linear(f"{prefix}.gate", h)) * linear(f"{prefix}.up", h)
        x = x + linear(f"{prefix}.down", h)
    return x


def main() -> int:
    rng = np.random.default_rng(0)
    params = random_params(rng)
    calibration, other = (
        jnp.asarray(rng.standard_normal((2048, HIDDEN)), jnp.float32) for _ in range(2)
    )

    blocks = []
    for layer in range(LAYERS):
        gate, up, down, norm = (f"layers.{layer}.{name}" for name in ("gate", "up", "down", "norm"))
        blocks += [Block((gate, up), previous=norm), Block((down,), previous=up)]

    record: dict[str, jax.Array] = {}
    forward(params, calibration, record)
    with tempfile.TemporaryDirectory() as folder:  # in which a stopped run would go on
        awq = quantize(
            params,
            {path: [x] for path, x in record.items()},
            blocks,
            group_size=GROUP_SIZE,
            folder=folder,
        )
    plain = dict(params)
    for block in blocks:
        for path in block.linears:
            plain[path] = round_to_nearest(plain.pop(f"{path}.weight").T, group_size=GROUP_SIZE)
    print(f"{sum(isinstance(w, AWQWeight) for w in awq.values())} linears quantized")

    want = forward(params, other)
    errors = {}
    for name, quantized in {"round to nearest": plain, "AWQ": awq}.items():
        difference = jax.jit(forward)(quantized, other) - want
        errors[name] = float(jnp.linalg.norm(difference) / jnp.linalg.norm(want))
        print(f"{name}: error {errors[name]:.4f} on data that it has not seen")
    good = errors["AWQ"] < 0.9 * errors["round to nearest"]

    with tempfile.TemporaryDirectory() as folder:
        # config.json of the model; what it says about the quantization is added.
        save_hf(folder, awq, {"model_type": "mlps", "num_hidden_layers": LAYERS})
        size = (Path(folder) / "model.safetensors").stat().st_size
        dense_size = sum(array.nbytes for array in params.values())
        print(f"saved: {size} bytes, the float model has {dense_size}")
        same = equal(load_hf(folder), awq)
    print(f"loaded again, equal: {same}")
    good &= same
    print("good" if good else "FAILED")
    return 0 if good else 1


def equal(a: dict, b: dict) -> bool:
    """Whether two trees have the same structure, layouts and group sizes in it, and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return all(jax.tree.leaves(same))


if __name__ == "__main__":
    sys.exit(main())
