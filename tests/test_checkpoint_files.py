"""`load_hf` refuses damaged, missing and contradictory files with one error that names them."""

import json
import os
import sys

import numpy as np
import pytest
from checkpoints import LINEAR, halves, linear, write, write_shards

import jax_awq


def test_truncated_file(tmp_path):
    file = write(tmp_path, linear()) / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(
        ValueError,
        match=f"{file} is damaged: .*: tensor {LINEAR}.* ends at byte "
        f"{size}, the file at {size - 1}",
    ):
        jax_awq.load_hf(tmp_path)


@pytest.mark.parametrize("length", [0, 4, 100])
def test_truncated_header(tmp_path, length):
    file = write(tmp_path, linear()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        jax_awq.load_hf(tmp_path)


@pytest.mark.parametrize("length", [100, 2**62, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("header", ["{}", '{"a":{"data_offsets":[]}}', "[" * 100_000])
def test_length_of_the_header_beyond_the_file(tmp_path, length, header):
    file = write(tmp_path, linear()) / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match=f"^load_hf: {file} is damaged: "):
        jax_awq.load_hf(tmp_path)


def test_folder_in_place_of_a_file(tmp_path):
    file = write(tmp_path, linear()) / "model.safetensors"
    file.unlink()
    file.mkdir()
    with pytest.raises(
        IsADirectoryError, match=f"^load_hf: {file} cannot be read: Is a directory$"
    ):
        jax_awq.load_hf(tmp_path)


def test_file_that_may_not_be_read(tmp_path):
    file = write(tmp_path, linear()) / "model.safetensors"
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root reads every file")
    with pytest.raises(
        PermissionError, match=f"^load_hf: {file} cannot be read: Permission denied$"
    ):
        jax_awq.load_hf(tmp_path)


def test_tensor_twice_in_a_file(tmp_path):
    file = write(tmp_path, linear()) / "model.safetensors"
    entry = '"a.weight":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=f"tensor a.weight is twice in {file}"):
        jax_awq.load_hf(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        jax_awq.load_hf(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
        jax_awq.load_hf(tmp_path)
    write(tmp_path, linear(), None)
    with pytest.raises(
        FileNotFoundError, match=r"neither config\.json, quant_config\.json nor quan"
    ):
        jax_awq.load_hf(tmp_path)
    write(tmp_path, linear(), file="other.safetensors")
    with pytest.raises(ValueError, match=r"several .* model.safetensors, other.safetensors"):
        jax_awq.load_hf(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    first, second = halves()
    with pytest.raises(
        ValueError,
        match=rf"tensor {LINEAR}.qweight in .*model-00002-of-00002"
        r".safetensors is also in .*model-00001-of-00002",
    ):
        jax_awq.load_hf(
            write_shards(
                tmp_path, first, second | {f"{LINEAR}.qweight": first[f"{LINEAR}.qweight"]}
            )
        )


def test_index_names_another_shard(tmp_path):
    with pytest.raises(
        ValueError,
        match=rf"{LINEAR}.qweight in .*model-00001.*, but "
        "model.safetensors.index.json has it in model-00002",
    ):
        jax_awq.load_hf(
            write_shards(
                tmp_path,
                *halves(),
                weight_map={f"{LINEAR}.qweight": "model-00002-of-00002.safetensors"},
            )
        )


def test_index_names_a_missing_tensor(tmp_path):
    with pytest.raises(ValueError, match=r"tensor a.weight is missing in .*model-00002-of-00002"):
        jax_awq.load_hf(
            write_shards(
                tmp_path, *halves(), weight_map={"a.weight": "model-00002-of-00002.safetensors"}
            )
        )


def test_index_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.weight is in model-3.safetensors, but there"):
        jax_awq.load_hf(
            write_shards(tmp_path, *halves(), weight_map={"a.weight": "model-3.safetensors"})
        )


def test_index_leaves_the_folder(tmp_path):
    with pytest.raises(ValueError, match="must be in the same folder"):
        jax_awq.load_hf(
            write_shards(tmp_path, *halves(), weight_map={"a.weight": "../model.safetensors"})
        )


def test_index_lacks_a_tensor(tmp_path):
    folder = write_shards(tmp_path, *halves())
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map[f"{LINEAR}.qzeros"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=rf"{LINEAR}.qzeros in .*is not in model.safetensors.ind"):
        jax_awq.load_hf(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="must map tensors to files in weight_map"):
        jax_awq.load_hf(folder)


def test_stray_shard(tmp_path):
    folder = write_shards(tmp_path, *halves())
    write(folder, {"a.weight": np.ones(4, np.float16)}, file="model-00009.safetensors")
    with pytest.raises(ValueError, match=r"index\.json does not name model-00009\.safetensors"):
        jax_awq.load_hf(folder)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ImportError, match=r"load_hf needs safetensors: pip install 'jax_awq\[hf\]'"
    ):
        jax_awq.load_hf(write(tmp_path, linear()))
