"""The benchmark: what its programs compile to, and its files and tables. Nothing is timed here."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_awq
from jax_awq import problems
from jax_awq.bench import impls, report, run, timing
from jax_awq.bench.__main__ import main

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


def program(name, *, calls, iterations, copies=3):
    weights = impls.weights(name, CASE, copies)
    x = impls.make_x(jax.random.key(1), CASE)
    loop = timing.chained_loop(impls.IMPLS[name].op, calls, iterations)
    return loop, x, weights


@pytest.mark.parametrize("name", impls.IMPLS)
def test_every_call_stays_in_the_loop(name):
    loop, x, weights = program(name, calls=18, iterations=5)
    text = jax.jit(loop).lower(x, weights).compile().as_text()
    computations = {
        found[1]: found[0]
        for found in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?^}", text, re.M | re.S)
    }

    def dots(computation, seen=()):
        """Products that one run of a computation makes, loops counted once."""
        body = computations[computation]
        called = re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", body)
        return len(re.findall(r" dot\(", body)) + sum(map(dots, called))

    (body,) = re.findall(r"body=%?([\w.\-]+)", text)
    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.M)
    assert dots(body) == 18  # none merged, though a weight comes back six times
    assert dots(entry) == 18  # and none made outside
    assert '"known_trip_count":{"n":"5"}' in text
    if name != "xla_dense":  # unpacking is not moved out of the loop: no dense weight enters it
        (loop_state,) = re.findall(r"= \((.*?)\) while\(", text)
        assert "f16[256,128]" not in loop_state


def test_our_op_is_one_custom_call_each():
    loop, x, weights = program("jax_awq", calls=16, iterations=2)
    if jax_awq.plan("awq_gemm", x, *weights[0], device="sm_90").route == "reference":
        pytest.skip("the compiled part of jax_awq is not there")
    lowered = jax.jit(loop).trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@jax_awq.awq_gemm(") in (1, 16)  # calls of one function, or inlined


def test_implementations_agree():
    x = impls.make_x(jax.random.key(2), CASE)
    (packed,) = impls.weights("jax_awq", CASE, 1)
    ours = np.asarray(impls.IMPLS["jax_awq"].op(x, *packed), np.float32)
    unpacked = np.asarray(impls.xla_unpack(x, *packed), np.float32)
    dense = jnp.dot(x, jax_awq.awq_dequantize(*packed))
    np.testing.assert_allclose(unpacked, ours, rtol=0, atol=2e-3 * np.abs(ours).max())
    np.testing.assert_allclose(dense, ours, rtol=0, atol=2e-3 * np.abs(ours).max())


def test_weights_are_distinct_and_random():
    for name in impls.IMPLS:
        first, second = impls.weights(name, CASE, 2)
        for a, b in zip(first, second, strict=True):
            assert len(np.unique(np.asarray(a))) > 30
            assert not (a == b).all()


def test_copies_exceed_the_cache():
    assert timing.copies_for(8.7e6, timing.MIN_WEIGHT_BYTES) == 28
    assert timing.copies_for(470e6, timing.MIN_WEIGHT_BYTES) == timing.MIN_COPIES


def test_floor():
    packed = 256 * 128 // 2 + 2 * 128 * 2 + 2 * 128 // 2
    x_and_y = 4 * (256 + 128) * 2
    assert run.floor_us("xla_unpack", CASE) == pytest.approx((packed + x_and_y) / 4.6e6)
    assert run.floor_us("xla_dense", CASE) == pytest.approx((256 * 128 * 2 + x_and_y) / 4.6e6)


def test_command_line(tmp_path, capsys):
    file = tmp_path / "results" / "awq_gemm.json"
    command = [
        "awq_gemm",
        "--shapes",
        "256x128",
        "--dtypes",
        "float16",
        "--repeats",
        "1",
        "--min-weight-mb",
        "0",
        "--json",
        str(file),
    ]
    assert main([*command, "--m", "1", "2"]) == 0
    assert main([*command, "--m", "2", "--impls", "xla_dense", "--merge"]) == 0
    captured = capsys.readouterr()
    assert "K=256 N=128 M=2 float16 jax_awq: " in captured.err
    result = json.loads(file.read_text())
    assert {"build_info", "device", "driver", "jax", "date", "ceilings", "method"} <= set(result)
    assert [(row["M"], row["impl"]) for row in result["rows"]] == [
        (m, impl) for m in (1, 2) for impl in impls.IMPLS
    ]
    for row in result["rows"]:
        assert row.keys() == ROW.keys()
        assert row["us"] > 0
    assert main(["table", str(file)]) == 0
    assert "**K=256, N=128**, float16, group_size 128, us" in capsys.readouterr().out


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


def test_shapes_are_checked(capsys):
    with pytest.raises(SystemExit):
        main(["awq_gemm", "--shapes", "256"])
    assert "'256' is neither KxN nor one of" in capsys.readouterr().err


def test_problems():
    named = {tuple(problems.PROBLEMS[name]) for name in problems.BENCH_PROBLEMS}
    assert named == {(4096, 4096), (14336, 4096), (4096, 28672), (8192, 28672), (2048, 5120)}
    assert problems.BENCH_ROWS[0] == 1
    assert problems.BENCH_ROWS[-1] == 8192
    assert all(p.k % 128 == 0 and p.n % 8 == 0 for p in problems.PROBLEMS.values())


def test_gpu_tests_are_counted(tmp_path):
    path = Path(__file__).parents[1] / "benchmarks" / "record_gpu_tests.py"
    spec = importlib.util.spec_from_file_location("record_gpu_tests", path)
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    (tmp_path / "report.xml").write_text("""<testsuites><testsuite>
        <testcase classname="tests.a" name="good" time="1.5"/>
        <testcase classname="tests.a" name="bad"><failure message="wrong bits"/></testcase>
        <testcase classname="tests.a" name="broken"><error message="no device"/></testcase>
        <testcase classname="tests.a" name="left"><skipped message="sm_75"/></testcase>
        </testsuite></testsuites>""")
    assert recorder.read(tmp_path / "report.xml") == {
        "counts": {"passed": 1, "failed": 1, "error": 1, "skipped": 1},
        "seconds": 1.5,
        "failures": [
            {"test": "tests.a::bad", "message": "wrong bits"},
            {"test": "tests.a::broken", "message": "no device"},
        ],
        "skipped": [{"test": "tests.a::left", "message": "sm_75"}],
    }
