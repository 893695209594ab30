"""`save_hf`: exact keys, shards, replaced folders, and what it refuses."""

import errno
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import LINEAR, WRITERS, format_sample, named, write
from safetensors import safe_open
from safetensors.numpy import load_file

import jax_awq
from jax_awq.testing import random_weight

LLAMA = Path(__file__).parent / "golden" / "llama-awq-gemm-g128"
CONFIG = {"model_type": "llama", "torch_dtype": "float16"}
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def llama():
    return jax_awq.load_hf(LLAMA), json.loads((LLAMA / "config.json").read_text())


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(
            np.asarray(actual[name]).view(np.uint8), np.asarray(array).view(np.uint8), name
        )


def weight(rng, k=256, n=64, group_size=128, **options):
    return random_weight(rng, k, n, group_size=group_size, **options)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_gives_back_what_autoawq_wrote(tmp_path, llama):
    params, config = llama
    jax_awq.save_hf(tmp_path / "made" / "here", params, config)
    folder = tmp_path / "made" / "here"
    assert files(folder) == ["config.json", "model.safetensors"]
    assert_same_tensors(
        load_file(folder / "model.safetensors"), load_file(LLAMA / "model.safetensors")
    )
    assert json.loads((folder / "config.json").read_text()) == config
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert files(tmp_path / "made") == ["here"]
    assert oct(folder.stat().st_mode) == oct((tmp_path / "made").stat().st_mode)


def test_configuration_is_autoawqs(tmp_path, rng, llama):
    given = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    jax_awq.save_hf(tmp_path / "a", {NAME: weight(rng)}, given)
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written == {**CONFIG, "quantization_config": llama[1]["quantization_config"]}
    assert given["quantization_config"] == {"quant_method": "gptq"}


def test_shards(tmp_path, llama):
    params, config = llama
    jax_awq.save_hf(tmp_path / "a", params, config, max_shard_bytes=1_000_000)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    original = load_file(LLAMA / "model.safetensors")
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in original.values())}
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert files(tmp_path / "a") == [
        "config.json",
        *shards,
        "model.safetensors.index.json",
    ]
    largest = max(a.nbytes for a in original.values())
    found = {}
    for shard in shards:
        tensors = load_file(tmp_path / "a" / shard)
        assert {index["weight_map"][name] for name in tensors} == {shard}
        assert sum(a.nbytes for a in tensors.values()) <= max(1_000_000, largest)
        found |= tensors
    assert_same_tensors(found, original)
    again = jax_awq.load_hf(tmp_path / "a")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize("group_size", [32, -1])
def test_round_trip(tmp_path, rng, layout, symmetric, dtype, group_size):
    options = {"layout": layout, "symmetric": symmetric, "dtype": dtype}
    given = weight(rng, group_size=group_size, **options)
    bias = rng.normal(size=64).astype(dtype)
    jax_awq.save_hf(tmp_path / "a", {NAME: given, f"{NAME}.bias": jnp.asarray(bias)}, CONFIG)
    loaded = jax_awq.load_hf(tmp_path / "a")
    back = loaded[NAME]
    assert (back.layout, back.group_size, back.dtype) == ("gemm", group_size, dtype)
    np.testing.assert_array_equal(back.dequantize(), given.dequantize())
    np.testing.assert_array_equal(loaded[f"{NAME}.bias"], bias)
    zeros = np.asarray(jax_awq.unpack_int4(back.qzeros))
    assert (zeros == 8).all() == symmetric


@pytest.mark.parametrize("name", WRITERS)
def test_conversion_of_every_format(tmp_path, name):
    made, tensors, config = format_sample(name, "bfloat16")
    params = jax_awq.load_hf(write(tmp_path, named(tensors), config))
    given = json.loads((tmp_path / "config.json").read_text())
    jax_awq.save_hf(tmp_path / "a", params, given)
    dense = jax_awq.load_hf(tmp_path / "a")[LINEAR].dequantize()
    np.testing.assert_array_equal(np.asarray(dense), made.dense())


