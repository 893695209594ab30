// The kernel for sm_90a: TMA brings tiles, a warp of its own keeping them coming, and eight warps
// multiply. A CTA computes kTokens x kOutputs of y.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "device/consumer_codes.cuh"
#include "device/consumer_mma.cuh"
#include "device/consumer_wgmma.cuh"
#include "device/epilogue.cuh"
#include "device/ptx.cuh"
#include "kernels/awq_gemm_launch.cuh"
#include "kernels/awq_gemm_schedule.cuh"
#include "kernels/tensor_maps.h"

namespace jax_awq {

struct AwqGemmTmaParams {
  CUtensorMap x, words, scales, zeros;
  CUtensorMap sums, sum_scales, sum_zeros;  // of the chunks of x, where x is codes
  AwqGemmParams p;
  int x_rows;                 // of a box of x, of which each member has one: no more than there are
  int members;                // CTAs side by side that share their rows of x
  int group_rows;             // of a box of scales or zeros
  int batch_x, batch_weight;  // 1 where every batch entry has its own, 0 where all share one
  bool exchange;              // results pass through shared memory: splits meet, or activation
  bool stream_k;
};

template <typename T, typename S, int kTokens, int kTiles>
using TmaConsumer =
    std::conditional_t<sizeof(T) == 1, CodesConsumer<T, kTokens, kTiles>,
                       std::conditional_t<kTokens <= 16, MmaConsumer<T, S, kTokens, kTiles>,
                                          WgmmaConsumer<T, S, kTokens, kTiles>>>;

template <typename T, typename S, int kTokens, int kTiles>
__global__ void __launch_bounds__(TmaTile<kTokens, kTiles, sizeof(T)>::kThreads, 1)
    AwqGemmTmaKernel(const __grid_constant__ AwqGemmTmaParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = TmaTile<kTokens, kTiles, sizeof(T)>;
  using Lane = TmaLane<Tile>;
  using Consumer = TmaConsumer<T, S, kTokens, kTiles>;
  const AwqGemmParams& p = params.p;
  extern __shared__ char unaligned[];
  const uint32_t shared =
      (SharedAddress(unaligned) + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment;

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be uniform
  const unsigned split = blockIdx.x % p.splits;
  const unsigned members = Tile::kCodes ? params.members : 1;
  const unsigned member = blockIdx.x % members;
  const TmaTileOrder order(p, kTokens, Tile::kOutputs * members);
  TmaWork work(p.splits * members, p.splits, order.count,
               static_cast<unsigned>(p.contraction + Tile::kDepth - 1) / Tile::kDepth,
               !Tile::kMma && params.stream_k);
  const int group_shift = p.buffers.weight.group_shift;
  const bool has_zeros = p.buffers.weight.qzeros != nullptr;
  auto blocks_of = [&](unsigned row) {
    const int64_t left = p.m - static_cast<int64_t>(row) * kTokens;
    return static_cast<unsigned>(min((left + 7) / 8, static_cast<int64_t>(kTokens / 8)));
  };

  if (threadIdx.x == 32 * Tile::kConsumerWarps) {
    for (int s = 0; s < Tile::kStages; ++s) {
      BarrierInit(Tile::Full(shared, s), 1);
      BarrierInit(Tile::Empty(shared, s), Tile::kTeamWarps * members);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (members > 1) {  // the fence above is release enough for barriers
    ClusterArriveRelaxed();
    ClusterWait();
  }

  if (warp >= Tile::kConsumerWarps) {
    if constexpr (Tile::kMoveRegisters) ReleaseRegisters<40>();
    if (warp != Tile::kConsumerWarps) return;
    const int group_rows = params.group_rows;
    const bool zeros_in_stage = has_zeros && !Tile::kCodes;
    const uint32_t x_bytes = params.x_rows * members * Tile::kDepth * sizeof(T);
    const uint32_t bytes =
        x_bytes + Tile::kWordBytes +
        group_rows * (Tile::kOutputs * 2 + (zeros_in_stage ? Tile::kOutputs / 2 : 0));
    const uint32_t sum_bytes = x_bytes + (has_zeros ? Tile::kSumWordBytes : Tile::kSumZerosAt);
    const int own_rows = member * params.x_rows;  // where this member's rows of x begin
    StageCounter<Tile::kStages> at;
    for (unsigned item = 0; item < work.items; ++item) {
      work.Next();
      unsigned batch, row, column;
      order.Find(work.tile, &batch, &row, &column);
      const int x_batch = batch * params.batch_x;
      const int weight_batch = batch * params.batch_weight;
      const int token0 = row * kTokens + own_rows;
      const int output0 = (column * members + member) * Tile::kOutputs;
      const int first = work.share.first;
      const int count = work.share.count;
      int sum_stages = 0, first_chunk = 0;
      if constexpr (Tile::kCodes) {
        sum_stages = Consumer::SumStages(work.share, has_zeros);
        first_chunk = Consumer::SumShare(work.share).first;
      }
      // What is of the weight, and announces the whole stage; and what is of x.
      const auto copy_weight = [&](int stage, int i) {
        const uint32_t barrier = Tile::Full(shared, stage);
        const uint32_t words = Tile::Words(shared, stage);
        if (Tile::kCodes && i >= count) {
          const int group = (first_chunk + (i - count) * Tile::kSumChunks) >> (group_shift - 7);
          BarrierArriveExpecting(barrier, sum_bytes);
          CopyBox(words, &params.sum_scales, output0, group, weight_batch, barrier);
          if (has_zeros) {
            CopyBox(words + Tile::kSumZerosAt, &params.sum_zeros, output0 / 8, group, weight_batch,
                    barrier);
          }
          return;
        }
        const int depth = (first + i) * Tile::kDepth;
        BarrierArriveExpecting(barrier, bytes);
        CopyBox(words, &params.words, output0 / 8, depth, weight_batch, barrier);
        CopyBox(Tile::Scales(shared, stage), &params.scales, output0, depth >> group_shift,
                weight_batch, barrier);
        if (zeros_in_stage) {
          CopyBox(Tile::Zeros(shared, stage), &params.zeros, output0 / 8, depth >> group_shift,
                  weight_batch, barrier);
        }
      };
      const auto copy_x = [&](int stage, int i) {
        const uint32_t barrier = Tile::Full(shared, stage);
        const bool sums = Tile::kCodes && i >= count;
        const void* map = sums ? &params.sums : &params.x;
        const int depth =
            sums ? 4 * (first_chunk + (i - count) * Tile::kSumChunks) : (first + i) * Tile::kDepth;
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
          const uint32_t to = Tile::X(shared, stage) + part * kTokens * 128 + own_rows * 128;
          const int from = depth + part * Tile::kPartDepth;
          if (members == 1) {
            CopyBox(to, map, from, token0, x_batch, barrier);
          } else {
            CopyBoxToMembers(to, map, from, token0, x_batch, barrier, 3);
          }
        }
      };
      const int stages = count + sum_stages;
      int begun = 0;
      if (p.buffers.overlap && item == 0) {  // the weight comes while x is still written
        for (; begun < min(Tile::kStages, stages); ++begun) {
          if (ElectOne()) copy_weight(begun, begun);
        }
        WaitForKernelBefore();
      }
      for (int i = 0; i < stages; ++i) {
        BarrierWait(Tile::Empty(shared, at.stage), at.phase ^ 1);
        if (ElectOne()) {
          if (i >= begun) copy_weight(at.stage, i);
          copy_x(at.stage, i);
        }
        __syncwarp();
        at.Advance();
      }
    }
    return;
  }

  if constexpr (Tile::kMoveRegisters) AcquireRegisters<232>();
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  Consumer consumer = [&] {
    if constexpr (Tile::kCodes) {
      return Consumer(shared, group_shift, has_zeros, p.scales_are_bf16, p.cluster ? split : 0,
                      members);
    } else {
      return Consumer(shared, group_shift, has_zeros);
    }
  }();
  if (p.buffers.overlap) WaitForKernelBefore();        // which writes the scales of rows
  const unsigned items = Tile::kMma ? 1 : work.items;  // few rows are one tile a CTA
#pragma unroll 1
  for (unsigned item = 0; item < items; ++item) {
    work.Next();
    unsigned batch, row, column;
    order.Find(work.tile, &batch, &row, &column);
    EpilogueParams epilogue = MakeEpilogue(p, batch);
    if (epilogue.partials) epilogue.WriteOnly(split * p.batch * p.size());
    const RowScales<kTokens> row_scales(epilogue, static_cast<int64_t>(row) * kTokens);

    float acc[kTiles][kTokens / 2];
    __builtin_assume(work.share.count > 0);  // or ptxas serializes what follows
    consumer.Accumulate(work.share, acc);

    const unsigned blocks = blocks_of(row);
    if (!Tile::kMma && work.slot >= 0) {
      float4* part = static_cast<float4*>(p.buffers.workspace) +
                     (int64_t{work.slot} * (kTokens / 8) * Tile::kTeamWarps + warp) * kTiles * 32 +
                     lane;
#pragma unroll
      for (int b = 0; b < kTokens / 8; ++b) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          part[(b * Tile::kTeamWarps * kTiles + j) * 32] =
              make_float4(acc[j][4 * b], acc[j][4 * b + 1], acc[j][4 * b + 2], acc[j][4 * b + 3]);
        }
      }
      continue;
    }
    const int64_t output0 = (static_cast<int64_t>(column) * members + member) * Tile::kOutputs;
    const int64_t token = static_cast<int64_t>(row) * kTokens + 2 * t + g % 2;
    if (!params.exchange) {
      if (p.buffers.row_scale) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int b = 0; b < kTokens / 8; ++b) row_scales.Multiply(b, acc[j] + 4 * b);
        }
      }
      const HalfWord<kTiles> half(epilogue, output0 + 8 * consumer.lane.word, consumer.lane.byte,
                                  g % 2);
#pragma unroll
      for (int b = 0; b < kTokens / 8; ++b) {
        float v[kTiles][4];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) v[j][i] = acc[j][4 * b + i];
        }
        half.template Store<false>(epilogue, v, token + 8 * b);
      }
      continue;
    }

    // First the teams of this CTA add what they have, then each unit's owner in the cluster reads
    // it from every other member: reading is several times as fast as writing to another's memory.
    // A unit is what a warp holds of eight tokens; or one tile of that, where there are few.
    constexpr int kUnitTiles = Tile::kMma ? 1 : kTiles;
    constexpr int kWarpUnits = kTiles / kUnitTiles;
    const int team = warp / Tile::kTeamWarps;
    const int team_warp = warp % Tile::kTeamWarps;
    const Exchange exchange(p.cluster ? p.splits : 1, p.cluster ? split : 0,
                            blocks * Tile::kTeamWarps * kWarpUnits);
    const uint32_t slots = shared + 16 * lane;
    NamedBarrierSync<1, 32 * Tile::kConsumerWarps>();  // the slots take the place of the pipeline
