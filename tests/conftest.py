import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for contract.py, beside the tests

# Before jax is imported: the sharding tests need a mesh, and a CPU can play eight devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import pytest
from hypothesis import settings

# Every example compiles a program, so the default deadline of 200 ms is noise.
settings.register_profile("jax_awq", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("jax_awq")


def _cuda_devices():
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _cuda_devices():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture
def rng():
    return np.random.default_rng(0)
