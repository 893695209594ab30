"""`quantize_activation`: bit for bit what its docstring says, by an oracle in numpy."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_case import auto_mesh
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_awq import (
    Int8Weight,
    QuantizedActivation,
    _ffi,
    dequantize_activation,
    plan,
    quantize_activation,
)
from jax_awq.testing import quantize_activation_numpy, unpack_bytes

DTYPES = [np.float16, jnp.bfloat16, np.float32]
NAN, INF = np.nan, np.inf


def assert_exact(qa, x, scale=None):
    """Codes, scale and sums of `qa` against the oracle; `scale` is the one that was given."""
    codes, wide = quantize_activation_numpy(x, bits=qa.bits, scale=scale)
    np.testing.assert_array_equal(unpack_bytes(qa.q, qa.bits, qa.k), codes)
    found = np.asarray(qa.scale)[..., None] if scale is None else np.asarray(qa.scale)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wide)
    if qa.bits == 4 and qa.k % 2:
        assert not (np.asarray(qa.q)[..., -1].view(np.uint8) >> 4).any()
    if qa.group_sums is not None:
        groups = qa.group_sums.shape[-1]
        sums = codes.astype(np.int32).reshape(*codes.shape[:-1], groups, qa.k // groups).sum(-1)
        assert qa.group_sums.dtype == np.int32
        np.testing.assert_array_equal(qa.group_sums, sums)


@given(st.data())
def test_is_exact(data):
    group_size = data.draw(st.sampled_from([None, -1, 1, 3, 32, 64]))
    k = data.draw(st.integers(1, 9)) * (1 if group_size in (None, -1) else group_size)
    rows = data.draw(st.sampled_from([(), (3,), (2, 3), (0,)]))
    bits = data.draw(st.sampled_from([8, 4]))
    granularity = data.draw(st.sampled_from(["token", "channel", "tensor", "given"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = rng.standard_normal((*rows, k)) * 2.0 ** rng.integers(-20, 12, (*rows, 1))
    x[rng.random(x.shape) < 0.1] = 0
    x = x.astype(np.float32).astype(data.draw(st.sampled_from(DTYPES)))
    scale = {
        "channel": rng.uniform(0, 0.1, k).astype(np.float32),
        "given": np.float32(rng.uniform(0, 0.1)),
    }.get(granularity)
    qa = quantize_activation(
        x,
        bits=bits,
        granularity="tensor" if granularity == "given" else granularity,
        scale=scale,
        group_size=group_size,
    )
    assert (qa.shape, qa.bits, qa.k) == (x.shape, bits, k)
    if granularity == "tensor":
        _, wide = quantize_activation_numpy(x.reshape(1, -1), bits=bits)
        np.testing.assert_array_equal(qa.scale, wide[0, 0])
        scale = wide[0, 0]
    assert_exact(qa, x, scale)


@given(st.data())
def test_values_are_within_half_a_step(data):
    bits = data.draw(st.sampled_from([8, 4]))
    values = st.floats(-(2.0**15), 2.0**15, width=16)
    x = np.asarray(data.draw(st.lists(values, min_size=1, max_size=20)), np.float16)
    qa = quantize_activation(x, bits=bits)
    back = np.asarray(dequantize_activation(qa)).astype(np.float64)
    assert (np.abs(back - x.astype(np.float64)) <= 0.5001 * float(qa.scale)).all()


def test_ties_go_to_even():
    x = np.asarray([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -500], np.float32)
    qa = quantize_activation(x, granularity="tensor", scale=1.0)
    np.testing.assert_array_equal(qa.q, [0, 2, 2, 0, -2, 126, 127, -127])


def test_two_codes_a_byte_the_even_column_low():
    x = np.asarray([1, -1, 7, -7, 3], np.float32)
    qa = quantize_activation(x, bits=4)
    np.testing.assert_array_equal(np.asarray(qa.q).view(np.uint8), [0xF1, 0x97, 0x03])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_rows_that_are_zero_or_not_finite(dtype, bits):
    x = np.ones((6, 5), np.float32)
    x[1] = 0
    x[2, 3], x[3, 0], x[4, 1] = NAN, INF, -INF
    x[5, :2] = NAN, INF
    qa = quantize_activation(x.astype(dtype), bits=bits, group_size=-1)
    largest = {8: 127, 4: 7}[bits]
    np.testing.assert_array_equal(qa.scale, np.float32([1 / largest, 0, NAN, INF, INF, NAN]))
    np.testing.assert_array_equal(qa.group_sums[:, 0], [5 * largest, 0, 0, 0, 0, 0])
    assert not np.asarray(qa.q)[1:].any()
    back = np.asarray(dequantize_activation(qa, dtype)).astype(np.float32)
    assert np.isnan(back[2:]).all()  # so that neither gets lost
    np.testing.assert_array_equal(back[:2], x[:2])
    one = quantize_activation(x.astype(dtype), bits=bits, granularity="tensor")
    assert np.isnan(one.scale)
    assert not np.asarray(one.q).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("shape", [(1030, 5), (9, 64), (3, 1000)])
def test_every_nan_is_seen(rng, shape, dtype):
    """XLA's maximum of floats loses some on a CPU."""
    x = rng.standard_normal(shape).astype(np.float32)
    at = rng.integers(shape[1], size=shape[0])
    x[np.arange(shape[0]), at] = NAN
    assert np.isnan(quantize_activation(x.astype(dtype)).scale).all()
    x[1:] = 1
    assert np.isnan(quantize_activation(x.astype(dtype), granularity="tensor").scale)
    assert np.isnan(Int8Weight.from_float(x.astype(dtype)).scale[at[0]])


