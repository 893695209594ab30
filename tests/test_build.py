"""The installed extension belongs to this tree and keeps the promises of the build."""

import ctypes
import hashlib
import importlib
import pathlib
import re
import sys
import tomllib

import jax
import pytest

import jax_awq
from jax_awq._primitive import OPS
from jax_awq.bench import impls

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(jax_awq.__file__).parent

if not (ROOT / "src/ffi/ops.def").exists():
    pytest.skip("the sources of the extension are not beside the tests", allow_module_level=True)
if PACKAGE == ROOT / "jax_awq" and not list(PACKAGE.glob("_ext*")):
    pytest.skip("jax_awq is imported from a tree where _ext is not built", allow_module_level=True)

_ext = importlib.import_module("jax_awq._ext")
INFO = jax_awq.build_info()

needs_cuda_build = pytest.mark.skipif(not INFO["cuda"], reason="built with JAX_AWQ_CUDA=OFF")


def source_hash(root: pathlib.Path) -> str:
    """As a shell prints it: find src -type f | LC_ALL=C sort | xargs sha256sum | sha256sum."""
    files = sorted(str(p.relative_to(root)) for p in root.glob("src/**/*") if p.is_file())
    lines = (f"{hashlib.sha256((root / f).read_bytes()).hexdigest()}  {f}\n" for f in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def declared_ops() -> list[tuple[str, str]]:
    text = (ROOT / "src/ffi/ops.def").read_text()
    return re.findall(r"^JAX_AWQ_OP\((\w+), (\w+)\)$", text, re.MULTILINE)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_extension_was_built_from_this_source():
    assert INFO["source_hash"] == source_hash(ROOT), "src/ changed since jax_awq was installed"


def test_version_has_one_source():
    assert INFO["version"] == project()["project"]["version"]


def test_headers_are_not_newer_than_the_running_jaxlib():
    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:3])

    assert numbers(INFO["jaxlib_headers"]) <= numbers(jax.lib.__version__)


def test_build_requires_the_oldest_supported_jaxlib():
    config = project()
    oldest = [d for d in config["project"]["dependencies"] if d.startswith("jaxlib")]
    headers = [d for d in config["build-system"]["requires"] if d.startswith("jaxlib")]
    assert [d.replace(">=", "==") for d in oldest] == headers


def test_ops_in_cpp_and_python_are_the_same():
    bench_only = ["copy", "read"]  # no ops of the library: nothing but a time comes of them
    same_kernels = "awq_gemm_w4a4"  # as awq_gemm_w4a8
    declared = [name for name, _ in declared_ops()]
    assert sorted([*declared, same_kernels]) == sorted([*OPS, *bench_only])


def test_benchmark_knows_the_launches_of_its_kernels():
    header = (ROOT / "src/kernels/memory.h").read_text()
    assert re.findall(r"kMemoryShapes = (\d+);", header) == [str(impls.LAUNCHES)]


def test_handlers_are_named_after_their_op():
    for name, handler in declared_ops():
        assert handler == "".join(word.capitalize() for word in name.split("_")) + "Handler"


def test_xla_may_record_every_op_into_a_cuda_graph():
    for name, handler in declared_ops():
        text = (ROOT / f"src/ffi/{name}.cc").read_text()
        definition = re.search(rf"XLA_FFI_DEFINE_HANDLER\w*\(\s*{handler}\b.*?\);", text, re.S)
        assert "kCmdBufferCompatible" in definition[0], name


@needs_cuda_build
def test_every_op_has_a_handler():
    targets = {f"jax_awq.{name}" for name, _ in declared_ops()}
    assert set(_ext.registrations()) == targets


@needs_cuda_build
def test_build_info_describes_the_device_code():
    assert re.fullmatch(r"\d+\.\d+\.\d+", INFO["nvcc"])
    assert INFO["architectures"]
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", a) for a in INFO["architectures"])


@pytest.mark.skipif(INFO["cuda"], reason="built with CUDA")
def test_build_without_cuda_is_empty_of_device_code():
    assert _ext.registrations() == {}
    assert INFO["architectures"] == []
    assert INFO["nvcc"] == ""


