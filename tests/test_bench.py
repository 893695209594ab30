"""The benchmark: what its programs compile to, and its files and tables. Nothing is timed here."""

import dataclasses
import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_awq
from jax_awq import problems
from jax_awq.bench import __main__ as bench
from jax_awq.bench import impls, plot, report, run, timing
from jax_awq.bench.__main__ import main
from jax_awq.testing import quantize_activation_numpy, unpack_bytes

CASE = impls.Case(m=4, k=256, n=128, group_size=128, dtype="float16")
ROW = {
    "op": "awq_gemm",
    "impl": "jax_awq",
    "M": 1,
    "N": 128,
    "K": 256,
    "group_size": 128,
    "dtype": "float16",
    "us": 2.0,
    "floor_us": 1.0,
}


OPTIONS = ["--shapes", "256x128", "--repeats", "1", "--min-weight-mb", "0", "--json"]
GEMM = {name: impl for name, impl in impls.IMPLS["awq_gemm"].items() if not impl.kernel}


def program(name, *, iterations, copies=3):
    weights = impls.weights(GEMM[name], CASE, copies)
    keys = jax.random.split(jax.random.key(1), timing.calls_for(copies) // copies)
    xs = [GEMM[name].make_x(key, CASE) for key in keys]
    return timing.chained_loop(GEMM[name].run, iterations), xs, weights


@pytest.mark.parametrize("name", GEMM)
def test_every_call_stays_in_the_loop(name):
    loop, xs, weights = program(name, iterations=5)
    text = jax.jit(loop).lower(xs, weights).compile().as_text()
    computations = {
        found[1]: found[0]
        for found in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?^}", text, re.M | re.S)
    }

    def dots(computation):
        """Products that one run of a computation makes, loops counted once."""
        body = computations[computation]
        called = re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", body)
        return len(re.findall(r" dot\(", body)) + sum(map(dots, called))

    (body,) = re.findall(r"body=%?([\w.\-]+)", text)
    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.M)
    assert dots(body) == 18  # none merged, though a weight comes back six times
    assert dots(entry) == 18  # and none made outside
    assert '"known_trip_count":{"n":"5"}' in text
    if not name.startswith(
        "xla_dense"
    ):  # unpacking is not moved out of the loop: no dense weight enters it
        (loop_state,) = re.findall(r"= \((.*?)\) while\(", text)
        assert "f16[256,128]" not in loop_state


