// SPDX-License-Identifier: Apache-2.0
// The CPU kernels from std::threads, for ThreadSanitizer (`make sanitize-threads`): forward and
// backward of a small ragged problem in every type, several passes over the prototypes included.
// The result must also be that of one thread, bit for bit. In torch itself the threads would be
// libgomp's, whose locks the sanitizer does not see: it would report races that are none.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace fastproto::cpu {
extern const InstructionSet FASTPROTO_KERNELS;
}

namespace {

using namespace fastproto;
using namespace fastproto::cpu;
using Bytes = std::vector<char>;

constexpr int kThreads = 4, kRounds = 20;
constexpr int64_t kPixels = 150, kDim = 24;
const std::vector<int32_t> kStarts = {0, 70, 75, 75, 140};  // two episodes of two bags, one empty

template <class Worker>
void run(int threads, int64_t tasks, int64_t scratch, const Worker& worker) {
  TaskQueue queue{0, tasks, 1};
  std::vector<std::thread> team;
  for (int i = 0; i < threads; ++i)
    team.emplace_back([&] {
      const size_t bytes = size_t(scratch + 63) / 64 * 64;
      const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(64, bytes), std::free);
      worker(queue, memory.get());
    });
  for (std::thread& thread : team) thread.join();
}

// A number in its type. For the half types, of the upper bits: a bfloat16; as a float16 also
// finite.
Bytes numbers(DType dtype, int64_t count, int64_t item) {
  std::mt19937 random(7);
  Bytes bytes(size_t(count * item));
  for (int64_t i = 0; i < count; ++i) {
    const double value = double(random() % 2000) / 1000 - 1;
    const float narrow = float(value);
    char* at = bytes.data() + i * item;
    if (dtype == DType::kFloat64) std::memcpy(at, &value, 8);
    if (dtype == DType::kFloat32) std::memcpy(at, &narrow, 4);
    if (item == 2) std::memcpy(at, reinterpret_cast<const char*>(&narrow) + 2, 2);
  }
  return bytes;
}

// Everything that a forward and a backward write.
std::vector<Bytes> results(DType dtype, int threads, int64_t chunk) {
  const int64_t item = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  const int64_t wide = item == 8 ? 8 : 4, total = kStarts.back();
  const Problem s{2, 2, 2, kDim, kPixels, total, 1, 0.1, 1e-6};
  const int64_t images = s.episodes * s.queries, maps = images * s.ways;
  const Kernels& kernels = FASTPROTO_KERNELS.kernels[int(dtype)];
  const auto bytes = [](int64_t count) { return Bytes(size_t(count)); };
  const Bytes feat = numbers(dtype, images * kDim * kPixels, item);
  const Bytes protos = numbers(dtype, total * kDim, item);
  const Bytes grad = numbers(dtype, maps * 2 * kDim * kPixels, item);
  Bytes out = bytes(maps * 2 * kDim * kPixels * item), agg = bytes(maps * kDim * kPixels * wide);
  Bytes stats = bytes(maps * 3 * kPixels * wide);
  const int64_t map = kDim * kPixels;
  const Strided in{feat.data(), s.queries * map, map, 0, kPixels, 1};
  const Dense saved{agg.data(), map, kPixels, 1};
  const ForwardParams forward{
      s, in, protos.data(), kStarts.data(), {out.data(), 2 * map, kPixels, 1}, saved, stats.data()};
  const Tiling wide_tiles = plan_forward(s, threads, wide);
  run(threads, images * wide_tiles.tiles(s) * s.ways, kernels.forward_scratch(s, wide_tiles),
      [&](TaskQueue& queue, void* memory) { kernels.forward(forward, wide_tiles, queue, memory); });

  const Tiling tiling = plan_backward(s, wide);
  const int64_t tasks = images * tiling.tiles(s);
  Bytes grad_feat = bytes(images * map * item), grad_protos = bytes(total * kDim * item);
  std::vector<double> parts(static_cast<size_t>(tasks));
  const Dense grads{const_cast<char*>(grad.data()), 2 * map, kPixels, 1};
  const BackwardParams backward{s,
                                in,
                                protos.data(),
                                kStarts.data(),
                                grads,
                                saved,
                                stats.data(),
                                {grad_feat.data(), map, kPixels, 1},
                                grad_protos.data(),
                                parts.data()};
  Bytes sums = bytes(chunk * kDim * wide), along = bytes(chunk * wide);
  std::vector<int32_t> done;
  void* target = item == wide ? static_cast<void*>(grad_protos.data()) : sums.data();
  BackwardPass pass{tiling, true, 0, chunk == total ? total : 0, target, along.data(), nullptr};
  const auto once = [&] {
    done.assign(size_t(tasks), 0);
    pass.done = done.data();
    run(threads, tasks, kernels.backward_scratch(s, tiling),
        [&](TaskQueue& queue, void* memory) { kernels.backward(backward, pass, queue, memory); });
  };
  once();
  pass.want_feat = false;
  while (pass.end < total) {
    pass.begin = pass.end;
    pass.end = std::min(pass.begin + chunk, total);
    once();
  }
  Bytes temperature(parts.size() * 8);
  std::memcpy(temperature.data(), parts.data(), temperature.size());
  return {out, agg, stats, grad_feat, grad_protos, temperature};
}

}  // namespace

int main() {
  int wrong = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    const bool half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
    for (int64_t chunk : {int64_t(140), half ? int64_t(64) : int64_t(140)}) {
      const std::vector<Bytes> alone = results(dtype, 1, chunk);
      for (int round = 0; round < kRounds; ++round)
        wrong += results(dtype, kThreads, chunk) != alone;
    }
    std::printf("type %d: %d of %d rounds unlike one thread\n", int(dtype), wrong, 2 * kRounds);
  }
  return wrong != 0;
}
