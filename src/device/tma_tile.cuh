// What producer and consumers of the TMA kernels agree on: shared memory, and which lane has what.
#pragma once

#include <cstdint>

#include "device/epilogue.cuh"
#include "device/ptx.cuh"
#include "kernels/types.h"

namespace jax_awq {

// The pipeline in shared memory: stages of kDepth indices of K, of which TMA brings x, words,
// scales and zero points. kTiles: tiles of 16 outputs of a warp; kElementBytes: of x; kTeamWarps:
// that share the work on a stage.
template <int kTokens_, int kTiles_, int kElementBytes, int kDepth_, int kMaxStages,
          int kTeamWarps_ = 8>
struct TmaPipeline {
  static constexpr int kTokens = kTokens_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kTeamWarps = kTeamWarps_;
  static constexpr int kOutputs = 16 * kTiles * kTeamWarps;
  static constexpr bool kCodes = kElementBytes == 1;

  // x lies in parts of 128 bytes a row, a row of the 128-byte swizzle.
  static constexpr int kParts = kDepth * kElementBytes / 128;
  static constexpr int kPartDepth = 128 / kElementBytes;
  static constexpr int kXBytes = kTokens * kDepth * kElementBytes;
  static constexpr int kXBoxes = (kTokens + 255) / 256;  // a box has at most 256 rows
  // A row of words is one of its swizzle, all of it or less.
  static constexpr int kWordRowBytes = kOutputs <= 128 ? 64 : 128;
  static_assert(kOutputs / 2 <= kWordRowBytes);
  static constexpr int kWordBytes = kDepth * kWordRowBytes;
  static constexpr int kGroupRows = kCodes ? 1 : kDepth / 32;  // at most
  static constexpr int kScaleBytes = kGroupRows * kOutputs * 2;
  static constexpr int kZeroBytes = (kGroupRows * kOutputs / 2 + 127) / 128 * 128;
  static constexpr int kStageBytes = kXBytes + kWordBytes + kScaleBytes + kZeroBytes;
  static constexpr int kAlignment = 1024;  // dynamic shared memory may start anywhere

  static constexpr int kRoom = 227 * 1024 - kAlignment - 256;
  static constexpr int kStages =
      kRoom / kStageBytes < kMaxStages ? kRoom / kStageBytes : kMaxStages;
  // The parts of a stage lie in arrays of their own: the swizzles want aligned tiles.
  static constexpr int kWordsAt = 0;
  static constexpr int kXAt = kWordsAt + kStages * kWordBytes;
  static constexpr int kScalesAt = kXAt + kStages * kXBytes;
  static constexpr int kZerosAt = kScalesAt + kStages * kScaleBytes;
  static constexpr int kBarriersAt = kZerosAt + kStages * kZeroBytes;
  // Its Empty is a barrier that nobody waits for: of more arrivals than it ever sees.
  static constexpr int kNoStage = kStages;
  static constexpr int kMostArrivals = (1 << 20) - 1;
  static constexpr int kPipelineBytes = kBarriersAt + 16 * (kStages + 1);

