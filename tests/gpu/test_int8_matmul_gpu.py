"""Every kernel variant of `int8_matmul` and `int4_matmul`, forced in turn."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.variants import ALLOCATED, BF16, F16, F32, assert_same_bits, run_twice

from jax_awq import _ffi, int4_matmul, int8_matmul, plan
from jax_awq.testing import assert_close
from jax_awq.testing_integers import random_int_problem

pytestmark = pytest.mark.gpu

VARIANTS = ("tma_64", "tma_128", "tma_256", "mma", "dp4a")
I32 = jnp.dtype(jnp.int32)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_width = pytest.mark.parametrize("bits", [8, 4])

# Rows on both sides of every tile; columns beside the multiples of every tile, and odd ones; K that
# no step divides, nor 16, nor 2.
CASES = (
    # M, K, N, result, options
    (1, 128, 128, I32, {}),
    (1, 4096, 1040, I32, {}),
    (3, 17, 7, I32, {}),
    (8, 1, 1, I32, {}),
    (33, 1000, 272, I32, {}),
    (64, 128, 256, I32, {}),
    (65, 31, 16, I32, {}),
    (129, 515, 400, I32, {}),
    (256, 384, 128, I32, {}),
    (257, 1152, 1040, I32, {}),
    (700, 640, 912, I32, {}),
    (1, 130, 33, F16, {}),
    (5, 2048, 144, F16, {"bias": F16}),
    (64, 96, 272, BF16, {"bias": F32, "activation": "gelu"}),
    (100, 512, 512, F32, {"scales": "scalar", "bias": BF16}),
    (130, 1023, 528, F16, {"scales": "scalar", "activation": "silu"}),
    (300, 768, 400, BF16, {"activation": "gelu_tanh"}),
    (513, 256, 1296, F32, {"bias": F32, "activation": "relu"}),
)


def name_of(case):
    m, k, n, dtype, options = case
    return f"{m}x{k}x{n},{dtype},{','.join(str(v) for v in options.values())}"


def op_of(bits):
    return int8_matmul if bits == 8 else int4_matmul


@functools.cache
def problem_of(bits, index, batch=()):
    m, k, n, dtype, options = CASES[index]
    rng = np.random.default_rng(index)
    return random_int_problem(rng, m, k, n, bits=bits, out_dtype=dtype, batch=batch, **options)


def check(force, variant, problem, fn, *operands, exact, guarded=False):
    """Forces `variant` on `fn`: it is right, and twice the same; or the error says why not."""
    op = f"int{problem.bits}_matmul"
    target = jax.devices()[0]
    k = {"k": problem.k} if problem.bits == 4 else {}
    refused = plan(op, problem.a, problem.b, device=target, **k).refused
    force(variant)
    program = jax.jit(lambda *o: fn(*o))
    if variant in refused:
        text = re.escape(f"variant {variant} cannot run: {refused[variant]}")
        with pytest.raises(ValueError, match=text):
            program.lower(*operands)
        return
    lowered = program.lower(*operands)
    (call,) = re.findall(r"@jax_awq\.(\w+)\(.*", lowered.as_text())
    assert call == op
    assert f'variant = "{variant}"' in lowered.as_text()
    like = np.zeros(exact.shape, problem.out_dtype)
    (y,) = run_twice(lowered.compile(), operands, like, guarded=guarded)
    if problem.out_dtype == I32:
        np.testing.assert_array_equal(y, exact)
    else:
        force("")
        with jax.default_device(jax.devices("cpu")[0]):
            reference = np.asarray(jax.jit(lambda *o: fn(*o))(*(np.asarray(o) for o in operands)))
        assert_close(y, exact, reference)


def product(problem):
    """`run` of a problem as a function of the arrays that it has, and these arrays."""
    names = [
        n for n in ("scale_a", "scale_b", "scale_c", "bias") if getattr(problem, n) is not None
    ]

    def fn(a, b, *values):
        return dataclasses.replace(problem, a=a, b=b, **dict(zip(names, values, strict=True))).run()

    return fn, (problem.a, problem.b, *(getattr(problem, n) for n in names))


@every_variant
@every_width
@pytest.mark.parametrize("index", range(len(CASES)), ids=[name_of(c) for c in CASES])
def test_product(index, bits, variant, force):
    problem = problem_of(bits, index)
    fn, operands = product(problem)
    exact = problem.sums() if problem.out_dtype == I32 else problem.float64()
    check(force, variant, problem, fn, *operands, exact=exact)


@every_variant
@every_width
@pytest.mark.parametrize("m", [64, 257])
def test_nothing_is_written_beside_the_result(m, bits, variant, force):
    """Tiles in part, and a result that ends where the allocator's memory does."""
    problem = random_int_problem(np.random.default_rng(m), m, 384, 704, bits=bits)
    fn, operands = product(problem)
    assert m * 704 * 4 % ALLOCATED == 0
    check(force, variant, problem, fn, *operands, exact=problem.sums(), guarded=True)


@every_variant
@every_width
@pytest.mark.parametrize("index", [4, 9, 13, 15])
def test_batch(index, bits, variant, force):
    problem = problem_of(bits, index, (3,))
    fn, operands = product(problem)
    exact = problem.sums() if problem.out_dtype == I32 else problem.float64()
    check(force, variant, problem, fn, *operands, exact=exact)


@every_variant
@every_width
def test_shared_rows(bits, variant, force):
    """A batch of b alone: every entry reads the one a."""
    problem = problem_of(bits, 4, (3,))
    one = dataclasses.replace(problem, a=problem.a[0])
    exact = dataclasses.replace(problem, a=np.stack([one.a] * 3)).sums()
    fn = jax.vmap(lambda a, b: dataclasses.replace(one, a=a, b=b).run(), (None, 0))
    check(force, variant, problem, fn, one.a, problem.b, exact=exact)


