"""`load_hf`: golden files of other tools bit for bit, and the forms a checkpoint may have."""

import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, LINEAR, write, write_shards

import jax_awq

GOLDEN = Path(__file__).parent / "golden"
LLAMA = GOLDEN / "llama-awq-gemm-g128"
SHA256 = {
    name: entry["sha256_fp16_le_ic_major"]
    for name, entry in json.loads((LLAMA / "expected_dequant_sha256.json").read_text()).items()
}
VECTORS = {"ic256_oc64_g128": 128, "ic512_oc192_g128": 128, "ic384_oc128_g64": 64}


@pytest.fixture(scope="module")
def llama():
    return jax_awq.load_hf(LLAMA)


def vectors(case):
    tensors = np.load(GOLDEN / "packed_vectors.npz")
    return {
        key.removeprefix(f"{case}/"): value
        for key, value in tensors.items()
        if key.startswith(case)
    }


def linear(case="ic256_oc64_g128", version="gemm"):
    """Tensors of one linear as they are in a checkpoint, by full name."""
    return {
        f"{LINEAR}.{key.removeprefix(f'{version}/')}": value
        for key, value in vectors(case).items()
        if key.startswith(f"{version}/")
        and key.rpartition("/")[2] in ("qweight", "qzeros", "scales", "bias")
    }


def digest(array):
    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def assert_same_bits(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual).view(np.uint16), expected.view(np.uint16))


# What other tools wrote


def test_llama_has_every_tensor(llama):
    assert {n for n, v in llama.items() if isinstance(v, jax_awq.AWQWeight)} == set(SHA256)
    assert len(SHA256) == 21
    assert len(llama) == 30
    assert llama["model.embed_tokens.weight"].dtype == jnp.float16
    assert llama["model.layers.0.mlp.down_proj"].shape == (1536, 512)


@pytest.mark.parametrize("name", SHA256)
def test_llama_dequantizes_to_the_bits_of_autoawq(llama, name):
    weight = jax_awq.awq_dequantize(llama[name])
    assert weight.dtype == jnp.float16
    assert digest(weight) == SHA256[name]


@pytest.mark.parametrize("mistake", ["natural_order", "natural_zeros", "zero_plus_1", "zero_8"])
def test_digest_catches_mistakes(llama, mistake):
    name = "model.layers.1.self_attn.v_proj"
    weight = llama[name]
    qweight, qzeros = weight.qweight, weight.qzeros
    if mistake == "natural_order":
        qweight = jax_awq.pack_int4(jax_awq.unpack_int4(qweight, order="natural"), order="awq")
    elif mistake == "natural_zeros":
        qzeros = jax_awq.pack_int4(jax_awq.unpack_int4(qzeros, order="natural"), order="awq")
    elif mistake == "zero_plus_1":
        qzeros = jax_awq.pack_int4(jax_awq.unpack_int4(qzeros) + 1)
    else:
        qzeros = None
    wrong = jax_awq.AWQWeight(qweight, weight.scales, qzeros)
    assert digest(jax_awq.awq_dequantize(wrong)) != SHA256[name]


