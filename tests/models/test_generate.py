"""Generation: the cache, batches and padding, sampling, where it ends, and what is refused."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_awq
from jax_awq import models
from jax_awq.models import decoder, sampling
from jax_awq.models.attention import make_cache

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-qwen3-moe"]


@functools.cache
def load(name="tiny-llama", **options):
    return models.load(GOLDEN / name, dtype="float32", **options)


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(2, 128, (batch, length)).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, "unrolled") for name in NAMES),
        ("tiny-llama", "stacked"),
        ("tiny-mistral", "stacked"),
    ],
)
def test_decoding_equals_the_full_forward(name, layers):
    model, ids, prompt = load(name, layers=layers), tokens(3, 17), 5
    want = np.asarray(model.logits(ids))
    cache = make_cache(model.config, 3, 20, stacked=layers == "stacked")
    filled = np.pad(ids[:, :prompt], ((0, 0), (0, 3)), constant_values=99)
    logits, cache = decoder.prefill(
        model.params, filled, np.int32(prompt), cache, config=model.config
    )
    np.testing.assert_allclose(logits, want[:, prompt - 1], rtol=0, atol=5e-5)
    for position in range(prompt, 17):
        logits, cache = decoder.decode_step(
            model.params, ids[:, position], cache, config=model.config
        )
        np.testing.assert_allclose(logits, want[:, position], rtol=0, atol=5e-5)
    assert int(cache.length) == 17


def test_the_cache_is_updated_in_place():
    model = load()
    cache = make_cache(model.config, 2, 16, stacked=False)
    places = [array.unsafe_buffer_pointer() for array in cache.k]
    _, new = decoder.decode_step(model.params, tokens(2, 1)[:, 0], cache, config=model.config)
    assert all(array.is_deleted() for array in cache.k)
    assert [array.unsafe_buffer_pointer() for array in new.k] == places


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_programs(dtype):
    """Four products of ours a layer where there are kernels, and nothing decided while running."""
    model = models.load(GOLDEN / "llama-awq-gemm-g128", dtype=dtype)
    cache = make_cache(model.config, 1, 64, stacked=False)
    operands = model.params, jnp.zeros(1, jnp.int32), cache
    traced = decoder.decode_step.trace(*operands, config=model.config)
    assert " conditional(" not in traced.lower().compile().as_text()
    x = jax.ShapeDtypeStruct((1, 512), dtype)
    weight = model.params["layers"][0]["attention"]["o_proj"].weight
    if jax_awq.plan("awq_gemm", x, weight, device="sm_90").route == "fused":
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        # Calls of a function for each of the four shapes, or inlined in three layers.
        assert text.count("@jax_awq.awq_gemm(") in (4, 4 * 3)


def test_weights_stay_packed():
    model = load()
    leaves = jax.tree.leaves(
        model.params["layers"], is_leaf=lambda leaf: isinstance(leaf, jax_awq.AWQWeight)
    )
    packed = [leaf for leaf in leaves if isinstance(leaf, jax_awq.AWQWeight)]
    fused = {"qkv": 128, "o": 64, "gate_up": 192, "down": 64}
    assert sorted(w.shape[1] for w in packed) == sorted([*fused.values()] * 2)
    assert all(leaf.ndim == 1 for leaf in leaves if not isinstance(leaf, jax_awq.AWQWeight))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_padded_batch_are_those_alone(name):
    model = load(name)
    short, long = tokens(1, 4, seed=1), tokens(1, 11, seed=2)
    ids = np.concatenate([np.pad(short, ((0, 0), (7, 0)), constant_values=5), long])
    mask = np.array([[0] * 7 + [1] * 4, [1] * 11])
    together = model.generate(ids, 8, attention_mask=mask, eos_token_id=())
    np.testing.assert_array_equal(together[0, 7:], model.generate(short, 8, eos_token_id=())[0])
    np.testing.assert_array_equal(together[1], model.generate(long, 8, eos_token_id=())[0])
    padded = np.asarray(model.logits(ids, mask))
    np.testing.assert_allclose(padded[:1, 7:], model.logits(short), rtol=0, atol=5e-5)
    on_the_right = np.pad(short, ((0, 0), (0, 3)), constant_values=5)
    np.testing.assert_allclose(
        model.logits(on_the_right)[:, :4], model.logits(short), rtol=0, atol=5e-5
    )


def test_longer_than_a_bucket():
    model, ids = load(), tokens(1, 61)
    new = model.generate(ids, 9, eos_token_id=())
    want = np.asarray(jnp.argmax(model.logits(new[:, :-1])[:, 60:], axis=-1))
    np.testing.assert_array_equal(new[:, 61:], want)


def test_a_row_that_ended_repeats_its_end():
    model, ids = load(), tokens(2, 6)
    free = model.generate(ids, 10, eos_token_id=())
    first, second = free[:, 6:]
    end = int(first[3])
    assert end not in first[:3]
    stop = 10 if end not in second else int(np.argmax(second == end))
    found = model.generate(ids, 10, eos_token_id=[end, 1000])
    assert found.shape[1] == min(6 + 10, 6 + max(3, stop) + 1)
    np.testing.assert_array_equal(found[0, 6:10], first[:4])
    assert (found[0, 9:] == end).all()
    length = min(stop + 1, 10)
    np.testing.assert_array_equal(found[1, 6 : 6 + length], second[:length])
    assert model.generate(ids[:1], 10, eos_token_id=end).shape == (1, 10)


def test_end_of_the_checkpoint():
    model = load()
    assert model.config.eos_token_ids == (1,)
    llama = models.load(GOLDEN / "llama-awq-gemm-g128")
    assert llama.config.eos_token_ids == (1,)
    assert llama.config.dtype == "float16"


def test_stream_is_generate():
    model, ids = load(), tokens(2, 6)
    new = np.stack(list(model.stream(ids, 5, eos_token_id=())), axis=1)
    np.testing.assert_array_equal(
        np.concatenate([ids, new], axis=1), model.generate(ids, 5, eos_token_id=())
    )
    np.testing.assert_array_equal(model.generate(ids, 0), ids)


@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
def test_with_64_bits(layers):
    model, ids = load(layers=layers), tokens(2, 6)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = [{}, {"attention_mask": mask}, {"temperature": 1.5, "top_p": 0.9}]
    want = [model.generate(ids, 4, eos_token_id=(), **o) for o in options]
    with jax.enable_x64(True):
        found = [model.generate(ids, 4, eos_token_id=(), **o) for o in options]
    for a, b in zip(found[:2], want[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert found[2].shape == want[2].shape  # random numbers of 64 bits are others


def test_seed_decides():
    model, ids = load(), tokens(4, 6)
    draw = functools.partial(model.generate, ids, 8, temperature=1.5, top_p=0.95, eos_token_id=())
    np.testing.assert_array_equal(draw(seed=3), draw(seed=3))
    assert (draw(seed=3) != draw(seed=4)).any()
    greedy = model.generate(ids, 8, eos_token_id=())
    np.testing.assert_array_equal(
        model.generate(ids, 8, temperature=1.0, top_p=0.0, eos_token_id=()), greedy
    )
    np.testing.assert_array_equal(model.generate(ids, 8, temperature=1e-4, eos_token_id=()), greedy)


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-40])
def test_the_least_temperatures_are_greedy(temperature):
    model, ids = load(), tokens(4, 6)
    np.testing.assert_array_equal(
        model.generate(ids, 8, temperature=temperature, eos_token_id=()),
        model.generate(ids, 8, eos_token_id=()),
    )


def test_no_part_of_the_probability_is_the_most_likely_token_at_any_temperature():
    model, ids = load(), tokens(4, 6)
    np.testing.assert_array_equal(
        model.generate(ids, 8, temperature=float("inf"), top_p=0.0, eos_token_id=()),
        model.generate(ids, 8, eos_token_id=()),
    )


def test_all_bits_of_a_seed_count():
    model, ids = load(), tokens(4, 6)
    draw = functools.partial(model.generate, ids, 8, temperature=1.5, eos_token_id=())
    found = [draw(seed=seed).tobytes() for seed in (1, 1 + 2**32, -1, 2**32 - 1)]
    assert len(set(found)) == 4
    assert draw(seed=np.int32(1)).tobytes() == found[0]


def test_samples_have_the_frequencies_of_a_nucleus():
    chances = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
    draws, temperature = 4000, 0.5
    logits = jnp.tile(jnp.log(chances) * temperature, (draws, 1))
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.7, [1, 2, 3]), (0.64, [1, 2]), (0.1, [1])):
        drawn = sampling.sample(logits, jax.random.key(0), 0, temperature, top_p, nucleus=top_p < 1)
        found = np.bincount(np.asarray(drawn), minlength=5) / draws
        want = np.where(np.isin(range(5), kept), chances, 0)
        np.testing.assert_allclose(found, want / want.sum(), atol=0.03)
        assert (found[want == 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.zeros(4, int)}, r"input_ids must be integers \(B, T\) .* int64 \(4,\)"),
        ({"input_ids": np.zeros((1, 0), int)}, r"of at least one token, got int64 \(1, 0\)"),
        ({"input_ids": np.zeros((1, 2))}, r"input_ids must be integers .* float64"),
        ({"input_ids": [[128]]}, "input_ids must be from 0 to 127, got 128 to 128"),
        ({"input_ids": [[-1]]}, "input_ids must be from 0 to 127, got -1"),
        ({"max_new_tokens": 127}, "2 tokens and 127 new ones exceed max_position_embeddings, 128"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ({"temperature": -0.5}, "temperature must be 0 or more, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"input_ids": [[3_000_000_000]]}, "input_ids must be from 0 to 127, got 3000000000"),
        ({"input_ids": [[2**70]]}, "input_ids must be integers .* object"),
        ({"seed": 2**70}, f"seed must be an integer of 64 bits, got {2**70}"),
        ({"eos_token_id": 2**31}, r"eos_token_id must be integers of 32 bits, got \[2147483648\]"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ({"attention_mask": [[1, 0]]}, "attention_mask must be 0 on the left and 1 to the end"),
        ({"attention_mask": [[0, 0]]}, "attention_mask must be 0 on the left and 1 to the end"),
        ({"attention_mask": [[1]]}, r"attention_mask must be 0 and 1 of shape \(1, 2\)"),
        ({"attention_mask": [[2, 1]]}, "attention_mask must be 0 and 1, got 1 to 2"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids must have rows of equal length"),
    ],
)
def test_what_generate_refuses(change, message):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        load().generate(**{"input_ids": [[3, 4]], "max_new_tokens": 2, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": "3"}, "max_new_tokens must be an integer, got '3'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ({"temperature": "a"}, "temperature must be a number, got 'a'"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"eos_token_id": 15.5}, "eos_token_id must be integers, got 15.5"),
        ({"eos_token_id": True}, "eos_token_id must be integers, got True"),
    ],
)
def test_what_is_no_number(change, message):
    with pytest.raises(TypeError, match=f"generate: {message}"):
        load().generate(**{"input_ids": [[3, 4]], "max_new_tokens": 2, **change})
