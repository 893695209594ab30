// The kernel for sm_90a. wgmma takes int8 only with the contraction innermost, and b lies the other
// way: it passes through registers, which cost one ldmatrix and four byte permutations for 64 x 32
// of it, and is the row operand. A CTA computes kTokens x 128 outputs of y; two of a cluster have
// the same tokens and bring each other half of them.

#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "device/int8_tile.cuh"
#include "device/tma_tile.cuh"
#include "device/wgmma.cuh"
#include "kernels/int8_matmul_launch.cuh"
#include "kernels/launch_clusters.h"
#include "kernels/tensor_maps.h"

namespace jax_awq {
namespace {

struct Int8TmaParams {
  CUtensorMap a, b;
  Int8MatmulParams p;
  int a_rows;            // of a box of a, of which each member has one
  int batch_a, batch_b;  // 1 where every batch entry has its own, 0 where all share one
  int cluster;
  bool widened;  // a comes from the kernel before
};

template <int kTokens, bool kPacked>
class Int8Consumer {
  using Tile = Int8Tile<kTokens, kPacked>;

 public:
  __device__ Int8Consumer(uint32_t shared, int cluster)
      : fragments_(threadIdx.x / 32, threadIdx.x % 32), shared_(shared), cluster_(cluster) {}

  // Sums over `count` stages: acc[4 b + 2 h + i] of output 2 g + h of the warp's 16, token
  // 8 b + 2 t + i.
  __device__ __forceinline__ void Accumulate(int count, int32_t (&acc)[kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0;
    PinRegisters(acc);
    WgmmaFence();
    const uint64_t first = SwizzledRows(Tile::A(shared_, 0));
    uint32_t a[2][4];
    int previous = -1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int stage = at_.stage;
      BarrierWait(Tile::Full(shared_, stage), at_.phase);
      fragments_.Load(Tile::B(shared_, stage));
      const uint64_t tokens = first + (stage * Tile::kABytes >> 4);  // descriptors count 16 bytes
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        // All but the newest wgmma are done: these registers are free again.
        WgmmaWait<1>();
        if (s == 1 && previous >= 0) Release(previous);
        fragments_.Get(s, a[s % 2]);
        PinRegisters(a[s % 2]);  // or its bytes are picked behind the fence
        WgmmaFence();
        Wgmma<int8_t, kTokens>(acc, a[s % 2], tokens + 2 * s);
        WgmmaCommit();
      }
      previous = stage;
      at_.Advance();
    }
    WgmmaWait<0>();
    PinRegisters(acc);
    if (previous >= 0) Release(previous);
  }

 private:
  // Members of a cluster write to each other's shared memory, so all hear of it. One predicated
  // instruction: with branches here ptxas serializes the wgmmas.
  __device__ void Release(int stage) const {
    const int lane = threadIdx.x % 32;
    if (lane < cluster_) BarrierArriveRemote(MapToRank(Tile::Empty(shared_, stage), lane));
  }

  Int8Fragments<kPacked> fragments_;
  const uint32_t shared_;
  const int cluster_;
  StageCounter<Tile::kStages> at_;
};

// What the epilogue multiplies a warp's sums with and adds, on its way while they are computed.
template <int kTokens>
class Int8Scales {
 public:
  // A lane has two neighbouring outputs and tokens lane, lane + 32, ...
  __device__ __forceinline__ void Fetch(const Int8Epilogue& epilogue, int64_t token0, int tokens,
                                        int64_t output0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kTokens / 32; ++i) {
      const int token = 32 * i + lane;
      rows_[i] = token < tokens ? epilogue.RowScale(token0 + token) : 0.0f;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t column = output0 + 2 * (lane / 4) + h;
      const bool valid = output0 < epilogue.n;
      column_scale[h] = valid ? epilogue.ColumnScale(column) : 0.0f;
      bias[h] = valid ? epilogue.Bias(column) : 0.0f;
    }
  }

  // `block`: of eight tokens. All lanes of a warp ask.
  __device__ __forceinline__ float Row(int block, int token) const {
    return __shfl_sync(~0u, rows_[block / 4], 8 * (block % 4) + token);
  }

