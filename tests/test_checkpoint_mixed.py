"""Checkpoints of which a part is quantized, and what their configurations say in all versions."""

import json

import numpy as np
import pytest
from checkpoints import CONFIG, LINEAR, format_sample, named, write

import jax_awq
from jax_awq.checkpoint.config import read_model_config

F16 = np.float16


def weight(*modules):
    return {
        name: array
        for module in modules
        for name, array in named(format_sample("Gemm", "float16")[1], module).items()
    }


def dense(*modules):
    return {f"{module}.weight": np.ones((64, 256), F16) for module in modules}


def load(folder, tensors, values=None):
    config = {**CONFIG, "group_size": 64}
    write(folder, tensors, None)
    text = json.dumps({**(values or {}), "quantization_config": config})
    (folder / "config.json").write_text(text)
    return jax_awq.load_hf(folder)


def quantized(loaded):
    return {n for n, value in loaded.items() if isinstance(value, jax_awq.AWQWeight)}


def experts(*numbers, layer=0, parts=("gate_proj", "up_proj")):
    return [f"model.layers.{layer}.mlp.experts.{n}.{p}" for n in numbers for p in parts]


@pytest.mark.parametrize("listed", [None, [], ["lm_head"], ["up_proj", "gate"]])
def test_tensors_decide_what_is_quantized(tmp_path, listed):
    """`modules_to_not_convert` has three rules in as many tools, and is wrong in the wild."""
    up, gate, router = (f"model.layers.0.mlp.{m}" for m in ("up_proj", "gate_proj", "gate"))
    tensors = weight(up) | dense(gate, router, "lm_head")
    tensors |= {f"{up}.bias": np.ones(64, F16), f"{gate}.bias": np.ones(64, F16)}
    config = {**CONFIG, "group_size": 64, "modules_to_not_convert": listed}
    loaded = jax_awq.load_hf(write(tmp_path, tensors, config))
    assert quantized(loaded) == {up}
    assert loaded[f"{gate}.weight"].shape == (64, 256)
    assert set(loaded) == {
        up, f"{up}.bias", f"{gate}.weight", f"{gate}.bias", f"{router}.weight", "lm_head.weight"
    }  # fmt: skip


@pytest.mark.parametrize("head", ["tied", "float", "quantized"])
def test_output_head(tmp_path, head):
    tensors = weight(LINEAR) | {"model.embed_tokens.weight": np.ones((64, 256), F16)}
    tensors |= {"tied": {}, "float": dense("lm_head"), "quantized": weight("lm_head")}[head]
    loaded = load(tmp_path, tensors, {"tie_word_embeddings": head == "tied"})
    assert quantized(loaded) == {LINEAR} | ({"lm_head"} if head == "quantized" else set())
    assert ("lm_head.weight" in loaded) == (head == "float")


def test_experts(tmp_path):
    some, others = experts(0, 1), experts(0, 1, layer=1)
    router = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    loaded = load(tmp_path, weight(*some) | dense(*others, *router), {"num_experts": 2})
    assert quantized(loaded) == set(some)


@pytest.mark.parametrize(
    ("modules", "values", "text"),
    [
        (experts(0, 2), {}, r"experts.1 is missing in .*model.safetensors"),
        (experts(0, 1), {"num_experts": 4}, r"experts.2 is missing in .*, which has 2 of 4"),
        (experts(0, 1), {"num_local_experts": 3}, r"experts.2 is missing"),
        (experts(0, 1)[:-1], {}, r"layers.0.mlp.experts.1.up_proj is missing in"),
        (["model.layers.0.q", "model.layers.2.q"], {}, r"model.layers.1 is missing in"),
        (["model.layers.0.q"], {"num_hidden_layers": 2}, r"layers.1 is missing .* 1 of 2"),
        (
            ["model.language_model.layers.0.q"],
            {"text_config": {"num_hidden_layers": 2}},
            r"model.language_model.layers.1 is missing",
        ),
    ],
)
def test_missing_layer_or_expert(tmp_path, modules, values, text):
    with pytest.raises(ValueError, match=text):
        load(tmp_path, weight(*modules), values)


ENDS = ("model.embed_tokens", "model.norm", "lm_head")
WHOLE = (*(f"model.layers.{n}.{m}" for n in (0, 1) for m in ("q", "norm")), *ENDS)
QUANTIZED = weight("model.layers.0.up", "model.layers.1.up")


@pytest.mark.parametrize("left_out", WHOLE)
def test_missing_module(tmp_path, left_out):
    """Of an architecture whose layers are alike, with nothing but the names to tell."""
    values = {"model_type": "llama", "num_hidden_layers": 2}
    there = [name for name in WHOLE if name != left_out]
    with pytest.raises(ValueError, match=rf"load_hf: {left_out} is missing in .*model.safetensors"):
        load(tmp_path, QUANTIZED | dense(*there), values)


