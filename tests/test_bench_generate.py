"""The generate benchmark: its checkpoint, what it counts, and its rows. Nothing is timed here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_awq
from jax_awq import models
from jax_awq.bench import decode, generate, synthetic
from jax_awq.bench.__main__ import main
from jax_awq.models.config import read_decoder_config

SMALL = decode.SMALL


@pytest.fixture
def folder(tmp_path):
    params = synthetic.checkpoint(SMALL, group_size=64)
    jax_awq.save_hf(tmp_path / "model", params, synthetic.config_json(SMALL))
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_checkpoint(tmp_path, dtype):
    config = dataclasses.replace(SMALL, dtype=dtype)
    params = synthetic.checkpoint(config, group_size=64)
    jax_awq.save_hf(tmp_path, params, synthetic.config_json(config))
    assert read_decoder_config(tmp_path) == dataclasses.replace(config, windows=(None, None))
    model = models.load(tmp_path)
    logits = np.asarray(model.logits([[3, 7, 400]]))
    assert np.isfinite(logits).all()
    assert 0.05 < logits.std() < 50
    q = params["model.layers.1.self_attn.q_proj"]
    assert q.dtype == dtype
    assert np.unique(jax_awq.unpack_int4(q.qweight)).size == 16
    assert abs(float(params["lm_head.weight"].astype(np.float32).mean())) < 1e-3


def test_real_names_and_shapes():
    """Those that Llama 3 8B has, from one layer of it with a small vocabulary."""
    config = dataclasses.replace(decode.LLAMA_3_8B, vocab_size=8, num_layers=1)
    params = synthetic.checkpoint(config, group_size=128)
    prefix = "model.layers.0"
    shapes = {name.removeprefix(f"{prefix}."): value.shape for name, value in params.items()}
    assert shapes == {
        "model.embed_tokens.weight": (8, 4096),
        "model.norm.weight": (4096,),
        "lm_head.weight": (8, 4096),
        "input_layernorm.weight": (4096,),
        "post_attention_layernorm.weight": (4096,),
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (4096, 1024),
        "self_attn.v_proj": (4096, 1024),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (4096, 14336),
        "mlp.up_proj": (4096, 14336),
        "mlp.down_proj": (14336, 4096),
    }


def test_a_float_copy_is_found(folder, monkeypatch):
    none = {"bytes_in_use": None, "peak_bytes_in_use": None}  # the arrays alone must tell
    monkeypatch.setattr(generate.Memory, "stats", lambda _: none)
    memory = generate.Memory()
    model = models.load(folder)
    assert memory.now(model)["no_float_copy"]
    weight = model.params["layers"][0]["attention"]["o_proj"].weight
    copy = weight.dequantize(jnp.bfloat16)
    found = memory.now(model)
    assert found["beyond_arrays"] == ["bfloat16[256, 256]"]
    assert not found["no_float_copy"]
    del copy
    assert memory.now(model)["no_float_copy"]


def test_bytes_in_use_count(folder, monkeypatch):
    in_use = 1000
    monkeypatch.setattr(
        generate.Memory, "stats", lambda _: {"bytes_in_use": in_use, "peak_bytes_in_use": 7}
    )
    memory = generate.Memory()
    model = models.load(folder)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    smallest = 256 * 256 * 2
    for beyond, good in ((0, True), (smallest - 1, True), (smallest, False)):
        in_use = 1000 + weights + beyond
        found = memory.now(model)
        assert found["beyond_weights"] == beyond
        assert found["no_float_copy"] == good
        assert (found["in_use_bytes"], found["peak_bytes"]) == (in_use, 7)


def test_command_line(tmp_path, capsys):
    file = tmp_path / "results" / "generate.json"
    options = "--small --num-layers 1 --batches 1 3 --prompt 70 --new 5 --repeats 1 --folder"
    assert main(["generate", *options.split(), str(tmp_path), "--json", str(file)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]
    captured = capsys.readouterr()
    assert "generate float16 batch 3: prefill " in captured.err
    assert "\ngenerated: 0.00 GB in " in captured.err
    result = json.loads(file.read_text())
    assert {"build_info", "device", "driver", "jax", "date", "method"} <= set(result)
    assert result["model"]["num_layers"] == 1

    # By hand: codes, scales and zeros of each 128 inputs; then what is not packed.
    inputs_times_outputs = 256 * (512 + 256 + 1024) + 512 * 256
    packed = inputs_times_outputs // 2 + inputs_times_outputs // 128 * 5 // 2
    others = 2 * (2 * 512 * 256 + 3 * 256)
    assert result["weights"] == {
        "packed_bytes": packed,
        "other_weight_bytes": others,
        "copy_bytes": 2 * inputs_times_outputs,
        "smallest_copy_bytes": 2 * 256 * 256,
        "largest_copy_bytes": 2 * 256 * 1024,
    }
    assert packed + others < result["checkpoint"]["bytes"] < packed + others + 10_000
    assert result["checkpoint"]["load_seconds"] > 0
    for moment in ("loaded", "generated"):
        assert result[moment]["beyond_arrays"] == []
        beyond = result[moment]["beyond_weights"] or 0  # null on a CPU
        assert result[moment]["no_float_copy"] == (beyond < 2 * 256 * 256)

    rows = result["rows"]
    assert [(r["op"], r["batch"], r["prompt"], r["new"]) for r in rows] == [
        ("generate", batch, 70, 5) for batch in (1, 3)
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["us"] * 1e6, rel=1e-2)
        assert row["prefill_tokens_per_second"] == pytest.approx(
            row["batch"] * 70 / row["prefill_us"] * 1e6, rel=1e-2
        )
        # 70 tokens fill two blocks of 64 slots, the new ones begin another.
        assert row["cache_bytes"] == row["batch"] * 2 * 192 * 2 * 64 * 2
        assert row["decode_temp_bytes"] > 0
    assert main(["table", str(file)]) == 0
    assert capsys.readouterr().out == captured.out
    assert captured.out.startswith("| dtype | batch | prompt | prefill ms | us/step | tokens/s |")


@pytest.mark.parametrize("options", ["--new 2", "--prompt 8000 --new 193"])
def test_new_tokens_must_fit(options):
    with pytest.raises(SystemExit, match="--new must be from 3 to 8192 less --prompt"):
        main(["generate", "--small", *options.split()])
