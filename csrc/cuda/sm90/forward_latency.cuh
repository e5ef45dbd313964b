// SPDX-License-Identifier: Apache-2.0
// Forward for Hopper where there is little to do: one image, one class. A cluster of blocks shares
// 16 queries, so that 256 pixels are 128 blocks; one launch, without tensor maps; bf16 and half,
// D <= 512. docs/kernels/sm90.md has the schedule.
//
// The cluster's blocks and each block's warps are as many as there are slices of 64 channels. In
// each pass block b multiplies the queries with 32 prototypes, its warps one slice of channels
// each; writes their weights to all blocks; then computes its own slice of G from all prototypes of
// the pass, each warp with those of one block, which therefore may have a maximum of their own.
//
// Budget, D = 512 (D <= 256 in brackets):
//   tile               16 queries, 64 channels of G; 256 (128) prototypes a pass, 32 of them for S
//   cluster            8 (4) blocks of 8 (4) warps
//   registers          G 16 x 64 a warp = 32; at most 128 a thread, for two blocks
//   shared memory      Q 16 KiB (8), prototypes as keys 32 KiB (16) and as values 32 KiB (16), W
//                      2 x 8 KiB (4), partial sums 20 KiB (10), G 33 KiB (17)
//   roofline           latency: a launch, one trip to memory, two products of 128 (64) mma.sync a
//                      block, one exchange within the cluster a pass
#pragma once

#include "forward_latency_block.cuh"

namespace fastproto::cuda::sm90 {

template <class Type, int Dim, bool IsChannelsLast>
struct LatencyTraits {
  using T = Type;
  static constexpr bool kChannelsLast = IsChannelsLast;
  static constexpr int kDim = Dim;
  static constexpr int kSlices = kDim / kBox;
  static constexpr int kCluster = kSlices;
  static constexpr int kThreads = 32 * kSlices;
  static constexpr int kBlocks = 2;  // of a multiprocessor
  static constexpr int kQueries = 16;
  static constexpr int kShare = 32;  // prototypes of a block in a pass
  static constexpr int kPass = kShare * kCluster;
  static constexpr int kColumns = kQueries * kShare / kThreads;  // of S, of a thread
  static constexpr int kLanes = kShare / kColumns;               // that share a row of S

  static constexpr int kQueryBytes = kQueries * kBoxRowBytes;  // a slice
  static constexpr int kShareBytes = kShare * kBoxRowBytes;    // a slice of a block's prototypes
  static constexpr int kWeightBytes = kQueries * 2 * kShare;   // a block's prototypes
  static constexpr int kProductStride = kShare + 2;  // floats; spreads rows over the banks
  static constexpr int kResultStride = kBox + 2;

  static constexpr int kQuery = 0;                                        // [slice]
  static constexpr int kKeys = kQuery + kSlices * kQueryBytes;            // [slice]
  static constexpr int kValues = kKeys + kSlices * kShareBytes;           // [block's prototypes]
  static constexpr int kWeights = kValues + kCluster * kShareBytes;       // [2][block]
  static constexpr int kBounds = kWeights + 2 * kCluster * kWeightBytes;  // [2][block][kQueries]
  static constexpr int kRowSums = kBounds + 2 * kCluster * 4 * kQueries;  // [block][kQueries]
  static constexpr int kPartial =  // [warp][kQueries + kShare][2]
      kRowSums + kCluster * 4 * kQueries;
  static constexpr int kFirst =
      kPartial + kSlices * 8 * (kQueries + kShare);  // [kQueries + kShare]
  static constexpr int kSharedBytes = kFirst + 4 * (kQueries + kShare);
  // In the place of the keys, when all are multiplied: partial S of a warp, partial G.
  static constexpr int kProductBytes = kQueries * 4 * kProductStride;
  static constexpr int kResultBytes = kQueries * 4 * kResultStride;

  static_assert(kDim == 256 || kDim == 512, "clusters of 4 or 8 blocks");
  static_assert(kColumns % 2 == 0, "weights are packed in pairs");
  static_assert(kProductBytes <= kShareBytes, "a warp's S in the place of its keys");
  static_assert(kResultBytes <= kShareBytes + kShareBytes, "G in the place of keys and values");
  static_assert(kSharedBytes == forward_latency_bytes(kDim) &&
                    kThreads == forward_latency_threads(kDim) &&
                    kCluster == forward_latency_cluster(kDim),
                "the plan");
  static_assert(kBlocks * (kSharedBytes + 1024) <= kSharedLimit + 1024,
                "shared memory of a multiprocessor");
};

template <class Traits>
FP_KERNEL FP_LAUNCH_BOUNDS(Traits::kThreads, Traits::kBlocks)
    forward_latency_kernel(FP_GRID_CONSTANT ForwardParams p) {
  using Block = latency_detail::LatencyBlock<Traits>;
  const Block block{p};
  const Problem& problem = p.problem;
  block.load_queries();
  block.load_keys(0);
  block.load_values(0);
  typename Block::Found found;
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int pixel = block.first_pixel + block.lane / 4 + 8 * h;
    found.first_q[h] = pixel < problem.pixels ? to_float(block.feat[pixel * p.feat.pixel]) : 0.0f;
  }
  sync_cluster();  // all have started: their memory may be written

  typename Block::Softmax softmax;
  softmax.bound = problem.running_max ? -infinity() : block.scale;
  float g[8][4] = {};
  float old_bound[2] = {softmax.bound, softmax.bound};

  FP_NO_UNROLL
  for (int pass = 0; pass < block.passes; ++pass) {
    if (block.own_statistics) {
      FP_UNROLL
      for (int n = 0; n < 4; ++n) {
        const int r = block.first_row(pass) + 8 * n + block.lane / 4;
        found.first_p[n] =
            r < block.bag.count ? to_float(block.protos[int64_t(r) * problem.dim]) : 0.0f;
        found.sums_p[n] = {};
      }
    }
    copy_async_wait<1>();  // not for the values
    sync_warp();
    float s[4][4] = {};
    block.multiply_keys(s, found, pass == 0);
    block.share_products(s, found, pass == 0);
    if (pass == 0) block.find_query_statistics(softmax);
    block.form_weights(softmax, pass);
    sync_cluster();
    const bool last = pass + 1 == block.passes;
    if (last) {
      copy_async_commit();  // so that the waits count alike
    } else {
      block.load_keys(pass + 1);
    }
    copy_async_wait<1>();  // values
    sync_warp();
    block.multiply_values(g, old_bound, pass);
    sync_warp();
    if (!last) block.load_values(pass + 1);
  }
  block.share_results(g);
  block.store_results();
}

template <class T>
const char* launch_forward_latency_of(const ForwardParams& p, int blocks, void* stream) {
  return with_traits<T, LatencyTraits>(p.problem.dim, is_channels_last(p), [&](auto tag) {
    using Traits = typename decltype(tag)::type;
    const Grid grid{blocks, Traits::kThreads, Traits::kSharedBytes, Traits::kCluster, stream};
    return cuda::launch<forward_latency_kernel<Traits>>(grid, p);
  });
}

}  // namespace fastproto::cuda::sm90