@pytest.mark.parametrize("module", ["self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_llama_linear_outputs(llama, module):
    name = f"model.layers.0.{module}"
    expected = np.load(LLAMA / "expected_linears.npz")
    x, y = expected[f"linear_in/{name}"], expected[f"linear_out/{name}"]
    # golden/README.md states 1e-3 for outputs of standard deviation 3.1.
    np.testing.assert_allclose(
        np.asarray(jax_awq.awq_gemm(jnp.asarray(x), llama[name])),
        y,
        rtol=0,
        atol=1e-3 * max(1, y.std() / 3.1),
    )


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("case", VECTORS)
def test_packed_vectors(tmp_path, case, version):
    data = vectors(case)
    loaded = jax_awq.load_hf(
        write(
            tmp_path,
            linear(case, version),
            {**CONFIG, "group_size": VECTORS[case], "version": version},
        )
    )
    weight = loaded[LINEAR]
    assert weight.layout == ("gemm" if version == "gemv_fast" else version)
    assert weight.group_size == VECTORS[case]
    gemm = jax_awq.convert(weight, "gemm")
    np.testing.assert_array_equal(gemm.qweight, data["gemm/qweight"])
    np.testing.assert_array_equal(gemm.qzeros, data["gemm/qzeros"])
    np.testing.assert_array_equal(gemm.scales, data["gemm/scales"])
    zeros = jax_awq.unpack_int4(gemm.qzeros)
    np.testing.assert_array_equal(zeros.T, data["zeros_oc_groups"])
    fake = data["fake_quant_fp16_oc_ic"].T
    assert_same_bits(weight.dequantize(), fake)
    assert_same_bits(jax_awq.convert(weight, "oc_major").dequantize(), fake)
    bias = loaded.get(f"{LINEAR}.bias")
    assert (bias is None) == (case != "ic512_oc192_g128")
    call = functools.partial(jax_awq.awq_gemm, bias=bias, out_dtype=jnp.float32)
    error = np.abs(np.asarray(call(data["x_fp16"], weight)) - data["y_fp32"])
    allowed = 1e-5 * np.abs(data["y_fp32"]).max()
    if jax_awq.plan("awq_gemm", data["x_fp16"], weight, **call.keywords).kernel[:6] == "decode":
        # y_fp32 has float16 weights; this kernel leaves (q - z) * s unrounded, half an ulp away.
        allowed += (
            np.abs(data["x_fp16"]).astype(np.float32) @ np.abs(fake.astype(np.float32)) / 2**11
        )
    assert (error <= allowed).all()


# What a checkpoint may look like


def test_shards(tmp_path):
    tensors = linear() | {"model.norm.weight": np.ones(4, np.float16)}
    names = list(tensors)
    folder = write_shards(
        tmp_path, {n: tensors[n] for n in names[:2]}, {n: tensors[n] for n in names[2:]}
    )
    loaded = jax_awq.load_hf(folder)
    assert set(loaded) == {LINEAR, "model.norm.weight"}
    assert_same_bits(
        loaded[LINEAR].dequantize(), vectors("ic256_oc64_g128")["fake_quant_fp16_oc_ic"].T
    )


def test_other_artefacts_are_left_alone(tmp_path):
    folder = write_shards(tmp_path, linear())
    write(folder, linear(), file="consolidated.safetensors")
    assert set(jax_awq.load_hf(folder)) == {LINEAR}


def test_old_quant_config(tmp_path):
    write(tmp_path, linear(), None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quant_config.json").write_text(
        json.dumps({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"})
    )
    assert jax_awq.load_hf(tmp_path)[LINEAR].group_size == 128


def test_bfloat16_scales_and_dtype(tmp_path):
    tensors = linear()
    tensors[f"{LINEAR}.scales"] = tensors[f"{LINEAR}.scales"].astype(ml_dtypes.bfloat16)
    tensors |= {"a.weight": np.arange(4, dtype=np.float16), "a.ids": np.arange(4, dtype=np.int32)}
    loaded = jax_awq.load_hf(write(tmp_path, tensors), dtype=jnp.bfloat16)
    assert loaded[LINEAR].scales.dtype == jnp.bfloat16
    assert loaded["a.weight"].dtype == jnp.bfloat16
    assert loaded["a.ids"].dtype == jnp.int32
    with pytest.raises(TypeError, match="dtype must be floating, got int32"):
        jax_awq.load_hf(tmp_path, dtype=jnp.int32)
    with pytest.raises(
        TypeError, match="load_hf: dtype must be a dtype or the name of one, got 'fp16'"
    ):
        jax_awq.load_hf(tmp_path, dtype="fp16")


def test_whole_k_and_no_zeros(tmp_path):
    tensors = linear()
    tensors[f"{LINEAR}.scales"] = tensors[f"{LINEAR}.scales"][:1]
    del tensors[f"{LINEAR}.qzeros"]
    weight = jax_awq.load_hf(
        write(tmp_path, tensors, {**CONFIG, "group_size": -1, "zero_point": False})
    )[LINEAR]
    assert weight.qzeros is None
    assert weight.shape == (256, 64)


def test_device(tmp_path):
    device = jax.devices()[-1]
    loaded = jax_awq.load_hf(write(tmp_path, linear()), device=device)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(loaded))


def test_scales_of_an_activation_are_plain(tmp_path):
    tensors = linear() | {"model.layers.0.mlp.act.scales": np.ones(8, np.float16)}
    assert jax_awq.load_hf(write(tmp_path, tensors))["model.layers.0.mlp.act.scales"].shape == (8,)


@pytest.mark.parametrize("shown", [False, True])
def test_progress_only_if_asked(tmp_path, capsys, shown):
    jax_awq.load_hf(write(tmp_path, linear()), progress=shown)
    captured = capsys.readouterr()
    assert ("3 of 3 tensors" in captured.err) == shown
    assert captured.out == ""


def test_gemv_padding_must_be_there(tmp_path):
    tensors = linear("ic384_oc128_g64", "gemv")
    tensors[f"{LINEAR}.scales"] = tensors[f"{LINEAR}.scales"][:, :8]
    with pytest.raises(
        ValueError,
        match=r"scales in .* must have shape \(128, 16\), got "
        r"\(128, 8\), for K=384, N=128",
    ):
        jax_awq.load_hf(write(tmp_path, tensors, {**CONFIG, "group_size": 64, "version": "gemv"}))