  float column_scale[2], bias[2];

 private:
  float rows_[kTokens / 32];
};

enum class Int8Output : uint8_t { kSums, kF32, kF16, kBF16 };

// A warp's sums to y. Eight lanes have two neighbouring outputs of a token each: whole sectors.
template <Int8Output kOutput, int kTokens>
__device__ __forceinline__ void StoreSums(const Int8Epilogue& epilogue,
                                          const Int8Scales<kTokens>& scales, int64_t token0,
                                          int tokens, int64_t output0,
                                          const int32_t (&acc)[kTokens / 2]) {
  constexpr bool kWide = kOutput == Int8Output::kSums || kOutput == Int8Output::kF32;
  constexpr int kBytes = kWide ? 4 : 2;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const int64_t row_bytes = kBytes * epilogue.n;
  char* to =
      static_cast<char*>(epilogue.y) + (token0 + 2 * t) * row_bytes + kBytes * (output0 + 2 * g);
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    if (8 * b >= tokens) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t sums[2] = {acc[4 * b + i] >> epilogue.shift,
                               acc[4 * b + i + 2] >> epilogue.shift};
      const bool store = 8 * b + 2 * t + i < tokens;
      char* at = to + i * row_bytes;
      if constexpr (kOutput == Int8Output::kSums) {
        if (store) *reinterpret_cast<int2*>(at) = make_int2(sums[0], sums[1]);
        continue;
      }
      const float row_scale = scales.Row(b, 2 * t + i);
      const float v0 = ScaleSum(sums[0], row_scale, scales.column_scale[0], scales.bias[0]);
      const float v1 = ScaleSum(sums[1], row_scale, scales.column_scale[1], scales.bias[1]);
      if constexpr (kOutput == Int8Output::kF32) {
        if (store) *reinterpret_cast<float2*>(at) = make_float2(v0, v1);
      } else {
        constexpr DType kType = kOutput == Int8Output::kF16 ? DType::kF16 : DType::kBF16;
        if (store) *reinterpret_cast<uint32_t*>(at) = PackPair(v0, v1, kType);
      }
    }
    to += 8 * row_bytes;
  }
}

// As above with an activation, whose code is large and so is there once: 64 tokens at a time
// through shared memory, so that four lanes hold 16 consecutive outputs.
template <int kTokens>
__device__ __forceinline__ void StoreActivated(const Int8Epilogue& epilogue, uint32_t staged,
                                               int64_t token0, int tokens, int64_t output0,
                                               const int32_t (&acc)[kTokens / 2]) {
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const FourColumns four(epilogue, output0 + 4 * t);
#pragma unroll
  for (int pass = 0; pass < kTokens / 64; ++pass) {
    if (64 * pass >= tokens) break;
    __syncwarp();
#pragma unroll
    for (int b = 0; b < 8; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Chunks of 16 bytes are swizzled: lanes t have rows that fall on the same banks.
        const int at = 4 * (8 * pass + b) + i;
        StoreShared(staged + (8 * b + 2 * t + i) * 64 + ((g / 2 ^ t) << 4) + g % 2 * 8, acc[at],
                    acc[at + 2]);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int row = 8 * i + g;
      if (64 * pass + row < tokens) {
        uint32_t sums[4];
        LoadShared(sums, staged + row * 64 + ((t ^ row / 2 % 4) << 4));
        const int64_t token = token0 + 64 * pass + row;
        four.Finish(epilogue, token, epilogue.RowScale(token),
                    make_int4(sums[0], sums[1], sums[2], sums[3]));
      }
    }
  }
}

