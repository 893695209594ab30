"""Models against what transformers computes with the same checkpoints, in golden files."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_awq import models

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = GOLDEN / "llama-awq-gemm-g128"
TINY = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe"]
# Of golden/README.md: maximum and mean error of logits whose standard deviation is 3.1.
TOLERANCE = {"float32": (1e-3, 1e-5), "float16": (0.03, 1e-3), "bfloat16": (0.13, 8e-3)}


@functools.cache
def load(name, **options):
    return models.load(GOLDEN / name, **options)


@functools.cache
def expected(name):
    file = "expected_model.npz" if name == LLAMA.name else "expected.npz"
    return dict(np.load(GOLDEN / name / file))


def errors(model, want):
    logits = np.asarray(model.logits(want["input_ids"]))[:, 5::6]
    assert logits.dtype == np.float32
    error = np.abs(logits - want["logits_fp32"])
    return error.max(), error.mean()


@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits(dtype, layers):
    found = errors(load(LLAMA.name, dtype=dtype, layers=layers), expected(LLAMA.name))
    assert found[0] < TOLERANCE[dtype][0]
    assert found[1] < TOLERANCE[dtype][1]


@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
def test_greedy(layers):
    want = expected(LLAMA.name)["greedy_ids"]
    model = load(LLAMA.name, dtype="float32", layers=layers)
    np.testing.assert_array_equal(model.generate(want[:, :16], 24), want)


def test_promotion_of_ranks_may_be_an_error():
    want = expected(LLAMA.name)["greedy_ids"]
    with jax.numpy_rank_promotion("raise"):
        found = load(LLAMA.name, dtype="float32").generate(want[:, :16], 4)
    np.testing.assert_array_equal(found, want[:, :20])


def test_perplexity():
    want = expected(LLAMA.name)
    ids = want["valid_ids"]
    logits = load(LLAMA.name, dtype="float32").logits(ids)
    chances = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(chances, ids[:, 1:, None], axis=-1).mean()
    assert f"{np.exp(loss):.4g}" == f"{want['ppl_quantized']:.4g}" == "82.43"
    assert np.exp(loss) == pytest.approx(want["ppl_quantized"], rel=1e-5)


def test_a_zero_point_of_8_exceeds_the_tolerance(tmp_path):
    """The mistake that predictions hardly show."""
    shutil.copytree(LLAMA, tmp_path, dirs_exist_ok=True)
    tensors = load_file(LLAMA / "model.safetensors")
    for name in tensors:
        if name.endswith("v_proj.qzeros"):
            tensors[name] = np.full_like(tensors[name], -0x77777778)
    save_file(tensors, tmp_path / "model.safetensors")
    found = errors(models.load(tmp_path, dtype="float32"), expected(LLAMA.name))
    assert found[0] > 3 * TOLERANCE["float32"][0]


@pytest.mark.parametrize("name", TINY)
def test_tiny_logits(name):
    want = expected(name)
    model = load(name, dtype="float32")
    np.testing.assert_allclose(model.logits(want["input_ids"]), want["logits"], rtol=0, atol=5e-5)
    mask = want["attention_mask"]
    padded = np.asarray(model.logits(want["input_ids"], mask))
    whole = np.concatenate([want["logits"][0], want["padded_logits"]])
    np.testing.assert_allclose(padded[mask == 1], whole, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", TINY)
def test_tiny_greedy(name):
    want = expected(name)
    generate = functools.partial(load(name, dtype="float32").generate, eos_token_id=())
    ids, mask = want["input_ids"], want["attention_mask"]
    np.testing.assert_array_equal(generate(ids, 12), want["greedy_ids"])
    padded = generate(ids, 12, attention_mask=mask)
    np.testing.assert_array_equal(padded, want["padded_greedy_ids"])


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral", "tiny-qwen2"])
def test_tiny_stacked(name):
    want = expected(name)
    model = load(name, dtype="float32", layers="stacked")
    np.testing.assert_allclose(model.logits(want["input_ids"]), want["logits"], rtol=0, atol=5e-5)
    np.testing.assert_array_equal(
        model.generate(want["input_ids"], 12, eos_token_id=()), want["greedy_ids"]
    )


def test_stacked_experts(tmp_path):
    """Experts in every layer, so that layers can be stacked."""
    name = "tiny-qwen3-moe"
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"mlp_only_layers": [], "num_hidden_layers": 2})
    )
    tensors = load_file(tmp_path / "model.safetensors")
    moved = {
        key.replace("layers.1.", "layers.0.").replace("layers.2.", "layers.1."): value
        for key, value in tensors.items()
        if "layers.0." not in key
    }
    save_file(moved, tmp_path / "model.safetensors")
    ids = expected(name)["input_ids"]
    stacked, unrolled = (
        models.load(tmp_path, dtype="float32", layers=layers) for layers in ("stacked", "unrolled")
    )
    np.testing.assert_allclose(stacked.logits(ids), unrolled.logits(ids), rtol=0, atol=5e-5)
    np.testing.assert_array_equal(stacked.generate(ids, 6), unrolled.generate(ids, 6))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiny-llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("tiny-llama", {"rms_norm_eps": 1e-3}),
        ("tiny-mistral", {"sliding_window": 8}),
        ("tiny-qwen3", {"max_window_layers": 0}),
        ("tiny-qwen3-moe", {"norm_topk_prob": False}),
        ("tiny-qwen3-moe", {"num_experts_per_tok": 1}),
    ],
)
def test_every_feature_counts(tmp_path, name, change):
    """A configuration that is read wrong shows in the logits."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert change.keys() <= config.keys()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    want = expected(name)
    found = models.load(tmp_path, dtype="float32").logits(want["input_ids"])
    assert np.abs(found - want["logits"]).max() > 1e-3
