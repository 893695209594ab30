"""What is lowered for CUDA, seen on a machine without a GPU, and what `plan` says of it."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import OF_OPS
from contract_case import K, N, auto_mesh
from jax import export
from jax.sharding import PartitionSpec as P

import jax_awq
from jax_awq import (
    AWQWeight,
    KernelPlan,
    _ffi,
    _plan,
    awq_dequantize,
    awq_gemm,
    build_info,
    int8_matmul,
    plan,
)
from jax_awq.testing import random_problem, random_weight

WORKSPACE = 4096


@pytest.fixture
def planned(monkeypatch):
    """Stands in for the compiled planning code, and collects what it is asked."""
    asked = []

    def plan_awq_gemm(**kwargs):
        asked.append(kwargs)
        return {
            "variant": kwargs["variant"] or "mma_32",
            "tile": (32, 128),
            "split_k": 2,
            "workspace_bytes": WORKSPACE,
            "refused": {"decode": "more than 16 rows of x"},
        }

    monkeypatch.setattr(
        _ffi, "_ext", types.SimpleNamespace(plan_awq_gemm=plan_awq_gemm, driver_problem=lambda: "")
    )
    return asked


def lowered(fn, *args, platforms=("cuda",)):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=platforms).as_text()


def custom_calls(text):
    return [line.strip() for line in text.splitlines() if "@jax_awq." in line]


def attributes(call):
    inside = re.search(r"mhlo.backend_config = \{(.*?)\}", call)[1]
    return dict(item.split(" = ", 1) for item in inside.split(", "))


@pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])
def test_one_custom_call_with_its_workspace(rng, planned, layout):
    p = random_problem(rng, 20, K, N, group_size=32, layout=layout, bias=True)
    (call,) = custom_calls(
        lowered(
            lambda x, w, b: awq_gemm(x, w, bias=b, activation="silu", split_k_iters=4),
            p.x,
            p.weight,
            p.bias,
        )
    )
    assert "@jax_awq.awq_gemm(" in call
    assert attributes(call) == {
        "activation": '"silu"',
        "group_size": "32 : i64",
        "split_k": "4 : i64",
        "layout": '"gemm"' if layout == "gemm" else '"oc_major"',
        "transpose": "false",
        "batch_invariant": "false",
        "variant": '""',
    }
    qweight = f"tensor<{K}x{N // 8}xi32>" if layout == "gemm" else f"tensor<{N}x{K // 8}xi32>"
    assert call.endswith(
        f": (tensor<20x{K}xf16>, {qweight}, tensor<2x{N}xf16>, tensor<2x{N // 8}xi32>, "
        f"tensor<{N}xf16>) -> (tensor<20x{N}xf16>, tensor<{WORKSPACE}xui8>)"
    )
    assert planned[-1] == {
        "m": 20,
        "n": N,
        "k": K,
        "batch": 1,
        "group_size": 32,
        "layout": "gemm" if layout == "gemm" else "oc_major",
        "x_dtype": "float16",
        "scales_dtype": "float16",
        "out_dtype": "float16",
        "has_zeros": True,
        "has_activation": True,
        "transpose": False,
        "split_k": 4,
        "batch_invariant": False,
        "variant": "",
        "arch": 90,
        "sm_count": 132,
    }


@pytest.mark.usefixtures("planned")
class TestCustomCalls:
    def test_typed_api_in_hlo(self, rng):
        p = random_problem(rng, 20, K, N, group_size=32)
        text = (
            jax.jit(lambda x, w: x @ w)
            .trace(p.x, p.weight)
            .lower(lowering_platforms=("cuda",))
            .compiler_ir("hlo")
            .as_hlo_text()
        )
        assert text.count("api_version=API_VERSION_TYPED_FFI") == 1

    def test_absent_operands_are_empty(self, rng):
        p = random_problem(rng, 20, K, N, group_size=-1, symmetric=True, dtype=jnp.bfloat16)
        (call,) = custom_calls(lowered(lambda x, w: x @ w, p.x, p.weight))
        assert f"tensor<1x{N}xbf16>, tensor<0xi32>, tensor<0xbf16>) ->" in call
        assert attributes(call)["group_size"] == f"{K} : i64"

    def test_batch_invariant_and_its_gradient(self, rng):
        p = random_problem(rng, 20, K, N, group_size=32)

        def loss(x, w):
            y = awq_gemm(x, w, deterministic="batch_invariant")
            return (y.astype(jnp.float32) ** 2).sum()

        product, gradient = custom_calls(lowered(jax.grad(loss), p.x, p.weight))
        for call, transpose in ((product, "false"), (gradient, "true")):
            assert attributes(call)["batch_invariant"] == "true"
            assert attributes(call)["transpose"] == transpose

    def test_gradient_is_the_transposed_product(self, rng):
        p = random_problem(rng, 20, K, N, group_size=32)
        (call,) = custom_calls(
            lowered(jax.grad(lambda x, w: (x @ w).astype(jnp.float32).sum()), p.x, p.weight)
        )
        assert attributes(call)["transpose"] == "true"
        assert f"-> (tensor<20x{K}xf16>," in call

    def test_vmap_over_x_folds_into_rows(self, rng):
        p = random_problem(rng, (3, 4), K, N, group_size=32)
        (call,) = custom_calls(lowered(jax.vmap(lambda x: x @ p.weight), p.x))
        assert f": (tensor<12x{K}xf16>," in call

    def test_vmap_over_weights_is_a_batch_of_the_kernel(self, rng):
        p = random_problem(rng, 20, K, N, group_size=32)
        stacked = random_weight(rng, K, N, group_size=32, batch=(3,))
        (call,) = custom_calls(lowered(jax.vmap(awq_gemm, (None, 0)), p.x, stacked))
        assert f": (tensor<20x{K}xf16>, tensor<3x{K}x{N // 8}xi32>" in call
        assert f"-> (tensor<3x20x{N}xf16>" in call

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, rng, check_vma):
        p = random_problem(rng, 20, K, N, group_size=32)
        fn = jax.shard_map(
            awq_gemm,
            mesh=auto_mesh(m=2, n=2),
            check_vma=check_vma,
            out_specs=P("m", "n"),
            in_specs=(P("m"), jax.tree.map(lambda _: P(None, "n"), p.weight)),
        )
        (call,) = custom_calls(lowered(fn, p.x, p.weight))
        assert f"-> (tensor<10x{N // 2}xf16>" in call

    def test_dequantize(self, rng):
        weight = random_weight(rng, K, N, group_size=32)
        (call,) = custom_calls(lowered(lambda w: w.dequantize(jnp.float32), weight))
        assert "@jax_awq.awq_dequantize(" in call
        assert attributes(call) == {"group_size": "32 : i64", "layout": '"gemm"'}
        assert call.endswith(f"-> tensor<{K}x{N}xf32>")

    def test_forced_variant_is_an_attribute(self, rng, monkeypatch):
        p = random_problem(rng, 20, K, N, group_size=32)
        monkeypatch.setenv("JAX_AWQ_FORCE", "simt")
        (call,) = custom_calls(lowered(lambda x, w: x @ w, p.x, p.weight))
        assert attributes(call)["variant"] == '"simt"'

    def test_dequantize_dot(self, rng, monkeypatch):
        p = random_problem(rng, 20, K, N, group_size=32, layout="oc_major")
        monkeypatch.setenv("JAX_AWQ_FORCE", "dequantize_dot")
        text = lowered(lambda x, w: x @ w, p.x, p.weight)
        (call,) = custom_calls(text)
        assert "@jax_awq.awq_dequantize(" in call
        assert text.count("stablehlo.dot_general") == 1

    def test_forced_reference(self, rng, monkeypatch):
        p = random_problem(rng, 20, K, N, group_size=32)
        monkeypatch.setenv("JAX_AWQ_FORCE", "reference")
        assert not custom_calls(lowered(lambda x, w: x @ w, p.x, p.weight))
        assert not custom_calls(lowered(AWQWeight.dequantize, p.weight))

    @pytest.mark.parametrize("rows", [0, (2, 0)])
    def test_nothing_is_launched_for_no_rows(self, rng, rows):
        p = random_problem(rng, rows, K, N, group_size=32)
        assert not custom_calls(lowered(lambda x, w: x @ w, p.x, p.weight))


# --- export

CHECKS = [export.DisabledSafetyCheck.custom_call("jax_awq.awq_gemm")]


def test_export_for_both_platforms_and_reload(rng, planned):
    p = random_problem(rng, 5, K, N, group_size=32)
    exported = export.export(
        jax.jit(lambda x, w: x @ w), platforms=("cpu", "cuda"), disabled_checks=CHECKS
    )(p.x, p.weight)
    assert len(custom_calls(exported.mlir_module())) == 1
    again = export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_array_equal(again.call(p.x, p.weight), p.run())

    def loss(fn):
        return lambda x: fn(x, p.weight).astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(loss(again.call))(p.x), jax.grad(loss(awq_gemm))(p.x))


@pytest.mark.parametrize("spec", ["b", "b, 3"])
@pytest.mark.parametrize("over", ["rows", "vmap"])
def test_export_with_a_symbolic_batch(rng, planned, spec, over):
    weight = random_weight(rng, K, N, group_size=32)
    fn = awq_gemm if over == "rows" else jax.vmap(awq_gemm, (0, None))
    x = jax.ShapeDtypeStruct(export.symbolic_shape(f"{spec}, {K}"), jnp.float16)
    exported = export.export(jax.jit(fn), platforms=("cpu", "cuda"), disabled_checks=CHECKS)(
        x, weight
    )
    assert planned[-1]["m"] == 0 or over == "vmap"
    concrete = rng.standard_normal((4, *x.shape[1:])).astype(np.float16)
    got = export.deserialize(exported.serialize()).call(concrete, weight)
    assert got.shape == (4, *x.shape[1:-1], N)
    np.testing.assert_allclose(got, awq_gemm(concrete, weight), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("fn", [awq_gemm, awq_dequantize, int8_matmul])
def test_export_with_symbolic_sides_of_a_weight(rng, fn):
    """No kernel is planned for what is not known: the reference runs, on CUDA too."""
    m, n, g = export.symbolic_shape("m, n, g")
    spec = jax.ShapeDtypeStruct
    if fn is int8_matmul:
        specs = spec((m, g), jnp.int8), spec((g, n), jnp.int8)
        arrays = [rng.integers(-9, 9, shape).astype(np.int8) for shape in ((3, 40), (40, 24))]
    else:
        specs = (
            *([spec((m, 32 * g), jnp.float16)] * (fn is awq_gemm)),
            *(spec((32 * g, n), jnp.int32), spec((g, 8 * n), jnp.float16)),
        )
        weight = random_weight(rng, 96, 24, group_size=32)
        arrays = [*([rng.standard_normal((3, 96)).astype(np.float16)] * (fn is awq_gemm))]
        arrays += [weight.qweight, weight.scales]
    options = {} if fn is int8_matmul else {"group_size": 32}
    jitted = jax.jit(functools.partial(fn, **options))
    exported = export.export(jitted, platforms=("cpu", "cuda"), disabled_checks=CHECKS)(*specs)
    found = export.deserialize(exported.serialize()).call(*arrays)
    np.testing.assert_array_equal(found, jitted(*arrays))


# --- plan


def test_plan_of_a_fused_kernel(rng, planned):
    p = random_problem(rng, (2, 10), K, N, group_size=32)
    shapes = jax.eval_shape(lambda *a: a, p.x, p.weight)
    assert plan("awq_gemm", *shapes, activation="silu", device="sm_90") == KernelPlan(
        op="awq_gemm",
        route="fused",
        kernel="mma_32",
        tile=(32, 128),
        split_k=2,
        workspace_bytes=WORKSPACE,
        accumulator="float32",
        deterministic=True,
        batch_invariant=False,
        refused={"decode": "more than 16 rows of x"},
        reason="",
    )
    assert plan("awq_gemm", *shapes, deterministic="batch_invariant").batch_invariant
    plan("awq_gemm", *shapes, bias=jnp.zeros(N), device="sm_80")
    assert (planned[-1]["m"], planned[-1]["arch"]) == (20, 80)
    assert plan("awq_dequantize", shapes[1], device="sm_90a").route == "fused"


def test_plan_says_why_the_reference_runs(rng, planned, monkeypatch):
    p = random_problem(rng, 5, K, N, group_size=32)
    cpu = jax.devices("cpu")[0]
    assert plan("awq_gemm", p.x, p.weight, device=cpu).reason == (
        "there is no kernel for platform cpu"
    )
    assert plan("awq_gemm", p.x[:0], p.weight, device="sm_90").reason == (
        "an operand or the result is empty"
    )
    wide = random_weight(rng, K, N, group_size=32, dtype=np.float32)
    assert plan("awq_dequantize", wide, device="sm_90").reason == "scales are float32"
    monkeypatch.setenv("JAX_AWQ_FORCE", "reference")
    assert plan("awq_gemm", p.x, p.weight, device="sm_90").reason == "JAX_AWQ_FORCE is reference"


@pytest.mark.parametrize(
    ("k", "n", "group_size", "reason"),
    [
        (96, 16, 48, "group_size is not 32, 64, 128 or K"),
        (512, 16, 256, "group_size is not 32, 64, 128 or K"),
        (32, 2**20, 32, "K or N is not below 1048576"),
    ],
)
def test_weights_that_no_kernel_takes_run_the_reference(planned, k, n, group_size, reason):
    weight = AWQWeight(
        jax.ShapeDtypeStruct((k, n // 8), jnp.int32),
        jax.ShapeDtypeStruct((k // group_size, n), jnp.float16),
    )
    x = jax.ShapeDtypeStruct((3, k), jnp.float16)
    for found in (
        plan("awq_gemm", x, weight, device="sm_90"),
        plan("awq_dequantize", weight, device="sm_90"),
    ):
        assert (found.route, found.reason) == ("reference", reason)


def test_without_the_compiled_part_the_reference_runs(rng, monkeypatch):
    monkeypatch.setattr(_ffi, "_ext", None)
    monkeypatch.setattr(_ffi, "MISSING", "the compiled part of jax_awq cannot be imported: gone")
    p = random_problem(rng, 5, K, N, group_size=32)
    assert not custom_calls(lowered(lambda x, w: x @ w, p.x, p.weight))
    found = plan("awq_gemm", p.x, p.weight, device="sm_90")
    assert (found.route, found.reason) == ("reference", _ffi.MISSING)
    info = build_info()
    assert (info["cuda"], info["missing"]) == (False, _ffi.MISSING)


@pytest.fixture
def old_driver(monkeypatch):
    """A GPU on this machine, whose driver is older than the toolkit of the build."""
    problem = "driver 535 is too old for CUDA 13.0"
    _ffi._driver_problem.cache_clear()
    monkeypatch.setattr(_ffi, "TARGETS", ("jax_awq.awq_gemm",))
    monkeypatch.setattr(_ffi, "_ext", types.SimpleNamespace(driver_problem=lambda: problem))
    monkeypatch.setattr(_plan, "_DEFAULT_TARGET", _plan._DEFAULT_TARGET._replace(local=True))
    yield problem
    _ffi._driver_problem.cache_clear()


def test_an_old_driver_is_told_once(old_driver):
    with pytest.warns(UserWarning, match=rf"^jax_awq: {old_driver}; the plain JAX reference runs"):
        assert _ffi.unavailable(on_device=True) == old_driver
    assert _ffi.unavailable(on_device=True)  # a second warning would be an error here
    assert not _ffi.unavailable(on_device=False)


@pytest.mark.parametrize("case", OF_OPS.values(), ids=OF_OPS.keys())
def test_with_an_old_driver_the_reference_runs(case, old_driver):
    with pytest.warns(UserWarning, match=old_driver):
        assert not custom_calls(lowered(case.fn, *case.operands))


def test_the_plan_tells_of_an_old_driver(rng, old_driver):
    p = random_problem(rng, 5, K, N, group_size=32)
    with pytest.warns(UserWarning, match=old_driver):
        found = plan("awq_gemm", p.x, p.weight, device="sm_90")
    assert (found.route, found.reason) == ("reference", old_driver)


def test_a_build_without_kernels_still_lowers_for_elsewhere(monkeypatch):
    monkeypatch.setattr(_ffi, "TARGETS", ())
    monkeypatch.setattr(_ffi, "_ext", types.SimpleNamespace())
    assert "JAX_AWQ_CUDA=OFF" in _ffi.unavailable(on_device=True)
    assert not _ffi.unavailable(on_device=False)


def test_plan_errors(rng):
    with pytest.raises(
        ValueError,
        match=r"^plan: op must be one of \['awq_dequantize', 'awq_gemm', 'awq_gemm_w4a4', "
        r"'awq_gemm_w4a8', 'dequantize_activation', 'int4_matmul', 'int8_matmul', "
        r"'quantize_activation'\], got 'awq_gem'$",
    ):
        plan("awq_gem")
    with pytest.raises(ValueError, match=r"^plan: device must look like 'sm_90', got 'H200'$"):
        plan(
            "awq_gemm",
            np.ones((1, K), np.float16),
            random_weight(rng, K, N, group_size=32),
            device="H200",
        )


# --- the compiled planning code itself


@pytest.mark.skipif(_ffi._ext is None, reason=_ffi.MISSING or "built")
def test_the_compiled_part_plans_and_lowers(rng):
    p = random_problem(rng, 4, 4096, 4096, group_size=128)
    found = plan("awq_gemm", p.x, p.weight, device="sm_90")
    assert found.route == "fused"
    assert found.kernel not in found.refused
    (call,) = custom_calls(lowered(lambda x, w: x @ w, p.x, p.weight))
    assert f"tensor<{max(found.workspace_bytes, 16)}xui8>" in call
    large = jax.ShapeDtypeStruct((8192, 4096), np.float16)
    ampere = plan("awq_gemm", large, p.weight, device="sm_80")
    built_without = "this build has no code for the GPU's architecture"
    assert ampere.route == "dequantize_dot" or ampere.refused["simt"] == built_without
    single = plan(
        "awq_gemm", jax.ShapeDtypeStruct((20, 4096), np.float32), p.weight, device="sm_90"
    )
    assert (single.route, single.reason) == ("reference", "x is float32")


@pytest.mark.skipif(_ffi._ext is None, reason=_ffi.MISSING or "built")
@pytest.mark.parametrize(
    ("m", "k", "n", "kernel", "split"),
    [
        (8, 2048, 5120, "few_8x192", 4),  # tiles of 256 would leave more processors idle
        (8, 4096, 4096, "few_8x128", 3),
        (8, 14336, 4096, "few_8x192", 5),
        (16, 4096, 4096, "few_16x128", 3),
        (24, 28672, 8192, "few_24x128", 2),
        (16, 8192, 28672, "few_16x224", 1),  # 128 tiles
        (1, 8192, 28672, "few_8x256", 1),  # 112 tiles
        (32, 14336, 4096, "tma_32x128", 7),  # two CTAs a processor
        (64, 2048, 5120, "tma_64x192", 4),
        (1024, 4096, 4096, "tma_256x128", 1),  # 128 tiles
        (512, 8192, 10240, "stream_256x128", 1),  # 160 tiles on 132 processors
        (64, 4096, 4104, "wgmma_64", None),  # rows that TMA cannot take
    ],
)
def test_what_hopper_runs(m, k, n, kernel, split):
    x = jax.ShapeDtypeStruct((m, k), np.float16)
    weight = AWQWeight(
        jax.ShapeDtypeStruct((k, n // 8), np.int32),
        jax.ShapeDtypeStruct((k // 128, n), np.float16),
        jax.ShapeDtypeStruct((k // 128, n // 8), np.int32),
    )
    found = plan("awq_gemm", x, weight, device="sm_90")
    assert found.kernel == kernel
    assert split is None or found.split_k == split
    # Sums meet in a cluster; or each CTA leaves those of a tile, and a count.
    shared = 132 * (256 * 128 * 4 + 4)
    assert found.workspace_bytes == (shared if kernel.startswith("stream") else 0)


@pytest.mark.skipif(_ffi._ext is None, reason=_ffi.MISSING or "built")
def test_a_variant_that_cannot_run_is_an_error(rng, monkeypatch):
    p = random_problem(rng, 64, K, N, group_size=32)
    refused = plan("awq_gemm", p.x, p.weight, device="sm_75").refused
    assert refused
    for variant in (*refused, "nonsense"):
        monkeypatch.setenv("JAX_AWQ_FORCE", variant)
        with pytest.raises(ValueError, match=refused.get(variant, "nonsense")):
            plan("awq_gemm", p.x, p.weight, device="sm_75")


def test_public_names_are_sorted():
    assert jax_awq.__all__ == sorted(jax_awq.__all__)
    assert all(getattr(jax_awq, name) for name in jax_awq.__all__)
