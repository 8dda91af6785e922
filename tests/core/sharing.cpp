// What two processors share on the path of a fault: every read and write of the core, recorded.
//
// The core is compiled a second time, with the compiler's instrumentation for ThreadSanitizer; but what the
// instrumentation calls is here, and notes the line of each access, and each lock. Two threads then fault on pages that
// are resident, in the same process, on the same file, once the first faults have made all that is made once. With all
// objects distributed no line that one of them writes is touched by the other, and no lock is taken by both; with
// shared ones the lines are found, which shows that the record sees them. Explained in docs/no-shared-lines.md.
//
// This file is not instrumented. Where it runs under AddressSanitizer it is compiled without it.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "check.hpp"
#include "vm/engine.hpp"
#include "vm/file_cache.hpp"
#include "vm/region.hpp"

namespace {

// Addresses by thread, plain memory: what records must not be recorded.
struct Record {
    static constexpr size_t kMost = 1 << 18;
    uintptr_t reads[kMost], writes[kMost], locks[kMost];
    size_t read = 0, written = 0, locked = 0;
};
thread_local Record* record = nullptr;

void note(uintptr_t* where, size_t& count, const volatile void* address, size_t size) {
    const auto first = reinterpret_cast<uintptr_t>(address) / 64;
    const auto last = (reinterpret_cast<uintptr_t>(address) + size - 1) / 64;
    for (uintptr_t line = first; line <= last; ++line) {
        CHECK(count < Record::kMost);
        where[count++] = line;
    }
}
void on_read(const volatile void* address, size_t size) {
    if (record) note(record->reads, record->read, address, size);
}
void on_write(const volatile void* address, size_t size) {
    if (record) note(record->writes, record->written, address, size);
}

}  // namespace

// What gcc's -fsanitize=thread calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void** address) { on_read(address, 8); }
void __tsan_vptr_update(void** address, void*) { on_write(address, 8); }
void __tsan_read_range(void* address, unsigned long size) { on_read(address, size); }
void __tsan_write_range(void* address, unsigned long size) { on_write(address, size); }
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

#define PLAIN(size)                                                            \
    void __tsan_read##size(void* address) { on_read(address, size); }          \
    void __tsan_write##size(void* address) { on_write(address, size); }        \
    void __tsan_unaligned_read##size(void* a) { on_read(a, size); }            \
    void __tsan_unaligned_write##size(void* a) { on_write(a, size); }          \
    void __tsan_volatile_read##size(void* address) { on_read(address, size); } \
    void __tsan_volatile_write##size(void* address) { on_write(address, size); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
#define MODIFY(bits, T, name, builtin)                            \
    T __tsan_atomic##bits##_##name(volatile T* a, T value, int) { \
        on_write(a, sizeof(T));                                   \
        return builtin(a, value, __ATOMIC_SEQ_CST);               \
    }
#define ATOMIC(bits, T)                                                                                    \
    T __tsan_atomic##bits##_load(const volatile T* a, int) {                                               \
        on_read(a, sizeof(T));                                                                             \
        return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                       \
    }                                                                                                      \
    void __tsan_atomic##bits##_store(volatile T* a, T value, int) {                                        \
        on_write(a, sizeof(T));                                                                            \
        __atomic_store_n(a, value, __ATOMIC_SEQ_CST);                                                      \
    }                                                                                                      \
    MODIFY(bits, T, exchange, __atomic_exchange_n)                                                         \
    MODIFY(bits, T, fetch_add, __atomic_fetch_add)                                                         \
    MODIFY(bits, T, fetch_sub, __atomic_fetch_sub)                                                         \
    MODIFY(bits, T, fetch_and, __atomic_fetch_and)                                                         \
    MODIFY(bits, T, fetch_or, __atomic_fetch_or)                                                           \
    MODIFY(bits, T, fetch_xor, __atomic_fetch_xor)                                                         \
    bool __tsan_atomic##bits##_compare_exchange_strong(volatile T* a, T* expected, T value, int, int) {    \
        on_write(a, sizeof(T));                                                                            \
        return __atomic_compare_exchange_n(a, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }                                                                                                      \
    bool __tsan_atomic##bits##_compare_exchange_weak(volatile T* a, T* expected, T value, int x, int y) {  \
        return __tsan_atomic##bits##_compare_exchange_strong(a, expected, value, x, y);                    \
    }                                                                                                      \
    T __tsan_atomic##bits##_compare_exchange_val(volatile T* a, T expected, T value, int x, int y) {       \
        __tsan_atomic##bits##_compare_exchange_strong(a, &expected, value, x, y);                          \
        return expected;                                                                                   \
    }
ATOMIC(8, unsigned char)
ATOMIC(16, unsigned short)
ATOMIC(32, unsigned)
ATOMIC(64, unsigned long)

// Locks, of whoever takes them: std::mutex comes here.
int pthread_mutex_lock(pthread_mutex_t* mutex) {
    static int (*const real)(pthread_mutex_t*) =
        reinterpret_cast<int (*)(pthread_mutex_t*)>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
    if (record) {
        note(record->locks, record->locked, mutex, 1);
        on_write(mutex, sizeof *mutex);
    }
    return real(mutex);
}
}

using namespace k42;
using namespace k42::vm;
using namespace k42::testing;

