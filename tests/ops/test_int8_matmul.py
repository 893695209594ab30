"""`int8_matmul` and `int4_matmul`: sums against int64, scaled results against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_case import auto_mesh
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_awq import _ffi, int4_matmul, int8_matmul, plan
from jax_awq.testing import assert_close
from jax_awq.testing_integers import random_int_problem, unpack_half_bytes

FLOATS = [np.float16, jnp.bfloat16, np.float32]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
every_width = pytest.mark.parametrize("bits", [8, 4])


@st.composite
def problems(draw, *, raw):
    options = {"out_dtype": np.int32}
    if not raw:
        options = {
            "out_dtype": draw(st.sampled_from(FLOATS)),
            "scales": draw(st.sampled_from(["each", "scalar"])),
            "bias": draw(st.sampled_from([None, *FLOATS])),
            "activation": draw(st.sampled_from(ACTIVATIONS)),
        }
    return random_int_problem(
        np.random.default_rng(draw(st.integers(0, 2**32))),
        tuple(draw(st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3))),
        draw(st.sampled_from([1, 2, 3, 16, 17, 31, 64, 100])),
        draw(st.sampled_from([1, 7, 8, 33])),
        bits=draw(st.sampled_from([4, 8])),
        batch=draw(st.sampled_from([(), (1,), (3,)])),
        **options,
    )


@given(problems(raw=True))
def test_sums_are_exact(problem):
    y = problem.run()
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, problem.sums())


@given(problems(raw=False))
def test_scaled_against_float64(problem):
    y = problem.run()
    assert y.dtype == problem.out_dtype
    assert_close(y, problem.float64(), y)


@pytest.mark.parametrize("m", [1, 3, 64])
@pytest.mark.parametrize("k", [1, 17, 31, 256])
@pytest.mark.parametrize("n", [1, 7, 48])
@every_width
def test_odd_shapes(rng, bits, m, k, n):
    problem = random_int_problem(rng, m, k, n, bits=bits)
    np.testing.assert_array_equal(problem.run(), problem.sums())


@pytest.mark.parametrize("code", [-128, 127])
def test_extreme_codes(code):
    """2048 products of (-128)**2 are 2**25, one more than float32 counts to."""
    a, b = np.full((2, 2049), code, np.int8), np.full((2049, 3), code, np.int8)
    np.testing.assert_array_equal(int8_matmul(a, b), np.full((2, 3), 2049 * code**2))


def test_extreme_int4_codes():
    a, b = np.full((2, 33), 0x88 - 256, np.int8), np.full((33, 3), 0x88 - 256, np.int8)
    np.testing.assert_array_equal(int4_matmul(a, b), np.full((2, 3), 66 * 64))
    np.testing.assert_array_equal(int4_matmul(a, b, k=65), np.full((2, 3), 65 * 64))


def test_the_even_index_is_in_the_low_half():
    a = np.array([[0x21]], np.int8)  # 1, 2
    b = np.array([[0x0F]], np.uint8)  # -1, 0
    assert int4_matmul(a.view(np.uint8), b) == -1
    np.testing.assert_array_equal(unpack_half_bytes(a, -1, 2), [[1, 2]])


@pytest.mark.parametrize("packed_dtype", [np.int8, np.uint8])
def test_packed_as_either_dtype(rng, packed_dtype):
    p = random_int_problem(rng, 5, 40, 6, bits=4)
    y = int4_matmul(p.a.view(packed_dtype), p.b.view(packed_dtype))
    np.testing.assert_array_equal(y, p.sums())


@every_width
def test_default_dtypes(rng, bits):
    op = int8_matmul if bits == 8 else int4_matmul
    p = random_int_problem(rng, 5, 16, 6, bits=bits)
    assert op(p.a, p.b).dtype == jnp.int32
    assert op(p.a, p.b, np.float32(1)).dtype == jnp.float32
    y = op(p.a, p.b, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, p.sums())


@pytest.mark.parametrize("batch", [(), (3,)])
def test_scales_with_kept_dimensions(rng, batch):
    p = random_int_problem(rng, (2, 5), 16, 6, bits=8, batch=batch, out_dtype=np.float32)
    y = int8_matmul(p.a, p.b, p.scale_a[..., None], p.scale_b[..., None, :])
    np.testing.assert_array_equal(y, p.run())


def test_batch_without_rows(rng):
    p = random_int_problem(
        rng, (), 16, 6, bits=8, batch=(3,), out_dtype=np.float32, bias=np.float32
    )
    assert p.a.shape == (3, 16)
    assert_close(p.run(), p.float64(), p.reference())


def test_scale_and_bias_shared_over_the_batch(rng):
    p = random_int_problem(rng, 5, 16, 6, bits=8, batch=(3,), out_dtype=np.float32, bias=np.float16)
    y = int8_matmul(p.a, p.b, p.scale_a, p.scale_b[0], bias=p.bias[0])
    for i in range(3):
        one = int8_matmul(p.a[i], p.b[i], p.scale_a[i], p.scale_b[0], bias=p.bias[0])
        np.testing.assert_array_equal(y[i], one)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape):
    y = int8_matmul(np.zeros(shape, np.int8), np.zeros((8, 3), np.int8))
    assert y.shape == (*shape[:-1], 3)


def test_nothing_to_sum_is_the_bias():
    y = int8_matmul(
        np.zeros((2, 0), np.int8), np.zeros((0, 3), np.int8), bias=np.arange(3, dtype=np.float32)
    )
    np.testing.assert_array_equal(y, [[0, 1, 2]] * 2)


@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 2)])
@every_width
def test_vmap_of_sums(rng, bits, axes):
    op = int8_matmul if bits == 8 else int4_matmul
    problems = [random_int_problem(rng, 5, 16, 6, bits=bits) for _ in range(3)]
    a, b = (
        getattr(problems[0], name)
        if axis is None
        else np.stack([getattr(p, name) for p in problems], axis)
        for name, axis in zip("ab", axes, strict=True)
    )
    y = jax.vmap(op, axes)(a, b)
    for i in range(3):
        a, b = (problems[0 if axis is None else i] for axis in axes)
        np.testing.assert_array_equal(y[i], op(a.a, b.b))


# --- shards


@pytest.mark.parametrize("k", [64, 63])
@pytest.mark.parametrize(
    ("a_spec", "b_spec", "result"),
    [(P("dp"), P(None, "tp"), P("dp", "tp")), (P("dp", "tp"), P("tp"), P("dp"))],
    ids=["column", "row"],
)
@every_width
def test_auto_axes(rng, bits, a_spec, b_spec, result, k):
    """Partial sums travel as integers; the last half of odd K is nobody's, so K is not split."""
    if bits == 8 and k == 63:
        k = 48
    p = random_int_problem(
        rng, 8, k, 16, bits=bits, bias=np.float32, activation="silu", out_dtype=np.float32
    )
    mesh = auto_mesh(dp=2, tp=4)
    put = [
        jax.device_put(o, NamedSharding(mesh, s))
        for o, s in zip(
            (p.a, p.b, p.scale_a, p.scale_b, p.bias), (a_spec, b_spec, P(), P(), P()), strict=True
        )
    ]

    @jax.jit
    def fn(a, b, scale_a, scale_b, bias):
        options = {"bias": bias, "activation": "silu", "out_dtype": jnp.float32}
        if bits == 8:
            return int8_matmul(a, b, scale_a, scale_b, **options)
        return int4_matmul(a, b, scale_a, scale_b, k=k, **options)

    y = fn(*put)
    assert_close(y, p.float64(), p.reference())
    assert y.sharding.spec == result or k == 63
    text = fn.lower(*put).compile().as_text()
    assert ("s32[4,16]" in text and " all-reduce(" in text) == (b_spec == P("tp") and k != 63)


