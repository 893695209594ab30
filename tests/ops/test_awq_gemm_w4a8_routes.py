"""What `awq_gemm_w4a8` and `awq_gemm_w4a4` run on CUDA, seen on a machine without a GPU."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweeps
from jax import export

from jax_awq import (
    AWQWeight,
    QuantizedActivation,
    _ffi,
    awq_gemm_w4a4,
    awq_gemm_w4a8,
    plan,
    quantize_activation,
)
from jax_awq._plan import _equations
from jax_awq._primitive import OPS
from jax_awq.testing_w4a8 import CODES, random_w4a8_problem

OP_OF = {"int8": "awq_gemm_w4a8", "int4": "awq_gemm_w4a4", "float8_e4m3fn": "awq_gemm_w4a8"}
PUBLIC = {"awq_gemm_w4a8": awq_gemm_w4a8, "awq_gemm_w4a4": awq_gemm_w4a4}
WORKSPACE = 4096


def shapes(m, k, n, group_size=-1, *, scales=np.float16, dtype=np.float16):
    groups = 1 if group_size == -1 else k // group_size
    return jax.ShapeDtypeStruct((m, k), dtype), AWQWeight(
        jax.ShapeDtypeStruct((k, n // 8), np.int32),
        jax.ShapeDtypeStruct((groups, n), scales),
        jax.ShapeDtypeStruct((groups, n // 8), np.int32),
        group_size=group_size,
    )


def lowered(fn, *args):
    """The custom calls of a program for CUDA."""
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return [line.strip() for line in text.splitlines() if "@jax_awq." in line]


def attributes(call):
    inside = re.search(r"mhlo.backend_config = \{(.*?)\}", call)[1]
    return dict(item.split(" = ", 1) for item in inside.split(", "))


needs_plan = pytest.mark.skipif(_ffi._ext is None, reason=_ffi.MISSING or "built")


@pytest.fixture
def planned(monkeypatch):
    """Stands in for the compiled planning code, and collects what it is asked."""
    asked = []

    def plan_awq_gemm_w4a8(**kwargs):
        asked.append(kwargs)
        return {
            "variant": kwargs["variant"] or "w4a8_64x256",
            "tile": (64, 256),
            "split_k": 2,
            "workspace_bytes": WORKSPACE,
            "refused": {"decode_8": "more than 8 rows of x"},
            "reason": "",
            "as_floats": False,
        }

    monkeypatch.setattr(
        _ffi,
        "_ext",
        types.SimpleNamespace(plan_awq_gemm_w4a8=plan_awq_gemm_w4a8, driver_problem=lambda: ""),
    )
    return asked


@pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])
@pytest.mark.parametrize("codes", CODES)
def test_one_custom_call_with_its_workspace(rng, planned, codes, layout):
    k, n = 64, 16
    p = random_w4a8_problem(
        rng, 20, k, n, codes=codes, group_size=32, layout=layout, bias=True, activation="silu"
    )
    (call,) = lowered(lambda x: p.run(x), p.base.x)
    assert "@jax_awq.awq_gemm_w4a8(" in call
    kernel_layout = "gemm" if layout == "gemm" else "oc_major"
    assert attributes(call) == {
        "activation": '"silu"',
        "codes": f'"{codes}"',
        "group_size": "32 : i64",
        "layout": f'"{kernel_layout}"',
        "variant": '""',
    }
    qweight = f"tensor<{k}x{n // 8}xi32>" if layout == "gemm" else f"tensor<{n}x{k // 8}xi32>"
    assert call.endswith(
        f": (tensor<20x{k}xf16>, {qweight}, tensor<2x{n}xf16>, tensor<2x{n // 8}xi32>, "
        f"tensor<0xf32>, tensor<{n}xf16>) -> (tensor<20x{n}xf16>, tensor<{WORKSPACE}xui8>)"
    )
    assert planned[-1] == {
        "m": 20,
        "n": n,
        "k": k,
        "batch": 1,
        "x_batch": 1,
        "scale_batch": 1,
        "group_size": 32,
        "layout": kernel_layout,
        "x_dtype": "float16",
        "scales_dtype": "float16",
        "out_dtype": "float16",
        "has_zeros": True,
        "has_activation": True,
        "codes": codes,
        "scale": "",
        "variant": "",
        "arch": 90,
        "sm_count": 132,
    }


def called_with(rng, **options):
    """The custom call of a problem with 20 rows and the operands `x` and `weight` of it."""
    p = random_w4a8_problem(rng, 20, 64, 16, group_size=-1, **options)
    return p, lambda x, weight=p.base.weight: dataclasses.replace(
        p, base=dataclasses.replace(p.base, weight=weight)
    ).run(x)


class TestOperands:
    def test_what_is_absent_is_empty(self, rng, planned):
        p, fn = called_with(rng, symmetric=True)
        (call,) = lowered(fn, p.base.x)
        assert "tensor<1x16xf16>, tensor<0xi32>, tensor<0xf32>, tensor<0xf32>) ->" in call
        assert attributes(call)["group_size"] == "64 : i64"
        assert not planned[-1]["has_zeros"]

    @pytest.mark.parametrize("static", [True, False])
    def test_a_single_scale(self, rng, planned, static):
        p, fn = called_with(rng, granularity="tensor", static=static)
        (call,) = lowered(fn, p.base.x)
        assert "tensor<1xf32>, tensor<0xf32>) ->" in call
        assert planned[-1]["scale"] == "one"

    @pytest.mark.parametrize("codes", ["int8", "int4"])
    def test_codes_of_the_caller(self, rng, planned, codes):
        p, fn = called_with(rng, codes=codes)
        (call,) = lowered(fn, p.quantized())
        assert ": (tensor<20x64xi8>," in call
        assert "tensor<20xf32>, tensor<0xf32>) ->" in call
        assert (planned[-1]["x_dtype"], planned[-1]["scale"]) == ("int8", "row")

    def test_a_batch_of_weights_shares_x(self, rng, planned):
        p, fn = called_with(rng)
        stacked = jax.tree.map(lambda a: np.stack([a] * 3), p.base.weight)
        (call,) = lowered(jax.vmap(fn, (None, 0)), p.base.x, stacked)
        assert ": (tensor<20x64xf16>, tensor<3x64x2xi32>" in call
        assert "-> (tensor<3x20x16xf16>" in call
        assert [planned[-1][name] for name in ("batch", "x_batch", "scale_batch")] == [3, 1, 1]

    def test_a_batch_of_all(self, rng, planned):
        p, fn = called_with(rng, batch=(3,), granularity="token")
        (call,) = lowered(fn, p.quantized())
        assert ": (tensor<3x20x64xi8>, tensor<3x64x2xi32>" in call
        assert [planned[-1][name] for name in ("batch", "x_batch", "scale_batch")] == [3, 3, 3]

    def test_vmap_over_x_folds_into_rows(self, rng, planned):
        p, fn = called_with(rng)
        (call,) = lowered(jax.vmap(fn), np.stack([p.base.x] * 3))
        assert ": (tensor<60x64xf16>," in call
        assert planned[-1]["m"] == 60

    def test_a_forced_variant_is_an_attribute(self, rng, planned, monkeypatch):
        p, fn = called_with(rng)
        monkeypatch.setenv("JAX_AWQ_FORCE", "w4a8_32x256")
        (call,) = lowered(fn, p.base.x)
        assert attributes(call)["variant"] == '"w4a8_32x256"'
        assert planned[-1]["variant"] == "w4a8_32x256"

    def test_the_gradient_is_not_forced_to_take_codes(self, rng, monkeypatch):
        p, fn = called_with(rng)
        monkeypatch.setenv("JAX_AWQ_FORCE", "w4a8_32x256")
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: fn(x).astype(jnp.float32).sum()))(p.base.x)
        (eqn,) = _equations(jaxpr.jaxpr, "jax_awq.awq_gemm")
        assert eqn.params["variant"] == ""


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize(
    ("codes", "sums"), [*zip(CODES, ("int32", "int32", "float32"), strict=True)]
)
def test_plan(codes, sums):
    options = {} if codes == "int4" else {"activation_dtype": codes}
    found = plan(OP_OF[codes], *shapes(64, 256, 64), device="sm_90", **options)
    assert (found.route, found.kernel, found.accumulator) == ("fused", "w4a8_64x256", sums)
    assert (found.tile, found.split_k, found.workspace_bytes) == ((64, 256), 2, WORKSPACE)
    assert found.refused == {"decode_8": "more than 8 rows of x"}
    assert found.deterministic


# --- the compiled planning code itself


@needs_plan
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_few_rows_are_multiplied_as_floats(codes, group_size):
    options = {} if codes == "int4" else {"activation_dtype": codes}
    for m, kernel in ((1, "few_8x192"), (8, "few_8x192"), (16, "few_16x192")):
        for out_dtype in ("float16", "float32"):  # they keep the sums of groups
            found = plan(
                OP_OF[codes],
                *shapes(m, 8192, 4096, group_size),
                device="sm_90",
                out_dtype=out_dtype,
                **options,
            )
            assert (found.route, found.kernel, found.accumulator) == ("fused", kernel, "float32")
            assert found.reason.endswith("for up to 16 rows of x the weight decides the time")


@needs_plan
@pytest.mark.parametrize(("codes", "file"), [("int8", "int8"), ("float8_e4m3fn", "float8")])
def test_the_plan_takes_what_was_fastest(codes, file):
    def chosen(m, k, n):
        found = plan("awq_gemm_w4a8", *shapes(m, k, n, 128), device="sm_90", activation_dtype=codes)
        return found.kernel, found.split_k

    excess, missing = sweeps.excess(f"sweep_{file}.txt", chosen)
    # Tiles of fewer rows than x has, three beside each other, were not timed.
    assert missing == {(m, k, 5120) for m in (96, 192) for k in (2048, 5120)}
    assert len(excess) == 77
    assert max(excess.values()) <= 0.14
    assert sum(excess.values()) / len(excess) <= 0.01


@needs_plan
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("group_size", [128, -1])
def test_more_rows_are_multiplied_as_bytes(codes, group_size):
    options = {} if codes == "int4" else {"activation_dtype": codes}
    for m in (17, 64, 1000, 4096):
        found = plan(OP_OF[codes], *shapes(m, 4096, 4096, group_size), device="sm_90", **options)
        assert (found.route, found.reason) == ("fused", "")
        assert re.fullmatch(r"w4a8_\d+x\d+", found.kernel)
        assert found.accumulator == ("float32" if codes == "float8_e4m3fn" else "int32")
        assert found.workspace_bytes >= m * 4096
        assert found.kernel not in found.refused
    x = jax.eval_shape(lambda x: quantize_activation(x), shapes(4096, 4096, 64)[0])
    if codes == "int8":  # codes that are there are not copied
        own = plan("awq_gemm_w4a8", x, shapes(4096, 4096, 4096, group_size)[1], device="sm_90")
        assert own.kernel == found.kernel
        assert own.workspace_bytes <= found.workspace_bytes - 4096 * 4096


@needs_plan
def test_a_scale_of_one_row_is_a_single_scale():
    """The handler cannot tell them apart, so both have the same workspace."""
    weight = shapes(1, 4096, 4096, 128)[1]
    q, scale = (jax.ShapeDtypeStruct((1, 4096), np.int8), jax.ShapeDtypeStruct((1,), np.float32))
    token = QuantizedActivation(q, scale)
    tensor = QuantizedActivation(q, jax.ShapeDtypeStruct((), np.float32), granularity="tensor")
    found = [plan("awq_gemm_w4a8", x, weight, device="sm_90") for x in (token, tensor)]
    assert found[0] == found[1]


@needs_plan
def test_groups_that_bytes_do_not_pay_for():
    for group_size in (32, 64):
        found = plan("awq_gemm_w4a8", *shapes(64, 4096, 4096, group_size), device="sm_90")
        assert (found.route, found.kernel) == ("fused", "tma_64x192")
        assert "the sums of groups below 128 would cost more" in found.reason
        options = {"out_dtype": "float32", "device": "sm_90"}
        found = plan("awq_gemm_w4a8", *shapes(64, 4096, 4096, group_size), **options)
        assert (found.route, found.kernel) == ("group_products", "quantize_activation")
        why = "it rounds weights to float16, and the result is float32"
        assert (found.accumulator, found.reason) == ("int32", why)
        assert found.refused["tma_64x192"] == why
        qa = QuantizedActivation(
            jax.ShapeDtypeStruct((64, 4096), np.int8), jax.ShapeDtypeStruct((64,), np.float32)
        )
        for x, codes in ((qa, "int8"), (shapes(64, 4096, 8)[0], "float8_e4m3fn")):
            weight = shapes(64, 4096, 4096, group_size)[1]
            found = plan("awq_gemm_w4a8", x, weight, activation_dtype=codes, **options)
            assert (found.route, found.reason) == ("reference", why)
            assert found.accumulator == ("int32" if codes == "int8" else "float32")


def skip_without_code(device):
    """Builds for newer GPUs alone plan nothing for older ones."""
    reason = plan("awq_gemm", *shapes(1, 256, 64), device=device).reason
    if "no code for the GPU" in reason:
        pytest.skip(reason)


@needs_plan
@pytest.mark.parametrize(
    ("m", "device", "route"),
    [
        (8, "sm_75", "fused"),
        (32, "sm_75", "fused"),
        (33, "sm_75", "group_products"),
        (33, "sm_80", "fused"),
        (4096, "sm_80", "fused"),
    ],
)
def test_older_gpus(m, device, route):
    skip_without_code(device)
    found = plan("awq_gemm_w4a8", *shapes(m, 4096, 4096, 128), device=device)
    assert found.route == route
    if device == "sm_75":
        why = "more than 32 rows of x for a kernel without tensor cores"
        assert found.refused.get("simt") == (why if m > 32 else None)
        assert found.kernel == ("simt" if m <= 32 else "quantize_activation")


@needs_plan
@pytest.mark.parametrize(
    ("k", "group_size", "scales", "why"),
    [
        (4096, 128, np.float32, "scales are float32"),
        (96, 48, np.float16, "group_size is not 32, 64, 128 or K"),
    ],
)
def test_plan_of_group_products(k, group_size, scales, why):
    x, weight = shapes(64, k, 64, group_size, scales=scales)
    found = plan("awq_gemm_w4a8", x, weight, device="sm_90")
    assert (found.route, found.kernel) == ("group_products", "quantize_activation")
    assert found.reason == why
    found = plan("awq_gemm_w4a8", x, weight, device="sm_90", activation_dtype="float8_e4m3fn")
    assert (found.route, found.reason, found.accumulator) == ("reference", why, "float32")


@needs_plan
def test_plan_of_the_reference(monkeypatch):
    x, weight = shapes(16, 256, 64)
    none = jax.ShapeDtypeStruct((0, 256), np.float16)
    found = plan("awq_gemm_w4a8", none, weight, device="sm_90")
    assert found.reason == "an operand or the result is empty"
    cpu = jax.devices("cpu")[0]
    assert "platform cpu" in plan("awq_gemm_w4a8", x, weight, device=cpu).reason
    monkeypatch.setenv("JAX_AWQ_FORCE", "reference")
    found = plan("awq_gemm_w4a8", x, weight, device="sm_90")
    assert found.reason == "JAX_AWQ_FORCE is reference"


@needs_plan
def test_a_variant_that_cannot_run_is_an_error(monkeypatch):
    skip_without_code("sm_75")
    skip_without_code("sm_80")
    x, weight = shapes(16, 256, 64, 32)
    refused = plan("awq_gemm_w4a8", x, weight, device="sm_75").refused
    assert refused
    for variant in (*refused, "nonsense"):
        monkeypatch.setenv("JAX_AWQ_FORCE", variant)
        with pytest.raises(ValueError, match=refused.get(variant, variant)):
            plan("awq_gemm_w4a8", x, weight, device="sm_75")
    # One that is not chosen for what it rounds runs where it is forced.
    monkeypatch.setenv("JAX_AWQ_FORCE", "mma_64")
    found = plan("awq_gemm_w4a8", x, weight, device="sm_80", out_dtype="float32")
    assert (found.route, found.kernel) == ("fused", "mma_64")
    assert found.reason == "codes are multiplied as 16-bit floats: the variant is forced"


@needs_plan
@pytest.mark.parametrize(("m", "group_size"), [(16, 32), (64, 64), (64, -1)])
@pytest.mark.parametrize("op", ["awq_gemm_w4a8", "awq_gemm_w4a4"])
def test_what_is_lowered_for_cuda_is_what_the_plan_says(op, m, group_size):
    x, weight = shapes(m, 256, 64, group_size)
    (call,) = lowered(PUBLIC[op], x, weight)
    found = plan(op, x, weight, device="sm_90")
    assert found.route == "fused"
    assert f"tensor<{found.workspace_bytes}xui8>" in call


# --- group products


def as_kernels(monkeypatch):
    """The kernel that rounds, played by its plain-JAX form; what was called."""
    called = []

    def played(plan, *operands, **params):
        called.append("quantize_activation")
        return OPS["quantize_activation"].reference(*operands, **params)

    op = dataclasses.replace(OPS["quantize_activation"], kernel=played)
    monkeypatch.setitem(OPS, "quantize_activation", op)
    return called


@needs_plan
@pytest.mark.parametrize("codes", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("scale", ["", "row", "one"])
def test_group_products_are_the_reference(monkeypatch, rng, codes, group_size, batch, scale):
    """Of every combination of operands, with a batch in the weight alone, too."""
    p = random_w4a8_problem(
        rng, 3, 64, 16, codes=codes, group_size=group_size, batch=batch, scales_dtype=np.float32
    )
    w = p.base.weight
    shape = (*batch, 3 if scale == "row" else 1)
    given = (rng.uniform(0.2, 0.5, shape).astype(np.float32),) if scale else ()
    params = {
        "layout": "gemm",
        "group_size": group_size,
        "symmetric": False,
        "codes": codes,
        "scale": scale,
        "activation": "silu",
        "out_dtype": jnp.dtype(jnp.float32),
        "has_bias": True,
        "variant": "",
    }
    bias = rng.standard_normal(16).astype(np.float16)
    op = OP_OF[codes]
    for own in (p.base.x, p.base.x[0]) if batch else (p.base.x,):
        operands = (own, w.qweight, w.scales, w.qzeros, *given, bias)
        found = OPS[op].plan("sm_90", *operands, **params)
        assert found.route == "group_products"
        want = OPS[op].reference(*operands, **params)
        with monkeypatch.context() as patch:
            called = as_kernels(patch)
            got = OPS[op].kernel(found, *map(jnp.asarray, operands), **params)
        assert called == ["quantize_activation"]
        assert [r.shape for r in got] == [r.shape for r in want]
        np.testing.assert_allclose(got[0], want[0], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("codes", CODES)
def test_export_with_symbolic_rows(rng, codes, group_size):
    """One program for any number of rows, on a CPU and on CUDA, stored and loaded."""
    p = random_w4a8_problem(rng, (2, 5), 64, 16, codes=codes, group_size=group_size, bias=True)

    def run(x, weight):
        return dataclasses.replace(p, base=dataclasses.replace(p.base, weight=weight)).run(x)

    rows = export.symbolic_shape("a, b")
    x = jax.ShapeDtypeStruct((*rows, 64), np.float16)
    stable = [
        export.DisabledSafetyCheck.custom_call(f"jax_awq.{name}")
        for name in ("quantize_activation", "awq_gemm_w4a8")
    ]
    exported = export.export(jax.jit(run), platforms=("cpu", "cuda"), disabled_checks=stable)(
        x, p.base.weight
    )
    loaded = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(loaded.call(p.base.x, p.base.weight), p.run())