def test_extension_uses_the_stable_abi_where_there_is_one():
    tag = "abi3" if sys.version_info >= (3, 12) else "cpython-311"
    assert pathlib.Path(_ext.__file__).name.startswith(f"_ext.{tag}")


def test_no_handler_is_exported():
    """Two extensions in one process may define handlers of the same name."""
    library = ctypes.CDLL(_ext.__file__)
    assert hasattr(library, "PyInit__ext")
    assert not [handler for _, handler in declared_ops() if hasattr(library, handler)]


def test_driver_problem_is_one_sentence():
    problem = _ext.driver_problem()
    assert isinstance(problem, str)
    assert "\n" not in problem


@pytest.mark.parametrize("ptx_arch", [0, 75, 90])
@pytest.mark.parametrize("driver", [0, 13010, 13020, 14000])
def test_no_driver_or_one_as_new_as_the_toolkit_is_no_problem(driver, ptx_arch):
    assert _ext.driver_problem_of(driver=driver, toolkit=13010, ptx_arch=ptx_arch) == ""


@pytest.mark.parametrize("ptx_arch", [0, 75])
def test_driver_of_an_older_major_version(ptx_arch):
    assert _ext.driver_problem_of(driver=12090, toolkit=13000, ptx_arch=ptx_arch) == (
        "the NVIDIA driver supports CUDA 12.9, but jax_awq was built with CUDA 13.0: update the "
        "driver, or build jax_awq with a toolkit the driver supports"
    )


def test_driver_of_an_older_minor_version_runs_machine_code():
    assert _ext.driver_problem_of(driver=13000, toolkit=13020, ptx_arch=0) == ""


@pytest.mark.parametrize(("ptx_arch", "architecture"), [(75, "75-real"), (90, "90a-real")])
def test_driver_of_an_older_minor_version_compiles_no_ptx(ptx_arch, architecture):
    assert _ext.driver_problem_of(driver=13000, toolkit=13020, ptx_arch=ptx_arch) == (
        "the NVIDIA driver supports CUDA 13.0, but jax_awq was built with CUDA 13.2 and has only "
        f"PTX for the GPU's sm_{ptx_arch}, which the driver is too old to compile: update the "
        f"driver, or build jax_awq with JAX_AWQ_CUDA_ARCHITECTURES={architecture}"
    )


def test_ptx_runs_where_there_is_no_machine_code():
    built = [re.fullmatch(r"(sm|compute)_(\d+)\w?", a).groups() for a in INFO["architectures"]]
    real = [int(arch) for kind, arch in built if kind == "sm"]
    virtual = [int(arch) for kind, arch in built if kind == "compute"]
    for arch in (70, 75, 80, 86, 89, 90, 100, 103, 110, 120, 121):
        fits = any(r <= arch and r // 10 == arch // 10 for r in real)
        assert _ext.runs_from_ptx(arch) == (not fits and any(v <= arch for v in virtual)), arch


def plan_arguments(**changes) -> dict:
    arguments = {
        "m": 4, "n": 4096, "k": 4096, "batch": 1, "group_size": 128, "layout": "gemm",
        "x_dtype": "float16", "scales_dtype": "float16", "out_dtype": "float16",
        "has_zeros": True, "has_activation": False, "transpose": False, "split_k": 0,
        "variant": "", "arch": 90, "sm_count": 132,
    }  # fmt: skip
    return arguments | changes


def test_plan_of_the_extension():
    plan = _ext.plan_awq_gemm(**plan_arguments())
    assert set(plan) == {
        "variant", "tile", "split_k", "workspace_bytes", "microseconds", "refused",
    }  # fmt: skip
    assert plan["variant"] not in plan["refused"]
    assert all(plan["refused"].values())


@pytest.mark.parametrize(
    "changes", [{"layout": "gptq"}, {"x_dtype": "float64"}, {"variant": "no_such_kernel"}]
)
def test_plan_refuses_what_it_does_not_know(changes):
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        _ext.plan_awq_gemm(**plan_arguments(**changes))
