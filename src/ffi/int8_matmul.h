// XLA buffers and attributes -> Int8MatmulProblem, for int8_matmul and int4_matmul. Checked again:
// an exported module comes here without passing through Python.
#pragma once

#include "kernels/int8_matmul.h"

#include <string>
#include <string_view>

#include "ffi/buffers.h"
#include "ffi/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {

using Int8Buffer = xla::ffi::Buffer<xla::ffi::S8>;

struct Int8MatmulCall {
  Stream stream;
  int32_t device_ordinal;
  Int8Buffer a, b;
  ScaleBuffer scale_a, scale_b, scale_c;  // empty: 1
  xla::ffi::AnyBuffer bias;               // empty: none
  xla::ffi::AnyBuffer y;
  xla::ffi::Buffer<xla::ffi::U8> workspace;
  int64_t k;
  std::string_view activation, variant;
};

inline xla::ffi::Error RunInt8Matmul(const char* op, bool packed, const Int8MatmulCall& call) {
  const auto known_activation = ActivationFromName(call.activation);
  if (!known_activation) return InvalidArgument(op, ": unknown activation ", call.activation);
  if (call.k < 0) return InvalidArgument(op, ": k must not be negative, got ", call.k);

  OperandChecker check(op);
  Int8MatmulProblem p;
  Int8MatmulBuffers buffers = {};
  p.k = call.k;
  p.packed = packed;
  p.variant = std::string(call.variant);
  std::vector<int64_t> dims;
  bool batched;
  JAX_AWQ_RETURN_IF_ERROR(check.Dimensions("a", call.a, 2, &dims, &batched));
  p.m = dims[0];
  JAX_AWQ_RETURN_IF_ERROR(check.Dimensions("b", call.b, 2, &dims, &batched));
  p.n = dims[1];
  JAX_AWQ_RETURN_IF_ERROR(check.Shape("a", call.a, {p.m, p.a_columns()}, &buffers.a_stride));
  JAX_AWQ_RETURN_IF_ERROR(check.Shape("b", call.b, {p.b_rows(), p.n}, &buffers.b_stride));
  bool has_each;
  JAX_AWQ_RETURN_IF_ERROR(check.Scales("scale_a", call.scale_a, p.m, &buffers.scale_a,
                                       &buffers.scale_a_stride, &buffers.row_scales));
  JAX_AWQ_RETURN_IF_ERROR(check.Scales("scale_b", call.scale_b, p.n, &buffers.scale_b,
                                       &buffers.scale_b_stride, &buffers.column_scales));
  JAX_AWQ_RETURN_IF_ERROR(check.Scales("scale_c", call.scale_c, 1, &buffers.scale_c,
                                       &buffers.scale_c_stride, &has_each));
  JAX_AWQ_RETURN_IF_ERROR(check.Bias(call.bias, p.n, &buffers));
  JAX_AWQ_RETURN_IF_ERROR(check.Result("y", call.y, {p.m, p.n}));
  buffers.raw = call.y.element_type() == xla::ffi::DataType::S32;
  if (!buffers.raw) JAX_AWQ_RETURN_IF_ERROR(check.Float("y", call.y, &buffers.out_dtype));
  buffers.activation = *known_activation;
  if (buffers.raw && (buffers.scale_a || buffers.scale_b || buffers.scale_c || buffers.bias ||
                      buffers.activation != Activation::kNone)) {
    return InvalidArgument(op, ": int32 sums take no scale, bias or activation");
  }
  p.batch = check.batch();
  p.a_batch = buffers.a_stride != 0 ? p.batch : 1;
  if (call.y.element_count() == 0) return xla::ffi::Error::Success();

  buffers.a = call.a.untyped_data();
  buffers.b = call.b.untyped_data();
  buffers.y = call.y.untyped_data();
  buffers.workspace = call.workspace.untyped_data();
  if (!Aligned({buffers.a, buffers.b, buffers.y})) p.variant = "dp4a";
  return PlanAndLaunch(
      op,
      [&] {
        return PlanInt8Matmul(p, DescribeDevice(call.device_ordinal), call.workspace.size_bytes());
      },
      [](const Int8MatmulPlan& plan) { return plan.refused.back().second; },
      [&](const Int8MatmulPlan& plan) { return LaunchInt8Matmul(p, plan, buffers, call.stream); });
}

}  // namespace jax_awq