def test_given_scales_saturate():
    x = np.asarray([[1e9, -1e9, INF, -INF, NAN, 1, 0, -0.0]], np.float32)
    qa = quantize_activation(x, granularity="tensor", scale=0.5)
    np.testing.assert_array_equal(qa.q, [[127, -127, 127, -127, 0, 2, 0, 0]])
    unusable = np.asarray([0, -1, NAN, INF, -INF, 1e-31, 1e38, 1e-45], np.float32)
    qa = quantize_activation(x, granularity="channel", scale=unusable)
    assert not np.asarray(qa.q).any()
    np.testing.assert_array_equal(qa.scale, unusable)


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-31, 9e-29, 2e-28, 1e30, 3.4e38])
def test_smallest_and_largest_magnitudes(largest):
    x = (np.linspace(-1, 1, 33) * largest).astype(np.float32)
    qa = quantize_activation(x)
    assert_exact(qa, x)
    assert np.asarray(qa.q).any() == (largest > 1e-28)  # 127 * 2**-100


def test_one_scale_for_each_entry_of_a_vmap(rng):
    x = rng.standard_normal((3, 2, 8)).astype(np.float16)
    qa = jax.vmap(lambda x: quantize_activation(x, granularity="tensor", group_size=4))(x)
    assert (qa.q.shape, qa.scale.shape, qa.group_sums.shape) == ((3, 2, 8), (3,), (3, 2, 2))
    for i in range(3):
        assert_exact(jax.tree.map(lambda a, i=i: a[i], qa), x[i], np.asarray(qa.scale)[i])
    np.testing.assert_array_equal(
        dequantize_activation(qa), np.asarray(qa.q) * np.asarray(qa.scale)[:, None, None]
    )


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_nested_maps_of_given_scales(rng, axes):
    x = rng.standard_normal((2, 3, 4, 6)).astype(np.float32)
    scale = rng.uniform(0.01, 0.1, (2, 3, 6)).astype(np.float32)
    operands = [a if axis == 0 else a[0] for a, axis in zip((x, scale), axes, strict=True)]

    def one(x, scale):
        return quantize_activation(x, granularity="channel", scale=scale).q

    got = jax.vmap(jax.vmap(one), axes)(*operands)
    for i in range(2):
        for j in range(3):
            a = x[i if axes[0] == 0 else 0, j]
            s = scale[i if axes[1] == 0 else 0, j]
            np.testing.assert_array_equal(got[i, j], quantize_activation_numpy(a, scale=s)[0])


# --- derivatives


def test_codes_and_computed_scales_have_no_derivative(rng):
    x = rng.standard_normal((2, 6)).astype(np.float32)
    for granularity in ("token", "tensor"):
        grad = jax.grad(
            lambda x, g=granularity: dequantize_activation(
                quantize_activation(x, granularity=g)
            ).sum()
        )(x)
        assert not grad.any()
    tangent = jax.jvp(lambda x: quantize_activation(x, group_size=-1), (x,), (x,))[1]
    assert (tangent.q.dtype, tangent.group_sums.dtype) == (jax.dtypes.float0,) * 2
    assert not tangent.scale.any()


def test_a_given_scale_has_one(rng):
    x = rng.standard_normal((2, 6)).astype(np.float32)

    def loss(scale):
        qa = quantize_activation(x, granularity="channel", scale=scale)
        return dequantize_activation(qa).sum()

    scale = np.full(6, 0.02, np.float32)
    codes, _ = quantize_activation_numpy(x, scale=scale)
    np.testing.assert_allclose(jax.grad(loss)(scale), codes.astype(np.float32).sum(0))


