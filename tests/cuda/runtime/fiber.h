// Fibers: stacks that the scheduler switches between.
//
// On x86-64 a switch saves the six registers that a call preserves, some 2 ns; elsewhere ucontext
// does it, with a system call a switch.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#define VQ_UCONTEXT 1
#endif

#if VQ_UCONTEXT
#include <ucontext.h>
#else
extern "C" void vq_switch(void** save, void* load);
asm(R"(
.text
.globl vq_switch
.hidden vq_switch
.type vq_switch, @function
vq_switch:
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
.size vq_switch, . - vq_switch
)");
#endif

namespace vq::harness {

// Room for a kernel's register arrays, unoptimised; pages are taken when touched.
constexpr std::size_t STACK_BYTES = 256 << 10;
constexpr std::size_t GUARD_BYTES = 4096;  // an overflow stops the process, not a neighbour

class Fiber {
public:
    // `main` must not return: it switches away for good.
    void start(void* stack, void (*main)()) {
#if VQ_UCONTEXT
        getcontext(&context);
        context.uc_stack.ss_sp = static_cast<char*>(stack) + GUARD_BYTES;
        context.uc_stack.ss_size = STACK_BYTES - GUARD_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, main, 0);
#else
        // as if vq_switch had been called at the head of `main`: six registers, where to return
        // to, and a word that aligns the stack as a call does
        auto* top = reinterpret_cast<void**>(static_cast<char*>(stack) + STACK_BYTES);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(main);
        for (int saved = 0; saved < 6; saved++) *--top = nullptr;
        pointer = top;
#endif
    }

    // Leave `from`, go on with `to`.
    static void change(Fiber& from, Fiber& to) {
#if VQ_UCONTEXT
        swapcontext(&from.context, &to.context);
#else
        vq_switch(&from.pointer, to.pointer);
#endif
    }

private:
#if VQ_UCONTEXT
    ucontext_t context;
#else
    void* pointer = nullptr;
#endif
};

// Stacks, kept from launch to launch.
class Stacks {
public:
    void* at(std::size_t number) {
        while (stacks.size() <= number) {
            void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (stack == MAP_FAILED || mprotect(stack, GUARD_BYTES, PROT_NONE) != 0) {
                std::perror("stack of a fiber");
                std::abort();
            }
            stacks.push_back(stack);
        }
        return stacks[number];
    }

private:
    std::vector<void*> stacks;
};

}  // namespace vq::harness