#pragma unroll
    for (int from = Tile::kTeams - 1; from >= 0; --from) {
      if (team == from) {
#pragma unroll
        for (int b = 0; b < kTokens / 8; ++b) {
          if (b < blocks) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              const uint32_t slot =
                  slots + ((b * Tile::kTeamWarps + team_warp) * kTiles + j) * Tile::kSlotBytes;
              float4 v = make_float4(acc[j][4 * b], acc[j][4 * b + 1], acc[j][4 * b + 2],
                                     acc[j][4 * b + 3]);
              if (from < Tile::kTeams - 1) Add(v, LoadSharedFour(slot));
              StoreSharedFour(slot, v);
            }
          }
        }
      }
      if (from > 0) NamedBarrierSync<1, 32 * Tile::kConsumerWarps>();
    }
    if (p.cluster) {
      ClusterSync();
    } else {
      NamedBarrierSync<1, 32 * Tile::kConsumerWarps>();
    }
    // Whatever warp it came from: lanes are alike. Two slots at once hide the latency of reading
    // from another's memory, where there are registers for them.
    constexpr int kSlots = Tile::kMma ? 1 : 2;
    constexpr int kBatch = kSlots / kUnitTiles;
#pragma unroll 1
    for (unsigned first = warp; first < exchange.own; first += Tile::kConsumerWarps * kBatch) {
      uint32_t at[kSlots];
      float4 sums[kSlots];
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const unsigned unit =
            exchange.rank * exchange.per + first + i / kUnitTiles * Tile::kConsumerWarps;
        at[i] = slots + (unit * kUnitTiles + i % kUnitTiles) * Tile::kSlotBytes;
      }
      const bool all = kBatch == 1 || first + Tile::kConsumerWarps < exchange.own;
      exchange.Sum(at, all ? kSlots : 1, sums);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (u > 0 && !all) break;
        const unsigned unit = exchange.rank * exchange.per + first + u * Tile::kConsumerWarps;
        const int of_warp = unit / kWarpUnits % Tile::kTeamWarps;
        const HalfWord<kUnitTiles> half(epilogue, output0 + 8 * Lane::Word(of_warp),
                                        kWarpUnits == 1 ? Lane::Byte(of_warp) : unit % kWarpUnits,
                                        g % 2);
        float v[kUnitTiles][4];
