// Up to 24 tokens on sm_90a: reading the weights is all the work there is.
//
// A CTA has up to 256 outputs and all tokens, and the members of a cluster divide K. Teams of warps
// take turns at the stages of one pipeline. Once little is left to read, time goes to what a
// single warp does one instruction after the other: so no division and no wait stands before the
// first copy, and sums are pushed to the member that finishes them, who alone waits.

#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "device/consumer_mma.cuh"
#include "device/epilogue.cuh"
#include "device/few_tile.cuh"
#include "device/ptx.cuh"
#include "kernels/awq_gemm_launch.cuh"
#include "kernels/tensor_maps.h"

namespace jax_awq {
namespace {

// Parameters lie in lines of 64 bytes of a cache that has none of them when the kernel starts. The
// producer waits for each before its first copy: what it reads is therefore in one.
struct FewParams {
  CUtensorMap words, scales, zeros, x;
  struct {
    Share::Even steps;  // of the members of a cluster
    uint32_t bytes;     // of a stage
    int group_shift;
    OwnEntries own;
    bool has_zeros, overlap, cluster;
  } copy;
  AwqGemmParams p;
};

constexpr int kBarriersReady = 1;  // named barriers of a CTA
constexpr int kTeamSumsReady = 2;

// The warp that copies. Stages come in order; x of a stage right behind its weight, or it would
// come behind the weight of all.
template <typename Tile>
__device__ __forceinline__ void Produce(const FewParams& params, const Share& share,
                                        uint32_t shared) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const auto& copy = params.copy;
  const int output0 = blockIdx.y * Tile::kOutputs;
  const int batch = blockIdx.z;
  // What is of the weight, and announces the whole stage; and what is of x.
  const auto copy_weight = [&](int stage, int i) {
    const uint32_t barrier = Tile::Full(shared, stage);
    const int depth = (share.first + i) * Tile::kDepth;
    const int group = depth >> copy.group_shift;
    BarrierArriveExpecting(barrier, copy.bytes);
    CopyBox(Tile::Words(shared, stage), &params.words, output0 / 8, depth, batch * copy.own.words,
            barrier);
    CopyBox(Tile::Scales(shared, stage), &params.scales, output0, group, batch * copy.own.scales,
            barrier);
    if (copy.has_zeros) {
      CopyBox(Tile::Zeros(shared, stage), &params.zeros, output0 / 8, group, batch * copy.own.zeros,
              barrier);
    }
  };
  const auto copy_x = [&](int stage, int i) {
    const int depth = (share.first + i) * Tile::kDepth;
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      CopyBox(Tile::X(shared, stage) + part * Tile::kTokens * 128, &params.x,
              depth + part * Tile::kPartDepth, 0, batch * copy.own.x, Tile::Full(shared, stage));
    }
  };

  if (ElectOne()) {
#pragma unroll
    for (int s = 0; s < Tile::kStages; ++s) {
      BarrierInit(Tile::Full(shared, s), 1);
      BarrierInit(Tile::Empty(shared, s), Tile::kTeamWarps);
    }
    BarrierInit(shared + Tile::kInboxBarrierAt, 1);
    BarrierInitFence();
  }
  __syncwarp();
  NamedBarrierArrive<kBarriersReady, Tile::kThreads>();
  // While x is still written nothing is in a hurry, and memory would idle.
  const int begun = min(copy.overlap ? Tile::kStages : Tile::kInFlight, share.count);
#pragma unroll 1
  for (int i = 0; i < begun; ++i) {
    if (ElectOne()) {
      copy_weight(i, i);
      if (!copy.overlap) copy_x(i, i);
    }
  }
  __syncwarp();
  if (copy.cluster) ClusterArriveRelaxed();  // the fence above is release enough for barriers
  if (copy.overlap) {                        // the weight comes while x is still written
    WaitForKernelBefore();
#pragma unroll 1
    for (int i = 0; i < begun; ++i) {
      if (ElectOne()) copy_x(i, i);
    }
  }
  StageCounter<Tile::kStages> at, arriving;
  at.stage = begun % Tile::kStages;
  at.phase = begun / Tile::kStages;
#pragma unroll 1
  for (int i = begun; i < share.count; ++i) {
    BarrierWait(Tile::Full(shared, arriving.stage), arriving.phase);
    arriving.Advance();
    BarrierWait(Tile::Empty(shared, at.stage), at.phase ^ 1);
    if (ElectOne()) {
      copy_weight(at.stage, i);
      copy_x(at.stage, i);
    }
    __syncwarp();
    at.Advance();
  }
#endif
}

