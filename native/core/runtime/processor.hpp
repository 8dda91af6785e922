// Processors: dense slots, each owned by one live thread, which takes it at first use and frees it at its
// end.
//
// A freed slot is taken by a later thread with everything in it, its local translation table above all: so
// representatives are neither lost nor multiplied when threads come and go. A slot never moves and is never
// returned; there are as many as threads ever used the runtime at the same time, and no fixed maximum.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime/fence.hpp"
#include "runtime/table.hpp"

namespace k42::alloc {
class Pool;
}

namespace k42::runtime {

// Two lines, because the prefetcher of x86 fetches lines in pairs: neighbours must not share a pair.
inline constexpr std::size_t apart = 128;

struct Limbo;
struct Mail;
struct Range;

struct alignas(apart) Processor {
    // Written by the owner alone, at each request; read by marks of quiescence.
    std::atomic<std::uint64_t> requests{0};  // odd: inside a request; each outermost call adds two
    std::atomic<bool> watched{false};        // a deferred destruction waits for the request that runs now
    std::uint32_t depth = 0;                 // calls on references that the owner is inside of
    std::uint32_t id = 0;
    Table<std::atomic<void*>> local;          // the Local Translation Table; an empty entry is a null pointer
    std::atomic<alloc::Pool*> pool{nullptr};  // the allocator's, which sets it when the owner first allocates

    Limbo* limbo = nullptr;   // what the owner has retired (retire.hpp)
    Range* ranges = nullptr;  // the owner's ranges of the global table that have free entries (translation.cpp)
    // The coid whose switch the owner's request waits for, or 0; written under the lock of all switches.
    std::atomic<std::uint64_t> waits_for_switch_of{0};
    std::atomic<Mail*> mail{nullptr};  // what others ask the owner to do, the last first
    // What others freed for us: they push, the owner takes all at once (so the list has no ABA problem).
    alignas(apart) std::atomic<Index> returned{0};
};

namespace detail {
// A plain pointer: no guard, no call to find it. The extension is loaded once, at 8 bytes of static TLS.
extern constinit thread_local Processor* current __attribute__((tls_model("initial-exec")));
Processor& adopt();
}  // namespace detail

// The processor of the calling thread, or nullptr while it has none.
inline Processor* current_or_null() { return detail::current; }

// The processor of the calling thread, taken at the first call.
inline Processor& current() {
    Processor* p = detail::current;
    return p ? *p : detail::adopt();
}

// Frees the calling thread's processor before the thread ends; its next use takes one again. Only outside of
// requests; else it does nothing, and the end of the thread frees the processor.
void release_current();

// How many processors there are; their ids are 0 … count-1.
std::uint32_t processor_count();

// The processor with this id, which must be smaller than the count.
Processor& processor(std::uint32_t id);

// A request begins: only the outermost call counts.
inline void enter(Processor& p) {
    if (p.depth++ == 0) {
        p.requests.store(p.requests.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        fence_light();  // "inside" before any look at a reference or a table: pairs with Mark's heavy fence
    }
}

// A request ends. True: a deferred destruction waited for it, and the caller must `collect()`.
[[nodiscard]] inline bool leave(Processor& p) {
    if (--p.depth != 0) return false;
    p.requests.store(p.requests.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    fence_light();  // "outside" before the look at `watched`: pairs with the heavy fence in `defer`
    return p.watched.load(std::memory_order_relaxed);
}

// Something to be done by the owner of a processor, outside of requests.
struct Mail {
    void (*open)(void* what);
    void* what;
    Mail* next = nullptr;
};

// Asks for it: the owner `open_mail`s after the request that runs now or the next one, else a later owner does.
void post(Processor& to, void (*open)(void* what), void* what);

// Does what was asked of the calling thread's processor, in order; nothing inside a request.
void open_mail(Processor& p);

// The same for every processor, whoever owns it: at the end of the program.
void open_mail_of_all();

}  // namespace k42::runtime
