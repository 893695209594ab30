"""Models on a GPU, by the kernels: the golden files in 16 bits, cuDNN's attention, decoding."""

import functools
import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_awq
from jax_awq import models
from jax_awq.bench import decode
from jax_awq.models import decoder
from jax_awq.models.attention import make_cache

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = GOLDEN / "llama-awq-gemm-g128"
# Of golden/README.md: maximum and mean error of logits whose standard deviation is 3.1.
TOLERANCE = {"float32": (1e-3, 1e-5), "float16": (0.03, 1e-3), "bfloat16": (0.13, 8e-3)}


@functools.cache
def load(name=LLAMA.name, **options):
    return models.load(GOLDEN / name, **options)


@functools.cache
def expected():
    return dict(np.load(LLAMA / "expected_model.npz"))


@pytest.mark.parametrize("attention", ["cudnn", "xla"])
@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits(dtype, layers, attention):
    model = load(dtype=dtype, layers=layers, attention=attention)
    logits = np.asarray(model.logits(expected()["input_ids"]))[:, 5::6]
    error = np.abs(logits - expected()["logits_fp32"])
    assert error.max() < TOLERANCE[dtype][0]
    assert error.mean() < TOLERANCE[dtype][1]


def test_logits_in_float32():
    logits = np.asarray(load(dtype="float32").logits(expected()["input_ids"]))[:, 5::6]
    error = np.abs(logits - expected()["logits_fp32"])
    assert error.max() < TOLERANCE["float32"][0]
    assert error.mean() < TOLERANCE["float32"][1]


def test_kernels_and_cudnn_are_chosen():
    model = load(dtype="bfloat16")
    assert model.config.attention == "cudnn"
    assert load(dtype="float32").config.attention == "xla"
    weight = model.params["layers"][0]["attention"]["qkv_proj"].weight
    x = jax.ShapeDtypeStruct((1, 512), jnp.bfloat16)
    assert jax_awq.plan("awq_gemm", x, weight).route == "fused"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_greedy(dtype):
    want = expected()["greedy_ids"]
    np.testing.assert_array_equal(load(dtype=dtype).generate(want[:, :16], 24), want)


@pytest.mark.parametrize("window", [None, 7])
def test_cudnn_is_xla_in_a_window(window):
    name = "tiny-mistral" if window else "tiny-llama"
    ids = np.random.default_rng(0).integers(2, 128, (3, 50))
    exact = np.asarray(load(name, dtype="float32").logits(ids))
    error = {
        attention: np.abs(
            np.asarray(load(name, dtype="bfloat16", attention=attention).logits(ids)) - exact
        )
        for attention in ("cudnn", "xla")
    }
    # Two orders of rounding: neither may be much further from float32 than the other.
    assert 0 < error["cudnn"].max() < 2 * error["xla"].max()
    assert 0 < error["cudnn"].mean() < 1.5 * error["xla"].mean()


@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decoding_equals_the_full_forward(dtype, layers):
    model, ids = load(dtype=dtype, layers=layers), expected()["input_ids"][:, :20]
    want = np.asarray(model.logits(ids))
    cache = make_cache(model.config, 2, 64, stacked=layers == "stacked")
    for position in range(20):
        logits, cache = decoder.decode_step(
            model.params, ids[:, position], cache, config=model.config
        )
        assert np.abs(logits - want[:, position]).max() < TOLERANCE[dtype][0]


@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
def test_a_step_has_the_same_bits_each_time(layers):
    params = decode.random_params(
        decode.SMALL, packed=True, stacked=layers == "stacked", group_size=128
    )
    results = []
    for _ in range(2):
        cache = make_cache(decode.SMALL, 3, 16, stacked=layers == "stacked")
        for token in range(6):
            step = jnp.full(3, token, jnp.int32)
            logits, cache = decoder.decode_step(params, step, cache, config=decode.SMALL)
        results.append(np.asarray(logits).tobytes())
    assert results[0] == results[1]


def test_no_copy_of_weights_outlives_loading():
    def live():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = live()
    model = models.load(LLAMA, dtype="float16")
    model.generate(expected()["greedy_ids"][:, :16], 3)
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert params == pytest.approx((LLAMA / "model.safetensors").stat().st_size, rel=0.01)
    assert live() - before < 1.01 * params + 1e5
