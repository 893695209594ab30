"""`awq_gemm` by hand: pack a small weight, multiply under jit, vmap and grad, compare with float64.

python examples/01_awq_gemm.py
"""

import jax
import jax.numpy as jnp
import numpy as np

import jax_awq

K, N, GROUP_SIZE = 256, 128, 64


def main() -> None:
    rng = np.random.default_rng(0)

    # The weight is (q - z) * s: 4-bit codes q; for each group of 64 rows a zero z and a scale s.
    codes = rng.integers(0, 16, (K, N))
    zeros = rng.integers(0, 16, (K // GROUP_SIZE, N))
    scales = rng.uniform(0.01, 0.02, (K // GROUP_SIZE, N)).astype(np.float16)
    weight = jax_awq.AWQWeight(jax_awq.pack_int4(codes), scales, jax_awq.pack_int4(zeros))
    x = jnp.asarray(rng.standard_normal((8, K)), jnp.float16)
    bias = jnp.asarray(rng.standard_normal(N), jnp.float16)
    print(weight)
    print(jax_awq.plan("awq_gemm", x, weight, bias=bias))

    steps = codes - np.repeat(zeros, GROUP_SIZE, axis=0)
    dense = steps * np.repeat(scales.astype(np.float64), GROUP_SIZE, axis=0)
    exact = np.asarray(x, np.float64) @ dense + np.asarray(bias, np.float64)

    y = jax.jit(jax_awq.awq_gemm)(x, weight, bias=bias)
    report("awq_gemm in jit", y, exact)

    # One row at a time, as a model would be written; a mapped x is folded into one product.
    rows = jax.vmap(lambda row: jax_awq.awq_gemm(row, weight, bias=bias))(x)
    report("awq_gemm in vmap", rows, exact)

    # The packed weight stays frozen; the gradient of x is the product with its transpose.
    def loss(x):
        return 0.5 * jnp.sum(jnp.square(jax_awq.awq_gemm(x, weight, out_dtype=jnp.float32)))

    dx = jax.jit(jax.grad(loss))(x)
    product = np.asarray(x, np.float64) @ dense
    report("gradient of x", dx, product @ dense.T)

    # Several weights at once (layers, experts) are one stacked AWQWeight.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), weight, weight)
    experts = jax.vmap(jax_awq.awq_gemm)(jnp.stack([x, -x]), stacked)
    report("two stacked weights", experts, np.stack([product, -product]))


def report(name: str, actual: jax.Array, exact: np.ndarray) -> None:
    error = np.abs(np.asarray(actual, np.float64) - exact).max() / np.abs(exact).max()
    print(f"{name}: max error {error:.2e} of the largest value")
    # Half an ulp of float16 for the result and one for each weight, with room for their sum.
    if not error < 2e-3:
        raise SystemExit(f"{name}: too large an error")


if __name__ == "__main__":
    main()
