"""The kernel variants of `awq_gemm`, problems for each of them, and how one is forced and judged.

A program cannot place its results, but a test can see where they are: `Surroundings` leaves them
no other memory of their size than what lies between guards.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
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
OF_CODES = (
    "w4a8_32x128",
    "w4a8_32x256",
    "w4a8_64x128",
    "w4a8_64x192",
    "w4a8_64x256",
    "w4a8_128x128",
    "w4a8_256x128",
)
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


TRIES = 16
ALLOCATED = 256  # bytes: the allocator gives multiples of it
OTHER_BITS = 0x5A  # in every byte


def check(
    force: Any,
    variant: str,
    function: Any,
    *operands: Any,
    exact: np.ndarray,
    reference: Any,
    guarded: bool = False,
) -> None:
    """Forces `variant` on `function`: it is right, and twice the same; or the error says why not.

    Args:
      exact: what `function` gives in float64.
      reference: what plain JAX gives in the same dtypes.
      guarded: as for `run_twice`.
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
    (y,) = run_twice(lowered.compile(), operands, reference, guarded=guarded)
    assert_close(y, exact, reference)


def assert_forced(text: str, variant: str) -> None:
    """Asserts that a lowered program calls nothing but the forced kernel."""
    (call,) = re.findall(r"@jax_awq\.(\w+)\(.*", text)
    if variant == "dequantize_dot":
        assert call == "awq_dequantize"
    else:
        assert call == "awq_gemm"
        assert f'variant = "{variant}"' in text


def run_twice(
    program: Any, operands: Any, *like: Any, also: Any = (), guarded: bool = False
) -> list[np.ndarray]:
    """The results of a program: twice the same bits, and nothing written beside them.

    What it does not write is NaN, or `OTHER_BITS` in integers. Its operands stay as they are.

    Args:
      operands: numpy arrays, or trees of them.
      like: numpy arrays as the results.
      also: the same for other memory that it may take.
      guarded: whether all of the results have to lie in `Surroundings`, as they mostly do.
    """
    placed = jax.device_put(operands)  # before the NaNs, whose memory is for results
    runs = []
    for _ in range(2):
        results = surrounded(lambda _: program(*placed), *like, also=also, guarded=guarded)
        runs.append([np.asarray(r) for r in results])
    for before, after in zip(jax.tree.leaves(operands), jax.tree.leaves(placed), strict=True):
        if np.asarray(after).tobytes() != np.asarray(before).tobytes():
            raise AssertionError(f"an operand of shape {after.shape} was written")
    for first, second in zip(*runs, strict=True):
        assert_same_bits(first, second)
    return runs[0]


def surrounded(
    run: Callable[["Surroundings"], Any], *like: Any, also: Any = (), guarded: bool = False
) -> list[Any]:
    """Results of `run`, given their surroundings, which it has not touched; see `run_twice`."""
    elsewhere = []
    for _ in range(TRIES if guarded else 1):
        around = Surroundings(*like, *also)
        results = jax.block_until_ready(jax.tree.leaves(run(around)))
        around.assert_untouched()
        if not guarded or all(around.holds(r) for r in results):
            return results
        elsewhere.append(results)  # kept, so that the next ones find this memory taken
    raise AssertionError(f"{TRIES} times a result was not where guards are around it")


class Surroundings:
    """Free memory that holds NaNs, between arrays of NaNs that stay, for results of given sizes.

    The allocator takes the smallest free part that is large enough, the first of several. So these
    arrays fill whatever is free and of a result's size, and then some of them, between others, are
    given back. The last bytes up to a multiple of `ALLOCATED` are no guards.
    """

    def __init__(self, *like: Any) -> None:
        self._guards: list[tuple[jax.Array, np.ndarray]] = []
        self._free: set[int] = set()
        given_back = []
        for nans in (_nans(a) for a in like if a.nbytes):
            size = -(-nans.nbytes // ALLOCATED) * ALLOCATED
            arrays: dict[int, jax.Array] = {}
            free: list[int] = []
            for _ in range(8):  # times: at first they may fill gaps and have no neighbours
                more = jax.block_until_ready([jax.device_put(nans) for _ in range(7)])
                arrays |= {address(a): a for a in more}
                free = between_others(list(arrays), size)
                if len(free) >= 2:  # one for the result, one for other memory of its size
                    break
            self._free |= set(free)
            for start, array in arrays.items():
                if free and start not in free:
                    self._guards.append((array, nans))
                else:  # also all of them, which still hold NaNs, where none is between others
                    given_back.append(array)
        for array in given_back:  # only now: the next arrays would have taken it
            array.delete()

    def holds(self, result: jax.Array) -> bool:
        """Whether a result lies there."""
        return address(result) in self._free

    def assert_untouched(self) -> None:
        for guard, nans in self._guards:
            if np.asarray(guard).tobytes() != nans.tobytes():
                raise AssertionError(f"bytes beside a result of shape {nans.shape} were written")


def between_others(addresses: list[int], size: int) -> list[int]:
    """Of parts of `size` bytes every second that has one on each side, which is not in the list."""
    found: list[int] = []
    for start in sorted(addresses):
        sides = {start - size, start + size}
        if sides <= set(addresses) and sides.isdisjoint(found):
            found.append(start)
    return found


def address(array: jax.Array) -> int:
    return array.unsafe_buffer_pointer()


def _nans(like: Any) -> np.ndarray:
    if jnp.issubdtype(like.dtype, jnp.floating):
        return np.full(like.shape, np.nan, like.dtype)
    return np.full(like.nbytes, OTHER_BITS, np.uint8).view(like.dtype).reshape(like.shape)


@jax.jit
def all_as_first(parts: jax.Array) -> jax.Array:
    """Whether every entry of the first axis is the same: compared where a large result is."""
    return (parts == parts[0]).all()


def assert_same_bits(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
