"""config.json: both spellings, every feature that is not supported, and rotary frequencies."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_awq import models
from jax_awq.models.config import read_decoder_config
from jax_awq.models.rope import Rope

GOLDEN = Path(__file__).parents[1] / "golden"


def changed(tmp_path, change, name="tiny-llama"):
    """The folder of a golden model, with entries of config.json changed, or removed by `...`."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}},
        {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": LLAMA3},
        {
            "rope_parameters": ...,
            "rope_theta": 500,
            "rope_scaling": {**LLAMA3, "type": "llama3"},
            "dtype": ...,
            "torch_dtype": "float16",
        },
        {"dtype": "torch.float16"},
    ],
)
def test_spellings(tmp_path, spelling):
    found = read_decoder_config(changed(tmp_path, spelling))
    assert found == read_decoder_config(GOLDEN / "tiny-llama")
    assert found.rope == Rope(500.0, "llama3", 8.0, 1.0, 4.0, 16.0)


def test_llama3_frequencies():
    """Of Llama 3.1's settings, by the definition's three cases in float64."""
    rope = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192.0)
    want = []
    for i in range(64):
        frequency = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * np.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 8
        elif wavelength > 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        want.append(frequency)
    np.testing.assert_allclose(rope.frequencies(128), want, rtol=3e-6)


def test_other_frequencies():
    plain = 100.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(Rope(100.0).frequencies(8), plain, rtol=1e-6)
    np.testing.assert_allclose(Rope(100.0, "linear", 4.0).frequencies(8), plain / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "windows"),
    [
        ("tiny-mistral", {}, (7, 7)),
        ("tiny-mistral", {"sliding_window": None}, (None, None)),
        ("tiny-mistral", {"sliding_window": ...}, (4096, 4096)),
        ("tiny-qwen2", {}, (None, None)),
        ("tiny-qwen2", {"sliding_window": 5}, (None, None)),
        ("tiny-qwen3", {}, (None, 5)),
        (
            "tiny-qwen3",
            {"layer_types": ["sliding_attention", "full_attention"]},
            (5, None),
        ),
        ("tiny-qwen3-moe", {"use_sliding_window": True, "sliding_window": 9}, (9, 9, 9)),
        ("tiny-llama", {}, (None, None)),
    ],
)
def test_windows(tmp_path, name, change, windows):
    assert read_decoder_config(changed(tmp_path, change, name)).windows == windows