#pragma unroll
        for (int j = 0; j < kUnitTiles; ++j) {
          const float4& sum = sums[u * kUnitTiles + j];
          v[j][0] = sum.x, v[j][1] = sum.y, v[j][2] = sum.z, v[j][3] = sum.w;
        }
        const unsigned block = unit / (kWarpUnits * Tile::kTeamWarps);
        if (p.buffers.row_scale) {
#pragma unroll
          for (int j = 0; j < kUnitTiles; ++j) row_scales.Multiply(block, v[j]);
        }
        half.template Store<true>(epilogue, v, token + 8 * block);
      }
    }
    if (p.cluster || members > 1) {  // nobody leaves while others read its memory, or arrive at it
      ClusterArriveRelaxed();
      ClusterWait();
    }
    return;  // one tile a CTA
  }
  if (members > 1) {
    ClusterArriveRelaxed();
    ClusterWait();
  }
#endif
}

// Adds the parts of each tile of the tail, and finishes it. A CTA has eight tokens of a tile, its
// warps what warps of the kernel before had of them.
template <int kTokens, int kTiles>
__global__ void __launch_bounds__(32 * TmaTile<kTokens, kTiles, 2>::kTeamWarps)
    FinishTailKernel(const __grid_constant__ AwqGemmParams p, unsigned steps, unsigned ctas) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = TmaTile<kTokens, kTiles, 2>;
  using Lane = TmaLane<Tile>;
  constexpr int kBlocks = kTokens / 8;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const TmaTileOrder order(p, kTokens, Tile::kOutputs);
  const StreamK stream(order.count, steps, ctas);
  const unsigned tail_tile = blockIdx.x / kBlocks;
  const unsigned block = blockIdx.x % kBlocks;
  unsigned batch, row, column;
  order.Find(stream.whole + tail_tile, &batch, &row, &column);
  const int64_t token0 = static_cast<int64_t>(row) * kTokens + 8 * block;
  if (token0 >= p.m) return;

  float4 sums[kTiles] = {};
  for (unsigned cta = stream.FirstOf(tail_tile); cta < ctas; ++cta) {
    const Share share = stream.Of(cta);
    if (share.first >= (tail_tile + 1) * steps) break;
    if (share.count == 0) continue;
    const float4* part =
        static_cast<const float4*>(p.buffers.workspace) +
        ((int64_t{StreamK::Slot(cta, tail_tile)} * kBlocks + block) * Tile::kTeamWarps + warp) *
            kTiles * 32 +
        lane;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) Add(sums[j], part[32 * j]);
  }
  float v[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    v[j][0] = sums[j].x, v[j][1] = sums[j].y, v[j][2] = sums[j].z, v[j][3] = sums[j].w;
  }
  const EpilogueParams epilogue = MakeEpilogue(p, batch);
  const bool odd = lane / 4 % 2;
  const HalfWord<kTiles> half(epilogue,
                              static_cast<int64_t>(column) * Tile::kOutputs + 8 * Lane::Word(warp),
                              Lane::Byte(warp), odd);
  const int64_t pair = token0 + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) v[i / 4][i % 4] *= epilogue.RowScale(pair + i % 2);
  half.template Store<true>(epilogue, v, pair + odd);