@every_variant
def test_variant_runs_enough(variant):
    """A kernel that refuses everything would pass every other test."""
    problems = [problem_of(bits, i) for bits in (4, 8) for i in range(len(CASES))]
    found = [
        plan(f"int{p.bits}_matmul", p.a, p.b, **({"k": p.k} if p.bits == 4 else {})).refused
        for p in problems
    ]
    reasons = [refused.get(variant, "") for refused in found]
    if reasons[0].startswith("needs "):
        pytest.skip(f"{variant} {reasons[0]}, which this build or device does not have")
    assert reasons.count("") >= 20, reasons


@every_variant
@pytest.mark.parametrize("code", [-128, 127])
def test_extreme_codes(code, variant, force):
    """Sums up to the last K that int32 holds."""
    k = 131056
    problem = dataclasses.replace(
        random_int_problem(np.random.default_rng(0), 65, k, 32, bits=8),
        a=np.full((65, k), code, np.int8),
        b=np.full((k, 32), code, np.int8),
    )
    fn, operands = product(problem)
    check(force, variant, problem, fn, *operands, exact=np.full((65, 32), code**2 * k))


@every_width
def test_large_result(bits):
    """Persistent CTAs with many tiles each, as the plan chooses: against XLA's own product."""
    rng = np.random.default_rng(0)
    problem = random_int_problem(rng, 4096, 1024, 8192, bits=bits)
    found = plan(f"int{bits}_matmul", problem.a, problem.b)
    assert bits == 4 or found.kernel == "tma_256" or "tma_256" in found.refused
    exact = (problem.sums()).astype(np.int32)
    for _ in range(2):
        np.testing.assert_array_equal(problem.run(), exact)


@every_width
@pytest.mark.parametrize("m", [5, 300])
def test_loop_replays_the_same_bits(bits, m):
    """Runs after the first may replay a recorded graph, with its kernels before and after."""
    rng = np.random.default_rng(0)
    problem = random_int_problem(rng, m, 2048, 2048, bits=bits)
    a, b = jax.device_put((problem.a, problem.b))

    def step(a):
        sums = dataclasses.replace(problem, a=a, b=b).run()
        return (sums >> 7).astype(jnp.int8)[:, : a.shape[-1]]

    loop = jax.jit(lambda a: jax.lax.fori_loop(0, 3, lambda _, a: step(a), a))
    eager = a
    for _ in range(3):
        eager = step(eager)
    for _ in range(3):
        assert_same_bits(np.asarray(loop(a)), np.asarray(eager))


# --- the handlers themselves

M, K, N = 4, 64, 32
CALL = {
    "a": ((M, K), jnp.int8),
    "b": ((K, N), jnp.int8),
    "scale_a": ((M,), F32),
    "scale_b": ((1,), F32),
    "scale_c": ((0,), F32),
    "bias": ((N,), F16),
    "y": ((M, N), F16),
    "k": K,
    "activation": "none",
    "variant": "",
}


def call(op, parts, workspace_bytes=0):
    attributes = {n: v for n, v in parts.items() if not isinstance(v, tuple)}
    operands = [jnp.zeros(*v) for n, v in parts.items() if isinstance(v, tuple) and n != "y"]
    result = jax.ShapeDtypeStruct(*parts["y"])
    return np.asarray(
        _ffi.call(op, result, *operands, workspace_bytes=workspace_bytes, **attributes)
    )


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"a": ((K,), jnp.int8)}, "a must have rank 2 or 3, got 1"),
        ({"a": ((M, N), jnp.int8)}, "a must have shape (4, 64), got (4, 32)"),
        ({"b": ((N, K), jnp.int8)}, "b must have shape (64, 64), got (32, 64)"),
        ({"b": ((K, N), jnp.int32)}, ""),
        ({"scale_a": ((N,), F32)}, "scale_a must have shape (4), got (32)"),
        ({"scale_b": ((M,), F32)}, "scale_b must have shape (32), got (4)"),
        ({"scale_c": ((M,), F32)}, "scale_c must have shape (1), got (4)"),
        ({"scale_a": ((M,), F16)}, ""),
        ({"bias": ((K,), F16)}, "bias must have shape (32), got (64)"),
        ({"bias": ((N,), jnp.int8)}, "bias must be float16, bfloat16 or float32"),
        ({"y": ((M, K), F16)}, "y must have shape (4, 32), got (4, 64)"),
        ({"y": ((2, M, N), F16)}, "y must have batch size 1"),
        ({"y": ((M, N), jnp.int16)}, "y must be float16, bfloat16 or float32"),
        ({"y": ((M, N), jnp.int32)}, "int32 sums take no scale, bias or activation"),
        ({"k": K - 1}, "a must have shape (4, 63), got (4, 64)"),
        ({"k": -1}, "k must not be negative, got -1"),
        ({"activation": "tanh"}, "unknown activation tanh"),
        ({"variant": "tma_7"}, "unknown variant tma_7"),
    ],
    ids=lambda v: v or "dtype" if isinstance(v, str) else "",
)
def test_handler_refuses(changed, text):
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        call("int8_matmul", CALL | changed)
    if text:  # otherwise XLA refuses before the handler is asked
        assert f"int8_matmul: {text}" in str(error.value)
    assert not call("int8_matmul", CALL).any()


def test_packed_handler_without_workspace():
    """As where a program was exported for a GPU whose kernel needs none."""
    parts = CALL | {"a": ((M, K // 2), jnp.int8), "b": ((K // 2, N), jnp.int8)}
    assert not call("int4_matmul", parts).any()