template <int kTokens, bool kPacked>
__global__ void __launch_bounds__(Int8Tile<kTokens, kPacked>::kThreads, 1)
    Int8MatmulTmaKernel(const __grid_constant__ Int8TmaParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = Int8Tile<kTokens, kPacked>;
  const Int8MatmulParams& p = params.p;
  extern __shared__ char unaligned[];
  const uint32_t shared =
      (SharedAddress(unaligned) + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment;

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be uniform
  const unsigned cluster = params.cluster;
  const unsigned rank = blockIdx.x % cluster;
  const Int8TileOrder order(p.m, p.n, p.batch, p.splits, kTokens, Tile::kOutputs * cluster);
  const unsigned first_tile = blockIdx.x / cluster;
  const unsigned tile_step = gridDim.x / cluster;
  const unsigned steps = static_cast<unsigned>((p.k + Tile::kDepth - 1) / Tile::kDepth);

  if (threadIdx.x == 32 * Tile::kConsumerWarps) {
    for (int s = 0; s < Tile::kStages; ++s) {
      BarrierInit(Tile::Full(shared, s), 1);
      BarrierInit(Tile::Empty(shared, s), Tile::kConsumerWarps * cluster);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (cluster > 1) {  // the fence above is release enough for barriers
    ClusterArriveRelaxed();
    ClusterWait();
  }
  StartKernelBehind();

  if (warp >= Tile::kConsumerWarps) {
    ReleaseRegisters<40>();
    if (warp != Tile::kConsumerWarps) return;
    const uint32_t bytes = params.a_rows * cluster * Tile::kDepth + Tile::kBBytes;
    auto begin = [&](int stage, int output, int step, int batch) {
      BarrierArriveExpecting(Tile::Full(shared, stage), bytes);
      CopyBox(Tile::B(shared, stage), &params.b, output, step * Tile::kBRows, batch,
              Tile::Full(shared, stage));
    };
    StageCounter<Tile::kStages> at;
    for (unsigned tile = first_tile; tile < order.count; tile += tile_step) {
      unsigned split, batch, row, column;
      order.Find(tile, &split, &batch, &row, &column);
      const Share share(steps, split, p.splits);
      const int a_batch = batch * params.batch_a;
      const int b_batch = batch * params.batch_b;
      const int own_rows = rank * params.a_rows;  // within the tile
      const int token = row * kTokens + own_rows;
      const int output = (column * cluster + rank) * Tile::kOutputs;
      int begun = 0;
      if (params.widened && tile == first_tile) {  // b comes while a is still written
        for (; begun < min(share.count, Tile::kStages); ++begun) {
          if (ElectOne()) begin(begun, output, share.first + begun, b_batch);
        }
        WaitForKernelBefore();
      }
      for (int i = 0; i < share.count; ++i) {
        const int step = share.first + i;
        BarrierWait(Tile::Empty(shared, at.stage), at.phase ^ 1);
        if (ElectOne()) {
          if (i >= begun) begin(at.stage, output, step, b_batch);
          const uint32_t barrier = Tile::Full(shared, at.stage);
          const uint32_t to = Tile::A(shared, at.stage) + own_rows * Tile::kDepth;
          if (cluster == 1) {
            CopyBox(to, &params.a, step * Tile::kDepth, token, a_batch, barrier);
          } else {
            CopyBoxToMembers(to, &params.a, step * Tile::kDepth, token, a_batch, barrier, 3);
          }
        }
        __syncwarp();
        at.Advance();
      }
    }
    return;
  }

  AcquireRegisters<232>();
  Int8Consumer<kTokens, kPacked> consumer(shared, cluster);
  for (unsigned tile = first_tile; tile < order.count; tile += tile_step) {
    unsigned split, batch, row, column;
    order.Find(tile, &split, &batch, &row, &column);
    const Share share(steps, split, p.splits);
    Int8Epilogue epilogue = MakeEpilogue(p, batch, kPacked ? kPackedShift : 0);
    if (p.partials) epilogue.WriteOnly(p.partials + (split * p.batch + batch) * p.size());
    const int64_t token0 = static_cast<int64_t>(row) * kTokens;
    const int tokens = static_cast<int>(min(p.m - token0, static_cast<int64_t>(kTokens)));
    const int64_t output0 =
        static_cast<int64_t>(column * cluster + rank) * Tile::kOutputs + 16 * warp;
    Int8Scales<kTokens> scales;
    scales.Fetch(epilogue, token0, tokens, output0);

    int32_t acc[kTokens / 2];
    consumer.Accumulate(share.count, acc);

    auto store = [&](auto output) {
      StoreSums<decltype(output)::value>(epilogue, scales, token0, tokens, output0, acc);
    };
    if (output0 >= p.n) {
      // These outputs are not there, as N ends within the tile.
    } else if (epilogue.raw) {
      store(std::integral_constant<Int8Output, Int8Output::kSums>());
    } else if (epilogue.activation != Activation::kNone) {
      StoreActivated<kTokens>(epilogue, Tile::Staged(shared, warp), token0, tokens, output0, acc);
    } else if (epilogue.out_dtype == DType::kF32) {
      store(std::integral_constant<Int8Output, Int8Output::kF32>());
    } else if (epilogue.out_dtype == DType::kF16) {
      store(std::integral_constant<Int8Output, Int8Output::kF16>());
    } else {
      store(std::integral_constant<Int8Output, Int8Output::kBF16>());
    }
  }
  if (cluster > 1) ClusterSync();  // nobody leaves while others arrive at its barriers
#endif
}

template <int kTokens, bool kPacked>
cudaError_t LaunchTile(const Int8MatmulPlan& plan, const Int8MatmulParams& p, const void* a,
                       cudaStream_t stream) {
  using Tile = Int8Tile<kTokens, kPacked>;
  const TensorMaps* maps = TensorMaps::Get();
  if (maps == nullptr) return cudaErrorNotSupported;
  Int8TmaParams params = {};
  params.p = p;
  params.cluster = plan.cluster;
  params.widened = plan.widen;
  // No more rows than there are: copying what lies outside of a takes long.
  const int64_t step = 8 * plan.cluster;
  params.a_rows =
      static_cast<int>(std::min<int64_t>(kTokens, (p.m + step - 1) / step * step)) / plan.cluster;
  params.batch_a = p.buffers.a_stride != 0;
  params.batch_b = p.buffers.b_stride != 0;
  const int64_t columns = plan.widen ? plan.padded_k : p.k;
  if (!maps->Encode(&params.a, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a, columns, p.m,
                    params.batch_a ? p.batch : 1, Tile::kDepth, params.a_rows,
                    CU_TENSOR_MAP_SWIZZLE_128B) ||
      !maps->Encode(&params.b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.buffers.b, p.n, p.b_rows,
                    params.batch_b ? p.batch : 1, Tile::kOutputs, Tile::kBRows,
                    CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  const int outputs = Tile::kOutputs * plan.cluster;
  const int64_t tiles =
      (p.m + kTokens - 1) / kTokens * ((p.n + outputs - 1) / outputs) * p.batch * p.splits;
  const int64_t clusters = std::min<int64_t>(tiles, plan.sm_count / plan.cluster);
  return LaunchClusters(Int8MatmulTmaKernel<kTokens, kPacked>, params, plan.cluster,
                        dim3(static_cast<unsigned>(clusters * plan.cluster)), Tile::kThreads,
                        Tile::kSharedBytes, stream, plan.widen);
}

template <bool kPacked>
cudaError_t LaunchTiles(const Int8MatmulPlan& plan, const Int8MatmulParams& p, const void* a,
                        cudaStream_t stream) {
  switch (plan.tile_tokens) {
    case 64:
      return LaunchTile<64, kPacked>(plan, p, a, stream);
    case 128:
      return LaunchTile<128, kPacked>(plan, p, a, stream);
    default:
      return LaunchTile<256, kPacked>(plan, p, a, stream);
  }
}

}  // namespace

cudaError_t LaunchInt8MatmulTma(const Int8MatmulPlan& plan, const Int8MatmulParams& p,
                                cudaStream_t stream) {
  const void* a = plan.widen ? p.buffers.workspace : p.buffers.a;
  return p.packed ? LaunchTiles<true>(plan, p, a, stream) : LaunchTiles<false>(plan, p, a, stream);
}

}  // namespace jax_awq
