#include "vm/agent.hpp"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <system_error>

#include "vm/status_page.hpp"
#include "vm/uffd.hpp"

namespace k42::vm {

namespace {

void futex_wake(const std::atomic<uint32_t>& word, int flags) {
    syscall(SYS_futex, &word, FUTEX_WAKE | flags, INT_MAX, nullptr, nullptr, 0);
}

// Waits while the shared word and the private one have these values. False: this Linux has no such call.
bool futex_wait_two(const std::atomic<uint32_t>& shared, uint32_t seen, const std::atomic<uint32_t>& own,
                    uint32_t own_seen) {
    futex_waitv waiters[2]{};
    waiters[0].val = seen;
    waiters[0].uaddr = reinterpret_cast<uint64_t>(&shared);
    waiters[0].flags = FUTEX_32;
    waiters[1].val = own_seen;
    waiters[1].uaddr = reinterpret_cast<uint64_t>(&own);
    waiters[1].flags = FUTEX_32 | FUTEX_PRIVATE_FLAG;
    return syscall(SYS_futex_waitv, waiters, 2, 0, nullptr, 0) >= 0 || errno == EAGAIN || errno == EINTR;
}

}  // namespace

// The ring

std::unique_ptr<CommandRing> CommandRing::create() {
    const SealedMemory made = make_sealed_memory("k42-commands", sizeof(CommandMemory));
    if (made.fd < 0) return nullptr;
    return std::unique_ptr<CommandRing>(new CommandRing(made.fd, static_cast<CommandMemory*>(made.address)));
}

std::unique_ptr<CommandRing> CommandRing::adopt(int fd) {
    const SealedMemory found = adopt_sealed_memory(fd, sizeof(CommandMemory));
    if (found.fd < 0) return nullptr;
    std::unique_ptr<CommandRing> ring(new CommandRing(fd, static_cast<CommandMemory*>(found.address)));
    for (const CommandMemory::Entry& entry : ring->memory_->entries) {
        ring->next_ = std::max(ring->next_, entry.number.load(std::memory_order_relaxed));
    }
    return ring;
}

CommandRing::~CommandRing() {
    munmap(memory_, sizeof *memory_);
    close(fd_);
}

void CommandRing::post(const Command& command) {
    while (writing_.test_and_set(std::memory_order_acquire)) sched_yield();
    const uint64_t number = ++next_;
    CommandMemory::Entry& entry = memory_->entries[number % CommandMemory::kEntries];
    entry.number.store(0, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);  // whoever reads what follows finds no number after it
    entry.what_from_to.store(uint64_t(command.what) << 32 | uint64_t(command.from) << 16 | command.to,
                             std::memory_order_relaxed);
    entry.address.store(command.address, std::memory_order_relaxed);
    entry.length.store(command.length, std::memory_order_relaxed);
    entry.number.store(number, std::memory_order_release);
    memory_->posted.store(uint32_t(number), std::memory_order_release);
    writing_.clear(std::memory_order_release);
    futex_wake(memory_->posted, 0);
}

std::optional<Command> CommandReader::next() {
    for (;;) {
        const CommandMemory::Entry& entry = memory_->entries[(last_ + 1) % CommandMemory::kEntries];
        const uint64_t number = entry.number.load(std::memory_order_acquire);
        if (number <= last_) return std::nullopt;  // the next is not written yet
        const uint64_t packed = entry.what_from_to.load(std::memory_order_relaxed);
        const Command command{Command::What(packed >> 32), uint16_t(packed >> 16), uint16_t(packed),
                              entry.address.load(std::memory_order_relaxed),
                              entry.length.load(std::memory_order_relaxed)};
        std::atomic_thread_fence(std::memory_order_acquire);  // pairs with the release fence in post()
        if (entry.number.load(std::memory_order_relaxed) != number) continue;
        lost_ += number - last_ - 1;  // we were overtaken
        last_ = number;
        return command;
    }
}

// The windows

void Windows::watch(size_t cpu, int uffd) {
    std::lock_guard guard(lock);
    if (uffds.size() <= cpu) uffds.resize(cpu + 1, -1);
    uffds[cpu] = uffd;
}

int Windows::uffd_of(size_t cpu) {
    std::lock_guard guard(lock);
    return cpu < uffds.size() ? uffds[cpu] : -1;
}

std::vector<int> Windows::all_uffds() {
    std::lock_guard guard(lock);
    std::vector<int> all;
    std::copy_if(uffds.begin(), uffds.end(), std::back_inserter(all), [](int uffd) { return uffd >= 0; });
    return all;
}

void Windows::add(const Range& range) {
    std::lock_guard guard(lock);
    ranges.push_back(range);
}

void Windows::remove(uint64_t base) {
    std::lock_guard none_changes(changing);
    std::lock_guard guard(lock);
    std::erase_if(ranges, [&](const Range& r) { return r.base == base; });
}

std::optional<Windows::Range> Windows::find(uint64_t address, uint64_t length) {
    std::lock_guard guard(lock);
    for (const Range& range : ranges) {
        const uint64_t at = address - range.base;
        if (at < range.length && length <= range.length - at) return range;
    }
    return std::nullopt;
}

void Windows::drain() {
    for (int uffd : all_uffds()) vm::drain(uffd);
}

// The agent

Agent::Agent(Windows& windows, int memfd) : windows_(windows) {
    void* memory = mmap(nullptr, sizeof(CommandMemory), PROT_READ, MAP_SHARED, memfd, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mapping the kernel's commands");
    memory_ = static_cast<const CommandMemory*>(memory);
    thread_ = std::thread([this] { run(); });
}

Agent::~Agent() {
    stop();
    munmap(const_cast<CommandMemory*>(memory_), sizeof *memory_);
}

void Agent::stop() {
    if (!thread_.joinable()) return;
    stopping_.store(1);
    futex_wake(stopping_, FUTEX_PRIVATE_FLAG);
    // It may be waiting for a kernel that has gone, or sleeps, to take note of what it did.
    while (!ended_.load(std::memory_order_acquire)) {
        windows_.drain();
        const timespec moment{0, 1'000'000};
        nanosleep(&moment, nullptr);
    }
    thread_.join();
}

void Agent::forget_in_child() {
    // A thread of the child's own may have its handle by now: neither joined nor detached.
    if (thread_.joinable()) new std::thread(std::move(thread_));
}

void Agent::run() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);  // signals are the program's, not this thread's
    pthread_setname_np(pthread_self(), "k42-agent");