def test_our_op_is_one_custom_call_each():
    loop, xs, weights = program("jax_awq", iterations=2, copies=16)
    if jax_awq.plan("awq_gemm", xs[0], *weights[0], device="sm_90").route == "reference":
        pytest.skip("the compiled part of jax_awq is not there")
    lowered = jax.jit(loop).trace(xs, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@jax_awq.awq_gemm(") in (1, 16)  # calls of one function, or inlined


def test_implementations_agree():
    x = impls.make_x(jax.random.key(2), CASE)
    (packed,) = impls.weights(GEMM["jax_awq"], CASE, 1)
    dense, unpacked = (
        np.asarray(impls.IMPLS["awq_dequantize"][name].run(x, *packed))
        for name in ("jax_awq", "xla_unpack")
    )
    np.testing.assert_array_equal(dense, unpacked)
    ours = np.asarray(GEMM["jax_awq"].run(x, *packed), np.float32)
    unpacked = np.asarray(GEMM["xla_unpack"].run(x, *packed), np.float32)
    dense = np.asarray(GEMM["xla_dense"].run(x, jnp.asarray(dense)), np.float32)
    np.testing.assert_allclose(unpacked, ours, rtol=0, atol=2e-3 * np.abs(ours).max())
    np.testing.assert_allclose(dense, ours, rtol=0, atol=2e-3 * np.abs(ours).max())


def test_weights_are_distinct_and_random():
    for impl in [*GEMM.values(), *impls.IMPLS["awq_dequantize"].values()]:
        first, second = impls.weights(impl, CASE, 2)
        assert sum(a.nbytes for a in first) == pytest.approx(impl.weight_bytes(CASE), rel=0.02)
        for a, b in zip(first, second, strict=True):
            assert len(np.unique(np.asarray(a))) > 30
            assert not (a == b).all()


def test_copies_exceed_the_cache():
    assert timing.copies_for(8.7e6, timing.MIN_WEIGHT_BYTES) == 28
    assert timing.copies_for(470e6, timing.MIN_WEIGHT_BYTES) == timing.MIN_COPIES


def test_floor():
    packed = 256 * 128 // 2 + 2 * 128 * 2 + 2 * 128 // 2
    x_and_y = 4 * (256 + 128) * 2
    assert run.floor_us("awq_gemm", "xla_unpack", CASE) == pytest.approx((packed + x_and_y) / 4.6e6)
    dense = 256 * 128 * 2
    assert run.floor_us("awq_gemm", "xla_dense", CASE) == pytest.approx((dense + x_and_y) / 4.6e6)
    for name in ("jax_awq", "copy", "xla_copy"):
        floor = run.floor_us("awq_dequantize", name, CASE)
        assert floor == pytest.approx((packed + dense) / 4.6e6)


def test_command_line(tmp_path, capsys):
    file = tmp_path / "results" / "awq_gemm.json"
    command = ["awq_gemm", *OPTIONS, str(file)]
    assert main([*command, "--m", "1", "2"]) == 0
    assert main([*command, "--m", "2", "--impls", "xla_dense", "--merge"]) == 0
    captured = capsys.readouterr()
    assert "K=256 N=128 M=2 bfloat16 jax_awq: " in captured.err
    result = json.loads(file.read_text())
    assert {"build_info", "device", "driver", "jax", "date", "ceilings", "method"} <= set(result)
    assert [(row["M"], row["impl"]) for row in result["rows"]] == [
        (m, name) for m in (1, 2) for name, impl in GEMM.items() if not impl.on_request
    ]
    for row in result["rows"]:
        assert row.keys() == ROW.keys()
        assert row["us"] > 0
    assert main(["table", str(file)]) == 0
    assert "**awq_gemm, K=256, N=128, group_size 128, bfloat16, us**" in capsys.readouterr().out


def test_command_line_of_dequantize(tmp_path):
    file = tmp_path / "awq_dequantize.json"
    assert main(["awq_dequantize", *OPTIONS, str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["op"], row["impl"], row["M"]) for row in rows] == [
        ("awq_dequantize", impl, 0) for impl in ("jax_awq", "xla_copy", "xla_unpack")
    ]


def test_command_line_of_w4a8(tmp_path):
    """Quantization is part of the call; a single group is asked for as -1."""
    file = tmp_path / "awq_gemm_w4a8.json"
    command = ["awq_gemm_w4a8", *OPTIONS, str(file), "--m", "2"]
    assert main(command) == 0
    assert main([*command, "--group-size", "-1", "--impls", "jax_awq", "--merge"]) == 0
    rows = json.loads(file.read_text())["rows"]
    names = ["awq_gemm", "jax_awq", "jax_awq_float8", "xla_dense"]
    assert sorted((row["group_size"], row["impl"]) for row in rows) == [
        (-1, "jax_awq"),
        *((128, name) for name in names),
    ]
    assert all(row.keys() == ROW.keys() for row in rows)
    one = dataclasses.replace(CASE, group_size=-1)
    assert one.packed_bytes == 256 * 128 // 2 + 128 * 2 + 128 // 2


def test_merge_keeps_no_rows_of_another_build(tmp_path):
    file = tmp_path / "old.json"
    dense = ROW | {"impl": "xla_dense"}
    top = report.environment() | {"ceilings": {}, "method": ""}
    ours = [ROW, ROW | {"op": "awq_gemm_w4a8", "impl": "awq_gemm"}]
    report.write(file, top, [*ours, dense])
    assert bench.kept(file, top) == [*ours, dense]
    assert bench.kept(file, top | {"build_info": {"version": "another"}}) == [dense]
    with pytest.raises(SystemExit, match="has device"):
        bench.kept(file, top | {"device": "another"})


def test_table():
    dense = ROW | {"impl": "xla_dense", "us": 5.0}
    assert report.markdown([dense, ROW, ROW | {"M": 2}]).splitlines()[2:] == [
        "| M | jax_awq | xla_dense | vs xla_dense | floor |",
        "|---:|---:|---:|---:|---:|",
        "| 1 | 2.0 | 5.0 | 2.50x | 1.0 |",
        "| 2 | 2.0 |  |  | 1.0 |",
    ]
    report.show([ROW])  # with rich or without


def test_merge_replaces_and_sorts():
    new = ROW | {"us": 3.0}
    assert report.merge([ROW | {"M": 8}, ROW], [new]) == [new, ROW | {"M": 8}]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("awq_gemm --shapes 256", "--shapes: '256' is neither KxN nor one of"),
        ("awq_gemm --shapes 0x64", "--shapes: K must be positive and N a positive multiple of 8"),
        ("awq_gemm --shapes 64x7", "--shapes: K must be positive and N a positive multiple of 8"),
        ("quantize_activation --shapes 0", "--shapes: must be an integer of 1 or more, got '0'"),
        ("awq_gemm --group-size 0", "--group-size: must be -1 or an integer of 1 or more, got '0'"),
        ("awq_gemm --shapes 192x64", "--group-size: must divide K=192, got 128"),
        ("decode --small --group-size 96", "--group-size: must divide K=256, got 96"),
        ("generate --group-size -1", "--group-size: must be an integer of 1 or more, got '-1'"),
        ("awq_gemm --repeats 0", "--repeats: must be an integer of 1 or more, got '0'"),
        ("awq_gemm --m 1 -1", "--m: must be an integer of 1 or more, got '-1'"),
        ("awq_gemm --m 0", "--m: must be an integer of 1 or more, got '0'"),
        ("awq_gemm --min-weight-mb nan", "--min-weight-mb: must be a number of 0 or more"),
        ("awq_gemm --min-weight-mb -1", "--min-weight-mb: must be a number of 0 or more"),
        ("awq_gemm --merge", "--merge: needs --json, the file to merge with"),
        ("awq_gemm --json /proc/version/a.json", "--json: /proc/version/a.json cannot be written"),
        ("decode --json /proc", "--json: /proc cannot be written: it is a folder"),
        ("plot a.json --out a.xyz", "--out: must end with .svg or .png, got a.xyz"),
        ("plot a.json --out /proc/version/a.svg", "--out: /proc/version/a.svg cannot be written"),
    ],
)
def test_arguments_are_checked(capsys, command, text):
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert f"argument {text}" in capsys.readouterr().err


