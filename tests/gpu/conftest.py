import os

# Before JAX is asked for its devices: several processes, and programs that a test starts, share one
# GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest


@pytest.fixture
def force(monkeypatch):
    """Forces a kernel variant for the rest of a test."""
    return lambda variant: monkeypatch.setenv("JAX_AWQ_FORCE", variant)
