// What the parts of the kernel for few tokens agree on, and where their sums meet.
#pragma once

#include "device/epilogue.cuh"
#include "device/tma_tile.cuh"

namespace jax_awq {

// Members that share the chunks of a tile: the most chunks that one owns, times all of them.
constexpr int MostParts(int chunks) {
  int most = 0;
  for (int members = 1; members <= kMaxCluster; ++members) {
    const int parts = (chunks + members - 1) / members * members;
    if (parts > most) most = parts;
  }
  return most;
}

// Of the teams of a CTA, by their warps.
struct FewTeams {
  int teams;
  int stages;
  int in_flight;  // stages on their way at a time
};
constexpr FewTeams TeamsOf(int warps, int tokens) {
  if (tokens > 16) {  // sums take more room
    return warps == 4 ? FewTeams{3, 6, 5} : warps == 6 ? FewTeams{2, 6, 4} : FewTeams{2, 4, 3};
  }
  return warps == 4 ? FewTeams{3, 9, 6} : warps == 6 ? FewTeams{2, 8, 4} : FewTeams{2, 6, 3};
}

// A warp has 32 outputs. Tiles of 256 read whole lines of memory, narrower ones are for weights
// that those would divide unevenly among the processors.
template <int kTokens, int kWarps>
struct FewTile : TmaPipeline<kTokens, 2, 2, 128, TeamsOf(kWarps, kTokens).stages, kWarps> {
  using Pipeline = TmaPipeline<kTokens, 2, 2, 128, TeamsOf(kWarps, kTokens).stages, kWarps>;
  // More in flight than memory needs (40 KB a processor) would only delay what is needed first: it
  // answers in no order.
  static constexpr int kInFlight = TeamsOf(kWarps, kTokens).in_flight;
  static_assert(kInFlight < Pipeline::kStages);
  // Teams take turns at the stages. Each stage is always the same team's: a team that runs ahead
  // would take a stage of another's that is not full yet for one of its own.
  static constexpr int kTeams = TeamsOf(kWarps, kTokens).teams;
  static_assert(Pipeline::kStages % kTeams == 0);
  static constexpr int kConsumerWarps = kTeams * kWarps;
  static constexpr int kConsumers = 32 * kConsumerWarps;
  static constexpr int kThreads = kConsumers + 32;

  // Sums of a chunk, 32 outputs. Teams give each other what another one finishes. Members push
  // theirs while the pipeline of their owner still runs, so that nothing of it shares this memory.
  using Unit = SumUnit<2, 1>;
  static constexpr int kUnits = kTokens / Unit::kTokens;  // of a chunk, which teams deal out
  static constexpr int kRounds = (kUnits + kTeams - 1) / kTeams;
  static constexpr int kChunkBytes = kUnits * Unit::kBytes;
  static constexpr int kInboxBarrierAt = Pipeline::kPipelineBytes;
  static constexpr int kTeamSumsAt = kInboxBarrierAt + 16;
  static_assert(kTeamSumsAt % 16 == 0);
  static constexpr int kTeamSumBytes = (kTeams - 1) * kChunkBytes;  // of a chunk
  static constexpr int kInboxAt = Unit::Aligned(kTeamSumsAt + kWarps * kTeamSumBytes);
  static constexpr int kSharedBytes =
      kInboxAt + MostParts(kWarps) * kChunkBytes + Pipeline::kAlignment;
  static_assert(kSharedBytes <= 227 * 1024);
};

}  // namespace jax_awq