@pytest.mark.parametrize("split", ["column", "row"])
def test_explicit_axes(rng, split):
    p = random_int_problem(rng, (2, 8), 64, 16, bits=8, out_dtype=np.float32, bias=np.float32)
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    a_spec, b_spec = (
        (P(None, "dp"), P(None, "tp")) if split == "column" else (P(None, "dp", "tp"), P("tp"))
    )
    with jax.set_mesh(mesh):
        a, b = jax.device_put(p.a, a_spec), jax.device_put(p.b, b_spec)
        y = int8_matmul(a, b, p.scale_a, p.scale_b, bias=p.bias)
        want = P(None, "dp", "tp") if split == "column" else P(None, "dp", None)
        assert jax.typeof(y).sharding.spec == want
    np.testing.assert_allclose(y, p.float64(), rtol=1e-5, atol=1e-5)


# --- derivatives


def test_linear_transpose_in_a_scale(rng):
    p = random_int_problem(rng, 5, 16, 6, bits=8, out_dtype=np.float32)
    ct = np.ones((5, 6), np.float32)
    for i in range(2):
        scales = [p.scale_a, p.scale_b]

        def fn(scale, i=i, scales=scales):
            return int8_matmul(p.a, p.b, *(scale if j == i else s for j, s in enumerate(scales)))

        (pulled,) = jax.linear_transpose(fn, scales[i])(ct)
        np.testing.assert_allclose(pulled, jax.vjp(fn, scales[i])[1](ct)[0], rtol=1e-6)