  __device__ static uint32_t Words(uint32_t shared, int s) {
    return shared + kWordsAt + s * kWordBytes;
  }
  __device__ static uint32_t X(uint32_t shared, int s) { return shared + kXAt + s * kXBytes; }
  __device__ static uint32_t Scales(uint32_t shared, int s) {
    return shared + kScalesAt + s * kScaleBytes;
  }
  __device__ static uint32_t Zeros(uint32_t shared, int s) {
    return shared + kZerosAt + s * kZeroBytes;
  }
  // Completed by the bytes of a stage, and by the consumers that have read it.
  __device__ static uint32_t Full(uint32_t shared, int s) { return shared + kBarriersAt + 8 * s; }
  __device__ static uint32_t Empty(uint32_t shared, int s) {
    return shared + kBarriersAt + 8 * (kStages + s);
  }
};

// With less to multiply, more copies in flight than memory needs only let some CTAs run ahead of
// others, and the last to end decides. One stage less of 64 x 128 and 32 x 256 makes room for their
// inboxes.
template <int kTokens, int kOutputs, int kElementBytes>
constexpr int kMostTmaStages = kElementBytes == 1                                ? 16
                               : kTokens * kOutputs == 64 * 128                  ? 5
                               : kTokens <= 64 || kTokens * kOutputs <= 96 * 128 ? 6
                                                                                 : 16;

// Tiles of 16 outputs of a warp.
constexpr int TilesOf(int outputs) { return outputs == 256 ? 2 : 1; }

// Bytes for a CTA, and for each of two of a processor, which keeps 1 KB of its 228 for each.
constexpr int kMostShared = 227 * 1024;
constexpr int kMostSharedOfTwo = (228 / 2 - 1) * 1024;

// Indices of the contraction in a stage: where it runs along the words, a row of them is 64 bytes.
template <int kElementBytes, bool kTranspose>
constexpr int kTmaDepth = kElementBytes == 1 || kTranspose ? 128 : 64;

// A tile of the wgmma kernel. With kTranspose its outputs are rows of K: words, scales and zero
// points of a stage are as many, those of a row along the contraction.
template <int kTokens, int kOutputs, int kElementBytes, bool kTranspose>
using TmaTilePipeline =
    TmaPipeline<kTokens, TilesOf(kOutputs), kElementBytes, kTmaDepth<kElementBytes, kTranspose>,
                kMostTmaStages<kTokens, kOutputs, kElementBytes>,
                kOutputs / 16 / TilesOf(kOutputs)>;

template <int kTokens, int kOutputs, int kElementBytes, bool kTranspose = false>
struct TmaTile : TmaTilePipeline<kTokens, kOutputs, kElementBytes, kTranspose> {
  using Pipeline = TmaTilePipeline<kTokens, kOutputs, kElementBytes, kTranspose>;
  static constexpr int kTiles = Pipeline::kTiles;
  static_assert(Pipeline::kTeamWarps % 4 == 0);  // warpgroups
  static_assert(!kTranspose || Pipeline::kDepth == kOutputs);
  static constexpr int kConsumerWarps = Pipeline::kTeamWarps;
  // One warp copies. Registers can only move to the consumers from a whole warpgroup.
  static constexpr bool kMoveRegisters = kTokens * kOutputs >= 128 * (Pipeline::kCodes ? 96 : 256);
  static constexpr int kProducerRegisters = kConsumerWarps == 8 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumerWarps == 8 ? 232 : 160;
  static constexpr int kThreads = 32 * (kConsumerWarps + (kMoveRegisters ? 4 : 1));
  static constexpr int kCtas =  // a processor
      !Pipeline::kCodes && kConsumerWarps == 8 && kTokens * kOutputs <= 96 * 128 ? 2 : 1;
  static constexpr bool kStreams =  // can share tiles: stream_*
      !Pipeline::kCodes && !kTranspose && kCtas == 1 && kConsumerWarps == 8;
  // Can be copied for two CTAs side by side at once: x, which is most of what large tiles read.
  static constexpr bool kSharesX =
      kOutputs == 128 && !kTranspose && (Pipeline::kCodes || kTokens >= 160);
  static constexpr bool kFewRegisters = kCtas > 1 && kTokens > 64;
  // Whether what every warp finishes is found before the loop over K: where registers are left.
  static constexpr bool kTurnsFirst = !Pipeline::kCodes && kTiles == 1 && kTokens <= 128;
  static constexpr bool kPersistent = kCtas == 1;  // takes tile after tile

  // Sums to exchange: each member of a cluster has room for its units of every member. Where that
  // is beside the pipeline nobody has to wait for the others before it sends; else it takes the
  // place of the drained pipeline. With few tokens units are small, or few warps would end a tile.
  using Unit = SumUnit<kTiles, kTiles == 2 || kTokens <= 32 ? 1 : 2>;
  static constexpr int kUnits = kTokens / Unit::kTokens * kConsumerWarps;
  static constexpr int kInboxBytes = (kUnits + kMaxCluster - 1) * Unit::kBytes;
  static constexpr int kInboxBarriersAt = Pipeline::kPipelineBytes;  // one for each warp
  static constexpr int kApartAt = Unit::Aligned(kInboxBarriersAt + 8 * kConsumerWarps);
  static constexpr bool kInboxApart = kApartAt + kInboxBytes + Pipeline::kAlignment <=
                                      (kCtas == 2 ? kMostSharedOfTwo : kMostShared);
  static constexpr int kInboxAt = kInboxApart ? kApartAt : 0;
  static constexpr int kSharedBytes =
      kApartAt + (kInboxApart ? kInboxBytes : 0) + Pipeline::kAlignment;
  static_assert(kInboxApart || kInboxBytes <= Pipeline::kBarriersAt);

  // Sums of a whole tile, left by another CTA, come through the pipeline in the place of x.
  static constexpr int kPartBytes = kTokens * Pipeline::kOutputs * 4;
  static constexpr int kPartFours =  // of a lane in a stage
      Pipeline::kXBytes / (Pipeline::kTeamWarps * Unit::kVectorBytes);
  static constexpr int kPartStageBytes = kPartFours * Pipeline::kTeamWarps * Unit::kVectorBytes;
  static constexpr int kPartStages = kStreams ? kPartBytes / kPartStageBytes : 0;
  // A stage of them as a box of a tensor: racecheck does not follow copies without a tensor map.
  static constexpr int kPartRowFloats = 256;
  static constexpr int kPartRows = kPartStageBytes / (4 * kPartRowFloats);
  static_assert(!kStreams || kPartStages * kPartStageBytes == kPartBytes);

  // With codes some stages have sums of x over chunks in place of x, and the scales and zero points
  // that go with them in place of words.
  static constexpr int kSumChunks = 16;
  static constexpr int kSumZerosAt = kSumChunks * Pipeline::kOutputs * 2;
  static constexpr int kSumWordBytes = kSumZerosAt + kSumChunks * Pipeline::kOutputs / 2;
};

// How a warp says that it has read a stage: to its own CTA, and to the other one where two write x
// to each other's shared memory.
template <typename Tile>
struct StageReader {
  __device__ StageReader(uint32_t shared, unsigned member, unsigned members) : shared(shared) {
    if constexpr (Tile::kSharesX) {
      const bool speaks = members > 1 && threadIdx.x % 32 == 0;
      other = KeepInRegister(speaks ? MapToRank(Tile::Empty(shared, 0), 1 - member) : 0);
    }
  }