@pytest.mark.parametrize(
    "array",
    [
        np.array(3.5, np.float32),
        np.float32(3.5),
        np.array(3.5, jnp.bfloat16),
        np.arange(6, dtype=jnp.float8_e4m3fn).reshape(2, 3),
        np.ones((0, 3), jnp.float8_e5m2),
        np.ones((2, 3), jnp.float8_e8m0fnu),
        np.arange(6).reshape(2, 3).T,
    ],
)
def test_other_tensors_keep_shape_and_dtype(tmp_path, rng, array):
    jax_awq.save_hf(tmp_path / "a", {NAME: weight(rng), "a": array, "b": np.ones(3)}, CONFIG)
    loaded = jax_awq.load_hf(tmp_path / "a")["a"]
    assert (loaded.shape, loaded.dtype) == (array.shape, jnp.asarray(array).dtype)
    np.testing.assert_array_equal(np.asarray(loaded), array)


def test_one_group_has_two_names(tmp_path, rng):
    params = {"a": weight(rng, 128, group_size=-1), "b": weight(rng, 256, group_size=128)}
    jax_awq.save_hf(tmp_path / "a", params, CONFIG)
    loaded = jax_awq.load_hf(tmp_path / "a")
    assert loaded["a"].group_size == loaded["b"].group_size == 128
    np.testing.assert_array_equal(loaded["a"].dequantize(), params["a"].dequantize())


def test_linears_left_out_are_told(tmp_path, rng):
    """Within the stack that is quantized: other tools take embedding and head for float anyway."""
    dense = np.ones((8, 8), np.float16)
    names = ("model.layers.1.mlp.gate", "model.layers.0.a", "lm_head", "model.embed_tokens")
    params = {f"{name}.weight": dense for name in names}
    params |= {
        NAME: weight(rng),
        "model.layers.0.norm.weight": dense[0],
        f"{NAME}.bias": np.ones(64, np.float16),
    }
    jax_awq.save_hf(tmp_path / "a", params, CONFIG)
    written = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert written["modules_to_not_convert"] == ["model.layers.0.a", "model.layers.1.mlp.gate"]


# Folders that are there already


