import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for contract.py, beside the tests

import jaxlib

# Before jax is imported: the sharding tests need a mesh, and a CPU can play eight devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Thousands of small programs run once each, and XLA's older code generator for CPUs compiles them
# in half the time. Later ones no longer know the flag, and do not start with it.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ and jaxlib.version.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
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


OPTIMIZATIONS = "jax_disable_most_optimizations"


def pytest_collection_modifyitems(items):
    if _cuda_devices():  # is tested, and timed, with the programs that users get
        return
    # LLVM would take longer to optimize programs than they run. What XLA makes of a program before
    # it generates code stays as it is.
    if OPTIMIZATIONS.upper() not in os.environ:
        jax.config.update(OPTIMIZATIONS, True)
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture
def optimized():
    """Programs as users have them: for tests that mostly compute, or whose bits depend on it."""
    before = jax.config.read(OPTIMIZATIONS)
    jax.config.update(OPTIMIZATIONS, False)
    if before:
        jax.clear_caches()  # another test may have compiled the same program
    yield
    jax.config.update(OPTIMIZATIONS, before)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