#endif
}

template <typename T, typename S, int kTokens, int kTiles>
cudaError_t LaunchTmaTile(const AwqGemmPlan& plan, const AwqGemmParams& p, cudaStream_t stream) {
  using Tile = TmaTile<kTokens, kTiles, sizeof(T)>;
  const TensorMaps* maps = TensorMaps::Get();
  if (maps == nullptr) return cudaErrorNotSupported;
  const AwqWeight& w = p.buffers.weight;
  const int64_t columns = (p.outputs + Tile::kOutputs - 1) / Tile::kOutputs;
  AwqGemmTmaParams params = {};
  params.p = p;
  // Codes come so fast that x has to be read once for two CTAs.
  params.members = Tile::kCodes && kTiles == 1 && p.splits == 1 && columns > 1 ? 2 : 1;
  const int64_t step = 8 * params.members;
  params.x_rows =
      static_cast<int>(std::min<int64_t>(kTokens, (p.m + step - 1) / step * step)) / params.members;
  params.batch_x = p.buffers.x_stride != 0;
  params.batch_weight = w.qweight_stride != 0;
  params.stream_k = plan.stream_k;
  params.exchange = p.cluster || Tile::kTeams > 1 || p.buffers.activation != Activation::kNone;
  const CUtensorMapDataType type = sizeof(T) == 1              ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t x_batch = params.batch_x ? p.batch : 1;
  const int64_t weight_batch = params.batch_weight ? p.batch : 1;
  const int64_t groups = w.group_shift == kSingleGroup ? 1 : (w.k >> w.group_shift);
  params.group_rows = std::max(1, Tile::kDepth >> w.group_shift);
  const auto encode_groups = [&](CUtensorMap* scales, CUtensorMap* zeros, int rows) {
    return maps->Encode(scales, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, w.scales, w.n, groups,
                        weight_batch, Tile::kOutputs, rows, CU_TENSOR_MAP_SWIZZLE_NONE) &&
           (w.qzeros == nullptr ||
            maps->Encode(zeros, CU_TENSOR_MAP_DATA_TYPE_INT32, 4, w.qzeros, w.n / 8, groups,
                         weight_batch, Tile::kOutputs / 8, rows, CU_TENSOR_MAP_SWIZZLE_NONE));
  };
  bool encoded =
      maps->Encode(&params.x, type, sizeof(T), p.buffers.x, w.k, p.m, x_batch, Tile::kPartDepth,
                   params.x_rows, CU_TENSOR_MAP_SWIZZLE_128B) &&
      maps->Encode(&params.words, CU_TENSOR_MAP_DATA_TYPE_INT32, 4, w.qweight, w.n / 8, w.k,
                   weight_batch, Tile::kOutputs / 8, Tile::kDepth,
                   kTiles == 2 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B) &&
      encode_groups(&params.scales, &params.zeros, params.group_rows);
  if (Tile::kCodes && encoded) {
    encoded = maps->Encode(&params.sums, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p.buffers.chunk_sums,
                           ChunkSumColumns(w.k), p.m, x_batch, 64, params.x_rows,
                           CU_TENSOR_MAP_SWIZZLE_128B) &&
              encode_groups(&params.sum_scales, &params.sum_zeros, Tile::kSumChunks);
  }
  if (!encoded) return cudaErrorInvalidValue;

  const int64_t tiles =
      (p.m + kTokens - 1) / kTokens * ((columns + params.members - 1) / params.members) * p.batch;
  const bool persistent = p.splits == 1 && !params.exchange;
  const int64_t resident = plan.resident_ctas / params.members;
  const int64_t ctas = plan.stream_k ? resident
                       : persistent  ? std::min(tiles, resident)
                                     : tiles * p.splits;
  const cudaError_t error = LaunchClusters(
      AwqGemmTmaKernel<T, S, kTokens, kTiles>, params, p.cluster_size() * params.members,
      dim3(static_cast<unsigned>(ctas * params.members)), Tile::kThreads, Tile::kSharedBytes,
      stream, p.buffers.overlap);
  if constexpr (!Tile::kCodes) {
    if (error != cudaSuccess || !plan.stream_k || tiles % resident == 0) return error;
    FinishTailKernel<kTokens, kTiles>
        <<<static_cast<unsigned>(tiles % resident * (kTokens / 8)), 32 * Tile::kTeamWarps, 0,
           stream>>>(p, static_cast<unsigned>((p.contraction + Tile::kDepth - 1) / Tile::kDepth),
                     static_cast<unsigned>(resident));
    return cudaGetLastError();
  }
  return error;
}