template <typename T, typename S, int kTokens, int kWarps>
__global__ void __launch_bounds__(FewTile<kTokens, kWarps>::kThreads, 1)
    AwqGemmFewKernel(const __grid_constant__ FewParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = FewTile<kTokens, kWarps>;
  const AwqGemmParams& p = params.p;
  extern __shared__ char unaligned[];
  const uint32_t shared =
      (SharedAddress(unaligned) + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment;
  const uint32_t inbox_barrier = shared + Tile::kInboxBarrierAt;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be uniform
  const unsigned split = blockIdx.x;
  const Share share(params.copy.steps, split);
  if (warp == Tile::kConsumerWarps) {
    Produce<Tile>(params, share, shared);
    return;
  }

  MmaConsumer<T, S, kTokens, kWarps> consumer(shared, p.buffers.weight.group_shift,
                                              p.buffers.weight.qzeros != nullptr);
  using Unit = typename Tile::Unit;
  const int lane = threadIdx.x % 32;
  const int m = static_cast<int>(p.m);
  // The first weight is long in coming: until then all is done that does not need it.
  EpilogueParams epilogue = MakeEpilogue(p, blockIdx.z);
  if (p.buffers.overlap) WaitForKernelBefore();  // which writes the scales of rows
  const RowScales<kTokens> row_scales(epilogue, 0);
  if (epilogue.partials) epilogue.WriteOnly(split * p.batch * p.size());
  const int team = warp / Tile::kTeamWarps;
  const int64_t output0 =
      static_cast<int64_t>(blockIdx.y) * Tile::kOutputs + 8 * consumer.lane.word;
  UnitOutputs<Unit> outputs(epilogue, output0, Unit::kTokens * team);
  // Chunks are dealt out to the members of the cluster. Everyone pushes what he has of one into the
  // inbox of its owner, who adds in the order of members.
  const unsigned members = p.cluster ? p.splits : 1;
  const unsigned rank = p.cluster ? split : 0;
  const unsigned chunk = warp % Tile::kTeamWarps;
  unsigned owner = chunk, round = 0;
  while (owner >= members) owner -= members, ++round;
  const uint32_t inbox =
      shared + Tile::kInboxAt + (round * Tile::kUnits + team) * members * Unit::kBytes;
  NamedBarrierSync<kBarriersReady, Tile::kThreads>();
  if (p.cluster) {
    ClusterArriveRelaxed();
    if (warp == rank && lane == 0) {
      unsigned own = 0;  // chunks
      for (unsigned c = rank; c < Tile::kTeamWarps; c += members) ++own;
      BarrierArriveExpecting(inbox_barrier, own * (members - 1) * m * 32 * sizeof(float));
    }
    __syncwarp();
    ClusterWait();  // the barriers of all members are set up
  }

  float acc[Tile::kTiles][kTokens / 2];
  consumer.Accumulate(share, acc);

  // A unit has the sums of all teams but the one that finishes it.
  const uint32_t team_sums = shared + Tile::kTeamSumsAt + chunk * Tile::kTeamSumBytes + 16 * lane;
  constexpr int kOthers = Tile::kTeams - 1;
  float4 sums[Tile::kRounds][2];  // of this team's units
#pragma unroll
  for (int b = 0; b < Tile::kUnits; ++b) {
    const int finisher = b % Tile::kTeams;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 v = Unit::Vector(acc, b, i);
      if (finisher == team) {
        sums[b / Tile::kTeams][i] = v;
      } else {
        const int part = b * kOthers + (kOthers == 1 ? 0 : team - (team > finisher));
        StoreSharedFour(team_sums + part * Unit::kBytes + i * Unit::kVectorBytes, v);
      }
    }
  }
  if (team >= Tile::kUnits) {
    NamedBarrierArrive<kTeamSumsReady, Tile::kConsumers>();
    return;
  }
  NamedBarrierSync<kTeamSumsReady, Tile::kConsumers>();
#pragma unroll
  for (int r = 0; r < Tile::kRounds; ++r) {
    const int unit = team + r * Tile::kTeams;
    if (unit >= Tile::kUnits) break;
#pragma unroll
    for (int other = 0; other < kOthers; ++other) {
      const uint32_t part = team_sums + (unit * kOthers + other) * Unit::kBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) Add(sums[r][i], LoadSharedFour(part + i * Unit::kVectorBytes));
    }
  }

  const uint32_t to = inbox + rank * Unit::kBytes;
  const uint32_t round_bytes = Tile::kTeams * members * Unit::kBytes;
  if (owner != rank) {
    const uint32_t remote = MapToRank(to, owner);
    const uint32_t barrier = MapToRank(inbox_barrier, owner);
#pragma unroll
    for (int r = 0; r < Tile::kRounds; ++r) {
      const int token = Unit::kTokens * (team + r * Tile::kTeams) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (token + i < m) {
          StoreClusterSharedAsync(remote + r * round_bytes + Unit::VectorAt(lane, i), sums[r][i],
                                  barrier);
        }
      }
    }
    return;
  }
  if (Unit::kTokens * team >= m) return;
