"""Blocks whose scales are searched on what attention and MLP give."""

import dataclasses
import json
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_awq
from jax_awq import models
from jax_awq.models import decoder
from jax_awq.models.layers import rms_norm
from jax_awq.models.params import assemble
from jax_awq.quantize import decoder_blocks, quantize

GOLDEN = Path(__file__).parents[1] / "golden"
GROUP = 32


def dense(name):
    """(float tensors of a checkpoint, model, configuration)."""
    params = {}
    for key, value in jax_awq.load_hf(GOLDEN / name).items():
        if isinstance(value, jax_awq.AWQWeight):
            params[f"{key}.weight"] = np.asarray(value.dequantize(jnp.float32).T)
        else:
            params[key] = np.asarray(value, np.float32)
    model = models.load(GOLDEN / name, dtype="float32")
    return params, model, models.read_decoder_config(GOLDEN / name)


def weights_of(params, block):
    return jnp.concatenate([params[f"{path}.weight"] for path in block.linears]).T


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"])
def test_outputs_are_those_of_the_model(name, rng):
    """A layer is its input, attention of that normalized, and the MLP of the sum normalized."""
    params, model, config = dense(name)
    blocks = models.quantization_blocks(params, config)
    assert blocks == decoder_blocks(params)
    x = jnp.asarray(rng.standard_normal((2, 40, config.hidden_size)), jnp.float32)
    for index, layer in enumerate(model.params["layers"]):
        qkv, o, gate_up, down = blocks[4 * index : 4 * index + 4]
        assert o.output is None
        assert down.output is None
        span = decoder.make_span(x, 0, None, model.config)
        want, _ = decoder.block(layer, x, span, None, config.window(index), model.config)
        h = rms_norm(x, layer["input_norm"], config.norm_eps)
        y = x + qkv.output(weights_of(params, qkv), h)
        h = rms_norm(y, layer["post_norm"], config.norm_eps)
        y = y + gate_up.output(weights_of(params, gate_up), h)
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-4)
        assert not np.allclose(x, want, rtol=0, atol=0.1)


def batches(block, hidden=64):
    rng = np.random.default_rng(len(block.linears[0]))
    size = 96 if block.linears[0].endswith("down_proj") else hidden
    scale = np.geomspace(1, 10, size)
    return [(rng.standard_normal((2, 9, size)) * scale).astype(np.float32) for _ in range(3)]


def test_quantize(tmp_path):
    params, _, config = dense("tiny-qwen2")
    blocks = models.quantization_blocks(params, config)
    asked = []

    def inputs(block):
        asked.append(block.linears[0])
        return iter(batches(block))

    options = {"group_size": GROUP, "folder": tmp_path}
    result = quantize(params, inputs, blocks, **options)
    assert asked == [block.linears[0] for block in blocks]  # once, though the search reads twice
    plain = quantize(params, batches, decoder_blocks(params), group_size=GROUP)
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in range(config.num_layers)]
    assert any(not np.allclose(result[name], plain[name]) for name in norms)

    again = quantize(params, lambda block: [], blocks, **options)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="is of another run"):
        quantize(params, batches, decoder_blocks(params), **options)


def test_layers_share_a_program():
    params, _, config = dense("tiny-qwen2")
    blocks = models.quantization_blocks(params, config)
    functions = [
        [b.output.func for b in blocks if b.linears[0].endswith(p)] for p in ("q_proj", "gate_proj")
    ]
    assert [len(set(some)) for some in functions] == [1, 1]
    assert [len(some) for some in functions] == [config.num_layers] * 2


def test_errors():
    params, _, config = dense("tiny-qwen2")
    name = "model.layers.1.self_attn.k_proj.bias"
    fewer = {key: value for key, value in params.items() if key != name}
    with pytest.raises(ValueError, match=f"quantization_blocks: there is no tensor {name}"):
        models.quantization_blocks(fewer, config)
    blocks = models.quantization_blocks(params, config)
    flat = [np.ones((18, 64), np.float32)]
    with pytest.raises(ValueError, match=r"must be \(B, T, H\), got shape \(18, 64\)"):
        quantize(params, lambda block: flat, blocks, group_size=GROUP)
    moe = models.read_decoder_config(GOLDEN / "tiny-qwen3-moe")
    with pytest.raises(
        ValueError, match=r"config must be of a dense model, got 'qwen3_moe' with 8"
    ):
        models.quantization_blocks(params, dataclasses.replace(moe))


