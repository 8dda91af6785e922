// The allocator alone, against a model and under contention: meant for ThreadSanitizer and AddressSanitizer.
// Takes a seed.
#include <sys/wait.h>

#include <array>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>

#include "alloc/allocator.hpp"
#include "check.hpp"

using namespace k42;
using namespace k42::testing;
using alloc::Kind;

namespace {

constexpr size_t kLine = runtime::apart;

uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// A size as programs ask for them: mostly small, at the edges of classes too, seldom a large one.
size_t any_size(Random& random) {
    switch (random.below(16)) {
        case 0:
            return random.below(200'000);
        case 1:
            return random.below(8192);
        case 2:
            return alloc::class_size(unsigned(random.below(16))) + random.below(3) - 1;
        default:
            return random.below(300);
    }
}

Kind any_kind(Random& random) { return random.one_in(3) ? Kind::padded : Kind::strict; }

// A block full of a pattern of its own: so whoever else writes to it is found out.
struct Filled {
    unsigned char* p = nullptr;
    size_t size = 0;
    unsigned char byte = 0;

    static Filled make(Random& random) {
        const size_t size = any_size(random);
        Filled block{static_cast<unsigned char*>(alloc::allocate(size, any_kind(random))), size,
                     static_cast<unsigned char>(random.next())};
        std::memset(block.p, block.byte, size);
        return block;
    }
    void check() const {
        for (size_t i = 0; i < size; ++i) CHECK(p[i] == byte);
    }
    void free() const {
        check();
        alloc::deallocate(p);
    }
};

struct Sum {
    uint64_t allocated = 0, freed = 0, sent = 0, returned = 0, held = 0, waiting = 0, reserved = 0;
    uint64_t live() const { return allocated - freed - sent; }
};

// Over all processors and sizes.
Sum sum() {
    const alloc::Statistics statistics = alloc::statistics();
    Sum sum;
    for (const alloc::Usage& u : statistics.usage) {
        sum.allocated += u.allocated;
        sum.freed += u.freed;
        sum.sent += u.sent;
        sum.returned += u.returned;
        sum.held += u.held;
    }
    sum.waiting = statistics.waiting;
    sum.reserved = statistics.reserved;
    return sum;
}

void size_classes() {
    begin("size_classes");
    for (Kind kind : {Kind::strict, Kind::padded}) {
        for (size_t size = 0; size <= alloc::largest_class; ++size) {
            const unsigned c = alloc::class_of(size, kind);
            CHECK(c < alloc::class_count);
            CHECK(size <= alloc::class_size(c));
            if (kind == Kind::padded) {
                CHECK_EQUAL(alloc::class_size(c) % kLine, 0u);
            } else {
                CHECK(c == 0 || alloc::class_size(c - 1) < size);
                if (size > 16) CHECK(alloc::class_size(c) < 2 * size);
            }
            // A size that is a multiple of an alignment has a class of such multiples.
            for (size_t alignment = 1; size && size % alignment == 0; alignment *= 2)
                CHECK_EQUAL(alloc::class_size(c) % std::min(alignment, alloc::class_size(c)), 0u);
        }
    }
}

// One thread: blocks do not overlap, are aligned, keep what is in them; the statistics say what was done.
void against_model() {
    begin("against_model");
    Random random(seed());
    const Sum before = sum();
    std::map<uintptr_t, Filled> model;
    uint64_t allocated = 0, freed = 0;
    for (int i = 0; i < 30'000; ++i) {
        // Grows and shrinks by turns.
        if (model.empty() || random.below(10) < (i / 5000 % 2 ? 4u : 6u)) {
            const Filled block = Filled::make(random);
            const auto at = address(block.p);
            CHECK_EQUAL(at % 16, 0u);
            const auto after = model.lower_bound(at);
            CHECK(after == model.end() || at + block.size <= after->first);
            CHECK(after == model.begin() || std::prev(after)->first + std::prev(after)->second.size <= at);
            CHECK(model.emplace(at, block).second);
            ++allocated;
        } else {
            auto chosen = model.lower_bound(random.next() % (model.rbegin()->first + 1));
            chosen->second.free();
            model.erase(chosen);
            ++freed;
        }
        if (random.one_in(3000)) {
            const Sum now = sum();
            CHECK_EQUAL(now.allocated - before.allocated, allocated);
            CHECK_EQUAL(now.freed - before.freed, freed);
            CHECK_EQUAL(now.live() - before.live(), model.size());
        }
    }
    for (auto& [at, block] : model) block.free();
    CHECK_EQUAL(sum().live(), before.live());
    CHECK_EQUAL(sum().sent, before.sent);
}

void odd_sizes() {
    begin("odd_sizes");
    alloc::deallocate(nullptr);
    void* first = alloc::allocate(0);
    void* second = alloc::allocate(0);
    void* padded = alloc::allocate(0, Kind::padded);
    CHECK(first && second && first != second);
    CHECK_EQUAL(address(padded) % kLine, 0u);
    for (void* p : {first, second, padded}) alloc::deallocate(p);
    const Sum before = sum();
    for (size_t size : {std::numeric_limits<size_t>::max(), std::numeric_limits<size_t>::max() / 2, size_t{1} << 47}) {
        for (Kind kind : {Kind::strict, Kind::padded}) {
            bool refused = false;
            try {
                alloc::allocate(size, kind);
            } catch (const std::bad_alloc&) {
                refused = true;
            }
            CHECK(refused);
        }
    }
    CHECK_EQUAL(sum().allocated, before.allocated);
    // Large ones come from the system and go there.
    auto* large = static_cast<char*>(alloc::allocate(5'000'000));
    large[0] = large[4'999'999] = 1;
    CHECK(sum().held >= before.held + 5'000'000);
    alloc::deallocate(large);
    CHECK_EQUAL(sum().held, before.held);
}

struct Counted {
    static inline int alive = 0;
    explicit Counted(bool refuse) {
        if (refuse) throw std::runtime_error("refused");
        ++alive;
    }
    ~Counted() { --alive; }
};
struct alignas(4096) Page {
    char bytes[4096];
};

void make_and_destroy() {
    begin("make_and_destroy");
    const Sum before = sum();
    {
        std::unique_ptr<Counted, alloc::Deleter> one(alloc::make<Counted>(false));
        CHECK_EQUAL(Counted::alive, 1);
    }
    CHECK_EQUAL(Counted::alive, 0);
    bool thrown = false;
    try {
        alloc::make<Counted, Kind::padded>(true);
    } catch (const std::runtime_error&) {
        thrown = true;
    }
    CHECK(thrown);
    alloc::destroy(static_cast<Counted*>(nullptr));
    auto* page = alloc::make<Page>();
    CHECK_EQUAL(address(page) % 4096, 0u);
    alloc::destroy(page);
    CHECK_EQUAL(sum().live(), before.live());
}

// From addresses: the lines of a processor's strict blocks are never another's, those of padded ones a block's alone.
void lines() {
    begin("lines");
    constexpr int kThreads = 6, kBlocks = 2000;
    struct Held {
        void* p;
        size_t size;
        Kind kind;
        uint32_t processor;
    };
    std::mutex lock;  // protects held
    std::vector<Held> held;
    std::array<std::vector<Held>, kThreads> given;
    in_threads(kThreads, [&](int i) {
        // Frees some blocks of earlier waves, which are others', and gets some like them.
        Random random(seed() + uint64_t(i));
        for (int j = 0; j < kBlocks; ++j) {
            if (random.one_in(3)) {
                std::unique_lock guard(lock);
                if (held.empty()) continue;
                std::swap(held[random.below(held.size())], held.back());
                const Held other = held.back();
                held.pop_back();
                guard.unlock();
                alloc::deallocate(other.p);
                continue;
            }
            const size_t size = 1 + random.below(random.one_in(10) ? 3000 : 200);
            const Kind kind = any_kind(random);
            const Held mine{alloc::allocate(size, kind), size, kind, runtime::current().id};
            std::lock_guard guard(lock);
            held.push_back(mine);
        }
    });
    std::map<uintptr_t, std::pair<uint32_t, int>> owner;  // of a line: its processor, its blocks
    for (const Held& block : held)
        for (uintptr_t line = address(block.p) / kLine; line <= (address(block.p) + block.size - 1) / kLine; ++line) {
            auto& [processor, blocks] = owner.try_emplace(line, block.processor, 0).first->second;
            CHECK_EQUAL(processor, block.processor);
            ++blocks;
        }
    for (const Held& block : held)
        if (block.kind == Kind::padded) {
            CHECK_EQUAL(address(block.p) % kLine, 0u);
            for (uintptr_t line = address(block.p) / kLine; line <= (address(block.p) + block.size - 1) / kLine; ++line)
                CHECK_EQUAL(owner.at(line).second, 1);
        }
    for (const Held& block : held) alloc::deallocate(block.p);
}

// Threads exchange blocks through a few places, so that most are freed far from home; waves of them come and go.
void passed_around() {
    begin("passed_around");
    constexpr int kWaves = 8, kWidth = 4, kSteps = kThreadSanitizer ? 1500 : 5000;
    struct Place {
        std::mutex lock;  // protects block
        Filled block;
    };
    std::array<Place, 64> places;
    const uint64_t live = sum().live();
    for (int wave = 0; wave < kWaves; ++wave) {
        in_threads(kWidth, [&](int i) {
            Random random(seed() + uint64_t(wave * kWidth + i));
            for (int step = 0; step < kSteps; ++step) {
                Filled block = random.one_in(8) ? Filled{} : Filled::make(random);
                Place& place = places[random.below(places.size())];
                {
                    std::lock_guard guard(place.lock);
                    std::swap(block, place.block);
                }
                if (block.p) block.free();
            }
        });
        uint64_t waiting = 0;
        for (Place& place : places) waiting += place.block.p != nullptr;
        CHECK_EQUAL(sum().live() - live, waiting);
    }
    for (Place& place : places)
        if (place.block.p) place.block.free();
    CHECK_EQUAL(sum().live(), live);
}

// A block freed elsewhere goes home, and is used again there.
void home() {
    begin("home");
    constexpr int kBlocks = 5000;
    std::barrier step(2);
    std::vector<void*> blocks;
    in_threads(2, [&](int i) {
        const uint32_t id = runtime::current().id;
        if (i == 0) {
            std::set<void*> mine;
            for (int j = 0; j < kBlocks; ++j) blocks.push_back(alloc::allocate(48));
            mine.insert(blocks.begin(), blocks.end());
            const auto own = [&] {
                for (const alloc::Usage& u : alloc::statistics().usage)
                    if (u.processor == id && u.size == 48) return u;
                CHECK(false);
                return alloc::Usage{};
            };
            const alloc::Usage before = own();
            step.arrive_and_wait();
            step.arrive_and_wait();
            CHECK_EQUAL(own().returned, before.returned);  // nobody but us touches our slabs
            alloc::settle();
            const alloc::Usage after = own();
            CHECK_EQUAL(after.returned - before.returned, uint64_t(kBlocks));
            CHECK_EQUAL(after.freed, before.freed);
            CHECK(after.held < before.held);  // slabs became empty
            int again = 0;
            for (void*& p : blocks) again += int(mine.count(p = alloc::allocate(48)));
            CHECK(again > 0);
            for (void* p : blocks) alloc::deallocate(p);
        } else {
            step.arrive_and_wait();
            const Sum before = sum();
            for (void* p : blocks) alloc::deallocate(p);
            alloc::settle();
            CHECK_EQUAL(sum().sent - before.sent, uint64_t(kBlocks));
            step.arrive_and_wait();
        }
    });
}

// Freeing takes no processor, and what it frees waits for the next owner of its home.
void strays() {
    begin("strays");
    const Sum before = sum();
    std::vector<void*> blocks;
    for (size_t size : {size_t{30}, size_t{300}, size_t{300'000}}) blocks.push_back(alloc::allocate(size));
    const uint32_t processors = runtime::processor_count();
    in_threads(1, [&](int) {
        for (void* p : blocks) alloc::deallocate(p);
        CHECK(!runtime::current_or_null());
    });
    CHECK_EQUAL(runtime::processor_count(), processors);
    CHECK_EQUAL(sum().live(), before.live());
    CHECK_EQUAL(sum().sent - before.sent, blocks.size());
    alloc::settle();
    CHECK_EQUAL(sum().returned - before.returned, blocks.size());
}

// A million blocks pass from hand to hand in the same memory.
void flat() {
    begin("flat");
    constexpr int kCycles = kThreadSanitizer ? 20'000 : 1'000'000 / 4;
    const auto cycles = [&] {
        std::array<std::atomic<void*>, 64> ring{};
        in_threads(4, [&](int i) {
            Random random(seed() + uint64_t(i));
            for (int j = 0; j < kCycles; ++j) {
                void* p = alloc::allocate(16 + random.below(500), any_kind(random));
                if (random.one_in(2)) p = ring[random.below(ring.size())].exchange(p);
                alloc::deallocate(p);
            }
        });
        for (auto& place : ring) alloc::deallocate(place.load());
    };
    const uint64_t live = sum().live();
    cycles();
    const Sum warm = sum();
    cycles();
    const Sum after = sum();
    CHECK_EQUAL(after.live(), live);
    CHECK(after.reserved <= warm.reserved + alloc::chunk_size);
    // What lists, outboxes and half-empty slabs may keep: a few slabs a size and processor.
    const uint64_t most = uint64_t(runtime::processor_count()) * alloc::class_count * 4 * alloc::slab_size;
    CHECK(after.held + after.waiting <= most);
}

size_t resident() {
    std::ifstream file("/proc/self/statm");
    size_t all = 0, pages = 0;
    file >> all >> pages;
    return pages * size_t(sysconf(_SC_PAGESIZE));
}

// What a peak took goes back to the system.
void gives_back() {
    begin("gives_back");
    constexpr size_t kBlocks = 64'000, kSize = 1024;
    const Sum before = sum();
    std::vector<void*> blocks(kBlocks);
    for (void*& p : blocks) std::memset(p = alloc::allocate(kSize), 1, kSize);
    const size_t peak = resident();
    const Sum high = sum();
    CHECK(high.held >= before.held + kBlocks * kSize - alloc::slab_size * 32);
    for (void* p : blocks) alloc::deallocate(p);
    CHECK(sum().held <= before.held + 4 * alloc::slab_size);
    CHECK(resident() + kBlocks * kSize * 3 / 4 <= peak);
    // The address space is there for the next peak.
    for (void*& p : blocks) p = alloc::allocate(kSize);
    CHECK_EQUAL(sum().reserved, high.reserved);
    for (void* p : blocks) alloc::deallocate(p);
}

// A child goes on with the one thread that it has, while in the parent others were in the middle of their pools.
// These use no memory of malloc while they run: AddressSanitizer's malloc does not survive that, its child hangs.
void forks() {
    begin("forks");
    constexpr int kForks = 10;
    constexpr int kThreads = 3;
    constexpr size_t kMine = 50, kOthers = 100;
    std::atomic<bool> stop{false};
    std::barrier ready(kThreads + 1);
    std::mutex lock;  // protects others
    std::vector<Filled> others;
    others.reserve(kOthers);
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i)
        threads.emplace_back([&, i] {
            Random random(seed() + uint64_t(i));
            std::vector<Filled> mine;
            mine.reserve(kMine + 1);
            mine.push_back(Filled::make(random));
            ready.arrive_and_wait();
            while (!stop.load()) {
                mine.push_back(Filled::make(random));
                if (mine.size() > kMine) {
                    std::swap(mine[random.below(mine.size())], mine.back());
                    mine.back().free();
                    mine.pop_back();
                }
                if (random.one_in(500)) {
                    std::lock_guard guard(lock);
                    if (others.size() < kOthers) {
                        others.push_back(mine.back());
                        mine.pop_back();
                    }
                }
            }
            for (const Filled& block : mine) block.free();
        });
    ready.arrive_and_wait();
    for (int i = 0; i < kForks; ++i) {
        Random random(seed());
        std::vector<Filled> mine;
        for (int j = 0; j < 200; ++j) mine.push_back(Filled::make(random));
        lock.lock();
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            alarm(60);
            for (const Filled& block : others) block.free();
            const auto work = [&](int k) {
                Random its(seed() + uint64_t(k));
                std::vector<Filled> blocks;
                for (int j = 0; j < 500; ++j) blocks.push_back(Filled::make(its));
                for (const Filled& block : blocks) block.free();
            };
            work(0);
            if (!kThreadSanitizer) in_threads(3, work);  // it allows no threads in the child
            for (const Filled& block : mine) block.free();
            alloc::settle();
            CHECK(sum().reserved > 0);
            _exit(0);
        }
        lock.unlock();
        int status = 0;
        CHECK_EQUAL(waitpid(child, &status, 0), child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        for (const Filled& block : mine) block.free();
    }
    stop.store(true);
    for (std::thread& thread : threads) thread.join();
    for (const Filled& block : others) block.free();
}

// AddressSanitizer knows which bytes are nobody's.
void poisoned() {
#ifdef __SANITIZE_ADDRESS__
    begin("poisoned");
    auto* p = static_cast<char*>(alloc::allocate(20));
    for (int i = 0; i < 20; ++i) CHECK(!__asan_address_is_poisoned(p + i));
    for (int i = 20; i < 32; ++i) CHECK(__asan_address_is_poisoned(p + i));
    alloc::deallocate(p);
    for (int i = 0; i < 32; ++i) CHECK(__asan_address_is_poisoned(p + i));
    // What only a block points to is not leaked: the sanitizer looks for that at the end.
    static std::unique_ptr<int>* kept = alloc::make<std::unique_ptr<int>>(new int(1));
    CHECK(kept->get());
#endif
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    size_classes();
    odd_sizes();
    against_model();
    make_and_destroy();
    home();
    strays();
    lines();
    passed_around();
    flat();
    gives_back();
    forks();
    poisoned();
    return 0;
}
