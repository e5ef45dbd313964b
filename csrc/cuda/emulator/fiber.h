// SPDX-License-Identifier: Apache-2.0
// Stacks, and the switch from one to another: what a C function must keep is saved on the old stack
// and loaded from the new one. (swapcontext would do, but calls the kernel each time.)
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

// The address sanitizer finds what kernels read and write outside of their tensors, but has to be
// told of other stacks.
#if defined(__SANITIZE_ADDRESS__)
#define FP_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FP_EMULATOR_ASAN 1
#endif
#endif
#ifdef FP_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastproto::cuda::emulator {

constexpr size_t kStackBytes = size_t(128) << 10;
constexpr size_t kGuardBytes = size_t(64) << 10;  // a multiple of every page size

// Inaccessible below, so that an overflow stops here.
inline uint8_t* new_stack() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<uint8_t*>(memory);
}
inline void free_stack(uint8_t* stack) { munmap(stack, kGuardBytes + kStackBytes); }

#if defined(__x86_64__)

// One copy, whatever number of files includes this.
asm(R"(
  .pushsection .text.fastproto_emulator_switch,"axG",@progbits,fastproto_emulator_switch,comdat
  .weak fastproto_emulator_switch
  .hidden fastproto_emulator_switch
  .type fastproto_emulator_switch, @function
fastproto_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastproto_emulator_switch, .-fastproto_emulator_switch
  .popsection
)");
constexpr int kSavedWords = 6;  // then the address to go to

#elif defined(__aarch64__)

asm(R"(
  .pushsection .text.fastproto_emulator_switch,"axG",@progbits,fastproto_emulator_switch,comdat
  .weak fastproto_emulator_switch
  .hidden fastproto_emulator_switch
  .type fastproto_emulator_switch, @function
fastproto_emulator_switch:
  sub sp, sp, #160
  stp d8, d9, [sp, #0]
  stp d10, d11, [sp, #16]
  stp d12, d13, [sp, #32]
  stp d14, d15, [sp, #48]
  stp x19, x20, [sp, #64]
  stp x21, x22, [sp, #80]
  stp x23, x24, [sp, #96]
  stp x25, x26, [sp, #112]
  stp x27, x28, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp d8, d9, [sp, #0]
  ldp d10, d11, [sp, #16]
  ldp d12, d13, [sp, #32]
  ldp d14, d15, [sp, #48]
  ldp x19, x20, [sp, #64]
  ldp x21, x22, [sp, #80]
  ldp x23, x24, [sp, #96]
  ldp x25, x26, [sp, #112]
  ldp x27, x28, [sp, #128]
  ldp x29, x30, [sp, #144]
  add sp, sp, #160
  ret
  .size fastproto_emulator_switch, .-fastproto_emulator_switch
  .popsection
)");
constexpr int kSavedWords = 19;

#endif

#if defined(__x86_64__) || defined(__aarch64__)

extern "C" void fastproto_emulator_switch(void** from, void* to);

struct Place {
  void* stack_pointer = nullptr;

  void start(uint8_t*, uint8_t* top, void (*entry)()) {
    // x86-64 enters a function 8 bytes past a multiple of 16, where a call would have put an
    // address; aarch64 at a multiple of 16.
    auto* words = reinterpret_cast<uint64_t*>(uintptr_t(top) & ~uintptr_t(63)) - 32;
#if defined(__x86_64__)
    words -= kSavedWords + 2;
    words[kSavedWords + 1] = 0;
#else
    words -= kSavedWords + 1;
#endif
    for (int i = 0; i < kSavedWords; ++i) words[i] = 0;
    words[kSavedWords] = uint64_t(uintptr_t(entry));
    stack_pointer = words;
  }
  void switch_to(Place& next) { fastproto_emulator_switch(&stack_pointer, next.stack_pointer); }
};

#else

struct Place {
  ucontext_t context;

  void start(uint8_t* bottom, uint8_t* top, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = size_t(top - bottom);
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Place& next) { swapcontext(&context, &next.context); }
};

#endif

// A stack, and how far it has come.
class Context {
 public:
  // The first switch to it calls `entry`, which calls entered and never returns.
  void start(uint8_t* bottom, uint8_t* top, void (*entry)()) {
#ifdef FP_EMULATOR_ASAN
    bottom_ = bottom;
    size_ = size_t(top - bottom);
    __asan_unpoison_memory_region(bottom, size_);
#endif
    place_.start(bottom, top, entry);
  }
  // `host` is who made the first switch of all.
  static void entered([[maybe_unused]] Context& host) {
#ifdef FP_EMULATOR_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (host.bottom_ == nullptr) {
      host.bottom_ = bottom;
      host.size_ = size;
    }
#endif
  }
  void switch_to(Context& next) {
#ifdef FP_EMULATOR_ASAN
    void* kept;
    __sanitizer_start_switch_fiber(&kept, next.bottom_, next.size_);
    place_.switch_to(next.place_);
    __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#else
    place_.switch_to(next.place_);
#endif
  }

 private:
  Place place_;
#ifdef FP_EMULATOR_ASAN
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

}  // namespace fastproto::cuda::emulator
