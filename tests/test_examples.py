"""Every example runs, and the errors it prints are within the stated tolerances."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
LLAMA = ROOT / "tests" / "golden" / "llama-awq-gemm-g128"
TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.13}  # of tests/golden/README.md
NUMBER = r"(\d\.\d+e[+-]\d+)"


def run(name, *arguments):
    """As in a user's shell: without what tests/conftest.py asks of XLA."""
    return subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def output_of(name):
    done = run(name)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert [p.name for p in sorted((ROOT / "examples").glob("*.py"))] == [
        "01_awq_gemm.py",
        "02_llama_mlp.py",
        "03_flax_nnx.py",
        "04_equinox.py",
        "05_generate.py",
        "06_replace_layers.py",
        "07_lora.py",
        "08_quantize.py",
        "09_quantize_checkpoint.py",
    ]


def test_awq_gemm():
    errors = re.findall(rf"max error {NUMBER} of the largest value", output_of("01_awq_gemm.py"))
    assert len(errors) == 4
    assert all(0 < float(error) < 2e-3 for error in errors)


def llama_errors(output):
    """{(dtype, what): error} of the lines that 02_llama_mlp.py prints."""
    errors, dtype = {}, None
    for line in output.splitlines():
        if heading := re.match(r"(\w+): .*", line):
            dtype = heading[1]
        if found := re.match(rf"  (.*?) +max error {NUMBER}, tolerance ([\d.]+)", line):
            assert float(found[3]) == TOLERANCE[dtype]
            errors[dtype, found[1]] = float(found[2])
    return errors


def test_llama_mlp():
    output = output_of("02_llama_mlp.py")
    errors = llama_errors(output)
    assert set(errors) == {
        (dtype, what)
        for dtype in TOLERANCE
        for what in ("gate_proj", "down_proj", "mlp, jit", "mlp, jit of vmap")
    }
    for (dtype, what), error in errors.items():
        assert error < TOLERANCE[dtype], (dtype, what)
        # Only float32 sums, in the order of the other tool, can give its very bits.
        assert error > 0 or dtype == "float32", (dtype, what)
    assert "device: " in output
    assert "every error is within its tolerance" in output


@pytest.mark.parametrize(
    ("linear", "mistake", "exceeded"),
    [
        ("gate_proj", "natural_zeros", ["gate_proj", "mlp, jit"]),
        ("gate_proj", "zero_8", ["gate_proj", "mlp, jit"]),
        ("up_proj", "zero_8", ["mlp, jit", "mlp, jit of vmap"]),
    ],
)
def test_llama_mlp_can_fail(tmp_path, linear, mistake, exceeded):
    """With the two mistakes that a model's predictions hardly show."""
    shutil.copytree(LLAMA, tmp_path, dirs_exist_ok=True)
    tensors = load_file(LLAMA / "model.safetensors")
    name = f"model.layers.0.mlp.{linear}.qzeros"
    words = tensors[name].view(np.uint32)
    if mistake == "zero_8":
        words = np.full_like(words, 0x88888888)
    else:
        order = (0, 2, 4, 6, 1, 3, 5, 7)  # of the codes in a word, put in natural order
        words = sum(
            ((words >> np.uint32(4 * nibble)) & np.uint32(15)) << np.uint32(4 * code)
            for nibble, code in enumerate(order)
        )
    save_file(
        tensors | {name: words.astype(np.uint32).view(np.int32)}, tmp_path / "model.safetensors"
    )
    done = run("02_llama_mlp.py", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = llama_errors(done.stdout)
    for dtype, what in itertools.product(TOLERANCE, exceeded):
        least = 3 if what == linear else 1.5
        assert errors[dtype, what] > least * TOLERANCE[dtype], (dtype, what)
    assert "EXCEEDED" in done.stdout


def assert_errors_of_a_module(output, count):
    errors = re.findall(rf"max error {NUMBER} of the standard deviation", output)
    assert len(errors) == count
    assert all(0 < float(error) < TOLERANCE["float16"] / 3.1 for error in errors)


@pytest.mark.parametrize(
    ("name", "package", "last"),
    [
        ("03_flax_nnx.py", "flax", r"gradient of x: \(2, 16, 512\) float16"),
        ("04_equinox.py", "equinox", r"gradient of down.scales: \(12, 512\) float16"),
    ],
)
def test_module(name, package, last):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    output = output_of(name)
    assert_errors_of_a_module(output, 2)
    assert re.search(last, output)


def test_generate():
    pytest.importorskip("tokenizers")
    output = output_of("05_generate.py")
    assert "the tokens of transformers: True" in output
    assert re.search(r"max error of the logits \d\.\d+e-0[4-9]", output)
    for dtype in ("float32", "float16"):
        assert re.search(rf"^{dtype}, greedy: .def __init__\(self, name", output, re.M)
    drawn = re.findall(r"^float16, drawn: (.*)", output, re.M)
    assert len(drawn) == 2
    assert drawn[0] != drawn[1]


def test_replaced_layers_are_right_and_smaller():
    pytest.importorskip("equinox")
    output = output_of("06_replace_layers.py")
    assert_errors_of_a_module(output, 1)
    assert re.search(r"whole model: \(2, 16, 512\) float16", output)
    dense, packed = map(int, re.findall(r"(\d+) bytes", output))
    matrices = 3 * 3 * 512 * 1536  # 32 bits each, then 4 and for each 128 a scale and a zero
    norms = 4 * 3 * 512
    assert dense - norms == 4 * matrices
    assert packed - norms == matrices // 2 + matrices // 128 * 2 + matrices // 128 // 2


def test_lora():
    pytest.importorskip("flax")
    output = output_of("07_lora.py")
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", output)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > np.log(2048)  # worse than a guess among all words
    assert losses[-1] < losses[0] / 4


def test_quantize():
    output = output_of("08_quantize.py")
    assert "6 linears quantized" in output
    plain, awq = (float(error) for error in re.findall(r"error (\d\.\d+) on data", output))
    assert 0 < awq < 0.9 * plain
    packed, dense = map(int, re.search(r"saved: (\d+) bytes, .* (\d+)", output).groups())
    assert packed < dense / 6
    assert "loaded again, equal: True" in output


def test_quantize_checkpoint():
    output = output_of("09_quantize_checkpoint.py")
    dense, awq = (float(n) for n in re.findall(r"(\d+\.\d\d)\b(?! MB)", output))
    assert abs(awq / dense - 1) < 0.005
    assert "float 23.1 MB, AWQ 9.3 MB" in output
