"""The kernel variants of `awq_gemm`, problems for each of them, and how one is forced and judged.

Guard bytes around results are beyond a JAX program: compute-sanitizer watches the bounds instead.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_awq import _plan, awq_gemm
from jax_awq._primitive import OPS
from jax_awq.testing import assert_close, random_problem

F16, BF16, F32 = (jnp.dtype(d) for d in (jnp.float16, jnp.bfloat16, jnp.float32))
VARIANTS = (
    "decode_8",
    "decode_16",
    "few_8x128",
    "few_8x192",
    "few_8x224",
    "few_8x256",
    "few_16x128",
    "few_16x192",
    "few_16x224",
    "few_16x256",
    "few_24x128",
    "few_24x192",
    "few_24x224",
    "tma_32x128",
    "tma_32x192",
    "tma_32x256",
    "tma_48x256",
    "tma_64x128",
    "tma_64x192",
    "tma_64x256",
    "tma_96x128",
    "tma_96x192",
    "tma_96x256",
    "tma_128x128",
    "tma_128x192",
    "tma_128x256",
    "tma_160x128",
    "tma_192x128",
    "tma_192x192",
    "tma_224x128",
    "tma_256x128",
    "tma_288x128",
    "tma_320x128",
    "stream_64x256",
    "stream_96x256",
    "stream_128x128",
    "stream_128x256",
    "stream_160x128",
    "stream_192x128",
    "stream_224x128",
    "stream_256x128",
    "stream_288x128",
    "stream_320x128",
    "wgmma_16",
    "wgmma_32",
    "wgmma_64",
    "wgmma_128",
    "mma_32",
    "mma_64",
    "mma_128",
    "dequantize_dot",
    "simt",
)
OF_GRADIENTS = ("transposed_128x128", "transposed_256x128")  # of x
# Of awq_gemm_w4a8 alone.
OF_CODES = ("w4a8_32x256", "w4a8_64x256", "w4a8_128x128", "w4a8_256x128")
MOST_ROWS = {  # of x
    variant: int(re.findall(r"\d+", variant)[0])
    for variant in VARIANTS
    if variant.startswith(("decode", "few"))
}
TRANSPOSED = (
    *(v for v in VARIANTS if not v.startswith(("decode", "few", "tma", "stream"))),
    *OF_GRADIENTS,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; what is None or False is left to the op's defaults."""

    m: int
    k: int
    n: int
    group_size: int = 128
    x: Any = F16
    scales: Any = None
    layout: str = "gemm"
    symmetric: bool = False
    bias: Any = None
    activation: str | None = None
    out: Any = None
    split: int | None = None

    def __str__(self) -> str:
        rest = [
            f"{f.name}={value}"
            for f in dataclasses.fields(self)[4:]
            if (value := getattr(self, f.name)) != f.default
        ]
        return ",".join([f"{self.m}x{self.k}x{self.n}", f"g{self.group_size}", *rest])

    def product(self, x: Any, weight: Any, bias: Any = None) -> Any:
        return awq_gemm(
            x,
            weight,
            bias=bias,
            activation=self.activation,
            split_k_iters=self.split,
            out_dtype=self.out,
        )

    def cotangent(self, x: Any, weight: Any, ct: Any) -> Any:
        """``ct @ W^T``: the gradient of `x`, without the product that it is the gradient of."""
        (dx,) = jax.linear_transpose(lambda x: self.product(x, weight), x)(ct)
        return dx


def one_process(cases: Any) -> list[Any]:
    """Parameters, each of whose tests run in one process (--dist loadgroup): solved once."""
    params = [case if isinstance(case, tuple) else (case,) for case in cases]
    names = ["-".join(map(str, values)) for values in params]
    return [
        pytest.param(*values, id=name, marks=pytest.mark.xdist_group(name))
        for values, name in zip(params, names, strict=True)
    ]


@functools.cache
def problem_of(case: Case, batch: tuple[int, ...] = ()) -> Any:
    problem = random_problem(
        np.random.default_rng(case.m + case.k + case.n),
        case.m,
        case.k,
        case.n,
        group_size=case.group_size,
        dtype=case.x,
        scales_dtype=case.scales,
        layout=case.layout,
        symmetric=case.symmetric,
        bias=case.bias is not None,
        activation=case.activation,
        out_dtype=case.out,
        batch=batch,
    )
    if case.bias is None:
        return problem
    return dataclasses.replace(problem, bias=problem.bias.astype(case.bias))


def on_cpu(function: Any, *operands: Any) -> np.ndarray:
    """What plain JAX gives in the same dtypes."""
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(jax.jit(lambda *a: function(*a))(*operands))


def refusals(function: Any, *operands: Any) -> dict[str, str]:
    """Variant -> why it cannot run the product in `function` on this device."""
    jaxpr = jax.make_jaxpr(function)(*operands).jaxpr
    (eqn,) = _plan._equations(jaxpr, "jax_awq.awq_gemm")
    avals = [v.aval for v in eqn.invars]
    return dict(OPS["awq_gemm"].plan(jax.devices()[0], *avals, **eqn.params).refused)


def check(
    force: Any, variant: str, function: Any, *operands: Any, exact: np.ndarray, reference: Any
) -> None:
    """Forces `variant` on `function`: it is right, and twice the same; or the error says why not.

    Args:
      exact: what `function` gives in float64.
      reference: what plain JAX gives in the same dtypes.
    """
    refused = refusals(function, *operands)
    assert set(refused) < {*VARIANTS, *OF_GRADIENTS, *OF_CODES}
    force(variant)
    # A function object of its own: JAX would find the program of another variant again.
    program = jax.jit(lambda *a: function(*a))
    if variant in refused:
        text = re.escape(f"variant {variant} cannot run: {refused[variant]}")
        with pytest.raises(ValueError, match=text):
            program.lower(*operands)
        return
    lowered = program.lower(*operands)
    assert_forced(lowered.as_text(), variant)
    compiled = lowered.compile()
    operands = jax.device_put(operands)  # before the NaNs, whose memory is for results
    results = []
    for _ in range(2):
        poison(reference)
        results.append(np.asarray(compiled(*operands)))
    assert_close(results[0], exact, reference)
    assert_same_bits(*results)


def assert_forced(text: str, variant: str) -> None:
    """Asserts that a lowered program calls nothing but the forced kernel."""
    (call,) = re.findall(r"@jax_awq\.(\w+)\(.*", text)
    if variant == "dequantize_dot":
        assert call == "awq_dequantize"
    else:
        assert call == "awq_gemm"
        assert f'variant = "{variant}"' in text


def poison(like: np.ndarray) -> None:
    """Leaves NaNs in free memory of that size, where the allocator looks first for a result."""
    nans = np.full(like.shape, np.nan, like.dtype)
    for array in [jax.device_put(nans) for _ in range(4)]:
        array.block_until_ready()
        array.delete()


@jax.jit
def all_as_first(parts: jax.Array) -> jax.Array:
    """Whether every entry of the first axis is the same: compared where a large result is."""
    return (parts == parts[0]).all()


def assert_same_bits(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