# --- shardings


def collectives(compiled):
    names = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
    return {n for n in names if re.search(rf" {n}(?:-start)?\(", compiled.as_text())}


@pytest.mark.parametrize(
    ("options", "split", "k", "found"),
    [
        ({"group_size": 32}, P("m"), 64, set()),
        ({"bits": 4, "group_size": -1}, P("m"), 63, set()),
        ({"granularity": "channel", "group_size": 16}, P("m", "k"), 64, set()),
        ({"granularity": "channel", "bits": 4, "group_size": 16}, P("m", "k"), 64, set()),
        ({"granularity": "channel", "bits": 4}, P("m", "k"), 64, set()),
        ({"granularity": "tensor"}, P("m", "k"), 64, {"all-reduce"}),
    ],
)
def test_split_over_devices(rng, options, split, k, found):
    x = rng.standard_normal((8, k)).astype(np.float16)
    scale = None
    specs = [split]
    if options.get("granularity") == "channel":
        scale = rng.uniform(0.01, 0.1, k).astype(np.float32)
        specs.append(P("k"))
    operands = [x] if scale is None else [x, scale]
    mesh = auto_mesh(m=2, k=4)
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(operands, specs, strict=True)
    ]
    fn = jax.jit(
        lambda x, scale=None: quantize_activation(x, scale=scale, **options),
    )
    qa = fn(*placed)
    want = quantize_activation(x, scale=scale, **options)
    jax.tree.map(np.testing.assert_array_equal, qa, want)
    assert qa.q.sharding.is_equivalent_to(NamedSharding(mesh, split), 2)
    assert collectives(fn.lower(*placed).compile()) == found
    back = jax.jit(dequantize_activation)
    np.testing.assert_array_equal(back(qa), dequantize_activation(want))
    assert collectives(back.lower(qa).compile()) == set()


def test_a_row_that_is_split_is_gathered(rng):
    x = rng.standard_normal((4, 64)).astype(np.float16)
    mesh = auto_mesh(m=2, k=4)
    placed = jax.device_put(x, NamedSharding(mesh, P("m", "k")))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(quantize_activation)(placed),
        quantize_activation(x),
    )


@pytest.mark.parametrize("granularity", ["token", "tensor", "channel"])
def test_explicit_axes(rng, granularity):
    x = rng.standard_normal((2, 4, 64)).astype(np.float16)
    scale = rng.uniform(0.01, 0.1, 64).astype(np.float32) if granularity == "channel" else None
    want = quantize_activation(x, granularity=granularity, scale=scale, bits=4)
    mesh = jax.make_mesh((2, 4), ("m", "k"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, P(None, "m"))
        qa = quantize_activation(placed, granularity=granularity, scale=scale, bits=4)
        assert jax.typeof(qa.q).sharding.spec == P(None, "m", None)
        back = dequantize_activation(qa)
        assert jax.typeof(back).sharding.spec == P(None, "m", None)
    jax.tree.map(np.testing.assert_array_equal, qa, want)
    np.testing.assert_array_equal(back, dequantize_activation(want))


# --- export, lowering, plan


def test_export_and_reload(rng):
    x = rng.standard_normal((2, 7)).astype(np.float16)
    exported = export.export(jax.jit(lambda x: quantize_activation(x, bits=4)))(x)
    qa = export.deserialize(exported.serialize()).call(x)
    assert (qa.bits, qa.granularity, qa.k) == (4, "token", 7)
    assert_exact(qa, x)


@pytest.fixture
def compiled_part(monkeypatch):
    """Stands in for the extension, whose handlers are named but not called."""
    monkeypatch.setattr(_ffi, "_ext", types.SimpleNamespace(driver_problem=lambda: ""))


def custom_call(fn, *args):
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line.strip() for line in text.splitlines() if "@jax_awq." in line]
    return call


@pytest.mark.usefixtures("compiled_part")
def test_one_custom_call(rng):
    x = rng.standard_normal((2, 3, 64)).astype(np.float16)
    call = custom_call(lambda x: quantize_activation(x, bits=4, group_size=32), x)
    assert "@jax_awq.quantize_activation(" in call
    assert "bits = 4 : i64, group_size = 32 : i64" in call
    assert call.endswith(
        ": (tensor<6x64xf16>, tensor<0x1xf32>) -> (tensor<6x32xi8>, tensor<6xf32>, tensor<6x2xi32>)"
    )
    scale = np.ones(64, np.float32)
    call = custom_call(
        lambda x, s: quantize_activation(x, granularity="channel", scale=s), x, scale
    )
    assert call.endswith(
        ": (tensor<6x64xf16>, tensor<1x64xf32>) -> "
        "(tensor<6x64xi8>, tensor<1xf32>, tensor<1x1xi32>)"
    )