def test_problems():
    named = {tuple(problems.PROBLEMS[name]) for name in problems.BENCH_PROBLEMS}
    assert named == {(4096, 4096), (14336, 4096), (4096, 28672), (8192, 28672), (2048, 5120)}
    assert problems.BENCH_ROWS[0] == 1
    assert problems.BENCH_ROWS[-1] == 8192
    assert all(p.k % 128 == 0 and p.n % 8 == 0 for p in problems.PROBLEMS.values())


def test_gpu_tests_are_counted_even_if_interrupted(tmp_path):
    (tmp_path / "test_some.py").write_text("""
import os
import signal
import pytest
pytestmark = pytest.mark.gpu

@pytest.fixture
def broken():
    raise RuntimeError("no device")

def test_good(): pass
def test_bad(): raise AssertionError("wrong bits")
def test_broken(broken): pass
def test_left(): pytest.skip("sm_75")
def test_cut_off(): os.kill(os.getpid(), signal.SIGTERM)
def test_never(): pass
""")
    recorder = Path(__file__).parents[1] / "benchmarks" / "record_gpu_tests.py"
    file = tmp_path / "gpu_tests.json"
    command = [sys.executable, str(recorder), str(file), "-q", "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert "source_hash" in result["build_info"]
    assert result["exit_code"] == 2
    assert result["counts"] == {"passed": 1, "failed": 1, "error": 1, "skipped": 1}
    told = [(entry["test"].split("::")[1], entry["message"]) for entry in result["failures"]]
    assert told == [
        ("test_bad", "AssertionError: wrong bits"),
        ("test_broken", "RuntimeError: no device"),
    ]
    assert [entry["message"] for entry in result["skipped"]] == ["Skipped: sm_75"]


def test_read_is_one_row_of_its_own(monkeypatch):
    """Timed once per weight, with the fastest launch; no GPU here, so its call is replaced."""
    launches = []

    def read(x, *weight, launch):
        launches.append(launch)
        return weight[0][:1, :1] ^ launch

    read_impl = dataclasses.replace(impls.IMPLS["awq_gemm"]["read"], run=read)
    monkeypatch.setitem(impls.IMPLS["awq_gemm"], "read", read_impl)
    (rows,) = run.run(
        "awq_gemm",
        [problems.Problem(256, 128)],
        [1, 2],
        ["float16"],
        ["read"],
        repeats=1,
        min_seconds=0.0,
        min_weight_bytes=0,
    )
    assert [(row["impl"], row["M"]) for row in rows] == [("read", 0)]
    assert set(launches) == set(range(impls.LAUNCHES))
    assert rows[0]["floor_us"] == round(CASE.packed_bytes / run.read_rate() * 1e6, 3)
    lines = report.overview([*rows, ROW], "float16").splitlines()
    assert lines[2] == f"| read | {rows[0]['us']:.1f} |"
    assert lines[3].startswith("| 1 |")


@pytest.mark.parametrize(
    ("op", "problem", "moved"),
    [
        ("awq_dequantize", (256, 128), CASE.packed_bytes + CASE.dense_bytes),
        ("quantize_activation", (256, 0), 128 * (256 * 3 + 4)),
    ],
)
def test_copy_moves_what_the_op_moves(monkeypatch, op, problem, moved):
    """Half of the bytes are read and half written, in every launch; no GPU here, as above."""
    seen = []

    def copy(x, a, *, launch):
        seen.append((launch, a.nbytes))
        return a + launch

    ours = impls.IMPLS[op]["copy"]
    monkeypatch.setitem(impls.IMPLS[op], "copy", dataclasses.replace(ours, run=copy))
    (rows,) = run.run(
        op,
        [problems.Problem(*problem)],
        [128] if ours.of_rows else [0],
        ["float16"],
        ["copy", "xla_copy"],
        repeats=1,
        min_seconds=0.0,
        min_weight_bytes=0,
    )
    assert [row["impl"] for row in rows] == ["copy", "xla_copy"]
    assert [row["floor_us"] for row in rows] == [round(moved / run.read_rate() * 1e6, 3)] * 2
    assert {launch for launch, _ in seen} == set(range(impls.LAUNCHES))
    assert [2 * size for _, size in seen] == pytest.approx([moved] * len(seen), rel=0.01)


def test_copy_is_one_custom_call():
    """Of a result like its operand, which is all it takes."""
    x, a = jnp.zeros((1, 8), jnp.float16), jnp.zeros((3, 8), jnp.bfloat16)
    traced = jax.jit(functools.partial(impls.copy, launch=2)).trace(x, a)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = re.findall(r"custom_call @jax_awq.copy.*", text)
    assert "shape = 2 : i64" in call
    assert call.endswith("(tensor<3x8xbf16>) -> tensor<3x8xbf16>")


@pytest.mark.parametrize(
    ("op", "name"),
    [("awq_gemm", "read"), ("awq_dequantize", "copy"), ("quantize_activation", "copy")],
)
def test_kernels_of_the_benchmark_run_where_ours_do(monkeypatch, op, name):
    others = [n for n, i in impls.IMPLS[op].items() if not (i.on_request or i.kernel)]
    monkeypatch.setattr(bench, "kernels_run", lambda: True)
    assert sorted(bench._impls(op, None)) == sorted([*others, name])
    assert bench._impls(op, [name]) == [name]
    monkeypatch.setattr(bench, "kernels_run", lambda: False)
    assert bench._impls(op, None) == others
    assert bench._impls(op, ["jax_awq"]) == ["jax_awq"]
    with pytest.raises(SystemExit, match=f"--impls {name} needs a CUDA device and the kernels"):
        bench._impls(op, ["jax_awq", name])


def test_efficiency_is_the_limit_over_the_time():
    # Bytes decide: 256 x 128 codes, scales, zeros, x and y.
    small = ROW | {"us": 4.0, "read_bytes_per_second": 4.6e12}
    moved = 256 * 128 // 2 + 2 * 128 * 2 + 2 * 128 // 2 + (256 + 128) * 2
    large = small | {"M": 1 << 20, "us": 200.0}
    other = ROW | {"impl": "xla_dense", "dtype": "bfloat16"}
    unknown = ROW | {"impl": "read", "M": 0}
    lines = plot.efficiency([large, small, other, unknown], [(256, 128)], "float16")
    ((first, second),) = lines[256, 128].values()
    assert first == (1, pytest.approx(moved / 4.6e12 * 1e6 / 4.0))
    moved_by_large = (2 << 20) * (256 + 128) + moved - (256 + 128) * 2
    assert second == (1 << 20, pytest.approx(moved_by_large / 4.6e12 * 1e6 / 200.0))


def test_plot_of_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib")
    results = Path(__file__).parents[1] / "benchmarks/results"
    names = "nvidia_h200/awq_gemm.json", "nvidia_h200/peers.json"
    files = [str(results / name) for name in names]
    assert main(["plot", *files, "--out", str(tmp_path / "a.svg"), "--note", "a note"]) == 0
    text = (tmp_path / "a.svg").read_text()
    for word in ("jax_awq", "xla_unpack", "marlin", "K = 8192, N = 28672", "a note"):
        assert word in text
        assert word in (results / "nvidia_h200/efficiency.svg").read_text() or word == "a note"


def test_what_has_no_rows_is_no_plot_and_no_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "a.json"
    content = {"ceilings": {"read_bytes_per_second": 1.0}, "rows": [ROW]}
    file.write_text(json.dumps(content))
    for command, text in (
        (["table", str(file), "--overview", "junk"], "--overview: .*no rows of dtype 'junk'"),
        (
            ["plot", str(file), "--out", str(tmp_path / "a.svg"), "--shapes", "8x8"],
            "plot: no float16 row of 8x8 with group size 128",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "a.svg").exists()


def test_plot_of_what_was_timed_nobody_knows_where(tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text('{"device": "cpu", "rows": []}')
    with pytest.raises(SystemExit, match="2"):
        main(["plot", str(file), "--out", str(tmp_path / "a.svg")])
    assert 'a.json has no "ceilings"' in capsys.readouterr().err


@pytest.mark.parametrize("command", ["table", "plot", "merge"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "a.json cannot be read: No such file"),
        ("not JSON", "a.json is not JSON: "),
        ("{}", 'a.json must be a JSON object with a list of objects in "rows"'),
        ("[]", "a.json must be a JSON object"),
        ('{"rows": [3]}', "a.json must be a JSON object"),
        ('{"rows": [{}], "ceilings": {"read_bytes_per_second": 1.0}}', 'row 0 must have "op"'),
        ('{"rows": [{"op": "decode"}]}', "row 0 must have \"impl\", got ['op']"),
        ('{"rows": [{"op": ["a"]}]}', "row 0 must have \"impl\", got ['op']"),
    ],
)
def test_files_that_are_no_results(tmp_path, capsys, command, content, text):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    elif command == "merge":
        pytest.skip("the first run of many")
    arguments = {
        "table": ["table", str(file)],
        "plot": ["plot", str(file), "--out", str(tmp_path / "a.svg")],
        "merge": ["awq_gemm", *OPTIONS, str(file), "--m", "1", "--merge"],
    }
    with pytest.raises(SystemExit) as caught:
        main(arguments[command])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    if content is not None and "rows" in content and text not in told:
        # Two commands ask first for what describes the whole file.
        text = {"plot": 'has no "ceilings"', "merge": 'has no "device"'}[command]
    assert text in told


def test_quantize_activation(tmp_path):
    """Every M has activations of its own, and all of an implementation's results are waited for."""
    file = tmp_path / "quantize.json"
    command = ["quantize_activation", "--shapes", "256", "--m", "8", "16", "--repeats", "1"]
    assert main([*command, "--min-weight-mb", "0", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {(row["impl"], row["M"]) for row in rows} == {
        (name, m)
        for name, impl in impls.IMPLS["quantize_activation"].items()
        for m in (8, 16)
        if not impl.kernel
    }
    case = impls.Case(m=128, k=256, n=0, group_size=0, dtype="float16")
    for name, impl in impls.IMPLS["quantize_activation"].items():
        ((a,),) = impls.weights(impl, case, 1)
        assert a.nbytes == pytest.approx(impl.weight_bytes(case), rel=0.02)
        if name not in ("copy", "xla_copy"):
            codes, _ = quantize_activation_numpy(a, bits=4 if name == "jax_awq_int4" else 8)
            result = impl.run(None, a)
            got = result[0] if name == "xla" else unpack_bytes(result.q, result.bits, 256)
            assert (got != codes).sum() <= 2  # XLA divides, which moves a tie


def test_problems_of_the_sanitizers_are_valid(rng, monkeypatch):
    """Nobody learns on a GPU alone that one of them cannot be made."""
    for name in ("XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")  # the script sets them for itself
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/sanitize.py"))
    for row in script["PRODUCTS"]:
        assert script["product_problem"](rng, *row).weight.shape == row[1:3]
    for row in script["W4A8_PRODUCTS"]:
        for codes in script["CODES"]:
            assert script["w4a8_problem"](rng, *row, codes).base.weight.shape == row[1:3]
