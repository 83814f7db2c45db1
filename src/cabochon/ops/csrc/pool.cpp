#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <mutex>
#include <thread>

// Torch's OpenMP, which it makes known to everybody; absent where torch does without.
extern "C" int omp_get_max_threads() __attribute__((weak));
extern "C" void omp_set_num_threads(int) __attribute__((weak));

namespace cabochon {
namespace {

// A worker that finds no job looks again this often (some tens of microseconds, the gap between two ops of a step)
// before it goes to sleep.
constexpr int LOOKS = 20000;

struct Job {
    void (*work)(void*, long, long) = nullptr;
    void* context = nullptr;
    long items = 0;
};

// `next` holds the job's number above 32 bits and its next item below. A worker takes items by compare-and-swap on
// the whole word, so one that comes late can't take an item of the following job with this job's arguments, and the
// caller waits for items, never for workers: a worker that the system has put aside holds nobody up.
//
// Items are taken in runs, long ones first, three quarters of a thread's share of what is left: neighbours lie side by side in
// memory, so a thread reads on where it was, and at the end threads wait for each other for the time of one item.
struct Pool {
    Job job;
    alignas(64) std::atomic<uint64_t> next{0};
    alignas(64) std::atomic<long> done{0};
    alignas(64) std::atomic<uint32_t> number{0};  // what waiting workers look at
    std::atomic<int> asleep{0};
    std::atomic<int> wanted{1};
    int started = 1;
    std::mutex one_caller;
};

Pool* pool = new Pool;  // never destroyed: workers may outlive the interpreter's exit handlers

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    sched_yield();
#endif
}

void take_items(Pool& p, uint32_t number, const Job& job) {
    const uint64_t base = uint64_t(number) << 32;
    const long sharing = p.wanted.load(std::memory_order_relaxed);
    uint64_t at = p.next.load(std::memory_order_acquire);
    while ((at & ~uint64_t(0xffffffff)) == base && long(at - base) < job.items) {
        const long first = long(at - base), run = 1 + 3 * (job.items - first - 1) / (4 * sharing);
        if (!p.next.compare_exchange_weak(at, at + run, std::memory_order_acq_rel)) continue;
        job.work(job.context, first, first + run);
        p.done.fetch_add(run, std::memory_order_acq_rel);
        at = p.next.load(std::memory_order_acquire);
    }
}

void worker(Pool* p, int index) {
    uint32_t seen = 0;
    for (;;) {
        uint32_t number = p->number.load(std::memory_order_acquire);
        for (int look = 0; number == seen && look < LOOKS; ++look) {
            pause();
            number = p->number.load(std::memory_order_acquire);
        }
        if (number == seen) {
            p->asleep.fetch_add(1);
            p->number.wait(seen);
            p->asleep.fetch_sub(1);
            continue;
        }
        seen = number;
        if (index >= p->wanted.load(std::memory_order_relaxed)) continue;
        const Job job = p->job;  // belongs to `number` if an item is won below
        take_items(*p, number, job);
    }
}

void forked() { pool = new Pool; }

void start_workers(Pool& p) {
    static const int once = pthread_atfork(nullptr, nullptr, forked);
    (void)once;
    for (; p.started < p.wanted; ++p.started) std::thread(worker, &p, p.started).detach();
}

}  // namespace

int threads() { return pool->wanted; }

void set_threads(int count) {
    std::lock_guard<std::mutex> lock(pool->one_caller);
    pool->wanted = count < 1 ? 1 : count;
}

int set_team(int count) {
    if (!omp_get_max_threads || !omp_set_num_threads) return count;
    const int before = omp_get_max_threads();
    omp_set_num_threads(count);
    return before;
}

void run_items(long items, void (*work)(void*, long, long), void* context) {
    Pool& p = *pool;
    std::unique_lock<std::mutex> lock(p.one_caller, std::try_to_lock);
    if (items <= 1 || p.wanted <= 1 || !lock.owns_lock()) {
        if (items > 0) work(context, 0, items);
        return;
    }
    start_workers(p);
    const uint32_t number = p.number.load(std::memory_order_relaxed) + 1;
    // Close the former job before its arguments change: workers that read the new ones can no longer win its items.
    p.next.store(uint64_t(number) << 32 | 0xffffffff, std::memory_order_seq_cst);
    p.job = {work, context, items};
    p.done.store(0, std::memory_order_relaxed);
    p.next.store(uint64_t(number) << 32, std::memory_order_seq_cst);
    p.number.store(number, std::memory_order_seq_cst);
    if (p.asleep.load() > 0) p.number.notify_all();
    take_items(p, number, p.job);
    for (int look = 0; p.done.load(std::memory_order_acquire) < items; ++look) look < LOOKS ? pause() : (void)sched_yield();
}

void* scratch(int slot, size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { free(data); }
    };
    thread_local Buffer buffers[9];
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes) {
        free(buffer.data);
        buffer.size = (bytes + bytes / 2 + 4095) & ~size_t(4095);
        buffer.data = aligned_alloc(4096, buffer.size);
        prefer_huge_pages(buffer.data, buffer.size);
    }
    return buffer.data;
}

void prefer_huge_pages(void* data, size_t bytes) {
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (uintptr_t(data) + page - 1) & ~(page - 1), end = (uintptr_t(data) + bytes) & ~(page - 1);
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

uint64_t read_through(const void* data, size_t bytes) {
    constexpr size_t chunk = 1 << 18, line = 64, ahead = 6144;
    std::atomic<uint64_t> total{0};
    parallel(bytes / chunk, [&](long item) {
        const char* from = static_cast<const char*>(data) + item * chunk;
        uint64_t sums[4] = {};
        for (size_t at = 0; at < chunk; at += 4 * line)
            for (int i = 0; i < 4; ++i) {
                uint64_t word;
                __builtin_memcpy(&word, from + at + i * line, sizeof word);
                __builtin_prefetch(from + at + i * line + ahead);
                sums[i] += word;
            }
        total += sums[0] + sums[1] + sums[2] + sums[3];
    });
    return total;
}

}  // namespace cabochon