@pytest.mark.usefixtures("compiled_part")
def test_plan(monkeypatch):
    x = jax.ShapeDtypeStruct((4, 96), jnp.bfloat16)
    assert plan("quantize_activation", x, device="sm_90").kernel == "rows"
    assert plan("quantize_activation", x, granularity="tensor", device="sm_80").kernel == "columns"
    for changed, options, reason in (
        (x, {"group_size": 48}, "group_size is not 32, 64, 128 or K"),
        (jax.ShapeDtypeStruct((0, 96), jnp.float32), {}, "x is empty"),
    ):
        found = plan("quantize_activation", changed, **options, device="sm_90")
        assert (found.route, found.reason) == ("reference", reason)
    monkeypatch.setenv("JAX_AWQ_FORCE", "reference")
    assert plan("quantize_activation", x, device="sm_90").reason == "JAX_AWQ_FORCE is reference"


# --- errors


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"x": np.ones((2, 8), np.int8)}, TypeError, "x must be float16 or bfloat16 or float32, "),
        ({"x": np.float32(1)}, ValueError, "x must have shape (..., K), got ()"),
        ({"bits": 5}, ValueError, "bits must be one of (8, 4), got 5"),
        (
            {"granularity": "row"},
            ValueError,
            "granularity must be one of ('token', 'channel', 'tensor'), got 'row'",
        ),
        (
            {"scale": np.float32(1)},
            ValueError,
            "scale must be None for granularity 'token', got one",
        ),
        ({"granularity": "channel"}, ValueError, "granularity 'channel' needs scale, got None"),
        (
            {"granularity": "channel", "scale": np.ones(4, np.float32)},
            ValueError,
            "scale must have shape (8,), got (4,)",
        ),
        (
            {"granularity": "tensor", "scale": np.ones(8, np.float32)},
            ValueError,
            "scale must have shape (), got (8,)",
        ),
        (
            {"granularity": "tensor", "scale": np.int32(1)},
            TypeError,
            "scale must be float16 or bfloat16 or float32, got int32",
        ),
        ({"group_size": 2.0}, TypeError, "group_size must be an integer, got 2.0"),
        ({"bits": [8]}, TypeError, "bits must be a plain value, got [8]"),
        ({"group_size": 3}, ValueError, "group_size must be -1 or a divisor of K=8, got 3"),
        ({"group_size": 0}, ValueError, "group_size must be -1 or a divisor of K=8, got 0"),
    ],
)
def test_errors(options, error, text):
    with pytest.raises(error) as caught:
        quantize_activation(**{"x": np.ones((2, 8), np.float32), **options})
    assert str(caught.value).startswith(f"quantize_activation: {text}")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"q": np.ones((2, 8), np.int32)}, TypeError, "q must be int8, got int32"),
        ({"scale": np.ones(2, np.float16)}, TypeError, "scale must be float32, got float16"),
        ({"scale": np.ones(3, np.float32)}, ValueError, "scale must have shape (2,), got (3,)"),
        ({"k": 7}, ValueError, "q must have shape (2, 7), got (2, 8)"),
        ({"bits": 4, "k": 14}, ValueError, "q must have shape (2, 7), got (2, 8)"),
        (
            {"granularity": "channel", "scale": np.ones(7, np.float32)},
            ValueError,
            "scale must have shape (8,), got (7,)",
        ),
        (
            {"group_sums": np.ones((3, 1), np.int32)},
            ValueError,
            "group_sums must have shape (2, 1), got (3, 1)",
        ),
    ],
)
def test_errors_of_the_pytree(options, error, text):
    arguments = {"q": np.ones((2, 8), np.int8), "scale": np.ones(2, np.float32), **options}
    with pytest.raises(error) as caught:
        QuantizedActivation(**arguments)
    assert str(caught.value) == f"QuantizedActivation: {text}"


def test_export_with_a_symbolic_k_packs_odd_and_even_ones(rng):
    def arrays(x):
        return jax.tree.leaves(quantize_activation(x, bits=4))

    shape = export.symbolic_shape("m, k")
    stored = export.export(jax.jit(arrays))(jax.ShapeDtypeStruct(shape, np.float32)).serialize()
    for k in (1, 2, 33, 34):
        x = rng.standard_normal((3, k)).astype(np.float32)
        for found, want in zip(export.deserialize(stored).call(x), arrays(x), strict=True):
            np.testing.assert_array_equal(found, want)
