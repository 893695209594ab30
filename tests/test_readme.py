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


@pytest.mark.parametrize(
    ("op", "above", "impls", "lines"),
    [
        ("awq_gemm", "Other weights, ", ["jax_awq", "xla_dense"], 10),
        (
            "awq_gemm_w4a8",
            "`awq_gemm_w4a8` with the rounding ",
            ["jax_awq", "awq_gemm", "jax_awq_float8", "xla_dense"],
            8,
        ),
    ],
)
def test_table_of_weights_is_the_committed_result(op, above, impls, lines):
    file = ROOT / f"benchmarks/results/nvidia_h200/{op}.json"
    us = {
        (row["M"], f"{row['K']} x {row['N']}", row["impl"]): row["us"]
        for row in json.loads(file.read_text())["rows"]
        if (row["op"], row["dtype"], row["group_size"]) == (op, "float16", 128)
    }
    table = re.search(rf"^{above}.*\n\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M)
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()
    ]
    assert len(rows) == lines
    for first, *cells in rows:
        m, told = (0, ["read"]) if first == "read" else (int(first), impls)
        for weight, cell in zip(head[1:], cells, strict=True):
            # To a tenth, and from 100 on to one.
            want = [round(u, 1) if u < 100 else round(u) for u in (us[m, weight, i] for i in told)]
            assert [float(number) for number in cell.split(" / ")] == want, (first, weight)
