"""Runs `pytest -m gpu` and records what came out.

    python benchmarks/record_gpu_tests.py benchmarks/results/nvidia_h200/gpu_tests.json [pytest ...]

Further arguments go to pytest. Exits as pytest does.
"""

import collections
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    file, *more = arguments
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "gpu", f"--junitxml={report}", *more]
        done = subprocess.run([sys.executable, "-m", "pytest", *command], cwd=ROOT, check=False)
        if not report.exists():
            print("pytest wrote no report", file=sys.stderr)
            return done.returncode or 1
        outcomes = read(report)
    # Only now: JAX takes most of a GPU's memory as soon as it is asked which one there is.
    from jax_awq.bench.report import environment

    result = environment() | {
        "command": f"pytest {' '.join(['-m gpu', *more])}",
        "exit_code": int(done.returncode),
        **outcomes,
    }
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{file}: {outcomes['counts']}")
    return int(done.returncode)


def read(report: Path) -> dict[str, Any]:
    """Counts by outcome, and the tests that did not pass, from a JUnit file."""
    counts: collections.Counter[str] = collections.Counter(passed=0, failed=0, error=0, skipped=0)
    failures, skips, seconds = [], [], 0.0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds += float(case.get("time", 0))
        outcome = "passed"
        for tag, meaning in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            found = case.find(tag)
            if found is not None:
                outcome = meaning
                entry = {"test": name, "message": (found.get("message") or "")[:500]}
                (skips if tag == "skipped" else failures).append(entry)
        counts[outcome] += 1
    return {
        "counts": dict(counts),
        "seconds": round(seconds, 1),
        "failures": failures,
        "skipped": skips,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