# --- errors and plans

ONES = np.ones
F32 = np.float32
ERRORS = [
    ({"a": [1]}, TypeError, "{a} must be an array, got list"),
    ({"activation": ["relu"]}, TypeError, "activation must be a plain value, got ['relu']"),
    (
        {"out_dtype": "nonsense"},
        TypeError,
        "out_dtype must be a dtype or the name of one, got 'nonsense'",
    ),
    ({"a": ONES((3, 16), F32)}, TypeError, "{a} must be {dtypes}, got float32"),
    ({"b": ONES((16, 8), np.int32)}, TypeError, "{b} must be {dtypes}, got int32"),
    ({"a": ONES((3, 15), np.int8)}, ValueError, "{a} must have shape (..., 16), got (3, 15)"),
    ({"a": np.int8(1)}, ValueError, "{a} must have shape (..., 16), got ()"),
    (
        {"b": ONES((1, 1, 16, 8), np.int8)},
        ValueError,
        "{b} must have 2 dimensions, or 3 with a leading batch, got shape (1, 1, 16, 8)",
    ),
    (
        {"b": ONES((4, 16, 8), np.int8)},
        ValueError,
        "{a} must have shape (4, ..., 16), got (3, 16)",
    ),
    ({"scale_a": ONES(3, np.float16)}, TypeError, "scale_a must be float32, got float16"),
    ({"scale_a": ONES(8, F32)}, ValueError, "scale_a must have shape (3,), got (8,)"),
    ({"scale_a": ONES((3, 8), F32)}, ValueError, "scale_a must have shape (3, 1), got (3, 8)"),
    ({"scale_b": ONES(3, F32)}, ValueError, "scale_b must have shape (8,), got (3,)"),
    ({"scale_b": ONES((2, 8), F32)}, ValueError, "scale_b must have shape (8,), got (2, 8)"),
    ({"scale_c": ONES(1, F32)}, ValueError, "scale_c must have shape (), got (1,)"),
    ({"bias": ONES(3, F32)}, ValueError, "bias must have shape (8,), got (3,)"),
    (
        {"bias": ONES(8, np.int8)},
        TypeError,
        "bias must be float16 or bfloat16 or float32, got int8",
    ),
    (
        {"activation": "swish"},
        ValueError,
        "activation must be one of (None, 'gelu', 'gelu_tanh', 'relu', 'silu'), got 'swish'",
    ),
    (
        {"out_dtype": np.int8},
        TypeError,
        "the result must be int32 or float16 or bfloat16 or float32, got int8",
    ),
    (
        {"out_dtype": np.int32, "scale_a": F32(1)},
        ValueError,
        "an int32 result takes no scale, bias or activation",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), ERRORS)
@every_width
def test_errors(bits, change, error, text):
    op = int8_matmul if bits == 8 else int4_matmul
    arguments = {"a": ONES((3, 16), np.int8), "b": ONES((16, 8), np.int8), **change}
    a, b = arguments.pop("a"), arguments.pop("b")
    names = ("a", "b") if bits == 8 else ("a_packed", "b_packed")
    text = text.format(a=names[0], b=names[1], dtypes="int8" if bits == 8 else "int8 or uint8")
    with pytest.raises(error) as caught:
        op(a, b, **arguments)
    assert str(caught.value) == f"{op.__name__}: {text}"