    CommandReader reader(memory_);
    bool waits = true;
    while (waits && !stopping_.load()) {
        const uint32_t seen = memory_->posted.load(std::memory_order_acquire);
        while (!stopping_.load()) {
            const auto command = reader.next();
            if (!command) break;
            execute(*command);
        }
        waits = futex_wait_two(memory_->posted, seen, stopping_, 0);
    }
    ended_.store(true, std::memory_order_release);
}

void Agent::execute(const Command& command) {
    if (command.address % kPageSize || command.length % kPageSize || command.length == 0) return;
    // From here on the addresses stay what they are now. A window that has gone meanwhile is not found: what is at its
    // addresses is the program's, and not ours to touch.
    std::lock_guard guard(windows_.changing);
    const auto range = windows_.find(command.address, command.length);
    if (!range || range->kind == Windows::Kind::copies) return;
    switch (command.what) {
        case Command::What::soft_unmap:
            madvise(reinterpret_cast<void*>(command.address), command.length, MADV_DONTNEED);
            break;
        case Command::What::rehome:
            rehome(command, *range);
            break;
    }
}

// To unregister the range and register it with the other userfaultfd would leave it unregistered for a moment, in
// which a touch of an absent page makes a page of zeros in the file cache. So a new mapping of the same frames,
// registered beforehand, is moved over the old one: Linux does that at one stroke. What it costs is the page tables:
// the pages are mapped again by faults. And the event of the move is to be read on the new userfaultfd; until then
// we wait, and ioctls there get EAGAIN.
void Agent::rehome(const Command& command, const Windows::Range& range) {
    const int uffd = windows_.uffd_of(command.to);
    if (uffd < 0) return;
    void* const place = reinterpret_cast<void*>(command.address);
    const bool shared = range.kind == Windows::Kind::shared;
    const int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE;
    const auto offset = off_t(range.offset + (command.address - range.base));
    // Nobody can touch it while it is not registered, or in a child that is forked now.
    void* const fresh = mmap(nullptr, command.length, PROT_NONE, flags, range.memfd, offset);
    if (fresh == MAP_FAILED) return;
    const int protection = shared ? PROT_READ | PROT_WRITE : PROT_READ;
    const bool moved = madvise(fresh, command.length, MADV_DONTFORK) == 0 &&
                       register_range(uffd, reinterpret_cast<uint64_t>(fresh), command.length, shared) == 0 &&
                       mprotect(fresh, command.length, protection) == 0 &&
                       mremap(fresh, command.length, command.length, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place;
    if (!moved) {
        munmap(fresh, command.length);
        // Out of memory, Linux can have removed the old mapping and not moved the new one: then nothing else may come
        // there, and accesses end loudly.
        mmap(place, command.length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1,
             0);
    }
    // Who waits on the old userfaultfd faults again, on the new one. A kernel that took over from another may not know
    // which the old one is.
    for (int other : windows_.all_uffds()) wake_range(other, command.address, command.length);
}

}  // namespace k42::vm