  // Predicated instructions: with branches here ptxas serializes the wgmmas.
  __device__ void Release(int stage) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (threadIdx.x % 32 == 0) BarrierArrive(Tile::Empty(shared, stage));
    if constexpr (Tile::kSharesX) {
      if (other != 0) BarrierArriveRemote(other + 8 * stage);
    }
#endif
  }

  const uint32_t shared;

 private:
  uint32_t other;  // its first Empty, or 0
};

template <int kStages, int kStep = 1>
struct StageCounter {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void Advance() {
    stage += kStep;
    if (stage >= kStages) stage -= kStages, phase ^= 1;
  }
};

// Words of qweight are read as 8 x 8 matrices of 16-bit elements, transposed: lane (g, t) gets the
// four codes of half a word, rows 2t and 2t + 1 of K side by side, which is a pair of the row
// operand of mma and wgmma for each of four outputs. With 256 outputs a warp has 32 of its own and
// a lane all four codes; with fewer two warps have the same words and take two codes each, rows g
// and g + 8 of their one tile.
template <typename Tile>
struct TmaLane {
  static constexpr int kTiles = Tile::kTiles;
  static constexpr int kPairs = Tile::kTeamWarps / 2;  // of warps with the same words

  __device__ TmaLane(uint32_t shared, bool has_zeros)
      : shared(shared), has_zeros(KeepInRegister(has_zeros)) {
    const int warp = threadIdx.x / 32 % Tile::kTeamWarps;
    const int lane = threadIdx.x % 32;
    const int chunk = Chunk(warp);
    word = Word(warp);
    byte = Byte(warp);
    half_selector = KeepInRegister(lane / 4 % 2 ? 0x3232 : 0x1010);
    const int row = Tile::kCodes ? CodesRow(lane) : lane;
    words_at =
        KeepInRegister(Tile::Words(shared, 0) + row * Tile::kWordRowBytes +
                       ((chunk ^ (Tile::kWordRowBytes == 128 ? row % 8 : row / 2 % 4)) << 4));
    scales_at = KeepInRegister(Tile::Scales(shared, 0) + 16 * word + 8 * byte);
    zeros_at = KeepInRegister(Tile::Zeros(shared, 0) + 4 * word);
  }

  // Of a warp of a team: its 16 bytes of a row of words, this lane's word, and the byte of the half
  // that is the first it takes.
  __device__ static int Chunk(int warp) { return kTiles == 2 ? warp : warp % kPairs; }
  __device__ static int Word(int warp) { return 4 * Chunk(warp) + threadIdx.x % 32 / 8; }
  __device__ static int Byte(int warp) { return kTiles == 2 ? 0 : warp / kPairs; }

  // Which of 32 rows a lane addresses where a fragment has four consecutive indices of a lane:
  // matrices 2i and 2i + 1 are 16 rows, of which lane t gets 4t, 4t + 1 from one of them and the
  // next two from the other. Half of the lanes have them the other way round, and so eight rows
  // never share banks.
  __device__ static int CodesRow(int lane) {
    const int row = lane % 8;
    return lane / 16 * 16 + row / 2 * 4 + row % 2 + 2 * (lane / 8 % 2 ^ row / 4);
  }

  // codes[h][i]: half a word in rows 32 h + 8 i + 2t and the next, or those of CodesRow.
  __device__ void LoadCodes(int stage, uint32_t (&codes)[Tile::kDepth / 32][4]) const {
#pragma unroll
    for (int h = 0; h < Tile::kDepth / 32; ++h) LoadCodes(stage, h, codes[h]);
  }
  __device__ void LoadCodes(int stage, int h, uint32_t (&codes)[4]) const {
    LoadMatrix4Transposed(codes,
                          words_at + stage * Tile::kWordBytes + h * 32 * Tile::kWordRowBytes);
  }

  // The scales of the lane's outputs, each twice, and its zero points, in the same places of two
  // halves as their codes.
  __device__ void LoadGroup(int stage, int row, uint32_t (&scales)[2 * kTiles],
                            uint32_t* zeros) const {
    LoadShared(scales, scales_at + stage * Tile::kScaleBytes + row * Tile::kOutputs * 2);
    uint32_t packed[1] = {0x88888888u};
    if (has_zeros) {
      LoadShared(packed, zeros_at + stage * Tile::kZeroBytes + row * Tile::kOutputs / 2);
    }
    *zeros = SelectBytes(packed[0], 0, half_selector) >> 8 * byte;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) scales[i] = SelectBytes(scales[i], 0, half_selector);
  }

  uint32_t shared, has_zeros;
  int word, byte;
  uint32_t half_selector, words_at, scales_at, zeros_at;
};

}  // namespace jax_awq