def test_numbers_are_float32_in_64_bits():
    a, b = ONES((3, 16), np.int8), ONES((16, 8), np.int8)
    want = int8_matmul(a, b, 0.5, 0.25, scale_c=2.0)
    with jax.enable_x64(True):
        got = int8_matmul(a, b, 0.5, 0.25, scale_c=2.0)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_k_must_fit_the_bytes():
    with pytest.raises(TypeError, match=r"^int4_matmul: k must be an integer, got 31.0"):
        int4_matmul(ONES((3, 16), np.int8), ONES((16, 8), np.int8), k=31.0)
    with pytest.raises(ValueError, match=r"^int4_matmul: k must be 31 or 32, got 33"):
        int4_matmul(ONES((3, 16), np.int8), ONES((16, 8), np.int8), k=33)


def test_plan_on_the_cpu_is_the_reference(rng):
    p = random_int_problem(rng, 5, 16, 6, bits=8)
    found = plan("int8_matmul", p.a, p.b, device=jax.devices("cpu")[0])
    assert (found.route, found.accumulator) == ("reference", "int32")
    assert found.reason == "there is no kernel for platform cpu"


needs_extension = pytest.mark.skipif(_ffi._ext is None, reason=_ffi.MISSING or "built")


def shapes(m, k, n):
    return jax.ShapeDtypeStruct((m, k), np.int8), jax.ShapeDtypeStruct((k, n), np.int8)


@needs_extension
@pytest.mark.parametrize(
    ("m", "k", "n", "kernel"),
    [
        (4096, 4096, 4096, "tma_256"),
        (4096, 8192, 28672, "tma_256"),
        (2048, 2048, 2048, "tma_256"),
        (256, 4096, 4096, "tma_64"),  # tma_128 has 64 CTAs
        (64, 8192, 28672, "tma_64"),
        (1, 4096, 4096, "tma_64"),
        (64, 4095, 4096, "tma_64"),
        (64, 4096, 4097, "mma"),  # rows that TMA cannot take
    ],
)
def test_what_hopper_runs(m, k, n, kernel):
    found = plan("int8_matmul", *shapes(m, k, n), device="sm_90")
    assert (found.route, found.kernel, found.accumulator) == ("fused", kernel, "int32")
    assert found.deterministic
    widened = m * (k + 15) // 16 * 16 if k % 16 and kernel != "mma" else 0
    sums = 4 * found.split_k * m * n if found.split_k > 1 else 0
    assert found.workspace_bytes == pytest.approx(widened + sums, abs=16 * m)


@needs_extension
def test_packed_activations_are_widened_in_the_workspace():
    found = plan("int4_matmul", *shapes(2048, 1024, 2048), device="sm_90")
    assert found.workspace_bytes == 2048 * 2048


@needs_extension
def test_a_variant_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_AWQ_FORCE", "tma_64")
    text = "^int8_matmul: variant tma_64 cannot run: rows of b are not 16-byte aligned"
    with pytest.raises(ValueError, match=text):
        plan("int8_matmul", *shapes(64, 64, 65), device="sm_90")
    monkeypatch.setenv("JAX_AWQ_FORCE", "nonsense")
    with pytest.raises(ValueError, match=r"^int4_matmul: unknown variant nonsense"):
        plan("int4_matmul", *shapes(64, 64, 64), device="sm_90")


@needs_extension
@every_width
def test_one_custom_call_when_lowered(rng, bits):
    p = random_int_problem(rng, (2, 5), 64, 48, bits=bits, out_dtype=np.float16, bias=np.float32)
    op = int8_matmul if bits == 8 else int4_matmul
    fn = jax.jit(lambda *o: op(*o[:4], bias=o[4], activation="relu", out_dtype=np.float16))
    traced = fn.trace(p.a, p.b, p.scale_a, p.scale_b, p.bias)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "@jax_awq." in line)
    assert f"@jax_awq.int{bits}_matmul(" in call
    assert 'activation = "relu", k = 64 : i64, variant = ""' in call
    width = 64 if bits == 8 else 32
    assert (
        f"(tensor<10x{width}xi8>, tensor<{width}x48xi8>, tensor<10xf32>, tensor<48xf32>, "
        "tensor<0xf32>, tensor<48xf32>) -> (tensor<10x48xf16>" in call
    )