template <typename T, typename S>
cudaError_t LaunchTmaTiles(const AwqGemmPlan& plan, const AwqGemmParams& p, cudaStream_t stream) {
  switch (plan.tile_tokens * 1000 + plan.tile_outputs) {
    case 8256:
      return LaunchTmaTile<T, S, 8, 2>(plan, p, stream);
    case 16256:
      return LaunchTmaTile<T, S, 16, 2>(plan, p, stream);
    case 32256:
      return LaunchTmaTile<T, S, 32, 2>(plan, p, stream);
    case 64256:
      return LaunchTmaTile<T, S, 64, 2>(plan, p, stream);
    case 96256:
      return LaunchTmaTile<T, S, 96, 2>(plan, p, stream);
    case 128128:
      return LaunchTmaTile<T, S, 128, 1>(plan, p, stream);
    case 128256:
      return LaunchTmaTile<T, S, 128, 2>(plan, p, stream);
    case 160128:
      return LaunchTmaTile<T, S, 160, 1>(plan, p, stream);
    case 192128:
      return LaunchTmaTile<T, S, 192, 1>(plan, p, stream);
    case 224128:
      return LaunchTmaTile<T, S, 224, 1>(plan, p, stream);
    case 256128:
      return LaunchTmaTile<T, S, 256, 1>(plan, p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t LaunchCodesTiles(const AwqGemmPlan& plan, const AwqGemmParams& p, cudaStream_t stream) {
  switch (plan.tile_tokens * 1000 + plan.tile_outputs) {
    case 32256:
      return LaunchTmaTile<T, T, 32, 2>(plan, p, stream);
    case 64256:
      return LaunchTmaTile<T, T, 64, 2>(plan, p, stream);
    case 128128:
      return LaunchTmaTile<T, T, 128, 1>(plan, p, stream);
    case 256128:
      return LaunchTmaTile<T, T, 256, 1>(plan, p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t LaunchAwqGemmTma(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                             const AwqGemmBuffers& buffers, cudaStream_t stream) {
  const AwqGemmParams params = MakeParams(p, plan, buffers);
  if constexpr (sizeof(T) == 1) {
    return LaunchCodesTiles<T>(plan, params, stream);
  } else {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (p.scales_dtype == DType::kF16) return LaunchTmaTiles<T, __half>(plan, params, stream);
    }
    return LaunchTmaTiles<T, T>(plan, params, stream);
  }
}

}  // namespace jax_awq
