#include "alloc/allocator.hpp"

#include <pthread.h>

namespace k42::alloc {

namespace {

std::atomic<Pool*> lost{nullptr};

// In the child of a fork, which has one thread. The others may have been in the middle of their pools, and will not
// finish: so the next owners of their processors begin new ones. What lies in the old ones stays there, and blocks of
// theirs can still be freed.
void lose_pools() {
    for (std::uint32_t id = 0, n = runtime::processor_count(); id < n; ++id) {
        runtime::Processor& p = runtime::processor(id);
        if (&p == runtime::current_or_null()) continue;
        Pool* pool = p.pool.exchange(nullptr);
        if (!pool) continue;
        pool->next_lost = lost.load();
        lost.store(pool);
    }
}

// Before main: so no thread can be in the middle of it when another forks.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, lose_pools);

void append(std::vector<Usage>& usage, const Pool& pool) {
    for (unsigned c = 0; c <= class_count; ++c) {
        const Bin& bin = pool.bin(c);
        const auto read = [](const Count& count) { return count.load(std::memory_order_relaxed); };
        const Usage u{.processor = pool.processor(),
                      .size = c < class_count ? class_size(c) : 0,
                      .allocated = read(bin.allocated),
                      .freed = read(bin.freed),
                      .sent = read(bin.sent) + pool.strays(c),
                      .returned = read(bin.returned),
                      .held = read(bin.held)};
        if (u.allocated || u.sent) usage.push_back(u);
    }
}

}  // namespace

Pool* detail::make_pool(runtime::Processor& here) noexcept {
    auto* made = new (std::nothrow) Pool(here.id);  // never destroyed, like the processor
    here.pool.store(made, std::memory_order_release);
    return made;
}

// The block is another processor's, or large.
void detail::deallocate_elsewhere(void* p, Slab& slab) noexcept {
    // Freeing takes no processor: a thread may free after it has given its own back, at its very end.
    runtime::Processor* here = runtime::current_or_null();
    Pool* pool = pool_or_null();
    if (here && !pool) pool = make_pool(*here);
    if (!slab.home) return Pool::deallocate_large(slab, pool);
    poison(p, class_size(slab.size_class));
    if (pool) {
        pool->send(p, slab);
    } else {
        slab.home->take_stray(p, slab.size_class);
    }
}

void settle() noexcept {
    if (Pool* pool = detail::pool_or_null()) pool->settle();
}

Statistics statistics() {
    Statistics all;
    const auto add_pool = [&](const Pool* pool) {
        append(all.usage, *pool);
        all.waiting += pool->waiting();
    };
    for (std::uint32_t id = 0, n = runtime::processor_count(); id < n; ++id)
        if (const Pool* pool = runtime::processor(id).pool.load(std::memory_order_acquire)) add_pool(pool);
    for (const Pool* pool = lost.load(); pool; pool = pool->next_lost) add_pool(pool);
    all.reserved = mapped_for_slabs();
    return all;
}

}  // namespace k42::alloc
