#include "alloc/slab.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

namespace k42::alloc {

namespace {

constexpr std::size_t slabs_in_chunk = chunk_size / slab_size - 1;  // the headers have the place of the first

static_assert(sizeof(Slab) * (slabs_in_chunk + 1) <= slab_size);

// Memory that begins at a multiple of chunk_size.
char* map(std::size_t size) {
    const std::size_t asked = size + chunk_size;
    void* memory = mmap(nullptr, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<char*>(memory);
    const std::size_t before = -reinterpret_cast<std::uintptr_t>(begin) % chunk_size;
    if (before) munmap(begin, before);
    begin += before;
    munmap(begin + size, chunk_size - before);
#ifdef MADV_NOHUGEPAGE
    // A huge page would be near one processor, and full of memory that nobody uses.
    madvise(begin, size, MADV_NOHUGEPAGE);
#endif
#ifdef __SANITIZE_ADDRESS__
    __lsan_register_root_region(begin, size);  // what blocks point to is not leaked
#endif
    return begin;
}

constexpr std::size_t most_warm = 64;  // 4 MiB

struct Depot {
    std::mutex lock;          // protects all of it; innermost, only the system is called under it
    std::vector<Slab*> warm;  // with their memory
    std::vector<Slab*> cold;  // without; has room for every slab, so that giving one back never fails
    std::size_t chunks = 0;

    static Depot& instance() {
        static Depot* depot = new Depot();  // never destroyed, like the processors
        return *depot;
    }
};

// Before main, so before all others who do so: the last of their locks to be taken before a fork is ours then, as it
// must be, for they may allocate under theirs.
[[maybe_unused]] const int registered =
    pthread_atfork([] { Depot::instance().lock.lock(); }, [] { Depot::instance().lock.unlock(); },
                   [] { Depot::instance().lock.unlock(); });

}  // namespace

Slab& take_slab() {
    Depot& depot = Depot::instance();
    std::lock_guard guard(depot.lock);
    std::vector<Slab*>& from = depot.warm.empty() ? depot.cold : depot.warm;
    if (from.empty()) {
        depot.warm.reserve(most_warm);
        depot.cold.reserve((depot.chunks + 1) * slabs_in_chunk);
        char* chunk = map(chunk_size);
        poison(chunk + slab_size, chunk_size - slab_size);
        ++depot.chunks;
        for (std::size_t i = slabs_in_chunk; i > 0; --i) depot.cold.push_back(new (chunk + i * sizeof(Slab)) Slab());
    }
    Slab* slab = from.back();
    from.pop_back();
    return *slab;
}

void give_slab(Slab& slab) noexcept {
    Depot& depot = Depot::instance();
    {
        std::lock_guard guard(depot.lock);
        if (depot.warm.size() < most_warm) return depot.warm.push_back(&slab);
    }
    madvise(memory_of(slab), slab_size, MADV_DONTNEED);
    std::lock_guard guard(depot.lock);
    depot.cold.push_back(&slab);
}

Slab& map_large(std::size_t size) {
    if (size > PTRDIFF_MAX - 2 * chunk_size) throw std::bad_alloc();
    const std::size_t mapped = slab_size + (size + 4095) / 4096 * 4096;
    auto* slab = new (map(mapped) + sizeof(Slab)) Slab();
    slab->mapped = mapped;
    return *slab;
}

void unmap_large(Slab& slab) noexcept {
    char* begin = memory_of(slab) - slab_size;
    const std::size_t size = slab.mapped;
#ifdef __SANITIZE_ADDRESS__
    __lsan_unregister_root_region(begin, size);
#endif
    munmap(begin, size);
}

std::size_t mapped_for_slabs() {
    Depot& depot = Depot::instance();
    std::lock_guard guard(depot.lock);
    return depot.chunks * chunk_size;
}

}  // namespace k42::alloc
