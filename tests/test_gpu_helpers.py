"""What the tests on a GPU judge by, where there is none."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import variants
from gpu.thunks import as_executed, calls_in_command_buffers
from gpu.variants import between_others, run_twice, surrounded

THUNKS = """001: kKernel       \tfusion
002: kCommandBuffer\t
  003: kCustomCall\tawq_gemm.1
  004: kWhile     \t
condition:
    005: kKernel\t
body:
    006: kCustomCall\tawq_gemm.2
007: kCustomCall   \tawq_gemm.3
008: kWhile        \t
body:
  009: kCustomCall   \tawq_gemm.4
  010: kCommandBuffer\t
    011: kCustomCall\tawq_gemm.5
"""


def test_custom_calls_in_command_buffers(tmp_path):
    assert calls_in_command_buffers(THUNKS) == [True, True, False, False, True]
    assert calls_in_command_buffers("No thunks.") == []
    file = tmp_path / "module_0001.jit_f.thunk_sequence.txt"
    assert as_executed(file) == file
    changed = tmp_path / "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt"
    changed.touch()
    assert as_executed(file) == changed


@pytest.mark.parametrize(
    ("addresses", "found"),
    [
        ([0, 256, 512, 768, 1024], [256, 768]),
        ([1024, 512, 0, 256, 768, 1280], [256, 768]),
        ([0, 256, 512, 1024, 1280], [256]),
        ([0, 512, 1024, 1536], []),
        ([0, 300, 600], []),
        ([0], []),
        ([], []),
    ],
)
def test_what_has_others_on_both_sides(addresses, found):
    assert between_others(addresses, 256) == found


def test_results_of_two_runs_are_compared():
    like = np.zeros((3, 5), np.float32)
    (y,) = run_twice(lambda x: x, (like,), like)
    assert y.tobytes() == like.tobytes()
    runs = iter((like, like + 1))
    with pytest.raises(AssertionError):
        run_twice(lambda: next(runs), (), like)


@pytest.mark.parametrize("lies", [True, False])
def test_guarded_results_have_to_lie_between_guards(monkeypatch, lies):
    like, tries = np.zeros(64, np.int32), []

    def holds(self, result):
        tries.append(result)
        return lies and len(tries) == 3

    monkeypatch.setattr(variants.Surroundings, "holds", holds)
    if not lies:
        with pytest.raises(AssertionError, match="16 times a result was not where guards are"):
            surrounded(lambda _: like, like, guarded=True)
        assert len(tries) == 16
    else:
        surrounded(lambda _: like, like, guarded=True)
        assert len(tries) == 3
    tries.clear()
    surrounded(lambda _: like, like)
    assert not tries


@pytest.mark.parametrize("at", [0, 512, 1024, 1536])
def test_bytes_beside_a_result_are_compared(monkeypatch, at):
    """Seven arrays that are said to lie side by side: on a CPU they lie anywhere."""
    memory: dict[int, int] = {}  # address that is told -> where the array is
    told: dict[int, int] = {}

    def address(array):
        start = told.setdefault(id(array), 256 * len(told))
        memory.setdefault(start, array.unsafe_buffer_pointer())
        return start

    monkeypatch.setattr(variants, "address", address)
    monkeypatch.setattr(jax, "device_put", lambda a: jnp.array(a, copy=True))
    around = variants.Surroundings(np.zeros(64, np.float32), np.zeros(0, np.float32))
    assert sorted(memory) == [0, 256, 512, 768, 1024, 1280, 1536]
    result = jnp.zeros(64)
    for start in memory:
        told[id(result)] = start
        assert around.holds(result) == (start in (256, 768, 1280))
    around.assert_untouched()
    ctypes.memset(memory[at] + 255, 0, 1)
    with pytest.raises(
        AssertionError, match=r"bytes beside a result of shape \(64,\) were written"
    ):
        around.assert_untouched()
