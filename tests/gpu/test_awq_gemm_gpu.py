"""Every kernel variant of `awq_gemm`, forced in turn, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.variants import (
    ALLOCATED,
    BF16,
    F16,
    F32,
    MOST_ROWS,
    OF_CODES,
    OF_GRADIENTS,
    TRANSPOSED,
    VARIANTS,
    Case,
    assert_same_bits,
    check,
    on_cpu,
    one_process,
    problem_of,
    refusals,
)

from jax_awq import AWQWeight, awq_gemm, plan
from jax_awq.testing import assert_close, dequantize_float64

pytestmark = pytest.mark.gpu

CASES = (
    # Rows on both sides of every tile; columns beside the multiples of every tile.
    Case(1, 256, 128),
    Case(1, 1024, 1008, 128, BF16),
    Case(3, 256, 72, 32, BF16),
    Case(8, 512, 264, 64),
    Case(8, 512, 272, 64, BF16),
    Case(9, 256, 144, 32),
    Case(16, 1120, 48, 32, BF16),
    Case(17, 256, 136, 64),
    Case(33, 384, 264, 128, BF16),
    Case(65, 256, 520, 128),
    Case(129, 192, 1000, 64, BF16),
    Case(200, 256, 264, 64),
    # One group, and K that no step of a main loop divides.
    Case(5, 96, 144, -1),
    Case(20, 1120, 136, -1, BF16),
    Case(4, 72, 264, -1, layout="oc_major"),
    Case(6, 40, 16, -1, BF16),
    Case(5, 100, 72, -1),
    Case(7, 1120, 144, 32, BF16),
    # The other layouts.
    Case(7, 256, 136, 64, layout="gemv"),
    Case(70, 384, 72, 128, BF16, layout="gemv", symmetric=True),
    Case(3, 1120, 264, 32, layout="oc_major"),
    Case(130, 256, 1000, 128, BF16, layout="oc_major", bias=BF16),
    # Scales of another dtype; no zeros; every epilogue.
    Case(8, 256, 144, 64, BF16, scales=F16),
    Case(40, 256, 136, 32, BF16, scales=F16, layout="oc_major"),
    Case(40, 256, 136, 32, F16, scales=BF16),
    Case(8, 512, 256, 128, symmetric=True),
    Case(13, 256, 144, 64, BF16, symmetric=True, bias=F32, activation="silu"),
    Case(4, 256, 144, 64, bias=F16, activation="relu", out=F32),
    Case(6, 256, 144, 64, BF16, bias=F16, activation="gelu", out=F16),
    Case(35, 256, 72, 64, bias=BF16, activation="gelu_tanh", out=BF16),
    Case(2, 256, 144, 32, BF16, out=F32),
    Case(66, 128, 264, 32, bias=F32, out=F32),
    # Up to 8 parts of K meet in a thread block cluster where there are any, more in memory.
    Case(7, 1024, 144, 128, split=1),
    Case(7, 1024, 136, 64, split=2),
    Case(7, 1024, 144, 128, BF16, split=3, bias=BF16, activation="silu"),
    Case(7, 1120, 272, 32, split=5, out=F32),
    Case(40, 1024, 264, 64, BF16, split=8, layout="oc_major"),
    Case(7, 1024, 144, 128, split=8),
    Case(7, 1024, 144, 128, split=12, bias=F32, activation="gelu", out=BF16),
    Case(70, 1024, 264, 64, BF16, split=12, layout="oc_major", out=F32),
    # Rows of qweight that TMA can take: whole tiles and parts of one, all group sizes, K of any
    # number of steps, more tokens than a tile and fewer.
    Case(1, 1024, 512, 128),
    Case(8, 4096, 288, 128, BF16, scales=F16, bias=BF16, activation="silu", out=F32),
    Case(17, 200, 96, -1, symmetric=True, bias=F16),
    Case(65, 1184, 544, 32, activation="gelu", out=BF16),
    Case(130, 576, 800, 64, BF16, out=F32),
    Case(300, 384, 1056, 128, bias=F32),
    Case(70, 2048, 320, 128, split=5, activation="relu"),
    Case(257, 1024, 352, 32, BF16, split=3, bias=F16),
    Case(260, 320, 12320, 32, BF16, bias=BF16),  # more tiles than processors
    Case(330, 320, 8672, 64, bias=F16),  # and two that share x side by side
    Case(300, 2176, 608, 128, out=F32),
    Case(129, 640, 480, 64, BF16, scales=F16),
    Case(513, 384, 256, -1, symmetric=True, bias=F32),
    Case(40, 1024, 288, 64, split=8, out=F32),
    Case(12, 2176, 256, 128, split=11, bias=BF16),
    # The same for few tokens.
    Case(1, 2048, 544, 32, BF16),
    Case(2, 1024, 1056, 64, bias=F32, activation="gelu"),
    Case(3, 1184, 288, -1, BF16, bias=BF16),
    Case(5, 4096, 512, 64, split=7, activation="relu", out=F32),
    Case(6, 3072, 320, 32, BF16, scales=F16, split=3),
    Case(7, 2048, 96, 128, symmetric=True, split=8),
    Case(8, 200, 800, -1, symmetric=True, bias=F16, out=BF16),
    Case(8, 1536, 352, 128, split=12, bias=F16),
    Case(9, 2048, 288, 128, BF16, bias=F32, out=F16),
    Case(11, 1024, 608, 32, split=2),
    Case(14, 4096, 544, 64, BF16, split=5, activation="silu"),
    Case(16, 384, 12320, 128),
    Case(16, 1120, 32, -1, split=4, out=F32),
    Case(19, 4096, 352, 128, split=3, bias=F32, activation="silu"),
    Case(22, 1536, 480, 64, BF16, split=7),
    Case(24, 2048, 544, 32, BF16, scales=F16),
)
TRANSPOSED_CASES = (
    Case(1, 256, 128, 64),
    Case(33, 96, 136, 32, BF16),
    Case(5, 100, 72, -1, BF16),
    Case(130, 256, 1000, 128, layout="oc_major"),
    Case(20, 512, 264, 64, BF16, layout="gemv"),
    Case(7, 384, 1024, 128, split=8),
    Case(40, 256, 1024, 64, BF16, scales=F16, split=12, layout="oc_major"),
    Case(20, 256, 136, 64, F16, scales=BF16, symmetric=True),
    # Rows of K and columns that end within a tile or a stage, more tiles than processors.
    Case(70, 384, 288, 128),
    Case(130, 1184, 544, 32, BF16),
    Case(257, 576, 800, 64, symmetric=True),
    Case(300, 200, 96, -1, BF16),
    Case(129, 640, 480, 64, BF16, scales=F16),
    Case(300, 384, 2080, 128, split=3),
    Case(100, 1024, 1056, 32, split=12),
    Case(260, 9344, 160, 128, BF16),
)
WEIGHT = "qweight scales qzeros"
# What has a batch dimension in jax.vmap.
MAPPED = ("x", WEIGHT, f"x {WEIGHT}", "qweight", "scales", "x qzeros", "scales qzeros", "bias")
BATCHED_CASES = (
    *((Case(2, 256, 160, 64, bias=F16), mapped) for mapped in MAPPED),
    *((Case(20, 256, 160, 64, BF16, bias=BF16), mapped) for mapped in MAPPED[3:7]),
    (Case(2, 256, 136, 32, BF16, layout="gemv", bias=BF16), f"x {WEIGHT}"),
    (Case(3, 1024, 144, 128, BF16, split=4, bias=BF16), f"x {WEIGHT}"),
    (Case(3, 1024, 144, 128, split=12, bias=F16, layout="oc_major"), f"{WEIGHT} bias"),
    (Case(20, 320, 288, 64, bias=F16), "x"),
    (Case(70, 320, 288, 64, BF16, bias=BF16), WEIGHT),
    (Case(9, 1024, 288, 32, split=3, bias=BF16), f"x {WEIGHT} bias"),
    (Case(4, 1024, 288, 128, split=3, bias=BF16), f"x {WEIGHT} bias"),
)
MIN_CASES = 9  # of CASES, for every variant
BATCHED_GRADIENTS = (
    # What has a batch dimension in jax.vmap; where x has none, its gradient is summed over it.
    (Case(1, 512, 256), f"x {WEIGHT}"),
    (Case(17, 384, 512, 64), f"x {WEIGHT}"),
    (Case(64, 512, 256, 32), f"x {WEIGHT}"),
    (Case(300, 384, 512, -1), f"x {WEIGHT}"),
    (Case(300, 512, 256, 128, BF16), f"x {WEIGHT}"),
    (Case(64, 384, 512, 64, BF16), f"x {WEIGHT}"),
    (Case(17, 512, 256, 32, BF16), f"x {WEIGHT}"),
    (Case(1, 384, 512, -1, BF16), f"x {WEIGHT}"),
    # Tiles in part, other layouts and dtypes; sums that meet in clusters and in memory.
    (Case(70, 200, 96, -1, BF16, scales=F16), f"x {WEIGHT}"),
    (Case(40, 256, 136, 64, layout="oc_major", symmetric=True), f"x {WEIGHT}"),
    (Case(20, 320, 288, 32, split=3), f"x {WEIGHT}"),
    (Case(33, 128, 1184, 128, BF16, split=12), f"x {WEIGHT}"),
    (Case(64, 320, 288, 64), WEIGHT),
    (Case(20, 320, 288, 64, BF16, split=3), "x qweight"),
    (Case(130, 384, 256, 128), "x scales qzeros"),
)
# Among all, problems that every variant is in: rows and columns within tiles, and results that end
# where the allocator's memory does. What is beside them is known there.
GUARDED = (
    Case(8, 4096, 288, 128, BF16, scales=F16, bias=BF16, activation="silu", out=F32),
    Case(300, 384, 1056, 128, bias=F32),
    Case(300, 384, 2080, 128, split=3),  # of gradients
)


@functools.cache
def solved(case):
    problem = problem_of(case)
    operands = problem.x, problem.weight, problem.bias
    return operands, problem.float64(), on_cpu(case.product, *operands)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", one_process(CASES))
def test_product(case, variant, force):
    operands, exact, reference = solved(case)
    guarded = case in GUARDED
    check(
        force, variant, case.product, *operands, exact=exact, reference=reference, guarded=guarded
    )


@functools.cache
def refusals_of_cases():
    problems = ((case, problem_of(case)) for case in CASES)
    return [refusals(case.product, p.x, p.weight, p.bias) for case, p in problems]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_runs_enough(variant):
    """A kernel that refuses everything would pass every other test."""
    reasons = [refused.get(variant, "") for refused in refusals_of_cases()]
    if reasons[0].startswith("needs "):
        pytest.skip(f"{variant} {reasons[0]}, which this build or device does not have")
    assert reasons.count("") >= MIN_CASES, reasons


def test_every_variant_is_guarded():
    """Nobody would miss guards that a kernel never has beside its results."""
    *products, gradient = GUARDED
    assert {*products} < {*CASES}
    assert gradient in TRANSPOSED_CASES
    refused = [refusals(c.product, *solved(c)[0]) for c in products]
    refused_gradient = refusals(gradient.cotangent, *solved_transposed(gradient)[0])
    for variant in VARIANTS:
        reasons = [r.get(variant, "") for r in refused]
        assert any(why == "" or why.startswith("needs ") for why in reasons), reasons
    for variant in set(TRANSPOSED) - {"dequantize_dot"}:
        why = refused_gradient.get(variant, "")
        assert why == "" or why.startswith("needs "), why
    for _, _, reference in (*map(solved, products), solved_transposed(gradient)):
        assert reference.nbytes % ALLOCATED == 0


@functools.cache
def solved_transposed(case):
    problem = problem_of(case)
    ct = np.random.default_rng(1).standard_normal((case.m, case.n)).astype(case.x)
    exact = ct.astype(np.float64) @ dequantize_float64(problem.weight).T
    operands = problem.x, problem.weight, ct
    return operands, exact, on_cpu(case.cotangent, *operands)


@pytest.mark.parametrize("variant", TRANSPOSED)
@pytest.mark.parametrize("case", one_process(TRANSPOSED_CASES))
def test_transposed_product(case, variant, force):
    operands, exact, reference = solved_transposed(case)
    guarded = case in GUARDED
    check(
        force, variant, case.cotangent, *operands, exact=exact, reference=reference, guarded=guarded
    )


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in TRANSPOSED])
def test_no_transposed(variant, force):
    operands, exact, reference = solved_transposed(TRANSPOSED_CASES[0])
    case = TRANSPOSED_CASES[0]
    assert variant in refusals(case.cotangent, *operands)
    check(force, variant, case.cotangent, *operands, exact=exact, reference=reference)


@pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["", "batched"])
def test_vjp(layout, dtype, batch):
    """With the kernels that the plan chooses."""
    n = 288 if batch else 264  # of which TMA takes rows of words, and of which it does not
    case = Case(20, 512, n, 64, dtype, layout=layout, bias=dtype, activation="silu")
    p = problem_of(case, batch)

    def vjp(x, weight, bias, ct):
        def product(x, scales, bias):
            parts = AWQWeight(weight.qweight, scales, weight.qzeros, layout=layout, group_size=64)
            return case.product(x, parts, bias)

        y, pull = jax.vjp(product, x, weight.scales, bias)
        return y, *pull(ct)

    ct = np.random.default_rng(1).standard_normal((*batch, case.m, case.n)).astype(dtype)
    results = jax.jit(lambda *a: vjp(*a))(p.x, p.weight, p.bias, ct)
    wide = jax.tree.map(
        lambda a: a if a.dtype == np.int32 else a.astype(np.float32), (p.x, p.weight, p.bias, ct)
    )
    with jax.default_device(jax.devices("cpu")[0]):
        references = jax.jit(lambda *a: vjp(*a))(p.x, p.weight, p.bias, ct)
        exact = jax.jit(lambda *a: vjp(*a))(*wide)
    for result, wanted, reference in zip(results, exact, references, strict=True):
        assert_close(result, np.asarray(wanted, np.float64), reference)


def mapped_operands(p, mapped):
    """Axes of jax.vmap, and x, qweight, scales, qzeros and bias: all entries of what is mapped."""
    weight = p.weight
    operands = (p.x, weight.qweight, weight.scales, weight.qzeros, p.bias)
    names = ("x", "qweight", "scales", "qzeros", "bias")
    axes = tuple(0 if name in mapped.split() else None for name in names)
    return axes, [
        a if axis == 0 or a is None else a[0] for a, axis in zip(operands, axes, strict=True)
    ]


@functools.cache
def solved_batched(case, mapped):
    """One entry of everything, and three of what is mapped."""
    p = problem_of(case, (3,))
    axes, operands = mapped_operands(p, mapped)
    options = {"layout": case.layout, "group_size": case.group_size}

    def one(x, qweight, scales, qzeros, bias):
        return case.product(x, AWQWeight(qweight, scales, qzeros, **options), bias)

    exact = []
    for entry in range(3):
        x, *weight, bias = (
            a[entry] if axis == 0 else a for a, axis in zip(operands, axes, strict=True)
        )
        exact.append(
            x.astype(np.float64) @ dequantize_float64(AWQWeight(*weight, **options))
            + bias.astype(np.float64)
        )
    function = jax.vmap(one, in_axes=axes)
    return function, operands, np.stack(exact), on_cpu(function, *operands)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("case", "mapped"), one_process(BATCHED_CASES))
def test_batched(case, mapped, variant, force):
    function, operands, exact, reference = solved_batched(case, mapped)
    check(force, variant, function, *operands, exact=exact, reference=reference)


@functools.cache
def batched_gradient(case, mapped):
    """As `solved_batched`, without a bias; the cotangent has three entries whatever is mapped."""
    p = problem_of(case, (3,))
    axes, operands = (parts[:-1] for parts in mapped_operands(p, mapped))
    options = {"layout": case.layout, "group_size": case.group_size}

    def one(x, *weight):
        return case.product(x, AWQWeight(*weight, **options))

    def gradient(x, *rest):
        *weight, ct = rest
        product = jax.vmap(one, in_axes=axes)
        return jax.linear_transpose(lambda x: product(x, *weight), x)(ct)[0]

    ct = np.random.default_rng(1).standard_normal((3, case.m, case.n)).astype(case.x)
    weights = []
    for entry in range(3):
        parts = zip(operands[1:], axes[1:], strict=True)
        parts = (a if axis is None or a is None else a[entry] for a, axis in parts)
        weights.append(AWQWeight(*parts, **options))
    return gradient, (*operands, ct), weights


@functools.cache
def solved_batched_gradient(case, mapped):
    function, operands, weights = batched_gradient(case, mapped)
    exact = [
        ct.astype(np.float64) @ dequantize_float64(weight).T
        for ct, weight in zip(operands[-1], weights, strict=True)
    ]
    exact = np.stack(exact) if "x" in mapped.split() else sum(exact)
    return function, operands, exact, on_cpu(function, *operands)


@pytest.mark.parametrize("variant", TRANSPOSED)
@pytest.mark.parametrize(("case", "mapped"), one_process(BATCHED_GRADIENTS))
def test_batched_gradient(case, mapped, variant, force):
    function, operands, exact, reference = solved_batched_gradient(case, mapped)
    check(force, variant, function, *operands, exact=exact, reference=reference)


def test_every_variant_runs_enough_batched_gradients():
    refused = []
    for parameters in BATCHED_GRADIENTS:
        function, operands, _ = batched_gradient(*parameters)
        refused.append(refusals(function, *operands))
    for variant in TRANSPOSED:
        reasons = [r.get(variant, "") for r in refused]
        assert reasons[0].startswith("needs ") or reasons.count("") >= MIN_CASES, reasons


@functools.cache
def identity_case(x, scales, layout, transpose):
    case = Case(192, 192, 224, 32, x, scales=scales, layout=layout)
    weight = problem_of(case).weight
    wanted = dequantize_float64(weight).astype(x)
    return case, weight, wanted.T if transpose else wanted


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("transpose", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(
    ("x", "scales", "layout"),
    [
        (F16, F16, "gemm"),
        (BF16, BF16, "gemm"),
        (BF16, F16, "gemm"),
        (F16, BF16, "gemm"),
        (BF16, BF16, "oc_major"),
    ],
    ids=str,
)
def test_identity_gives_the_weight(x, scales, layout, transpose, variant, force):
    """Bit for bit: every product but one is 0, so nothing rounds except the weight."""
    case, weight, wanted = identity_case(x, scales, layout, transpose)
    rows = MOST_ROWS.get(variant, len(wanted))
    function = case.cotangent if transpose else case.product
    left = (np.zeros((rows, case.k), x), weight) if transpose else ()
    eye = np.eye(len(wanted), dtype=x)
    sample = (*left, eye[:rows]) if transpose else (eye[:rows], weight)
    if variant in refusals(function, *sample):
        check(force, variant, function, *sample, exact=wanted, reference=wanted)
        return
    force(variant)
    program = jax.jit(lambda *a: function(*a))
    for start in range(0, len(eye), rows):
        part = eye[start : start + rows]
        y = program(*left, part) if transpose else program(part, weight)
        np.testing.assert_array_equal(np.asarray(y), wanted[start : start + rows])


INVARIANT_CASES = (
    Case(300, 4096, 4096),  # in clusters
    Case(300, 4096, 4096, 128, BF16, bias=BF16, activation="silu"),
    Case(300, 1024, 28672, 64, scales=F16, symmetric=True),  # without splits
    Case(300, 14336, 4096, 128, BF16, scales=F16, out=F32),
    Case(300, 1120, 288, 32, bias=F32, activation="gelu"),
    Case(300, 2048, 512, split=3),
    Case(300, 2048, 512, 128, BF16, split=12, bias=BF16),  # in the workspace
    Case(300, 1024, 136, 64, BF16, bias=F32),  # rows that TMA cannot take
    Case(300, 2048, 264, 128, layout="oc_major", activation="relu"),
    Case(300, 100, 72, -1),  # no tensor cores
    Case(300, 256, 136, 32, F16, scales=BF16),
)


@pytest.mark.parametrize("case", INVARIANT_CASES, ids=str)
def test_batch_invariant(case):
    """A row has the same bits in every batch, and in every place of it."""
    p = problem_of(case)

    def product(x, weight, bias):
        return awq_gemm(
            x,
            weight,
            bias=bias,
            activation=case.activation,
            split_k_iters=case.split,
            deterministic="batch_invariant",
            out_dtype=case.out,
        )

    run = jax.jit(product)
    y = np.asarray(run(p.x, p.weight, p.bias))
    assert_close(y, p.float64(), on_cpu(case.product, p.x, p.weight, p.bias))
    for rows in (1, 7, 16, 33, 64, 100, 129, 256):
        for first in (0, 300 - rows):
            part = np.asarray(run(p.x[first : first + rows], p.weight, p.bias))
            assert_same_bits(part, y[first : first + rows])


@pytest.mark.parametrize("case", [Case(300, 2048, 512), Case(300, 1120, 288, 32, BF16)], ids=str)
def test_batch_invariant_tiles_agree(case, force):
    """Whichever of its tiles a kernel takes, the bits are the same."""
    p = problem_of(case)
    product = functools.partial(awq_gemm, deterministic="batch_invariant")
    refused = refusals(product, p.x, p.weight)
    first = {}
    for variant in (v for v in VARIANTS if v not in refused):
        force(variant)
        y = np.asarray(product(p.x, p.weight))
        assert_same_bits(y, first.setdefault(variant.partition("_")[0], y))
    assert set(first) >= {"simt"}


@pytest.mark.parametrize("case", [Case(300, 1024, 4096), Case(300, 2048, 264, 128, BF16)], ids=str)
def test_batch_invariant_gradient(case):
    p = problem_of(case)
    ct = np.random.default_rng(1).standard_normal((case.m, case.n)).astype(case.x)

    def pull(ct, weight):
        x = jnp.zeros((len(ct), case.k), case.x)
        product = functools.partial(awq_gemm, deterministic="batch_invariant")
        return jax.linear_transpose(lambda x: product(x, weight), x)(ct)[0]

    run = jax.jit(pull)
    dx = np.asarray(run(ct, p.weight))
    for rows in (1, 16, 33, 129, 256):
        assert_same_bits(np.asarray(run(ct[-rows:], p.weight)), dx[-rows:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows(variant, force):
    force(variant)
    p = problem_of(Case(1, 256, 128))
    for x in (p.x[:0], np.zeros((3, 0, 256), F16)):
        assert awq_gemm(x, p.weight).shape == (*x.shape[:-1], 128)


def test_every_variant_is_here():
    p = problem_of(Case(1, 256, 128))
    refused = refusals(awq_gemm, p.x.astype(np.float32), p.weight)
    assert set(refused) == {*VARIANTS, *OF_GRADIENTS, *OF_CODES}


@pytest.mark.parametrize(("x", "scales"), [(F16, F32), (F32, F16), (F32, F32)], ids=str)
def test_float32_takes_the_reference(x, scales):
    p = problem_of(Case(9, 256, 72, 64, x, scales=scales))
    made = plan("awq_gemm", p.x, p.weight)
    assert made.route == "reference"
    assert made.refused["simt"] == ("x is float32" if x == F32 else "scales are float32")
    if x == F16:
        assert_close(np.asarray(p.run()), p.float64(), p.reference())