# Whole models


def write_dense(folder, name):
    """A golden checkpoint as the float one that it may have been made of."""
    params, model, config = dense(name)
    values = json.loads((GOLDEN / name / "config.json").read_text())
    del values["quantization_config"]
    checkpoints.write(folder, params, config=None)
    (folder / "config.json").write_text(json.dumps(values))
    return params, model, config


@pytest.mark.parametrize(
    ("name", "layers"),
    [("tiny-llama", "stacked"), ("tiny-qwen2", "unrolled"), ("tiny-qwen3", "unrolled")],
)
def test_model(tmp_path, name, layers, rng):
    params, packed, config = write_dense(tmp_path, name)
    model = models.load(tmp_path, dtype="float32", layers=layers)
    ids = rng.integers(0, config.vocab_size, (4, 24))
    np.testing.assert_allclose(model.logits(ids), packed.logits(ids), rtol=0, atol=1e-4)

    tensors, inputs, blocks = model.quantization(ids)
    assert tensors.keys() == params.keys()
    for key, value in params.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)
    last = blocks[-1]
    assert last.linears == (f"model.layers.{config.num_layers - 1}.mlp.down_proj",)
    (batch,) = inputs(last)
    assert batch.shape == (4, 24, config.intermediate_size)
    with pytest.raises(ValueError, match="comes after blocks of a later layer"):
        inputs(blocks[0])

    found = jax_awq.quantize(model, [ids[:2], ids[2:]], group_size=GROUP)
    assert set(found) == set(jax_awq.load_hf(GOLDEN / name))
    whole = jax_awq.quantize(model, ids, group_size=GROUP, folder=tmp_path / "state")
    for path in (tmp_path / "state").glob("0000[4-7]*"):
        path.unlink()
    again = jax_awq.quantize(model, ids, group_size=GROUP, folder=tmp_path / "state")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_recorded_inputs_are_those_of_the_model(rng):
    """What the last linear gets, by its own weight, is what the last layer adds."""
    _, model, config = dense("tiny-mistral")
    params, _, _ = dense("tiny-mistral")
    float_model = models.Model(assemble(dict(as_jax(params)), config), model.config)
    ids = rng.integers(0, config.vocab_size, (2, 30))
    tensors, inputs, blocks = float_model.quantization(ids)
    h = float_model.params["embed"][ids]
    for layer in range(config.num_layers):
        qkv, o, gate_up, down = blocks[4 * layer : 4 * layer + 4]
        (x,) = inputs(qkv)
        norm = float_model.params["layers"][layer]["input_norm"]
        np.testing.assert_allclose(x, rms_norm(h, norm, config.norm_eps), rtol=0, atol=1e-4)
        for block in (o, down):
            (x,) = inputs(block)
            h = h + x @ tensors[f"{block.linears[0]}.weight"].T
        assert inputs(gate_up)[0].shape == (2, 30, config.hidden_size)


def as_jax(params):
    return {name: jnp.asarray(value) for name, value in params.items()}


def test_errors_of_models(tmp_path):
    packed = models.load(GOLDEN / "tiny-llama")
    with pytest.raises(ValueError, match=r"must be float, model\.layers\.0\..*_proj is packed"):
        jax_awq.quantize(packed, [[[1, 2]]])
    moe = models.load(GOLDEN / "tiny-qwen3-moe")
    with pytest.raises(ValueError, match="quantize: model must be dense, got one of 'qwen3_moe'"):
        jax_awq.quantize(moe, [[[1, 2]]])
    write_dense(tmp_path, "tiny-llama")
    model = models.load(tmp_path, dtype="float32")
    with pytest.raises(ValueError, match=r"quantize: calibration of a model must be integers \(B"):
        jax_awq.quantize(model, [1, 2])
    with pytest.raises(ValueError, match="has no quantization_config"):
        jax_awq.load_hf(tmp_path)