#pragma unroll
  for (int r = 0; r < Tile::kRounds; ++r) {
    if (team + r * Tile::kTeams >= Tile::kUnits) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      StoreSharedFour(to + r * round_bytes + Unit::VectorAt(lane, i), sums[r][i]);
    }
  }
  __syncwarp();
  if (p.cluster) BarrierWait(inbox_barrier, 0);
#pragma unroll
  for (int r = 0; r < Tile::kRounds; ++r) {
    const int token = Unit::kTokens * (team + r * Tile::kTeams);
    if (token >= m) break;
    if (r > 0) outputs = UnitOutputs<Unit>(epilogue, output0, token);
    outputs.template Finish<Tile::kTeamWarps>(epilogue, inbox + r * round_bytes, members, token, 1,
                                              row_scales);
  }
#endif
}

template <typename T, typename S, int kTokens, int kWarps>
cudaError_t LaunchTile(const AwqGemmParams& p, cudaStream_t stream) {
  using Tile = FewTile<kTokens, kWarps>;
  const TensorMaps* maps = TensorMaps::Get();
  if (maps == nullptr) return cudaErrorNotSupported;
  const AwqWeight& w = p.buffers.weight;
  const auto steps = static_cast<unsigned>((w.k + Tile::kDepth - 1) / Tile::kDepth);
  FewParams params = {};
  const int x_rows = static_cast<int>(p.m);  // what lies outside takes longer to fill than to copy
  const int group_rows = std::max(1, Tile::kDepth >> w.group_shift);
  auto& copy = params.copy;
  copy.steps = {steps / p.splits, steps % p.splits};
  copy.group_shift = w.group_shift;
  copy.own = OwnEntries(p.buffers);
  copy.has_zeros = w.qzeros != nullptr;
  copy.overlap = p.buffers.overlap;
  copy.cluster = p.cluster;
  copy.bytes = x_rows * Tile::kDepth * 2 + Tile::kDepth * Tile::kOutputs / 2 +
               group_rows * (Tile::kOutputs * 2 + (copy.has_zeros ? Tile::kOutputs / 2 : 0));
  params.p = p;
  const CUtensorMapDataType type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t x_batch = copy.own.x ? p.batch : 1;
  if (!maps->Encode(&params.x, type, sizeof(T), p.buffers.x, w.k, p.m, x_batch, Tile::kPartDepth,
                    x_rows, CU_TENSOR_MAP_SWIZZLE_128B) ||
      !maps->EncodeWeight(&params.words, &params.scales, &params.zeros, w, p.batch, Tile::kOutputs,
                          Tile::kDepth, group_rows, Tile::kWordRowBytes,
                          CU_TENSOR_MAP_L2_PROMOTION_NONE)) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(p.splits,
                  static_cast<unsigned>((p.outputs + Tile::kOutputs - 1) / Tile::kOutputs),
                  static_cast<unsigned>(p.batch));
  return LaunchClusters(AwqGemmFewKernel<T, S, kTokens, kWarps>, params, p.cluster_size(), grid,
                        Tile::kThreads, Tile::kSharedBytes, stream, p.buffers.overlap);
}

template <typename T, typename S>
cudaError_t Launch(const AwqGemmPlan& plan, const AwqGemmParams& params, cudaStream_t stream) {
  switch (plan.tile_tokens * 1000 + plan.tile_outputs) {
    case 8128:
      return LaunchTile<T, S, 8, 4>(params, stream);
    case 8192:
      return LaunchTile<T, S, 8, 6>(params, stream);
    case 8224:
      return LaunchTile<T, S, 8, 7>(params, stream);
    case 8256:
      return LaunchTile<T, S, 8, 8>(params, stream);
    case 16128:
      return LaunchTile<T, S, 16, 4>(params, stream);
    case 16192:
      return LaunchTile<T, S, 16, 6>(params, stream);
    case 16224:
      return LaunchTile<T, S, 16, 7>(params, stream);
    case 16256:
      return LaunchTile<T, S, 16, 8>(params, stream);
    case 24128:
      return LaunchTile<T, S, 24, 4>(params, stream);
    case 24192:
      return LaunchTile<T, S, 24, 6>(params, stream);
    case 24224:
      return LaunchTile<T, S, 24, 7>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LaunchAwqGemmFew(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                             const AwqGemmBuffers& buffers, cudaStream_t stream) {
  const AwqGemmParams params = MakeParams(p, plan, buffers);
  if (p.x_dtype == DType::kF16) return Launch<__half, __half>(plan, params, stream);
  return p.scales_dtype == DType::kF16 ? Launch<__nv_bfloat16, __half>(plan, params, stream)
                                       : Launch<__nv_bfloat16, __nv_bfloat16>(plan, params, stream);
}

}  // namespace jax_awq
