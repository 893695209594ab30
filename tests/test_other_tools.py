"""What other tools make of `save_hf`'s files, and `load_hf` of theirs.

Each test is skipped where its tool is not installed. On a CPU, with Python 3.11:

    pip install jax pytest torch transformers==5.23.0 compressed-tensors gptqmodel==7.7.0
    pip install jax pytest torch transformers==4.51.3 autoawq==0.2.9   # apart from the above

On a machine of two cores GPTQModel needs GPTQMODEL_CPU_WORKERS=2.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import LINEAR, named, write

import jax_awq

LLAMA = Path(__file__).parent / "golden" / "llama-awq-gemm-g128"
SHA256 = {
    name: entry["sha256_fp16_le_ic_major"]
    for name, entry in json.loads((LLAMA / "expected_dequant_sha256.json").read_text()).items()
}


def importorskip(name):
    return pytest.importorskip(name, exc_type=ImportError)


@functools.cache
def params():
    return jax_awq.load_hf(LLAMA)


@pytest.fixture
def folder(tmp_path):
    """The golden checkpoint, written by `save_hf` in several files."""
    config = json.loads((LLAMA / "config.json").read_text())
    jax_awq.save_hf(tmp_path / "saved", params(), config, max_shard_bytes=1_000_000)
    return tmp_path / "saved"


def tensors_of(folder):
    torch = importorskip("safetensors.torch")
    return {
        n: t for f in sorted(folder.glob("*.safetensors")) for n, t in torch.load_file(f).items()
    }


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_autoawq_dequantizes_what_was_saved(folder):
    packing = importorskip("awq.utils.packing_utils")
    tensors = tensors_of(folder)
    for name, expected in SHA256.items():
        arrays = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        assert digest(packing.dequantize_gemm(*arrays, 4, 128).numpy()) == expected, name


def test_autoawq_module_takes_what_was_saved(folder):
    """Its own layer, filled by name and strictly, on the inputs that transformers recorded."""
    torch, gemm = importorskip("torch"), importorskip("awq.modules.linear.gemm")
    tensors, expected = tensors_of(folder), np.load(LLAMA / "expected_linears.npz")
    for key in (k for k in expected if k.startswith("linear_in/")):
        name = key.removeprefix("linear_in/")
        k, n = params()[name].shape
        layer = gemm.WQLinear_GEMM(4, 128, k, n, bias=False, dev="cpu")
        own = {t.removeprefix(f"{name}."): v for t, v in tensors.items() if t.startswith(name)}
        layer.load_state_dict(own, strict=True)
        x, y = expected[key], expected[f"linear_out/{name}"]
        with torch.no_grad():
            error = np.abs(layer(torch.from_numpy(x).half()).float().numpy() - y).max()
        assert error < 0.03 * max(1, y.std() / 3.1), name  # golden/README.md, everything float16


def test_transformers_with_gptqmodel_runs_what_was_saved(folder):
    torch, _ = importorskip("torch"), importorskip("gptqmodel")
    transformers = importorskip("transformers")

    def load(path):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, device_map="cpu", dtype=torch.float16
        ).eval()

    model, original = load(folder), load(LLAMA)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "qweight") or n in SHA256}
    assert set(layers) == set(SHA256)
    assert not any(isinstance(m, torch.nn.Linear) for m in layers.values())
    ids = torch.arange(48).reshape(2, 24)
    expected = np.load(LLAMA / "expected_linears.npz")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
        for key in (k for k in expected if k.startswith("linear_in/")):
            name = key.removeprefix("linear_in/")
            x, y = expected[key], expected[f"linear_out/{name}"]
            error = np.abs(layers[name](torch.from_numpy(x).half()).float().numpy() - y).max()
            assert error < 0.03 * max(1, y.std() / 3.1), name


def test_compressed_tensors_converts_what_was_saved_and_we_read_it(folder, tmp_path):
    """Its converter reads AutoAWQ's format with code of its own and writes pack-quantized."""
    convert = importorskip("compressed_tensors.entrypoints.convert.converters")
    torch = importorskip("safetensors.torch")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    converter = convert.AutoAWQConverter.from_autoawq_config(quantization)
    tensors = tensors_of(folder)
    converter.validate(tensors)
    converted = converter.process(tensors)
    assert sum(name.endswith(".weight_packed") for name in converted) == len(SHA256)
    config = converter.update_config(None).model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    torch.save_file(
        {n: t.contiguous() for n, t in converted.items()}, tmp_path / "model.safetensors"
    )
    loaded = jax_awq.load_hf(tmp_path)
    assert set(loaded) == set(params())
    for name, expected in SHA256.items():
        assert digest(loaded[name].dequantize()) == expected, name


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_what_gptqmodel_packs(tmp_path, version, act_order):
    """Packed and dequantized by GPTQModel's own layer."""
    torch, linear = importorskip("torch"), importorskip("gptqmodel.nn_modules.qlinear.torch")
    model_utils = importorskip("gptqmodel.utils.model")
    k, n, group_size = 256, 64, 64
    rng = np.random.default_rng(0)
    group = np.arange(k) // group_size
    group = rng.permutation(group) if act_order else group
    codes = rng.integers(0, 16, (k, n))
    zeros = rng.integers(1, 16, (k // group_size, n))
    scales = rng.uniform(0.005, 0.02, zeros.shape).astype(np.float16)
    weight = ((codes - zeros[group]) * scales[group].astype(np.float32)).T
    dense = torch.nn.Linear(k, n, bias=False)
    dense.weight.data = torch.from_numpy(np.ascontiguousarray(weight))
    layer = linear.TorchLinear(
        bits=4, group_size=group_size, desc_act=act_order, sym=False,
        in_features=k, out_features=n, bias=False, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    g_idx = torch.from_numpy(group.astype(np.int32))
    layer.pack(dense, torch.from_numpy(scales.T), torch.from_numpy(zeros.T), g_idx)
    expected = layer.dequantize_weight().numpy()
    if version == "gptq":
        model_utils.convert_gptq_v2_to_v1_format_module(layer, quantize_config=layer)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {part: getattr(layer, part).detach().numpy() for part in parts}
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": act_order,
        "checkpoint_format": version,
    }
    loaded = jax_awq.load_hf(write(tmp_path, named(tensors), config))[LINEAR]
    assert isinstance(loaded, jax_awq.PermutedWeight) == act_order
    np.testing.assert_array_equal(np.asarray(loaded.dequantize()), expected)
