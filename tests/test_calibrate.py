"""Static scales from data: exact maxima, percentiles within a bin, whatever the batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_awq import ActivationRange, calibrate_activation, quantize_activation

INVERSE = np.float32(1 / 127)


def batches_of(rng, k=6, dtype=np.float16):
    sizes = [(5, k), (2, 3, k), (k,), (0, k)]
    scale = 2.0 ** rng.integers(-8, 8, k)
    return [(rng.standard_normal(s) * scale).astype(np.float32).astype(dtype) for s in sizes]


def rows_of(batches):
    return np.abs(
        np.concatenate([np.asarray(b, np.float32).reshape(-1, b.shape[-1]) for b in batches])
    )


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_absmax(rng, granularity, bits):
    batches = batches_of(rng)
    axis = 0 if granularity == "channel" else None
    want = rows_of(batches).max(axis) * np.float32(1 / {8: 127, 4: 7}[bits])
    got = calibrate_activation(batches, granularity=granularity, bits=bits)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    quantize_activation(batches[0], granularity=granularity, scale=got, bits=bits)


@given(st.data())
def test_percentile_is_in_its_bin(data):
    """Never below the value that so many percent do not pass, and above it by 1/32 at most."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    percentile = data.draw(st.sampled_from([0.1, 25.0, 50.0, 90.0, 99.0, 99.9, 100.0]))
    granularity = data.draw(st.sampled_from(["channel", "tensor"]))
    batches = batches_of(rng, dtype=data.draw(st.sampled_from([np.float16, np.float32])))
    got = calibrate_activation(
        batches, method="percentile", percentile=percentile, granularity=granularity
    )
    axis = 0 if granularity == "channel" else None
    # The least of the values that the percentage of all values do not pass.
    exact = np.quantile(rows_of(batches), percentile / 100, axis, method="inverted_cdf")
    assert (got >= exact * INVERSE * (1 - 1e-6)).all()
    assert (got <= np.maximum(exact, 2.0**-24) * INVERSE * (1 + 1 / 32 + 1e-6)).all()


def test_what_no_bin_holds():
    """Below 2**-24 magnitudes count as that, above 2**16 as the largest of them."""
    x = np.asarray([1e-9, 1e-9, 1e-9, 3e-8], np.float32)[:, None]
    seen = ActivationRange.empty(1, percentiles=True).update(x)
    assert 1e-9 <= seen.magnitude(50)[0] <= 2.0**-24 * (1 + 1 / 32)
    x = np.asarray([1, 1e5, 2e5], np.float32)[:, None]
    seen = ActivationRange.empty(1, percentiles=True).update(x)
    assert seen.magnitude(60)[0] == 2e5
    assert 1 <= seen.magnitude(30)[0] <= 1 + 1 / 32


def test_zeros():
    assert calibrate_activation([np.zeros((4, 2), np.float16)]).tolist() == [0, 0]
    got = calibrate_activation([np.zeros((4, 2), np.float16)], method="percentile")
    assert got.tolist() == [0, 0]


def test_a_scan_and_a_merge_are_the_loop(rng):
    batches = rng.standard_normal((5, 4, 3)).astype(np.float32)
    empty = ActivationRange.empty(3, percentiles=True)
    scanned, _ = jax.lax.scan(lambda seen, x: (seen.update(x), None), empty, batches)
    looped = empty
    for batch in batches:
        looped = looped.update(batch)
    merged = empty.update(batches[:2]).merge(empty.update(batches[2:]))
    for other in (scanned, merged):
        jax.tree.map(np.testing.assert_array_equal, looped, other)
    assert looped.tokens == 20
    jitted = jax.jit(lambda seen: seen.scale(percentile=90))(scanned)
    np.testing.assert_array_equal(
        jitted, calibrate_activation(batches, method="percentile", percentile=90)
    )


def test_a_single_scale_may_be_of_several_widths():
    batches = [np.ones((4, 8), np.float32), np.full((4, 16), 2, np.float32)]
    assert calibrate_activation(batches, granularity="tensor") == 2 * INVERSE


@pytest.mark.parametrize("spec", [P("rows", "k"), P(("rows", "k"), None), P()])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("method", ["absmax", "percentile"])
def test_batches_split_over_explicit_axes(rng, method, granularity, spec):
    batches = rng.standard_normal((3, 16, 8)).astype(np.float16)
    want = calibrate_activation(batches, method=method, granularity=granularity)
    mesh = jax.make_mesh((2, 4), ("rows", "k"), axis_types=(AxisType.Explicit,) * 2)
    split = [jax.device_put(b, NamedSharding(mesh, spec)) for b in batches]
    np.testing.assert_array_equal(
        calibrate_activation(split, method=method, granularity=granularity), want
    )


