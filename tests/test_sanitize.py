"""What benchmarks/gpu.sh records of the sanitizers, and the problems that they watch."""

import json
import os
import pathlib
import re
import runpy
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

import jax_awq
from jax_awq import _ffi
from jax_awq.testing import planned

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OF_GRADIENTS = (
    *("transposed_128x128", "transposed_256x128", "wgmma_16", "wgmma_32", "wgmma_64", "wgmma_128"),
    *("mma_32", "mma_64", "mma_128", "simt"),
)


@pytest.fixture
def script(monkeypatch):
    for name in ("XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")  # the script sets them for itself
    return runpy.run_path(str(ROOT / "benchmarks/sanitize.py"))


@pytest.mark.skipif(_ffi._ext is None, reason=_ffi.MISSING or "built")
def test_every_kernel_of_a_gradient_has_batches_of_weights(script):
    runs = dict.fromkeys(OF_GRADIENTS, 0)
    splits = set()
    for m, k, n, group_size, dtype, layout, split in script["BATCHED_GRADIENTS"]:
        options = {
            "transpose": True,
            "batch": script["BATCH"],
            "group_size": k if group_size == -1 else group_size,
            "layout": layout,
            "split_k": split or 0,
            **{f"{name}_dtype": np.dtype(dtype).name for name in ("x", "scales", "out")},
        }
        refused = planned(m, k, n, **options)["refused"]
        for variant in (v for v in OF_GRADIENTS if v not in refused):
            runs[variant] += 1
            found = planned(m, k, n, variant=variant, **options)
            if found["workspace_bytes"]:
                splits.add(variant)
    if "no code for" in planned(1, 64, 64)["refused"].get("simt", ""):
        pytest.skip("this build has no code for that GPU")
    assert min(runs.values()) >= 3, runs
    assert splits == set(OF_GRADIENTS) - {"simt"}  # whose sums meet in the workspace


def test_a_gradient_of_a_batch_is_judged(script, rng):
    row = script["BATCHED_GRADIENTS"][0]
    run, exact = script["gradient"](rng, script["product_problem"](rng, *row, batch=(3,)), row[-1])
    assert exact.shape == (3, *row[:2])
    ran = {"": 0}
    script["run_variants"](ran, (run, exact))
    assert ran == {"": 1}
    right = run()
    results = iter((right, right.at[2, 4, 319].add(1)))  # of the CPU, and of the variant
    with pytest.raises(AssertionError, match="1 of 4800 values are off"):
        script["run_variants"](ran, (lambda: next(results), exact))


def test_conversions_are_counted(script):
    assert script["conversions"]() == {
        "awq_dequantize": 8,
        "quantize_activation": 16,
        "dequantize_activation": 16,
    }


def test_a_variant_that_never_ran_is_told(script, capsys):
    gradients, check = script["GRADIENT_COUNTS"], script["check_counts"]
    whole = {"awq_gemm": {"simt": 1, "mma_32": 2}, gradients: {"simt": 1}}
    none = {"awq_gemm": {"simt": 0, "mma_32": 0}, gradients: {"simt": 0}}
    assert check([none, whole]) == 0
    assert check([none, whole | {"awq_gemm": {"simt": 1, "mma_32": 0}}]) == 1
    assert "awq_gemm, 2 variants; never ran: mma_32" in capsys.readouterr().out
    assert check([none, whole | {gradients: {"simt": 0}}]) == 1
    assert f"{gradients}, 1 variants; never ran: simt" in capsys.readouterr().out
    assert check([{"awq_gemm": {}, gradients: {}}]) == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(("errors", "code"), [(0, 0), (2, 99)])
def test_what_is_recorded(tmp_path, errors, code):
    """By gpu.sh, whose sanitizer is one that only counts."""
    (function,) = re.findall(
        r"^sanitize\(\) \{.*?^\}\n", (ROOT / "benchmarks/gpu.sh").read_text(), re.M | re.S
    )
    commands = {
        "compute-sanitizer": f"""while [ "$1" != --part ]; do shift; done
            echo "{{\\"awq_gemm\\": {{\\"simt\\": ${{2%/*}}, \\"part ${{2%/*}}\\": 1}}}}" >"$4"
            echo "========= ERROR SUMMARY: {errors} errors"; exit {code}""",
        # Not what checks the counts: it would take as long for each tool as all else together.
        "python3": f'[ "$1" = benchmarks/sanitize.py ] || exec {sys.executable} "$@"',
    }
    for name, text in commands.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "memcheck.0.counts").write_text("of another run")
    call = f'set -uo pipefail; PATH={tmp_path}:"$PATH"; OUT={tmp_path}; {function} sanitize'
    # As gpu.sh has it: the package that is tested, not what the current directory has.
    site = str(pathlib.Path(jax_awq.__file__).parents[1])
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": site}
    done = subprocess.run(
        ["bash", "-c", call],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (code != 0), done.stdout + done.stderr
    assert f"synccheck, part 3: {errors} errors, exit code {code}" in done.stdout
    result = json.loads((tmp_path / "sanitizers.json").read_text())
    parts = [{"errors": errors, "exit_code": code}] * 4
    assert result["tools"] == dict.fromkeys(TOOLS, parts)
    variants = {"simt": 0 + 1 + 2 + 3, **{f"part {part}": 1 for part in range(4)}}
    assert result["ran"] == {tool: {"awq_gemm": variants} for tool in TOOLS}
    assert result["build_info"] == _ffi.build_info()


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/results/*/sanitizers.json")), ids=str)
def test_committed_result(file):
    """Nothing was found, by any tool; each ran the same, and every variant that it counts."""
    result = json.loads(file.read_text())
    assert set(result["tools"]) == set(TOOLS)
    for parts in result["tools"].values():
        assert parts == [{"errors": 0, "exit_code": 0}] * 4
    if "ran" in result:  # results before that have no counts
        assert set(result["ran"]) == set(TOOLS)
        first, *others = result["ran"].values()
        assert others == [first] * 3
        assert {"awq_gemm", "awq_gemm_w4a8", "int8_matmul, int4_matmul", "conversions"} < set(first)
        for ran in first.values():
            assert ran
            assert min(ran.values()) > 0
