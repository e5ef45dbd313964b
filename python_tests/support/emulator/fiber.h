// SPDX-License-Identifier: Apache-2.0
// Stacks, and the switch from one to another. (swapcontext would do, but calls the kernel each
// time; longjmp makes AddressSanitizer forget what it knows of the stack.)
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

// The address sanitizer finds what kernels read and write outside of their tensors, but has to be
// told of other stacks.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastproto::cuda::emulator {

// Inaccessible below, so that an overflow stops here.
class Stack {
 public:
  static constexpr size_t kBytes = size_t(128) << 10;

  Stack()
      : memory_(static_cast<uint8_t*>(mmap(nullptr, kGuardBytes + kBytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, kGuardBytes, PROT_NONE);
  }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(memory_, kGuardBytes + kBytes); }
  uint8_t* bottom() const { return memory_ + kGuardBytes; }

 private:
  static constexpr size_t kGuardBytes = size_t(64) << 10;  // a multiple of every page size
  uint8_t* memory_;
};

// A stack, and how far it has come.
class Fiber {
 public:
  // The first switch to it calls `entry`, which calls entered and never returns.
  void start(uint8_t* bottom, size_t size, void (*entry)()) {
    bottom_ = bottom;
    size_ = size;
    entry_ = entry;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(bottom, size);
#endif
  }
  // `host` is who made the first switch of all.
  static void entered([[maybe_unused]] Fiber& host) {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (host.bottom_ == nullptr) {
      host.bottom_ = const_cast<void*>(bottom);
      host.size_ = size;
    }
#endif
  }
  __attribute__((noinline, no_sanitize("address"))) void switch_to(Fiber& next) {
#ifdef __SANITIZE_ADDRESS__
    void* kept;
    __sanitizer_start_switch_fiber(&kept, next.bottom_, next.size_);
#endif
    if (__builtin_setjmp(place_) == 0) next.resume();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#endif
  }

 private:
  __attribute__((noinline, noreturn, no_sanitize("address"))) void resume() {
    if (entry_ == nullptr) __builtin_longjmp(place_, 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = bottom_;
    context.uc_stack.ss_size = size_;
    context.uc_link = nullptr;
    makecontext(&context, std::exchange(entry_, nullptr), 0);
    setcontext(&context);
    std::abort();  // not reached
  }

  void* place_[5];
  void* bottom_ = nullptr;
  size_t size_ = 0;
  void (*entry_)() = nullptr;
};

}  // namespace fastproto::cuda::emulator