def test_a_scan_over_explicit_axes(rng):
    x = rng.standard_normal((3, 16, 8)).astype(np.float32)
    empty = ActivationRange.empty(8, percentiles=True)
    want = functools.reduce(lambda seen, one: seen.update(one), x, empty)
    mesh = jax.make_mesh((2, 4), ("rows", "k"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: jax.lax.scan(lambda s, one: (s.update(one), None), empty, x)[0])(
            jax.device_put(x, P(None, "rows", "k"))
        )
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_trees(rng):
    batches = [{"up": jnp.ones((2, 3)), "down": [jnp.full((2, 5), 2.0)]} for _ in range(2)]
    scales = calibrate_activation(iter(batches))
    np.testing.assert_array_equal(scales["up"], np.full(3, INVERSE))
    np.testing.assert_array_equal(scales["down"][0], np.full(5, 2 * INVERSE))


@pytest.mark.parametrize(
    ("batches", "options", "error", "text"),
    [
        ([], {}, ValueError, "batches must have one or more entries, got none"),
        ([np.ones((0, 2), np.float32)], {}, ValueError, "the batches have no token"),
        (
            [np.full((1, 2), np.nan, np.float32)],
            {},
            ValueError,
            "the batches must be finite, got NaN or infinity",
        ),
        (
            [np.ones((1, 2), np.float32)],
            {"method": "mse"},
            ValueError,
            "method must be one of ('absmax', 'percentile'), got 'mse'",
        ),
        (
            [np.ones((1, 2), np.float32)],
            {"granularity": "token"},
            ValueError,
            "granularity must be one of ('channel', 'tensor'), got 'token'",
        ),
        (
            [np.ones((1, 2), np.float32)],
            {"percentile": 0},
            ValueError,
            "percentile must be in (0, 100], got 0",
        ),
        (
            [np.ones((1, 2), np.float32)],
            {"method": "percentile", "percentile": "99"},
            TypeError,
            "percentile must be a number, got '99'",
        ),
        (
            {"a": np.ones((1, 2), np.float32)},
            {},
            TypeError,
            "batches must be a sequence of batches, got one dict",
        ),
        ([np.float32(1)], {}, ValueError, "a batch must have shape (..., K), got ()"),
        (
            [np.ones((4, 0), np.float32)],
            {},
            ValueError,
            "K must be positive, got a batch of shape (4, 0)",
        ),
    ],
)
def test_errors(batches, options, error, text):
    with pytest.raises(error) as caught:
        calibrate_activation(batches, **options)
    assert str(caught.value) == f"calibrate_activation: {text}"


def test_a_range_is_stored_compared_and_merged_with_its_like():
    one = ActivationRange.empty(4, percentiles=True)
    update = jax.jit(lambda seen, x: seen.update(x))
    x = np.ones((2, 4), np.float32)
    stored = export.export(update)(one, x).serialize()
    found = export.deserialize(stored).call(one, x)
    jax.tree.map(np.testing.assert_array_equal, found, update(one, x))
    assert one == one
    assert one != ActivationRange.empty(4, percentiles=True)
    assert len({one, found}) == 2
    for k, got in ((3, r"\(3,\)"), (None, r"\(\)")):
        with pytest.raises(ValueError, match=rf"ActivationRange.merge: .* shape \(4,\), got {got}"):
            one.merge(ActivationRange.empty(k, percentiles=True))


def test_without_promotion_of_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        calibrate_activation([jnp.ones((2, 4))], method="percentile")


def test_errors_of_batches():
    ones = np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 2\), got \(1, 3\)"):
        calibrate_activation([ones, np.ones((1, 3), np.float32)])
    with pytest.raises(ValueError, match=r"update: K must be positive, got shape \(1, 0\)"):
        calibrate_activation([ones, np.ones((1, 0), np.float32)], granularity="tensor")
    with pytest.raises(TypeError, match="x must be float16 or bfloat16 or float32, got int32"):
        calibrate_activation([np.ones((1, 2), np.int32)])
    with pytest.raises(ValueError, match="batches must have the structure"):
        calibrate_activation([{"a": ones}, {"b": ones}])
    with pytest.raises(ValueError, match="percentile below 100 needs histograms"):
        ActivationRange.empty(2).magnitude(99)
