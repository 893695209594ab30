// Microseconds that kernels of awq_gemm take, by a model fitted to an H200 (benchmarks/NOTES.md),
// to compare them: the right tile and split follow for shapes nobody has timed. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/awq_gemm.h"

namespace jax_awq {

// What the plan knows of a kernel.
struct AwqGemmVariant {
  const char* name;
  AwqGemmKernel kernel;
  int tokens;  // of one tile; 0: no tile
  int outputs;
  int depth;        // a split of K is a multiple of this
  int ctas_per_sm;  // resident at once
  bool splits;      // can divide the contraction among CTAs
  double step_us;   // of one CTA for 64 indices of the contraction; 0: not for the cost model
  const char* (*unsupported)(const AwqGemmProblem&, const Device&);
};

// CTA clusters of `size` that run at once: one more would cost a second wave. A cluster lives in
// one GPC, so that some processors are left over; the counts are those that
// cudaOccupancyMaxActiveClusters gives on an H200.
int64_t ResidentClusters(const Device& device, int ctas_per_sm, int size);

// How stream_* divides its tiles.
struct StreamShares {
  StreamShares(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v);

  // A CTA leaves sums of one tile at most, and a count.
  size_t workspace_bytes() const { return shared == 0 ? 0 : ctas * (tile_bytes + 4); }

  int64_t ctas;
  int64_t whole;   // tiles that a CTA computes alone
  int64_t shared;  // the others
  int64_t tile_bytes;
};

// Of a variant of the TMA kernel or of that for few rows.
double TmaMicroseconds(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v,
                       int split);
int BestTmaSplit(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v);

double StreamMicroseconds(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v);

// Of writing the weight in x's dtype and multiplying with the library's dense kernel.
double DequantizeDotMicroseconds(const AwqGemmProblem& p, const Device& device);

}  // namespace jax_awq
