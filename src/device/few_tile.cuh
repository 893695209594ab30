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

template <int kTokens>
struct FewTile : TmaPipeline<kTokens, 2, 2, 128, 6> {
  using Pipeline = TmaPipeline<kTokens, 2, 2, 128, 6>;
  // Stages on their way at a time. More than memory needs (40 KB a processor) would only delay what
  // is needed first: it answers in no order.
  static constexpr int kInFlight = 3;
  static_assert(kInFlight < Pipeline::kStages);
  // Teams of eight warps take turns at the stages. Each stage is always the same team's: a team
  // that runs ahead would take a stage of the other's that is not full yet for one of its own.
  static constexpr int kTeams = 2;
  static_assert(Pipeline::kStages % kTeams == 0);
  static constexpr int kConsumerWarps = kTeams * Pipeline::kTeamWarps;
  static constexpr int kConsumers = 32 * kConsumerWarps;
  static constexpr int kThreads = kConsumers + 32;

  // Sums of a chunk, 32 outputs. Teams give each other what the other one finishes. Members push
  // theirs while the pipeline of their owner still runs, so that nothing of it shares this memory.
  using Unit = SumUnit<2, 1>;
  static constexpr int kUnits = kTokens / Unit::kTokens;  // of a chunk
  static_assert(kUnits <= kTeams);                        // one for each team to finish
  static constexpr int kChunkBytes = kUnits * Unit::kBytes;
  static constexpr int kInboxBarrierAt = Pipeline::kPipelineBytes;
  static constexpr int kTeamSumsAt = kInboxBarrierAt + 16;
  static constexpr int kInboxAt = Unit::Aligned(kTeamSumsAt + Pipeline::kTeamWarps * kChunkBytes);
  static constexpr int kSharedBytes =
      kInboxAt + MostParts(Pipeline::kTeamWarps) * kChunkBytes + Pipeline::kAlignment;
  static_assert(kSharedBytes <= 227 * 1024);
};

}  // namespace jax_awq
