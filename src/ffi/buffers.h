// Operands of an FFI call: shapes with an optional leading batch dimension, dtypes, names.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <vector>

#include "ffi/status.h"
#include "kernels/types.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {

inline std::optional<DType> FloatType(xla::ffi::DataType dtype) {
  switch (dtype) {
    case xla::ffi::DataType::F16:
      return DType::kF16;
    case xla::ffi::DataType::BF16:
      return DType::kBF16;
    case xla::ffi::DataType::F32:
      return DType::kF32;
    default:
      return std::nullopt;
  }
}

inline std::optional<Layout> LayoutFromName(std::string_view name) {
  if (name == "gemm") return Layout::kGemm;
  if (name == "oc_major") return Layout::kOcMajor;
  return std::nullopt;
}

inline std::optional<Activation> ActivationFromName(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  return std::nullopt;
}

// As tensor core kernels count on. XLA aligns its buffers; another caller's may lie anywhere.
inline bool Aligned(std::initializer_list<const void*> bases) {
  return std::none_of(bases.begin(), bases.end(),
                      [](const void* base) { return reinterpret_cast<uintptr_t>(base) % 16; });
}

using ScaleBuffer = xla::ffi::Buffer<xla::ffi::F32>;

// Checks operands of one call against each other and keeps the batch they agree on.
class OperandChecker {
 public:
  explicit OperandChecker(std::string_view op) : op_(op) {}

  int64_t batch() const { return batch_.value_or(1); }

  // Dimensions of `buffer` without its batch dimension; `rank` is that of a single entry.
  template <typename Buffer>
  xla::ffi::Error Dimensions(std::string_view name, const Buffer& buffer, size_t rank,
                             std::vector<int64_t>* dims, bool* batched) {
    const auto all = buffer.dimensions();
    if (all.size() != rank && all.size() != rank + 1) {
      return InvalidArgument(op_, ": ", name, " must have rank ", rank, " or ", rank + 1, ", got ",
                             all.size());
    }
    *batched = all.size() == rank + 1;
    dims->assign(all.begin() + *batched, all.end());
    if (*batched) {
      if (batch_ && *batch_ != all[0]) {
        return InvalidArgument(op_, ": ", name, " has batch size ", all[0], ", others have ",
                               *batch_);
      }
      batch_ = all[0];
    }
    return xla::ffi::Error::Success();
  }

  // The size of a matrix that has its free dimensions folded into rows.
  template <typename Buffer>
  xla::ffi::Error Matrix(std::string_view name, const Buffer& buffer, int64_t* rows,
                         int64_t* columns) {
    const auto dims = buffer.dimensions();
    if (dims.size() != 2) {
      return InvalidArgument(op_, ": ", name, " must have rank 2, got ", dims.size());
    }
    *rows = dims[0];
    *columns = dims[1];
    return xla::ffi::Error::Success();
  }

  // Checks scales of a (rows, k) matrix, (entries, 1 or k); `rows_per_scale` is 0 if there are
  // none.
  template <typename Buffer>
  xla::ffi::Error Scale(const Buffer& scale, int64_t rows, int64_t k, int64_t* scale_columns,
                        int64_t* rows_per_scale) {
    int64_t entries = 0;
    JAX_AWQ_RETURN_IF_ERROR(Matrix("scale", scale, &entries, scale_columns));
    if ((*scale_columns != 1 && *scale_columns != k) || (entries > 0 && rows % entries)) {
      return InvalidArgument(op_, ": scale must have shape (divisor of ", rows, ", 1 or ", k,
                             "), got ", Text(scale.dimensions()));
    }
    *rows_per_scale = entries > 0 ? std::max<int64_t>(rows / entries, 1) : 0;
    return xla::ffi::Error::Success();
  }

  // Checks the shape; `stride` becomes the elements from one batch entry to the next, 0 if shared.
  template <typename Buffer>
  xla::ffi::Error Shape(std::string_view name, const Buffer& buffer,
                        std::initializer_list<int64_t> want, int64_t* stride) {
    std::vector<int64_t> dims;
    bool batched;
    JAX_AWQ_RETURN_IF_ERROR(Dimensions(name, buffer, want.size(), &dims, &batched));
    if (dims != std::vector<int64_t>(want)) {
      return InvalidArgument(op_, ": ", name, " must have shape ", Text(want), ", got ",
                             Text(dims));
    }
    *stride = 0;
    if (batched) {
      *stride = 1;
      for (int64_t d : dims) *stride *= d;
    }
    return xla::ffi::Error::Success();
  }

  // Checks a scale for each of `size`, or one for all of them; without any nothing is written.
  xla::ffi::Error Scales(std::string_view name, const ScaleBuffer& buffer, int64_t size,
                         const float** scale, int64_t* stride, bool* each) {
    if (buffer.element_count() == 0) return xla::ffi::Error::Success();
    std::vector<int64_t> dims;
    bool batched;
    JAX_AWQ_RETURN_IF_ERROR(Dimensions(name, buffer, 1, &dims, &batched));
    *each = dims[0] != 1;
    *scale = buffer.typed_data();
    return Shape(name, buffer, {*each ? size : 1}, stride);
  }

