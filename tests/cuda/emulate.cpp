#include "emulate.hpp"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

cu_emu_thread *cu_emu_me;

namespace {

const size_t STACK = 128 << 10;
const int MOST = 1024;

struct fiber {
    cu_emu_thread me;
    unsigned char *stack;
    bool done;
#if defined(__x86_64__)
    void *sp;
#else
    ucontext_t context;
#endif
};

fiber fibers[MOST + 1]; /* the last one is the caller */
int n_threads, current, n_done;
const std::function<void()> *body;
int block_waiting;
unsigned block_round;
int warp_waiting[MOST / 32];
unsigned warp_round[MOST / 32];
alignas(16) unsigned char exchange[MOST / 32][2][32 * 24];
unsigned exchange_turn[MOST];

#if defined(__x86_64__)
/* Save what the calling convention asks for, change the stack, restore. */
extern "C" void cu_emu_switch(void **from, void *to);
asm(".text\n.globl cu_emu_switch\n.hidden cu_emu_switch\ncu_emu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#endif

#if defined(__SANITIZE_ADDRESS__)
const void *main_bottom; /* stack of the caller, learnt when the first fiber starts */
size_t main_size;
int previous;
#endif

void switch_to(int next) {
    int from = current;
    current = next;
    if (next < MOST)
        cu_emu_me = &fibers[next].me;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    previous = from;
    if (next < MOST)
        __sanitizer_start_switch_fiber(&fake, fibers[next].stack, STACK);
    else
        __sanitizer_start_switch_fiber(&fake, main_bottom, main_size);
#endif
#if defined(__x86_64__)
    cu_emu_switch(&fibers[from].sp, fibers[next].sp);
#else
    swapcontext(&fibers[from].context, &fibers[next].context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

/* Next fiber that has not finished, round and round. */
int after(int i) {
    for (int k = 1; k <= n_threads; k++) {
        int j = (i + k) % n_threads;
        if (!fibers[j].done)
            return j;
    }
    return MOST;
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (previous == MOST) {
        main_bottom = bottom;
        main_size = size;
    }
#endif
    (*body)();
    fibers[current].done = true;
    n_done++;
    switch_to(after(current));
    abort();
}

void prepare(int i) {
    fiber *f = &fibers[i];
    if (!f->stack) {
        void *p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            abort();
        f->stack = static_cast<unsigned char *>(p);
    }
    f->done = false;
#if defined(__SANITIZE_ADDRESS__)
    /* the one before left without returning: its frames are still marked */
    ASAN_UNPOISON_MEMORY_REGION(f->stack, STACK);
#endif
#if defined(__x86_64__)
    void **top = reinterpret_cast<void **>(f->stack + STACK);
    *--top = nullptr; /* return address of entry: never used, keeps the alignment */
    *--top = reinterpret_cast<void *>(entry);
    for (int k = 0; k < 6; k++)
        *--top = nullptr;
    f->sp = top;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, entry, 0);
#endif
}

/* Wait until `round` has moved on. Nobody else alive that could move it: a barrier without all. */
void wait_round(const unsigned *round) {
    unsigned before = *round;
    for (int idle = 0; *round == before; idle++) {
        if (idle > 4 * n_threads + 4) {
            fprintf(stderr, "emulate: a barrier is not reached by all threads (%d of %d ended)\n",
                    n_done, n_threads);
            abort();
        }
        switch_to(after(current));
    }
}

} // namespace

void cu_emu_barrier(void) {
    if (++block_waiting == n_threads) {
        block_waiting = 0;
        block_round++;
    } else
        wait_round(&block_round);
}

void cu_emu_warp_barrier(void) {
    int w = current / 32;
    int lanes = n_threads - w * 32 < 32 ? n_threads - w * 32 : 32;
    if (++warp_waiting[w] == lanes) {
        warp_waiting[w] = 0;
        warp_round[w]++;
    } else
        wait_round(&warp_round[w]);
}

unsigned char *cu_emu_exchange(void) {
    return exchange[current / 32][exchange_turn[current] & 1];
}

/* The other half next: lanes that are late still read this one, and the barrier of the next use
 * keeps the fast ones from coming back to it. */
void cu_emu_exchange_done(void) {
    exchange_turn[current]++;
}

void cu_emu_run(int64_t gx, int64_t gy, int threads, size_t shared,
                const std::function<void()> &what) {
    if (threads < 1 || threads > MOST || shared > (227u << 10)) {
        fprintf(stderr, "emulate: %d threads and %zu bytes of shared memory\n", threads, shared);
        abort();
    }
    std::vector<unsigned char> memory(shared + 16);
    unsigned char *at = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
    body = &what;
    n_threads = threads;
    for (int64_t y = 0; y < gy; y++)
        for (int64_t x = 0; x < gx; x++) {
            memset(at, 0xff, shared); /* NaN to whoever reads before it writes */
            n_done = block_waiting = 0;
            memset(warp_waiting, 0, sizeof warp_waiting);
            memset(exchange_turn, 0, sizeof exchange_turn);
            for (int i = 0; i < threads; i++) {
                fibers[i].me = cu_emu_thread{i, threads, x, y, gx, at};
                prepare(i);
            }
            current = MOST;
            switch_to(0);
            if (n_done != threads) {
                fprintf(stderr, "emulate: %d of %d threads ended\n", n_done, threads);
                abort();
            }
        }
}
