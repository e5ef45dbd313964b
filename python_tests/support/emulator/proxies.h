// SPDX-License-Identifier: Apache-2.0
// Who may see a byte of shared memory. Threads write it through the generic proxy; TMA and WGMMA go
// through another one, the async proxy, which sees a thread's writes only after that thread's
// fence.proxy.async (PTX ISA, "Proxies"). A chip may get away without; here it is an error.
//
// Kernels write with plain stores, too, so a write is noticed as a byte that changed: when the
// thread gives up its turn, memory is compared with what it was. (Who stores what was there already
// is not noticed.) That takes time, so it is done where FASTPROTO_EMULATE_PROXIES=1, or
// set_proxies, asks for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fastproto::cuda::emulator {

class Proxies {
 public:
  static constexpr int kNobody = -1;

  // What lies there belongs to nobody. Without a start nothing is noticed.
  void start(const uint8_t* shared, int bytes) {
    shared_ = shared;
    seen_.assign(shared, shared + bytes);
    writer_.assign(size_t(bytes), kNobody);
  }

  // What has changed was written by `thread`.
  void note(int thread) {
    constexpr size_t kPart = 256;
    for (size_t part = 0; part < seen_.size(); part += kPart) {
      const size_t end = std::min(part + kPart, seen_.size());
      if (memcmp(&seen_[part], shared_ + part, end - part) == 0) continue;
      for (size_t i = part; i < end; ++i) {
        if (seen_[i] == shared_[i]) continue;
        seen_[i] = shared_[i];
        writer_[i] = int16_t(thread);
      }
    }
  }
  // The thread's fence.proxy.async.
  void fence(int thread) {
    note(thread);
    std::replace(writer_.begin(), writer_.end(), int16_t(thread), int16_t(kNobody));
  }
  // Something is known to have written there, whether bytes changed or not: the async proxy
  // (kNobody), or an instruction of a thread.
  void written(uint32_t offset, int bytes, int thread = kNobody) {
    if (shared_ == nullptr) return;
    memcpy(&seen_[offset], shared_ + offset, size_t(bytes));
    std::fill_n(writer_.begin() + offset, bytes, int16_t(thread));
  }
  // A thread that wrote there and has run no fence since.
  int unfenced(uint32_t offset, int bytes) const {
    for (size_t i = offset; shared_ != nullptr && i < offset + size_t(bytes); ++i)
      if (writer_[i] != kNobody) return writer_[i];
    return kNobody;
  }

 private:
  const uint8_t* shared_ = nullptr;
  std::vector<uint8_t> seen_;
  std::vector<int16_t> writer_;
};

}  // namespace fastproto::cuda::emulator
