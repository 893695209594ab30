// The kernel for sm_90a: TMA brings tiles, a warp of its own keeping them coming, and eight warps
// multiply. A CTA computes kTokens x kOutputs of y.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "device/consumer_codes.cuh"
#include "device/consumer_transposed.cuh"
#include "device/consumer_wgmma.cuh"
#include "device/epilogue.cuh"
#include "device/ptx.cuh"
#include "kernels/awq_gemm_launch.cuh"
#include "kernels/awq_gemm_schedule.cuh"
#include "kernels/tensor_maps.h"

namespace jax_awq {

struct AwqGemmTmaParams {
  CUtensorMap x[2], words, scales, zeros;
  CUtensorMap sums[2], sum_scales, sum_zeros;  // of the chunks of x, where x is codes
  CUtensorMap part_sums;                       // TailParts::sums
  // What the producer reads comes first: as FewParams.
  TmaSchedule schedule;
  // Of a box of x and of sums, of which each member has kXBoxes; the second is for the last row of
  // tiles and has no more than are left: what lies outside takes longer to fill than to copy.
  int x_rows[2];
  int members;     // CTAs side by side that share their rows of x
  int group_rows;  // of a box of scales or zeros
  int group_shift;
  OwnEntries own;
  bool has_zeros, overlap, cluster;
  bool exchange;         // results pass through shared memory: splits meet, or activation
  Share::Even units[2];  // of a tile, for the members of a cluster to finish
  Share::Even turn;      // how much further a member and its units are for the same warp
  TailParts parts;
  AwqGemmParams p;
};

// Named barriers of a CTA.
constexpr int kTmaBarriersReady = 1;
constexpr int kTmaConsumers = 2;

template <typename T, typename S, int kTokens, int kOutputs, bool kTranspose>
using TmaConsumer =
    std::conditional_t<sizeof(T) == 1, CodesConsumer<T, kTokens, kOutputs>,
                       std::conditional_t<kTranspose, TransposedConsumer<T, S, kTokens>,
                                          WgmmaConsumer<T, S, kTokens, kOutputs>>>;

template <typename T, typename S, int kTokens, int kOutputs, bool kTranspose>
__global__ void __launch_bounds__(TmaTile<kTokens, kOutputs, sizeof(T), kTranspose>::kThreads,
                                  TmaTile<kTokens, kOutputs, sizeof(T), kTranspose>::kCtas)
    AwqGemmTmaKernel(const __grid_constant__ AwqGemmTmaParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = TmaTile<kTokens, kOutputs, sizeof(T), kTranspose>;
  constexpr int kTiles = Tile::kTiles;
  using Lane = TmaLane<Tile>;
  using Unit = typename Tile::Unit;
  using Consumer = TmaConsumer<T, S, kTokens, kOutputs, kTranspose>;
  const AwqGemmParams& p = params.p;
  extern __shared__ char unaligned[];
  const uint32_t shared =
      (SharedAddress(unaligned) + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment;

  const uint32_t inbox_barriers = shared + Tile::kInboxBarriersAt;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be uniform
  const unsigned members = Tile::kSharesX ? params.members : 1;
  const unsigned member = blockIdx.x % members;
  const TmaTileOrder& order = params.schedule.order;
  TmaWork work(params.schedule, Tile::kPersistent);
  const unsigned split = work.split;
  const int group_shift = params.group_shift;
  const bool has_zeros = params.has_zeros;
  if (warp == Tile::kConsumerWarps) {
    if (ElectOne()) {
      for (int s = 0; s < Tile::kStages; ++s) {
        BarrierInit(Tile::Full(shared, s), 1);
        BarrierInit(Tile::Empty(shared, s), Tile::kTeamWarps * members);
      }
      BarrierInit(Tile::Empty(shared, Tile::kNoStage), Tile::kMostArrivals);
      for (int w = 0; w < Tile::kConsumerWarps; ++w) BarrierInit(inbox_barriers + 8 * w, 1);
      BarrierInitFence();
    }
    __syncwarp();
    // The consumers wait for that, the producer for nobody.
    NamedBarrierArrive<kTmaBarriersReady, 32 * (Tile::kConsumerWarps + 1)>();
  } else if (warp < Tile::kConsumerWarps) {
    NamedBarrierSync<kTmaBarriersReady, 32 * (Tile::kConsumerWarps + 1)>();
  }
  // The fence above is release enough for barriers.
  if (Tile::kInboxApart && params.cluster) ClusterArriveRelaxed();
  if (members > 1) {
    ClusterArriveRelaxed();
    ClusterWait();
  }

  if (warp >= Tile::kConsumerWarps) {
    if constexpr (Tile::kMoveRegisters) ReleaseRegisters<Tile::kProducerRegisters>();
    if (warp != Tile::kConsumerWarps) return;
    const int group_rows = params.group_rows;
    const bool zeros_in_stage = has_zeros && !Tile::kCodes;
    const uint32_t group_bytes =
        group_rows * (Tile::kOutputs * 2 + (zeros_in_stage ? Tile::kOutputs / 2 : 0));
    StageCounter<Tile::kStages> at;
    for (unsigned item = 0; item < work.items; ++item) {
      work.Next();
      unsigned batch, row, column;
      order.Find(work.tile, &batch, &row, &column);
      const int last = row + 1 == order.rows;
      const int x_rows = params.x_rows[last];
      const uint32_t x_bytes = x_rows * Tile::kXBoxes * members * Tile::kDepth * sizeof(T);
      const uint32_t bytes = x_bytes + Tile::kDepth * kOutputs / 2 + group_bytes;
      const uint32_t sum_bytes = x_bytes + (has_zeros ? Tile::kSumWordBytes : Tile::kSumZerosAt);
      const int own_rows = member * x_rows * Tile::kXBoxes;  // where this member's begin
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
          CopyBox(words, &params.sum_scales, output0, group, batch * params.own.scales, barrier);
          if (has_zeros) {
            CopyBox(words + Tile::kSumZerosAt, &params.sum_zeros, output0 / 8, group,
                    batch * params.own.zeros, barrier);
          }
          return;
        }
        const int depth = (first + i) * Tile::kDepth;
        BarrierArriveExpecting(barrier, bytes);
        const int column = kTranspose ? depth : output0;  // of the weight
        const int row = kTranspose ? output0 : depth;
        CopyBox(words, &params.words, column / 8, row, batch * params.own.words, barrier);
        CopyBox(Tile::Scales(shared, stage), &params.scales, column, row >> group_shift,
                batch * params.own.scales, barrier);
        if (zeros_in_stage) {
          CopyBox(Tile::Zeros(shared, stage), &params.zeros, column / 8, row >> group_shift,
                  batch * params.own.zeros, barrier);
        }
      };
      const auto copy_x = [&](int stage, int i) {
        const uint32_t barrier = Tile::Full(shared, stage);
        const bool sums = Tile::kCodes && i >= count;
        const void* map = sums ? &params.sums[last] : &params.x[last];
        const int depth =
            sums ? 4 * (first_chunk + (i - count) * Tile::kSumChunks) : (first + i) * Tile::kDepth;
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
          const uint32_t to = Tile::X(shared, stage) + part * kTokens * 128 + own_rows * 128;
          const int from = depth + part * Tile::kPartDepth;
#pragma unroll
          for (int box = 0; box < Tile::kXBoxes; ++box) {
            const int rows = box * x_rows;
            if (members == 1) {
              CopyBox(to + rows * 128, map, from, token0 + rows, batch * params.own.x, barrier);
            } else {
              CopyBoxToMembers(to + rows * 128, map, from, token0 + rows, batch * params.own.x,
                               barrier, 3);
            }
          }
        }
      };
      const int stages = count + sum_stages;
      int begun = 0;
      if (params.overlap && item == 0) {  // the weight comes while x is still written
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
      if constexpr (Tile::kStreams) {  // what others have left of this tile
        if (work.parts > 0) WaitForKernelBefore();
        for (int part = 1; part <= work.parts; ++part) {
          const unsigned cta = blockIdx.x - part * members;
          WaitForCount(params.parts.counts + cta, Tile::kTeamWarps);
          FenceProxyAsyncGlobal();
#pragma unroll 1
          for (int i = 0; i < Tile::kPartStages; ++i) {
            BarrierWait(Tile::Empty(shared, at.stage), at.phase ^ 1);
            if (ElectOne()) {
              const uint32_t barrier = Tile::Full(shared, at.stage);
              BarrierArriveExpecting(barrier, Tile::kPartStageBytes);
              CopyBox(Tile::X(shared, at.stage), &params.part_sums, 0,
                      (cta * Tile::kPartStages + i) * Tile::kPartRows, 0, barrier);
            }
            __syncwarp();
            at.Advance();
          }
        }
      }
    }
    return;
  }