def test_does_not_overwrite(tmp_path, rng):
    params = {NAME: weight(rng)}
    for name in ("config.json", "model-00001-of-00002.safetensors", "quantize_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(FileExistsError, match=rf"{folder} holds a model already \({name}\)"):
            jax_awq.save_hf(folder, params, CONFIG)
        assert files(folder) == [name]
        assert (folder / name).read_text() == "{}"
    with pytest.raises(FileExistsError, match=r"config\.json must be a folder"):
        jax_awq.save_hf(tmp_path / "config.json" / "config.json", params, CONFIG)


def test_overwrite_replaces_the_model_and_nothing_else(tmp_path, rng, llama):
    folder = tmp_path / "a"
    jax_awq.save_hf(folder, *llama, max_shard_bytes=1_000_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "quant_config.json").write_text('{"w_bit": 4}')
    given = weight(rng)
    jax_awq.save_hf(folder, {NAME: given}, CONFIG, overwrite=True)
    assert files(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    np.testing.assert_array_equal(jax_awq.load_hf(folder)[NAME].dequantize(), given.dequantize())


def test_folder_without_a_model_is_used(tmp_path, rng):
    (tmp_path / "tokenizer.json").write_text("{}")
    jax_awq.save_hf(tmp_path, {NAME: weight(rng)}, CONFIG)
    assert files(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_leaves_everything_as_it_was(tmp_path, rng, monkeypatch, overwrite):
    folder = tmp_path / "a"
    if overwrite:
        jax_awq.save_hf(folder, {NAME: weight(rng)}, CONFIG)
    before = {p: p.read_bytes() for p in folder.glob("*")}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        jax_awq.save_hf(folder, {NAME: weight(rng, 128)}, CONFIG, overwrite=overwrite)
    assert {p: p.read_bytes() for p in folder.glob("*")} == before
    assert files(tmp_path) == (["a"] if overwrite else [])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_failing_move_leaves_everything_as_it_was(tmp_path, rng, monkeypatch, error, count, late):
    """Each of the four moves, with an interrupt before or after it; the fifth is not there."""
    jax_awq.save_hf(tmp_path, {NAME: weight(rng)}, CONFIG)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    moves, replace = [], Path.replace

    def failing(source, target):
        moves.append(target)
        if len(moves) != count + 1:
            return replace(source, target)
        if late:
            replace(source, target)
        raise error

    monkeypatch.setattr(Path, "replace", failing)
    save = functools.partial(jax_awq.save_hf, tmp_path, {NAME: weight(rng)}, CONFIG, overwrite=True)
    if count == 4:
        save()
        assert {p: p.read_bytes() for p in tmp_path.iterdir()}.keys() == before.keys()
        assert [p.name for p in moves if p.parent != tmp_path] == [
            "config.json",
            "model.safetensors",
        ]
        assert [p.name for p in moves[2:]] == ["model.safetensors", "config.json"]
        return
    with pytest.raises(error):
        save()
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_old_files_that_cannot_be_put_back_are_not_removed(tmp_path, rng, monkeypatch):
    jax_awq.save_hf(tmp_path, {NAME: weight(rng)}, CONFIG)
    old = (tmp_path / "model.safetensors").read_bytes()
    replace = Path.replace

    def failing(source, target):
        if Path(target).parent == tmp_path:
            raise OSError("no more moves into the folder")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match=r"\.old"):
        jax_awq.save_hf(tmp_path, {NAME: weight(rng)}, CONFIG, overwrite=True)
    (aside,) = tmp_path.iterdir()
    assert files(aside) == ["config.json", "model.safetensors"]
    assert (aside / "model.safetensors").read_bytes() == old


def test_link_to_another_filesystem(tmp_path, rng, monkeypatch):
    """Between folders that only a link joins, nothing can be renamed."""
    (tmp_path / "there").mkdir()
    link = tmp_path / "here" / "link"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "there")
    replace = Path.replace

    def within(source, target):
        if tmp_path / "there" not in Path(source).resolve().parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", within)
    for overwrite in (False, True):
        given = weight(rng)
        jax_awq.save_hf(link, {NAME: given}, CONFIG, overwrite=overwrite)
        found = jax_awq.load_hf(tmp_path / "there")[NAME]
        np.testing.assert_array_equal(found.qweight, given.qweight)
        assert files(link) == ["config.json", "model.safetensors"]
        assert files(link.parent) == ["link"]


# What it refuses


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({NAME: None}, ValueError, "params must have an AWQWeight, got none"),
        ({"a": weight(np.random.default_rng(0), batch=(2,))}, ValueError,
         r"a must be \(K, N\), got shape \(2, 256, 64\)"),
        ({"a": weight(np.random.default_rng(0), dtype=np.float32)}, TypeError,
         "scales of a must be float16 or bfloat16, got float32"),
        ({"a": weight(np.random.default_rng(0), group_size=64)}, ValueError,
         f"all weights must have the same group_size, got {NAME} 128, a 64"),
        ({"a": jax_awq.PermutedWeight(weight(np.random.default_rng(0)),
                                      np.arange(256, dtype=np.int32))}, ValueError,
         r"a has permuted inputs \(GPTQ's act-order\)"),
        ({f"{NAME}.scales": np.ones(3)}, ValueError,
         rf"tensor {NAME}.scales must come from one parameter, got {NAME} and {NAME}.scales"),
        ({"a": [1.0]}, TypeError, "a must be an AWQWeight or an array, got list"),
        ({"a": jax.ShapeDtypeStruct((2,), np.float16)}, TypeError,
         "a must be an AWQWeight or an array, got ShapeDtypeStruct"),
        ({"a": jax_awq.Int8Weight(np.ones((8, 8), np.int8), np.ones(8, np.float32))}, TypeError,
         "a must be an AWQWeight or an array, got Int8Weight"),
        ({"a": np.ones(3, np.complex128)}, TypeError, "a must be bool or .*, got complex128"),
        ({"a": np.array(["text"])}, TypeError, "a must be bool or .*, got <U4"),
        ({"__metadata__": np.ones(3)}, ValueError, "__metadata__ must have another name"),
        ({f"{NAME}.weight": np.ones(3)}, ValueError,
         f"{NAME}.weight must have another name: beside the AWQWeight {NAME} there may only"),
        ({f"{NAME}.foo": np.ones(3)}, ValueError, f"{NAME}.foo must have another name"),
        ({f"{NAME}.bias": np.ones(3, np.float16)}, ValueError,
         rf"{NAME}.bias must have shape \(64,\), got \(3,\)"),
        ({f"{NAME}.bias": np.ones(64)}, TypeError, f"{NAME}.bias must be .*, got float64"),
        ({"a.qweight": np.ones((8, 8), np.int32)}, ValueError,
         "a.qweight must have other names: they are those of a quantized linear"),
        ({"a.scales": np.ones((8, 8))}, ValueError, "a.scales must have other names"),
    ],
)  # fmt: skip
def test_refuses(tmp_path, rng, change, error, text):
    params = {NAME: weight(rng)} | change
    params = {name: value for name, value in params.items() if value is not None}
    with pytest.raises(error, match=f"^save_hf: {text}"):
        jax_awq.save_hf(tmp_path / "a", params, CONFIG)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_shard_bytes": "5GB"}, "max_shard_bytes must be an integer, got '5GB'"),
        ({"max_shard_bytes": None}, "max_shard_bytes must be an integer, got None"),
        ({"max_shard_bytes": float("nan")}, "max_shard_bytes must be an integer, got nan"),
        ({"params": None}, "params must be a mapping, got NoneType"),
        ({"params": []}, "params must be a mapping, got list"),
        ({"params": {1: np.ones(3)}}, "params must have strings as keys, got 1"),
        ({"config": None}, "config must be a mapping, got NoneType"),
        ({"config": [1]}, "config must be a mapping, got list"),
        ({"config": {1: 2, "a": 3}}, "config must have strings as keys, got 1"),
        ({"config": {"a": np.float32(1)}}, "config must be JSON, .* float32 is not JSON serial"),
        ({"config": {"a": {1: 2, "a": 3}}}, "config must be JSON, with strings as keys, got: "),
    ],
)
def test_arguments_of_a_wrong_type(tmp_path, rng, change, text):
    arguments = {"params": {NAME: weight(rng)}, "config": CONFIG} | change
    with pytest.raises(TypeError, match=f"^save_hf: {text}"):
        jax_awq.save_hf(tmp_path / "a", **arguments)
    assert files(tmp_path) == []


def test_link_to_nothing(tmp_path, rng):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match=r"^save_hf: .*link must be a folder, got a link"):
        jax_awq.save_hf(tmp_path / "link", {NAME: weight(rng)}, CONFIG)
    assert files(tmp_path) == ["link"]


@pytest.mark.parametrize("name", ["config.json", "x.safetensors"])
def test_folder_with_the_name_of_a_file(tmp_path, rng, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"^save_hf: {tmp_path / name} must be a file, got a"):
        jax_awq.save_hf(tmp_path, {NAME: weight(rng)}, CONFIG, overwrite=True)
    assert files(tmp_path) == [name]


def test_other_errors(tmp_path, rng, monkeypatch):
    params = {NAME: weight(rng)}
    with pytest.raises(ValueError, match="max_shard_bytes must be 1 or more, got 0"):
        jax_awq.save_hf(tmp_path / "a", params, CONFIG, max_shard_bytes=0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        jax_awq.save_hf(tmp_path / "a", params, {"torch_dtype": np.float16})
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="save_hf needs safetensors: pip install"):
        jax_awq.save_hf(tmp_path / "a", params, CONFIG)
    assert files(tmp_path) == []
