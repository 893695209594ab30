// What the copy engine of sm_90 is told of a tensor in global memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/types.h"

namespace jax_awq {

// Three-dimensional tensor maps: batch, rows, columns, the columns contiguous.
class TensorMaps {
 public:
  // nullptr on a driver without them.
  static const TensorMaps* Get() {
    static const TensorMaps maps;
    return maps.encode_ ? &maps : nullptr;
  }

  bool Encode(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* base,
              int64_t columns, int64_t rows, int64_t batch, unsigned box_columns, unsigned box_rows,
              CUtensorMapSwizzle swizzle,
              CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) const {
    const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                                 static_cast<cuuint64_t>(batch)};
    const cuuint64_t strides[2] = {sizes[0] * bytes, sizes[0] * sizes[1] * bytes};
    const cuuint32_t box[3] = {box_columns, box_rows, 1};
    const cuuint32_t steps[3] = {1, 1, 1};
    return encode_(map, type, 3, const_cast<void*>(base), sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }

  // The parts of a weight, of `batch` entries where these do not share them, for boxes of so many
  // outputs: words in boxes of `depth` rows, which lie `row_bytes` apart in shared memory, the
  // width of their swizzle; scales and zero points (if there are any) of `groups`.
  bool EncodeWeight(CUtensorMap* words, CUtensorMap* scales, CUtensorMap* zeros, const AwqWeight& w,
                    int64_t batch, int outputs, int depth, int groups, int row_bytes,
                    CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) const {
    return Encode(words, CU_TENSOR_MAP_DATA_TYPE_INT32, 4, w.qweight, w.n / 8, w.k,
                  w.qweight_stride ? batch : 1, outputs / 8, depth,
                  row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                  promotion) &&
           EncodeGroups(scales, zeros, w, batch, outputs, groups);
  }

  bool EncodeGroups(CUtensorMap* scales, CUtensorMap* zeros, const AwqWeight& w, int64_t batch,
                    int outputs, int groups) const {
    const int64_t all = w.group_shift == kSingleGroup ? 1 : w.k >> w.group_shift;
    return Encode(scales, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, w.scales, w.n, all,
                  w.scales_stride ? batch : 1, outputs, groups, CU_TENSOR_MAP_SWIZZLE_NONE) &&
           (w.qzeros == nullptr ||
            Encode(zeros, CU_TENSOR_MAP_DATA_TYPE_INT32, 4, w.qzeros, w.n / 8, all,
                   w.qzeros_stride ? batch : 1, outputs / 8, groups, CU_TENSOR_MAP_SWIZZLE_NONE));
  }

 private:
  TensorMaps() {
    cudaDriverEntryPointQueryResult result;
    void* function = nullptr;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) {
      encode_ = reinterpret_cast<decltype(encode_)>(function);
    }
  }

  decltype(&cuTensorMapEncodeTiled) encode_ = nullptr;
};

}  // namespace jax_awq