  if constexpr (Tile::kMoveRegisters) AcquireRegisters<Tile::kConsumerRegisters>();
  const int lane = threadIdx.x % 32;
  const StageReader<Tile> reader(shared, member, members);
  Consumer consumer = [&] {
    if constexpr (Tile::kCodes) {
      return Consumer(reader, group_shift, has_zeros, p.scales_are_bf16);
    } else {
      return Consumer(reader, group_shift, has_zeros);
    }
  }();
  if (params.overlap) WaitForKernelBefore();  // which writes the scales of rows
#pragma unroll 1
  for (unsigned item = 0; item < work.items; ++item) {
    work.Next();
    unsigned batch, row, column;
    order.Find(work.tile, &batch, &row, &column);
    const RowScales<kTokens> row_scales(MakeEpilogue(p, batch),
                                        static_cast<int64_t>(row) * kTokens);
    const int64_t output0 = (static_cast<int64_t>(column) * members + member) * Tile::kOutputs;
    const int64_t token0 = static_cast<int64_t>(row) * kTokens;
    const unsigned parts = p.cluster ? p.splits : 1;
    const unsigned rank = p.cluster ? split : 0;
    const Share::Even units = params.units[row + 1 == order.rows];
    // What this warp finishes of them.
    const unsigned own_units =
        (units.least + (rank < units.longer) + Tile::kTeamWarps - 1 - warp) / Tile::kTeamWarps;
    const auto expect_sums = [&] {
      if (lane == 0) {
        BarrierArriveExpecting(inbox_barriers + 8 * warp, own_units * (parts - 1) * Unit::kBytes);
      }
    };
    if (Tile::kInboxApart && p.cluster) expect_sums();

    EpilogueParams epilogue = MakeEpilogue(p, batch);
    if (epilogue.partials) epilogue.WriteOnly(split * p.batch * p.size());
    // The units of a tile are dealt out to the members of the cluster in turn. What does not depend
    // on the sums is found before them where there are registers for it.
    const unsigned count = units.least * parts + units.longer;
    const uint32_t inbox = shared + Tile::kInboxAt;
    TmaTurns<Tile> own;
    const auto find_turns = [&] {
      own = TmaTurns<Tile>(epilogue, parts, rank, warp, output0, token0);
    };
    if constexpr (Tile::kTurnsFirst) {
      if (params.exchange) find_turns();
    }

    float acc[kTiles][kTokens / 2];
    __builtin_assume(work.share.count > 0);  // or ptxas serializes what follows
    consumer.Accumulate(work.share, acc);

    if constexpr (Tile::kStreams) {
      if (work.leaves) {
        WaitForKernelBefore();  // which clears the counts
        params.parts.template Leave<Tile>(blockIdx.x, warp, acc);
        continue;
      }
      for (int part = 0; part < work.parts; ++part) consumer.AddPart(acc);
    }
    if (!params.exchange) {
      if (epilogue.row_scale) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int b = 0; b < kTokens / 8; ++b) row_scales.Multiply(b, acc[j] + 4 * b);
        }
      }
      const HalfWord<kTiles> half(epilogue, output0 + 8 * consumer.lane.word, consumer.lane.byte,
                                  token0 + lane % 4 * 2 + HalfWord<kTiles>::HasOdd());