  // Checks the three weight tensors against each other and fills `w`.
  template <typename Scales>
  xla::ffi::Error Weight(const xla::ffi::Buffer<xla::ffi::S32>& qweight, const Scales& scales,
                         const xla::ffi::Buffer<xla::ffi::S32>& qzeros, int64_t group_size,
                         std::string_view layout, AwqWeight* w) {
    const std::optional<Layout> known = LayoutFromName(layout);
    if (!known) return InvalidArgument(op_, ": unknown layout ", layout);
    std::vector<int64_t> dims;
    bool batched;
    JAX_AWQ_RETURN_IF_ERROR(Dimensions("qweight", qweight, 2, &dims, &batched));
    w->layout = *known;
    w->k = w->layout == Layout::kGemm ? dims[0] : 8 * dims[1];
    w->n = w->layout == Layout::kGemm ? 8 * dims[1] : dims[0];
    if (w->n % 8) return InvalidArgument(op_, ": N=", w->n, " must be a multiple of 8");
    if (w->k >= 1 << 20 || w->n >= 1 << 20) {  // grids count blocks of rows in 16 bits
      return InvalidArgument(op_, ": K=", w->k, " and N=", w->n, " must be below 2^20");
    }
    const bool known_size = group_size == 32 || group_size == 64 || group_size == 128;
    if (group_size != w->k && !known_size) {
      return InvalidArgument(op_, ": group_size must be 32, 64, 128 or K, got ", group_size);
    }
    if (group_size > 0 && w->k % group_size) {
      return InvalidArgument(op_, ": K=", w->k, " must be a multiple of group_size ", group_size);
    }
    w->group_shift = group_size == w->k ? kSingleGroup
                     : group_size == 32 ? 5
                     : group_size == 64 ? 6
                                        : 7;
    const int64_t groups = group_size == w->k ? 1 : w->k / group_size;
    JAX_AWQ_RETURN_IF_ERROR(Shape("qweight", qweight, {dims[0], dims[1]}, &w->qweight_stride));
    JAX_AWQ_RETURN_IF_ERROR(Shape("scales", scales, {groups, w->n}, &w->scales_stride));
    JAX_AWQ_RETURN_IF_ERROR(Float("scales", scales, &w->scales_dtype));
    w->qweight = qweight.untyped_data();
    w->scales = scales.untyped_data();
    if (qzeros.element_count() > 0) {
      JAX_AWQ_RETURN_IF_ERROR(Shape("qzeros", qzeros, {groups, w->n / 8}, &w->qzeros_stride));
      w->qzeros = qzeros.untyped_data();
    }
    return xla::ffi::Error::Success();
  }

  // Checks the bias of `size` outputs; without one nothing is written.
  template <typename Buffers>
  xla::ffi::Error Bias(const xla::ffi::AnyBuffer& bias, int64_t size, Buffers* buffers) {
    if (bias.element_count() == 0) return xla::ffi::Error::Success();
    JAX_AWQ_RETURN_IF_ERROR(Shape("bias", bias, {size}, &buffers->bias_stride));
    JAX_AWQ_RETURN_IF_ERROR(Float("bias", bias, &buffers->bias_dtype));
    buffers->bias = bias.untyped_data();
    return xla::ffi::Error::Success();
  }

  // Checks that the result has the batch dimension that the operands have.
  template <typename Buffer>
  xla::ffi::Error Result(std::string_view name, const Buffer& buffer,
                         std::initializer_list<int64_t> want) {
    const int64_t operands = batch();
    int64_t stride;
    JAX_AWQ_RETURN_IF_ERROR(Shape(name, buffer, want, &stride));
    if (batch() != operands || (stride == 0 && operands != 1)) {
      return InvalidArgument(op_, ": ", name, " must have batch size ", operands);
    }
    return xla::ffi::Error::Success();
  }

  template <typename Buffer>
  xla::ffi::Error Float(std::string_view name, const Buffer& buffer, DType* dtype) {
    const std::optional<DType> found = FloatType(buffer.element_type());
    if (!found) {
      return InvalidArgument(op_, ": ", name, " must be float16, bfloat16 or float32");
    }
    *dtype = *found;
    return xla::ffi::Error::Success();
  }

 private:
  template <typename Dims>
  static std::string Text(const Dims& dims) {
    std::ostringstream text;
    text << '(';
    const char* separator = "";
    for (int64_t d : dims) {
      text << separator << d;
      separator = ", ";
    }
    text << ')';
    return text.str();
  }

  std::string_view op_;
  std::optional<int64_t> batch_;
};

}  // namespace jax_awq
