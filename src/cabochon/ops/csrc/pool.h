// Threads that share out the items of one job after another. A job's result never depends on who did which item.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cabochon {

int threads();
void set_threads(int count);

// How many threads torch's ops have that are called from this one, from now on; what it was. Only OpenMP is told: torch's
// own setting would reach threads that begin meanwhile.
int set_team(int count);

// Memory of the calling thread that lives until its next call; grows, is never given back.
// `slot` keeps buffers that are in use together apart.
void* scratch(int slot, size_t bytes);

// Asks for 2 MiB pages in memory that nobody has written yet; a walk through it then misses fewer translations.
void prefer_huge_pages(void* data, size_t bytes);

// Reads a word of every cache line on all threads: how long that takes is the least that a step over so many bytes takes.
uint64_t read_through(const void* data, size_t bytes);

// Calls work(context, first, last) for runs of items.
void run_items(long items, void (*work)(void* context, long first, long last), void* context);

// work(item) for every item in [0, items), in any order, on all threads; returns when all are done.
template <class Work>
void parallel(long items, const Work& work) {
    run_items(
        items,
        [](void* context, long first, long last) {
            const Work& work = *static_cast<const Work*>(context);
            for (long item = first; item < last; ++item) work(item);
        },
        const_cast<Work*>(&work));
}

// The same by runs: work(first, last), neighbours at a time. Runs grow shorter towards the end.
template <class Work>
void parallel_runs(long items, const Work& work) {
    run_items(items, [](void* context, long first, long last) { (*static_cast<const Work*>(context))(first, last); }, const_cast<Work*>(&work));
}

}  // namespace cabochon