#pragma unroll
      for (int b = 0; b < kTokens / 8; ++b) {
        float v[kTiles][4];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) v[j][i] = acc[j][4 * b + i];
        }
        half.Store(epilogue, v, b);
      }
      if constexpr (Tile::kPersistent) continue;
      return;
    }

    // Each pushes what it has of a unit into the inbox of its owner, who adds in the order of
    // members.
    if constexpr (!Tile::kTurnsFirst) find_turns();
    if (p.cluster) {
      if (!Tile::kInboxApart) ClusterArriveRelaxed();  // this pipeline is drained
      ClusterWait();
      if (!Tile::kInboxApart) expect_sums();
    } else {
      NamedBarrierSync<kTmaConsumers, 32 * Tile::kConsumerWarps>();
    }
    const uint32_t own_part = inbox + rank * Unit::kBytes;
    unsigned owner = own.owner, slot = own.slot;
#pragma unroll
    for (int u = 0; u < kTokens / Unit::kTokens; ++u) {
      if (u * Tile::kTeamWarps >= count) break;
      const uint32_t to = own_part + slot * parts * Unit::kBytes;
      const uint32_t remote = MapToRank(to, owner);
      const uint32_t barrier = MapToRank(inbox_barriers + slot % Tile::kTeamWarps * 8, owner);
#pragma unroll
      for (int i = 0; i < Unit::kVectors; ++i) {
        const float4 v = Unit::Vector(acc, u * Unit::kBlocks, i);
        const uint32_t at = Unit::VectorAt(lane, i);
        if (owner == rank) {
          StoreSharedFour(to + at, v);
        } else {
          StoreClusterSharedAsync(remote + at, v, barrier);
        }
      }
      owner += params.turn.longer;
      slot += params.turn.least;
      if (owner >= parts) owner -= parts, ++slot;
    }
    NamedBarrierSync<kTmaConsumers, 32 * Tile::kConsumerWarps>();
    if (own_units > 0) {
      if (p.cluster) BarrierWait(inbox_barriers + 8 * warp, 0);
      own.outputs.template Finish<Tile::kTeamWarps>(epilogue, inbox + warp * parts * Unit::kBytes,
                                                    parts, own.token, own_units, row_scales);
    }
    if (members > 1) {  // nobody leaves while others arrive at its barriers
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

static __global__ void ClearCountsKernel(uint32_t* counts, unsigned ctas) {
  StartKernelBehind();
  for (unsigned i = threadIdx.x; i < ctas; i += blockDim.x) counts[i] = 0;
}

template <typename T, typename S, int kTokens, int kOutputs, bool kTranspose = false>
cudaError_t LaunchTmaTile(const AwqGemmPlan& plan, const AwqGemmParams& p, cudaStream_t stream) {
  using Tile = TmaTile<kTokens, kOutputs, sizeof(T), kTranspose>;
  const TensorMaps* maps = TensorMaps::Get();
  if (maps == nullptr) return cudaErrorNotSupported;
  const AwqWeight& w = p.buffers.weight;
  const int64_t columns = (p.outputs + Tile::kOutputs - 1) / Tile::kOutputs;
  AwqGemmTmaParams params = {};
  params.p = p;
  params.members = plan.members;
  const int64_t last_rows = p.m - (p.m - 1) / kTokens * kTokens;
  const int boxes = params.members * Tile::kXBoxes;  // which begin at whole rows of the swizzle
  params.x_rows[0] = kTokens / boxes;
  params.x_rows[1] =
      static_cast<int>(boxes == 1 ? last_rows : (last_rows + 8 * boxes - 1) / (8 * boxes) * 8);
  const unsigned parts = p.cluster ? p.splits : 1;
  for (int last = 0; last < 2; ++last) {
    const int64_t rows = last ? last_rows : kTokens;
    const auto units = static_cast<unsigned>((rows + Tile::Unit::kTokens - 1) /
                                             Tile::Unit::kTokens * Tile::kTeamWarps);
    params.units[last] = {units / parts, units % parts};
  }
  params.turn = {Tile::kTeamWarps / parts, Tile::kTeamWarps % parts};
  params.group_shift = w.group_shift;
  params.own = OwnEntries(p.buffers);
  params.has_zeros = w.qzeros != nullptr;
  params.overlap = p.buffers.overlap;
  params.cluster = p.cluster;
  params.exchange = p.cluster || p.buffers.activation != Activation::kNone;
  const CUtensorMapDataType type = sizeof(T) == 1              ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t x_batch = params.own.x ? p.batch : 1;
  params.group_rows = std::max(1, (kTranspose ? Tile::kOutputs : Tile::kDepth) >> w.group_shift);
  bool encoded = maps->EncodeWeight(&params.words, &params.scales, &params.zeros, w, p.batch,
                                    kTranspose ? Tile::kDepth : Tile::kOutputs,
                                    kTranspose ? Tile::kOutputs : Tile::kDepth, params.group_rows,
                                    Tile::kWordRowBytes);
  for (int last = 0; last < 2; ++last) {
    encoded = encoded && maps->Encode(&params.x[last], type, sizeof(T), p.buffers.x, p.contraction,
                                      p.m, x_batch, Tile::kPartDepth, params.x_rows[last],
                                      CU_TENSOR_MAP_SWIZZLE_128B);
    if (!Tile::kCodes) continue;
    encoded = encoded && maps->Encode(&params.sums[last], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                                      p.buffers.chunk_sums, ChunkSumColumns(w.k), p.m, x_batch, 64,
                                      params.x_rows[last], CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (Tile::kCodes && encoded) {
    encoded = maps->EncodeGroups(&params.sum_scales, &params.sum_zeros, w, p.batch, Tile::kOutputs,
                                 Tile::kSumChunks);
  }
  if (!encoded) return cudaErrorInvalidValue;

  const int64_t tiles =
      (p.m + kTokens - 1) / kTokens * ((columns + params.members - 1) / params.members) * p.batch;
  const bool persistent = Tile::kPersistent && p.splits == 1 && !params.exchange;
  const int64_t resident = plan.resident_ctas / params.members;
  const int64_t groups = plan.stream_k ? resident : persistent ? std::min(tiles, resident) : tiles;
  const int64_t ctas = groups * p.splits * params.members;
  params.schedule =
      TmaSchedule(p, kTokens, Tile::kOutputs, Tile::kDepth, params.members, groups, plan.stream_k);
  if (plan.stream_k) {
    params.parts.sums = static_cast<char*>(p.buffers.workspace);
    params.parts.counts = reinterpret_cast<uint32_t*>(params.parts.sums + ctas * Tile::kPartBytes);
    if (!maps->Encode(&params.part_sums, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, params.parts.sums,
                      Tile::kPartRowFloats, ctas * Tile::kPartStages * Tile::kPartRows, 1,
                      Tile::kPartRowFloats, Tile::kPartRows, CU_TENSOR_MAP_SWIZZLE_NONE)) {
      return cudaErrorInvalidValue;
    }
    ClearCountsKernel<<<1, 256, 0, stream>>>(params.parts.counts, static_cast<unsigned>(ctas));
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return LaunchClusters(AwqGemmTmaKernel<T, S, kTokens, kOutputs, kTranspose>, params,
                        p.cluster_size() * params.members, dim3(static_cast<unsigned>(ctas)),
                        Tile::kThreads, Tile::kSharedBytes, stream,
                        p.buffers.overlap || plan.stream_k);
}

template <typename T, typename S>
cudaError_t LaunchTransposedTiles(const AwqGemmPlan& plan, const AwqGemmParams& p,
                                  cudaStream_t stream) {
  switch (plan.tile_tokens) {
    case 128:
      return LaunchTmaTile<T, S, 128, 128, true>(plan, p, stream);
    case 256:
      return LaunchTmaTile<T, S, 256, 128, true>(plan, p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T, typename S>
cudaError_t LaunchTmaTiles(const AwqGemmPlan& plan, const AwqGemmParams& p, cudaStream_t stream) {
  if (p.transpose) return LaunchTransposedTiles<T, S>(plan, p, stream);
  switch (plan.tile_tokens * 1000 + plan.tile_outputs) {
    case 32128:
      return LaunchTmaTile<T, S, 32, 128>(plan, p, stream);
    case 32192:
      return LaunchTmaTile<T, S, 32, 192>(plan, p, stream);
    case 32256:
      return LaunchTmaTile<T, S, 32, 256>(plan, p, stream);
    case 64128:
      return LaunchTmaTile<T, S, 64, 128>(plan, p, stream);
    case 64192:
      return LaunchTmaTile<T, S, 64, 192>(plan, p, stream);
    case 64256:
      return LaunchTmaTile<T, S, 64, 256>(plan, p, stream);
    case 96128:
      return LaunchTmaTile<T, S, 96, 128>(plan, p, stream);
    case 96192:
      return LaunchTmaTile<T, S, 96, 192>(plan, p, stream);
    case 96256:
      return LaunchTmaTile<T, S, 96, 256>(plan, p, stream);
    case 128128:
      return LaunchTmaTile<T, S, 128, 128>(plan, p, stream);
    case 128192:
      return LaunchTmaTile<T, S, 128, 192>(plan, p, stream);
    case 128256:
      return LaunchTmaTile<T, S, 128, 256>(plan, p, stream);
    case 160128:
      return LaunchTmaTile<T, S, 160, 128>(plan, p, stream);
    case 192128:
      return LaunchTmaTile<T, S, 192, 128>(plan, p, stream);
    case 192192:
      return LaunchTmaTile<T, S, 192, 192>(plan, p, stream);
    case 224128:
      return LaunchTmaTile<T, S, 224, 128>(plan, p, stream);
    case 256128:
      return LaunchTmaTile<T, S, 256, 128>(plan, p, stream);
    case 288128:
      return LaunchTmaTile<T, S, 288, 128>(plan, p, stream);
    case 320128:
      return LaunchTmaTile<T, S, 320, 128>(plan, p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t LaunchCodesTiles(const AwqGemmPlan& plan, const AwqGemmParams& p, cudaStream_t stream) {
  switch (plan.tile_tokens * 1000 + plan.tile_outputs) {
    case 32128:
      return LaunchTmaTile<T, T, 32, 128>(plan, p, stream);
    case 32256:
      return LaunchTmaTile<T, T, 32, 256>(plan, p, stream);
    case 64128:
      return LaunchTmaTile<T, T, 64, 128>(plan, p, stream);
    case 64192:
      return LaunchTmaTile<T, T, 64, 192>(plan, p, stream);
    case 64256:
      return LaunchTmaTile<T, T, 64, 256>(plan, p, stream);
    case 128128:
      return LaunchTmaTile<T, T, 128, 128>(plan, p, stream);
    case 256128:
      return LaunchTmaTile<T, T, 256, 128>(plan, p, stream);
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