@pytest.mark.parametrize(
    ("left_out", "values"),
    [
        ("", {"model_type": "llama"}),
        ("lm_head", {"model_type": "llama", "tie_word_embeddings": True}),
        ("lm_head", {"model_type": "llama", "architectures": ["LlamaModel"]}),
        ("model.layers.1.q", {"model_type": "another"}),
        ("model.norm", {"model_type": "another"}),
    ],
)
def test_what_a_model_may_lack(tmp_path, left_out, values):
    there = [name for name in WHOLE if name != left_out]
    load(tmp_path, QUANTIZED | dense(*there), {"num_hidden_layers": 2, **values})


def test_layers_with_and_without_experts(tmp_path):
    modules = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate", *ENDS]
    values = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 2}
    load(tmp_path, weight(*experts(0, 1, layer=1)) | dense(*modules), values)


def test_more_layers_than_the_configuration_has(tmp_path):
    """DeepSeek V3 has one more, which predicts a second token."""
    modules = ["model.layers.0.q", "model.layers.1.q"]
    assert quantized(load(tmp_path, weight(*modules), {"num_hidden_layers": 1})) == set(modules)


# Files and names of all versions


def test_old_quantize_config(tmp_path):
    made, tensors, config = format_sample("Gptq", "act-order")
    write(tmp_path, named(tensors), None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    old = {k: v for k, v in config.items() if k not in ("quant_method", "checkpoint_format")}
    (tmp_path / "quantize_config.json").write_text(json.dumps({**old, "damp_percent": 0.01}))
    dense = jax_awq.load_hf(tmp_path)[LINEAR].dequantize()
    np.testing.assert_array_equal(np.asarray(dense), made.dense())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({**CONFIG, "backend": "autoawq", "do_fuse": False}, id="transformers 4"),
        pytest.param({**CONFIG, "format": "gemm", "backend": "auto"}, id="transformers 5"),
        pytest.param(
            {
                **CONFIG,
                "method": "awq",
                "format": "gemm",
                "checkpoint_format": "gemm",
                "desc_act": False,
                "lm_head": False,
                "pack_dtype": "int32",
                "meta": {"quantizer": ["gptqmodel:7.7.0"]},
            },
            id="GPTQModel 7",
        ),
    ],
)
def test_keys_of_awq_tools(tmp_path, config):
    tensors = weight(LINEAR)
    assert quantized(jax_awq.load_hf(write(tmp_path, tensors, {**config, "group_size": 64}))) == {
        LINEAR
    }


def test_names_of_one_value_must_agree(tmp_path):
    config = {**CONFIG, "group_size": 64, "format": "gemv"}
    with pytest.raises(ValueError, match=r"version and format must agree, got .*'gemv'"):
        jax_awq.load_hf(write(tmp_path, weight(LINEAR), config))


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (3, "config_groups must be dict, got 3"),
        ({"group_0": 3}, "group_0 must be dict, got 3"),
        ({"group_0": {"weights": []}}, r"weights must be dict, got \[\]"),
        ({"group_0": {"weights": {"num_bits": "4"}}}, "num_bits must be int, got '4'"),
        ({"group_0": {"weights": {"symmetric": 1}}}, "symmetric must be bool, got 1"),
    ],
)
def test_damaged_config_groups(tmp_path, groups, text):
    _, tensors, config = format_sample("PackQuantized", "float16")
    with pytest.raises(ValueError, match=text):
        jax_awq.load_hf(write(tmp_path, named(tensors), {**config, "config_groups": groups}))


def model_config(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return read_model_config(folder)


def test_model_config_of_both_versions(tmp_path):
    """Version 4 of transformers and version 5 of the same model."""
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    same = {"model_type": "llama", "hidden_size": 64}
    v5 = {
        **same,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **rope},
    }
    v4 = {
        **same,
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **rope},
    }
    oldest = {**v4, "rope_scaling": {"type": "llama3", **rope}}
    for values in (v4, v5, oldest, {**v4, **v5}):
        assert model_config(tmp_path, values) == v5


def test_model_config_defaults(tmp_path):
    assert read_model_config(tmp_path) == {}
    assert model_config(tmp_path, {"rope_theta": 1e4, "rope_scaling": None}) == {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
    }
    mixed = {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}}
    assert model_config(tmp_path, mixed) == {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}
    }
    nested = {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3", "dtype": "float16"}}
    assert model_config(tmp_path, nested)["model_type"] == "qwen3"
    by_layer = {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_theta": 1.0}
    assert model_config(tmp_path, by_layer)["rope_parameters"] == by_layer["rope_parameters"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype is 'float16', but the older"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 1000000.0"),
    ],
)
def test_model_config_contradicts_itself(tmp_path, values, text):
    with pytest.raises(ValueError, match=text):
        model_config(tmp_path, values)
