"""`python -m jax_awq`: text of a model, and what a checkpoint has."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_awq import models
from jax_awq.checkpoint.formats import READABLE

tokenizers = pytest.importorskip("tokenizers")
testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from jax_awq.cli import app  # noqa: E402
from jax_awq.cli.inspect import survey  # noqa: E402

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
LLAMA = GOLDEN / "llama-awq-gemm-g128"
PROMPT = "import unittest\n\nclass Test"


def run(*arguments):
    return testing.CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})


def copy(tmp_path, name="tiny-llama", **config):
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(LLAMA / "tokenizer.json"))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}])
def test_generate(tokenizer, options):
    flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
    found = run("generate", LLAMA, "--prompt", PROMPT, "--max-new-tokens", 9, *flags)
    assert found.exit_code == 0, found.output
    ids = np.array([tokenizer.encode(PROMPT).ids])
    want = models.load(LLAMA).generate(ids, 9, **options)
    assert found.stdout == tokenizer.decode(want[0].tolist()) + "\n"
    assert re.search(r"loaded in \d+\.\d s", found.stderr)
    told = rf"{ids.shape[1]} tokens of prompt, .* then \d+\.\d tokens/s"
    assert re.search(told, found.stderr)


def test_generate_stops_at_the_end(tmp_path, tokenizer):
    ids = np.array([tokenizer.encode(PROMPT).ids])
    new = models.load(LLAMA).generate(ids, 6)[0, ids.shape[1] :].tolist()
    folder = copy(tmp_path, LLAMA.name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [new[2], 1]}))
    found = run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 6)
    assert new[2] not in new[:2]
    assert found.stdout == tokenizer.decode([*ids[0].tolist(), *new[:2]]) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([GOLDEN / "no", "--prompt", "x"], "error: generate: there is no folder .*no"),
        ([GOLDEN / "tiny-llama", "--prompt", "x"], "error: generate: .* has no tokenizer.json"),
        ([LLAMA, "--prompt", "a\udcff"], r"generate: --prompt must be UTF-8 text, got 'a\\udcff'"),
        (
            [LLAMA, "--prompt", "x", "--temperature", 1, "--seed", 2**70],
            "error: generate: seed must be an integer of 64 bits",
        ),
        ([LLAMA, "--prompt", ""], "error: generate: --prompt must have at least one token"),
        (
            [LLAMA, "--prompt", "x", "--max-new-tokens", 600],
            "600 new ones exceed max_position_embeddings, 512",
        ),
    ],
)
def test_generate_tells_what_is_wrong(arguments, message):
    found = run("generate", *arguments)
    assert found.exit_code == 1
    assert re.search(message, found.stderr)
    assert "Traceback" not in found.output


def test_generate_with_a_broken_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    found = run("generate", tmp_path, "--prompt", "x")
    assert found.exit_code == 1
    message = f"error: generate: {tmp_path / 'tokenizer.json'} must be a tokenizer, got: "
    assert found.stderr.startswith(message)


def test_inspect():
    found = run("inspect", LLAMA)
    assert found.exit_code == 0, found.output
    lines = {line.split()[0]: line.split()[1:] for line in found.stdout.splitlines() if line}
    down = ["3", "AutoAWQ", "gemm", "1536", "x", "512", "128", "1,225,728"]
    assert lines["model.layers.*.mlp.down_proj"] == down
    assert lines["lm_head.weight"] == ["1", "F16", "2048", "x", "512", "2,097,152"]
    assert "21 quantized linears, 4.9 MB" in found.stdout
    assert "model: llama, 3 layers, hidden 512, 8 heads, 4 of k and v" in found.stdout
    assert "no problems" in found.stdout
    every = run("inspect", LLAMA, "--all").stdout.splitlines()
    assert sum(line.split()[0].endswith("_proj") for line in every if line) == 21


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.glob("tiny-*")))
def test_survey_counts_every_byte(name):
    found = survey(GOLDEN / name)
    assert not found.problems
    assert found.model is not None
    tensors = load_file(GOLDEN / name / "model.safetensors")
    assert sum(entry.size for entry in found.entries) == sum(t.nbytes for t in tensors.values())


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), {}, "tensor model.norm.weight is missing"),
        (lambda t: t.update(more=np.ones(2)), {}, "model_type 'llama' has no place for more"),
        (lambda t: t.update({"a.²": np.ones(2)}), {}, "model_type 'llama' has no place for a.²"),
        (
            lambda t: t.update({f"a.{'1' * 5000}": np.ones(2)}),
            {},
            "model_type 'llama' has no place for a.1",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(64, np.int16)}),
            {},
            "tensor model.norm.weight in .* must have a floating dtype",
        ),
        (lambda t: None, {"model_type": "gemma2"}, "model_type must be one of"),
        (lambda t: None, {"architectures": 5}, "config.json: architectures must be list, got 5"),
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.scales"),
            {},
            "tensor model.layers.1.mlp.up_proj.scales is missing",
        ),
    ],
)
def test_inspect_tells_problems(tmp_path, change, config, message):
    folder = copy(tmp_path, **config)
    change_tensors(folder, change)
    found = run("inspect", folder)
    assert found.exit_code == 1
    assert re.search(f"problem: .*{message}", found.stdout)
    assert "no problems" not in found.stdout
    with pytest.raises(ValueError, match=message):
        models.load(folder)


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("lm_head.weight", lambda head: head[:-8]),
        ("lm_head.weight", lambda head: head.astype(np.int32)),
        (FREQUENCIES, lambda found: found[:3]),
    ],
)
def test_inspect_tells_of_what_is_compared(tmp_path, name, edit):
    folder = copy(tmp_path, tie_word_embeddings=True)
    config = models.load(GOLDEN / "tiny-llama").config
    frequencies = config.rope.frequencies(config.head_dim)

    def put(change):
        def edit_tensors(tensors):
            tensors |= {
                "lm_head.weight": tensors["model.embed_tokens.weight"],
                FREQUENCIES: frequencies,
            }
            tensors[name] = np.ascontiguousarray(change(tensors[name]))

        change_tensors(folder, edit_tensors)

    put(lambda same: same)
    models.load(folder)
    assert survey(folder).problems == []
    put(edit)
    with pytest.raises(ValueError, match=rf"tensor {name}|lm_head.weight differs"):
        models.load(folder)
    (problem,) = survey(folder).problems
    assert problem.startswith(f"load: tensor {name} in {folder / 'model.safetensors'} must have ")


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_inspect_tells_of_a_dtype_that_is_not_read(tmp_path, dtype):
    folder = copy(tmp_path)
    change_tensors(folder, lambda t: t.update({FREQUENCIES: np.zeros(12, np.int8)}))
    file = folder / "model.safetensors"
    data, shape = file.read_bytes(), {"F4": "[24]", "F6_E2M3": "[16]"}[dtype]
    old, new = b'"I8","shape":[12]', f'"{dtype}","shape":{shape}'.encode()
    assert data.count(old) == 1
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(old, new)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    found = run("inspect", folder)
    assert found.exit_code == 1
    text = rf"load_hf: tensor {FREQUENCIES} in {file} must be BOOL.*, got {dtype}"
    assert re.search(f"problem: {text}", found.stdout)
    with pytest.raises(ValueError, match=text):
        models.load(folder)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_inspect_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jax_awq", "inspect", str(LLAMA)],
            env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode != 0
    assert done.stderr.startswith("error: [Errno 28] No space left on device\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", checkpoints.WRITERS)
def test_survey_of_every_format(tmp_path, name):
    made, tensors, config = checkpoints.format_sample(name, "groups of 32")
    checkpoints.write(tmp_path, checkpoints.named(tensors), config)
    (entry,) = survey(tmp_path).entries
    assert (entry.name, entry.shape, entry.group_size) == (checkpoints.LINEAR, made.codes.shape, 32)
    assert entry.size == sum(array.nbytes for array in tensors.values())
    assert entry.kind == {type(f).__name__: f.title for f in READABLE}[name]


def test_every_broken_linear_is_told(tmp_path):
    folder = copy(tmp_path)
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    change_tensors(folder, lambda t: [t.pop(f"{name}.scales") for name in names])
    found = survey(folder)
    assert len(found.problems) == 2
    for name, problem in zip(names, found.problems, strict=True):
        assert f"{name}.scales is missing" in problem
    assert "model.layers.1.mlp.gate_proj" in {entry.name for entry in found.entries}


def test_a_layer_that_is_left_out(tmp_path):
    folder = copy(tmp_path)

    def drop(tensors):
        for name in [n for n in tensors if ".layers.0." in n]:
            del tensors[name]

    change_tensors(folder, drop)
    assert "model.layers.0 is missing" in run("inspect", folder).stdout


def test_inspect_of_no_checkpoint(tmp_path):
    found = run("inspect", tmp_path)
    assert found.exit_code == 1
    assert found.stdout == f"problem: load_hf: {tmp_path} has no .safetensors file\n"


def test_inspect_writes_whole_names_to_a_pipe():
    found = testing.CliRunner().invoke(app, ["inspect", str(LLAMA)], env={"COLUMNS": "60"})
    assert re.search(
        r"^ *model\.layers\.\*\.post_attention_layernorm\.weight  ", found.stdout, re.M
    )


def test_without_the_extra(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('no typer', name='typer')")
    done = subprocess.run(
        [sys.executable, "-m", "jax_awq"],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "python -m jax_awq needs typer: pip install 'jax_awq[cli]'\n"
