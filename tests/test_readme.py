"""The code in README.md runs, and its figures are those of the committed results."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from jax_awq.bench import report
from jax_awq.verify import schemes

ROOT = pathlib.Path(__file__).parents[1]


def test_usage_runs(monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    assert blocks
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    exec("".join(blocks), scope)
    printed = capsys.readouterr().out
    comments = re.findall(r"^print\(.*\n# (.*\n)", "".join(blocks), re.M)
    outputs = re.findall(r"^```\n\n```text\n(.*?)^```", readme, re.M | re.S)
    assert comments
    assert outputs
    assert all(f"\n{text}" in f"\n{printed}" for text in comments + outputs)
    assert scope["y"].shape == (2, 24, 1536)
    assert scope["w"].shape == scope["gate"].shape
    assert scope["dx"].shape == scope["x"].shape
    assert scope["ids"].shape == (1, 23)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, scope["again"], scope["params"]))


def test_table_of_schemes_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/cpu/verify.json").read_text())
    assert result["exceeded"] == []
    table = schemes.markdown(result["summary"], result["perplexity"])
    assert f"\n{table}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_performance_table_is_the_committed_result(dtype):
    file = ROOT / "benchmarks/results/nvidia_h200/awq_gemm.json"
    table = report.overview(json.loads(file.read_text())["rows"], dtype)
    assert table.count("\n") == 17  # reading, and 1 to 8192 rows of x
    assert table in (ROOT / "README.md").read_text()


def test_table_of_other_weights_is_the_committed_result():
    file = ROOT / "benchmarks/results/nvidia_h200/awq_gemm.json"
    us = {
        (row["M"], f"{row['K']} x {row['N']}", row["impl"]): row["us"]
        for row in json.loads(file.read_text())["rows"]
        if (row["op"], row["dtype"], row["group_size"]) == ("awq_gemm", "float16", 128)
    }
    table = re.search(
        r"^Other weights, .*\n\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M
    )
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()
    ]
    assert len(lines) == 10
    for first, *cells in lines:
        for weight, cell in zip(head[1:], cells, strict=True):
            m, impls = (0, ["read"]) if first == "read" else (int(first), ["jax_awq", "xla_dense"])
            want = [us[m, weight, impl] for impl in impls]
            told = [float(number) for number in cell.split(" / ")]
            # To a tenth, and from 100 on to one.
            assert told == [round(u, 1) if u < 100 else round(u) for u in want], (first, weight)