def test_defaults(tmp_path):
    change = {"num_key_value_heads": ..., "head_dim": ..., "dtype": ..., "eos_token_id": [1, 5]}
    found = read_decoder_config(changed(tmp_path, change))
    assert (found.num_kv_heads, found.head_dim, found.dtype) == (4, 16, "float16")
    assert found.eos_token_ids == (1, 5)
    assert read_decoder_config(changed(tmp_path, {"head_dim": ...}, "tiny-qwen3")).head_dim == 128


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tiny-llama", {"model_type": "gemma2"}, "model_type must be one of .*'llama'.* 'gemma2'"),
        ("tiny-llama", {"model_type": ...}, "config.json has no model_type"),
        ("tiny-llama", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ("tiny-llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ("tiny-llama", {"sliding_window": 64}, "sliding_window must be None, got 64"),
        ("tiny-llama", {"num_key_value_heads": 3}, "num_key_value_heads must divide .* 4, got 3"),
        ("tiny-llama", {"hidden_size": "64"}, "hidden_size must be int, got '64'"),
        ("tiny-llama", {"vocab_size": None}, "config.json has no vocab_size"),
        ("tiny-llama", {"rms_norm_eps": ...}, "config.json has no rms_norm_eps"),
        ("tiny-llama", {"head_dim": 15}, "head_dim must be even, got 15"),
        ("tiny-llama", {"dtype": "float8"}, "dtype must be one of .*, got 'float8'"),
        ("tiny-llama", {"eos_token_id": "x"}, "eos_token_id must be one or more tokens, got 'x'"),
        (
            "tiny-llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_type must be one of .*, got \['yarn'\]",
        ),
        (
            "tiny-llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            "rope_parameters of type 'llama3' has no low_freq_factor",
        ),
        (
            "tiny-llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "beta": 1.0}},
            "type 'linear' has beta, which is not supported",
        ),
        (
            "tiny-llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters must be one flat object",
        ),
        (
            "tiny-llama",
            {"rope_parameters": {"rope_type": "linear", "factor": "4"}},
            "factor must be a number, got '4'",
        ),
        ("tiny-qwen2", {"attention_bias": True}, "attention_bias must be False .* 'qwen2'"),
        ("tiny-qwen3", {"layer_types": ["full_attention"]}, "layer_types must .* each of 2"),
        ("tiny-qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types must name"),
        ("tiny-qwen3", {"sliding_window": 0}, "sliding_window must be 1 or more, got 0"),
        (
            "tiny-qwen3",
            {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
            "layer_types has sliding_attention without a sliding_window",
        ),
        ("tiny-qwen3-moe", {"num_experts_per_tok": 9}, "num_experts_per_tok must be 1 to 8, got 9"),
        ("tiny-qwen3-moe", {"moe_intermediate_size": ...}, "has no moe_intermediate_size"),
        ("tiny-qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be 1 or more"),
        *(
            ("tiny-llama", {"rms_norm_eps": eps}, f"rms_norm_eps must be positive.*, got {eps}")
            for eps in (0, -1e-6, float("nan"), float("inf"))
        ),
        ("tiny-llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be float, got 10"),
        ("tiny-llama", {"max_position_embeddings": 0}, "max_position_embeddings must be 1 or more"),
        ("tiny-llama", {"num_attention_heads": 0}, "num_attention_heads must be 1 .*, got 0"),
        ("tiny-llama", {"num_key_value_heads": -2}, "num_key_value_heads must divide .*, got -2"),
        ("tiny-llama", {"num_hidden_layers": 0}, "num_hidden_layers must be from 1 to 10000"),
        ("tiny-llama", {"num_hidden_layers": 10**12}, "num_hidden_layers must be from 1 to 10000"),
        ("tiny-llama", {"head_dim": 0}, "head_dim must be 1 or more, got 0"),
        ("tiny-qwen3", {"layer_types": [["a"], {}]}, r"layer_types must name .* \[\['a'\], {}\]"),
        *(
            (
                "tiny-llama",
                {"rope_parameters": {"rope_theta": 500.0, **LLAMA3, key: value}},
                f"{key} must be positive and finite in float32, got {value}",
            )
            for key in ("rope_theta", *list(LLAMA3)[1:])
            for value in (0, -1.0, float("nan"))
        ),
        (
            "tiny-llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 10**400}},
            "factor must be positive and finite in float32, got 10",
        ),
        (
            "tiny-llama",
            {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
            "high_freq_factor must be above low_freq_factor 4.0, got 4.0",
        ),
        (
            "tiny-llama",
            {"rope_parameters": ..., "rope_scaling": {"rope_type": ["linear"], "factor": 2}},
            r"rope_type must be one of .*, got \[\['linear'\]\]",
        ),
        (
            "tiny-llama",
            {"rope_parameters": {"rope_type": 1, "type": "x"}},
            r"rope_type must be one of .*, got \[1, 'x'\]",
        ),
    ],
)
def test_what_is_refused(tmp_path, name, change, message):
    folder = changed(tmp_path, change, name)
    with pytest.raises(ValueError, match=f"load: .*{message}"):
        models.load(folder)


def test_options_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="layers must be 'unrolled' or 'stacked', got 'scan'"):
        models.load(GOLDEN / "tiny-llama", layers="scan")
    with pytest.raises(ValueError, match="attention must be 'xla', 'cudnn' or None, got 'foo'"):
        models.load(GOLDEN / "tiny-llama", attention="foo")
    with pytest.raises(ValueError, match="load: attention 'cudnn' needs a CUDA device"):
        models.load(GOLDEN / "tiny-llama", attention="cudnn", device=jax.devices("cpu")[0])
    with pytest.raises(ValueError, match=r"layers='stacked' needs equal layers.*\(None, 5\)"):
        models.load(GOLDEN / "tiny-qwen3", layers="stacked")
    with pytest.raises(TypeError, match="dtype must be float16, bfloat16 or float32, got float64"):
        models.load(GOLDEN / "tiny-llama", dtype="float64")
    with pytest.raises(
        TypeError, match="load: dtype must be a dtype or the name of one, got 'fp16'"
    ):
        models.load(GOLDEN / "tiny-llama", dtype="fp16")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        models.load(tmp_path)
    for text in ("{", "[" * 200_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not JSON"):
            models.load(tmp_path)
