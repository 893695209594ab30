"""Runs `pytest -m gpu` and records what came out.

    python benchmarks/record_gpu_tests.py benchmarks/results/nvidia_h100/gpu_tests.json [pytest ...]

Further arguments go to pytest. Exits as pytest does. Interrupted or terminated, it records the
tests that were done, with pytest's exit code for that, 2.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Outcomes:
    """A plugin of pytest that keeps what became of each test as it is reported."""

    def __init__(self) -> None:
        self.of_tests: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        outcome: str = report.outcome
        if report.passed and report.when != "call":
            return
        if report.failed and report.when != "call":
            outcome = "error"
        self.of_tests[report.nodeid] = outcome
        if not report.passed:
            self.messages[report.nodeid] = _message(report)[:500]

    def summary(self) -> dict[str, Any]:
        """Counts by outcome, and the tests that did not pass."""
        every = self.of_tests.values()
        counts = {
            name: sum(outcome == name for outcome in every)
            for name in ("passed", "failed", "error", "skipped")
        }
        return {
            "counts": counts,
            "seconds": round(self.seconds, 1),
            "failures": self._told("failed", "error"),
            "skipped": self._told("skipped"),
        }

    def _told(self, *outcomes: str) -> list[dict[str, str]]:
        return [
            {"test": test, "message": self.messages[test]}
            for test, outcome in self.of_tests.items()
            if outcome in outcomes
        ]


def _message(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # file, line and reason of a skip
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr) if crash is None else crash.message


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    file, *more = arguments
    path = Path(file).resolve()
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes = Outcomes()
    code = int(pytest.main(["-m", "gpu", *more], plugins=[outcomes]))
    # Only now: JAX takes most of a GPU's memory as soon as it is asked which one there is.
    from jax_awq.bench.report import environment

    summary = outcomes.summary()
    result = environment() | {
        "command": f"pytest {' '.join(['-m gpu', *more])}",
        "exit_code": code,
        **summary,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{file}: {summary['counts']}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