namespace {

// A HAT that maps nothing: what a HAT does for a page is one ioctl of the CPU's own descriptor.
class NoHat final : public Hat {
  public:
    using Hat::Hat;
    RangeResult map(int, uint64_t, uint64_t length, bool) override { return {length, 0}; }
    RangeResult allow_write(int, uint64_t, uint64_t length) override { return {length, 0}; }
    bool protect(const Region&, uint64_t, uint64_t, uint32_t) override { return true; }
    void soft_unmap(const Region&, uint64_t, uint64_t, uint32_t) override {}
    void wake_everywhere(uint64_t, uint64_t) override {}
    RangeResult zero(int, uint64_t, uint64_t length, int, uint64_t) override { return {length, 0}; }
    void wake(int, uint64_t, uint64_t) override {}
    void fail(int, uint64_t, uint64_t, const std::string&) override { CHECK(!"a fault that fails"); }
    void unmapped(const Region&, uint64_t) override {}
};

struct Objects {
    bool process, region, fcm, frames;
};

std::set<uintptr_t> set_of(const uintptr_t* lines, size_t count) { return {lines, lines + count}; }

struct Shared {
    size_t lines, locks;
    bool operator==(const Shared&) const = default;
};

int memory(uint64_t bytes) {
    const int fd = memfd_create("k42-sharing", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, off_t(bytes)) == 0);
    return fd;
}

// Faults on all pages by two processors, each through windows of its CPU; `zero_fill`: on pages of its own that are
// absent, else on the same ones, which are resident.
Shared shared_by_two(Objects objects, bool zero_fill) {
    constexpr uint64_t kSpan = 512, kPages = 2 * kSpan, kStart = 0x10'0000'0000;
    constexpr uint64_t kWarm = 40, kAbsent = 20;  // together less than a chunk of frames: the root is not asked again
    FramePool pool(1'000'000, objects.frames);
    FileCache cache(&pool, memory(kPages * kPageSize), memory(kPages), kPages, Fill::zero, Backing::reserved,
                    Policy::fifo, 2,
                    objects.fcm ? (zero_fill ? Tables::partitioned : Tables::replicated) : Tables::shared);
    CHECK(pool.reserve(kPages));
    RegionMap map(objects.process);
    auto* hat = new NoHat(1, &map, 2);
    Account* const account = pool.accounts().open(std::nullopt, objects.frames);
    hat->charge_to(account->id());
    auto region = std::make_unique<Region>(kStart, kPages, 0, 1, 1, false, &cache, hat);
    region->gate.distribute(objects.region);
    CHECK(map.insert(kStart, kStart + kPages * kPageSize, region.get()));
    CHECK(hat->add_window(0, kStart, kPages * kPageSize, kStart));
    cache.attach(region.get());

    std::unique_ptr<Record> records[2] = {std::make_unique<Record>(), std::make_unique<Record>()};
    std::barrier turn(2);
    in_threads(2, [&](int who) {
        const auto touch = [&](uint64_t first, uint64_t end) {
            for (uint64_t page = first; page < end; ++page) {
                const runtime::Within within;  // as the engine's servers
                CHECK(Engine::handle(FaultAt{hat, who, kStart + page * kPageSize}));
            }
        };
        // Warm: both have faulted on every page, or, of absent ones, on a few.
        for (int times = 0; times < 2; ++times) {
            touch(zero_fill ? uint64_t(who) * kSpan : 0, zero_fill ? uint64_t(who) * kSpan + kWarm : kPages);
            turn.arrive_and_wait();
        }
        record = records[who].get();
        const uint64_t first = uint64_t(who) * kSpan + kWarm;
        touch(zero_fill ? first : 0, zero_fill ? first + kAbsent : kPages);
        record = nullptr;
    });
    std::set<uintptr_t> read[2], written[2], locked[2];
    for (int who = 0; who < 2; ++who) {
        read[who] = set_of(records[who]->reads, records[who]->read);
        written[who] = set_of(records[who]->writes, records[who]->written);
        locked[who] = set_of(records[who]->locks, records[who]->locked);
        CHECK(records[who]->read > 200 && records[who]->written > 100);
    }
    Shared shared{0, 0};
    std::set<uintptr_t> common;
    for (int who = 0; who < 2; ++who) {
        for (uintptr_t line : written[who]) {
            if (read[1 - who].count(line) || written[1 - who].count(line)) common.insert(line);
        }
    }
    shared.lines = common.size();
    for (uintptr_t line : locked[0]) shared.locks += locked[1].count(line);
    cache.detach(region.get());
    CHECK(pool.check() && account->check());
    CHECK_EQUAL(account->used(), cache.counts().resident);
    hat->release();
    return shared;
}

void show(Objects objects, Shared shared) {
    const auto name = [](bool distributed) { return distributed ? "distributed" : "shared"; };
    std::printf("  process %s, region %s, fcm %s, frames %s: %zu lines, %zu locks\n", name(objects.process),
                name(objects.region), name(objects.fcm), name(objects.frames), shared.lines, shared.locks);
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    begin("resident_pages");
    for (int choice = 0; choice < 8; ++choice) {
        const Objects objects{(choice & 1) != 0, (choice & 2) != 0, (choice & 4) != 0, true};
        const Shared shared = shared_by_two(objects, false);
        show(objects, shared);
        CHECK_EQUAL(shared.lines == 0, choice == 7);
        CHECK_EQUAL(shared.locks == 0, objects.process && objects.fcm);  // a gate has no lock
    }
    begin("zero_fill");
    for (bool distributed : {false, true}) {
        const Objects objects{true, true, true, distributed};
        const Shared shared = shared_by_two(objects, true);
        show(objects, shared);
        CHECK_EQUAL(shared.lines == 0 && shared.locks == 0, distributed);
    }
    std::puts("ok");
}
