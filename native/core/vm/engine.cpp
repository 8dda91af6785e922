#include "vm/engine.hpp"

#include <errno.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "runtime/quiescence.hpp"
#include "vm/region.hpp"

namespace k42::vm {

namespace {

constexpr int kBatch = 16;  // faults read at once: more than the threads of a client that fault on one CPU

uint64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

}  // namespace

Engine::Engine(std::vector<int> cpus, bool sticky, bool homing)
    : cpus_(std::move(cpus)), sticky_(sticky), homing_(homing), placement_(cpus_) {
    for (size_t i = 0; i < cpus_.size(); ++i) servers_.push_back(std::make_unique<Server>(*this, int(i), cpus_[i]));
}

Engine::~Engine() { stop(); }

void Engine::start() {
    for (size_t i = 0; i < cpus_.size(); ++i) {
        Server& server = *servers_[i];
        server.epoll = epoll_create1(EPOLL_CLOEXEC);
        server.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        epoll_event event{};
        event.events = EPOLLIN;
        event.data.ptr = nullptr;
        epoll_ctl(server.epoll, EPOLL_CTL_ADD, server.wake, &event);
        server.thread = std::thread([this, i] { serve(int(i)); });
    }
}

void Engine::stop() {
    if (stopping_.exchange(true)) return;
    for (auto& server : servers_) {
        if (server->thread.joinable()) {
            const uint64_t one = 1;
            [[maybe_unused]] const auto written = write(server->wake, &one, sizeof one);
            server->thread.join();
        }
    }
    // Faults on any CPU's server may wait for what another's readers read.
    for (auto& server : servers_) server->reader.stop();
    for (auto& server : servers_) {
        {
            std::lock_guard guard(server->clients_lock);  // add() and remove() may be at work
            for (auto& client : server->clients) client->hat->release();
            server->clients.clear();
            if (server->epoll >= 0) close(server->epoll);
            if (server->wake >= 0) close(server->wake);
            server->epoll = server->wake = -1;
        }
        std::lock_guard guard(server->queue_lock);
        server->stopped = true;
        for (HandedUp& fault : server->queue) fault.hat->release();
        server->queue.clear();
        server->queue_filled.notify_all();
    }
    placement_.release_all();
}

bool Engine::add(UffdHat* hat, int cpu, pid_t pid, bool sticky, bool homing) {
    Server& server = *servers_[cpu];
    auto client =
        std::make_unique<Client>(Client{hat, pid, hat->descriptor(cpu), sticky && sticky_, homing && homing_});
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = client.get();
    std::lock_guard guard(server.clients_lock);
    if (epoll_ctl(server.epoll, EPOLL_CTL_ADD, client->uffd, &event) < 0) return false;
    hat->retain();
    server.clients.push_back(std::move(client));
    return true;
}

void Engine::remove(UffdHat* hat) {
    for (auto& server : servers_) {
        std::lock_guard guard(server->clients_lock);
        for (auto& client : server->clients) {
            if (client->hat != hat) continue;
            epoll_ctl(server->epoll, EPOLL_CTL_DEL, client->uffd, nullptr);
            client->hat->release();
            client.reset();
        }
        std::erase(server->clients, nullptr);
    }
    // Readers look at what it leads to without a lock, but never once they have seen this.
    hat->retire();
    synchronize();
}

void Engine::synchronize() {
    std::vector<runtime::Processor*> processors;
    for (auto& server : servers_) {
        if (auto* p = server->processor.load(std::memory_order_seq_cst)) processors.push_back(p);
        server->reader.add_processors(processors);
    }
    runtime::synchronize(processors);
}

void Engine::serve(int cpu) {
    Server& server = *servers_[cpu];
    server.processor.store(&runtime::current(), std::memory_order_seq_cst);
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(cpus_[cpu], &here);
    pthread_setaffinity_np(pthread_self(), sizeof here, &here);
    pthread_setname_np(pthread_self(), ("k42-fault-" + std::to_string(cpus_[cpu])).c_str());

    epoll_event events[kBatch];
    bool watching = false;  // some threads may have to get their masks back
    while (!stopping_.load(std::memory_order_relaxed)) {
        const int ready = epoll_wait(server.epoll, events, kBatch, watching ? 1 : -1);
        const uint64_t now = now_ns();
        for (int i = 0; i < ready; ++i) {
            if (!events[i].data.ptr) continue;
            std::lock_guard guard(server.clients_lock);
            // Removed between the wait and here? Then the pointer is stale: compare, never follow.
            auto found = std::find_if(server.clients.begin(), server.clients.end(),
                                      [&](const auto& c) { return c.get() == events[i].data.ptr; });
            if (found != server.clients.end()) read_faults(cpu, server, **found, now);
        }
        if (watching || ready > 0) {
            watching = server.affinity.release_idle(now);
            server.kept.store(server.affinity.kept(), std::memory_order_relaxed);
        }
    }
}

void Engine::read_faults(int cpu, Server& server, Client& client, uint64_t now) {
    uffd_msg messages[kBatch];
    const ssize_t count = read_messages(client.uffd, messages, kBatch);
    if (count <= 0) {
        // EAGAIN: the fault went away (a signal, or another's CONTINUE). Anything else: the client is gone; stop
        // polling it, its connection's end removes it.
        if (count == 0 || (errno != EAGAIN && errno != EINTR)) {
            epoll_ctl(server.epoll, EPOLL_CTL_DEL, client.uffd, nullptr);
        }
        return;
    }
    runtime::Processor& processor = runtime::current();
    runtime::enter(processor);
    uint64_t faults = 0, finished = 0, reading = 0, local = 0, remote = 0, rehomed = 0;
    for (ssize_t i = 0; i < count; ++i) {
        if (messages[i].event == UFFD_EVENT_FORK)
            close(int(messages[i].arg.fork.ufd));  // asked for by no client of ours
        if (messages[i].event != UFFD_EVENT_PAGEFAULT) continue;
        ++faults;
        const auto& fault = messages[i].arg.pagefault;
        const uint64_t address = fault.address & ~(kPageSize - 1);
        const Window* const window = client.hat->window(cpu, address);
        const bool follows = client.homing && window && window->spans;
        int place = -1;
        if (client.sticky || client.homing) {
            const Hold hold = !client.sticky ? Hold::nowhere : follows ? Hold::anywhere : Hold::here;
            place = server.affinity.fault(client.pid, pid_t(fault.feat.ptid), hold, now);
        }
        local += place == cpu;
        remote += place >= 0 && place != cpu;
        const bool guarded = fault.flags & UFFD_PAGEFAULT_FLAG_WP;
        const bool write = guarded || (fault.flags & UFFD_PAGEFAULT_FLAG_WRITE);
        const FaultAt at{client.hat, cpu, address, write, guarded};
        std::optional<uint64_t> canonical;
        if (window) canonical = window->canonical + (address - window->base);
        ReadJob job;
        const bool done = handle(at, canonical, &job);
        if (job.cache) {
            ++reading;  // the reader counts what becomes of it
            server.reader.submit(job);
        }
        if (window) {
            // The thread goes on meanwhile: it faults again if its span moves under it.
            rehomed += client.hat->follow(*window, cpu, at.address, client.homing ? place : -1, now);
        }
        finished += done && !job.cache;
        if (!done) hand_up(server, at, canonical.value_or(0));
    }
    // Written by this thread alone: no read-modify-write is needed.
    auto add = [](std::atomic<uint64_t>& counter, uint64_t n) {
        counter.store(counter.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
    };
    add(server.faults, faults);
    add(server.finished, finished);
    add(server.handed_up, faults - finished - reading);
    add(server.local, local);
    add(server.remote, remote);
    add(server.rehomed, rehomed);
    // Server threads call no Clustered Object, so no deferred destruction waits for them.
    (void)runtime::leave(processor);
}

bool Engine::handle(FaultAt fault) { return handle(fault, fault.hat->canonical(fault.cpu, fault.address)); }

void Engine::hand_up(Server& server, const FaultAt& fault, uint64_t canonical) {
    fault.hat->retain();
    std::lock_guard guard(server.queue_lock);
    server.queue.push_back({fault.hat, fault.cpu, fault.address, canonical, fault.write});
    server.queue_filled.notify_one();
}

bool Engine::handle(FaultAt fault, std::optional<uint64_t> canonical, ReadJob* job) {
    const auto entry = canonical ? fault.hat->regions().lookup(*canonical) : std::nullopt;
    if (!entry) {
        fault.hat->fail(fault.cpu, fault.address, kPageSize, "no region is mapped at this address any more");
        return true;
    }
    Region& region = *entry->value;
    switch (region.gate.try_enter()) {
        case RegionGate::Entry::entered:
            break;
        case RegionGate::Entry::stopped:
            return false;
        case RegionGate::Entry::rejected:
            fault.hat->fail(fault.cpu, fault.address, kPageSize, "its region was being unmapped");
            return true;
    }
    const uint64_t page = region.page_at(*canonical);
    const Region::Group group = region.group_of(page);
    fault.tracked = region.tracked.load(std::memory_order_relaxed);
    FileCache& cache = *region.cache;
    const FileCache::Run around = cache.widened(fault.cpu, page, region);
    const auto resolve = [&] { return cache.resolve(fault, page, {group.first, group.count}, around); };
    Outcome outcome = resolve();
    if (outcome == Outcome::absent && job && cache.source() && group.count <= Source::kMostPages) {
        if (const FileCache::Run run = cache.begin_read(page, {group.first, group.count}, *fault.hat); run.count) {
            fault.hat->retain();
            *job = {&cache, fault, *canonical, page, run};
            outcome = Outcome::queued;  // for the end of its own read
        } else {
            outcome = resolve();  // another fault was faster
        }
    }
    region.gate.leave();
    return outcome != Outcome::absent && outcome != Outcome::no_frame && outcome != Outcome::shared;
}

std::optional<HandedUp> Engine::next(int cpu) {
    Server& server = *servers_[cpu];
    for (;;) {
        std::unique_lock guard(server.queue_lock);
        server.queue_filled.wait(guard, [&] { return server.stopped || !server.queue.empty(); });
        if (server.stopped) return std::nullopt;
        HandedUp fault = server.queue.front();
        server.queue.pop_front();
        guard.unlock();
        // While it was in the queue another fault may have brought its page in and its window gone: another file may be
        // at this address now, whose pages are not to be mapped, nor failed, for this one.
        if (fault.hat->canonical(fault.cpu, fault.address) == fault.canonical) return fault;
        fault.hat->wake(fault.cpu, fault.address, kPageSize);
        fault.hat->release();
    }
}

Engine::Counts Engine::counts() const {
    Counts total{};
    for (const auto& server : servers_) {
        total.faults += server->faults.load(std::memory_order_relaxed);
        const uint64_t read = server->reader.finished();
        total.finished += server->finished.load(std::memory_order_relaxed) + read;
        total.read += read;
        total.handed_up += server->handed_up.load(std::memory_order_relaxed) + server->reader.given_up();
        total.kept += server->kept.load(std::memory_order_relaxed);
        total.local += server->local.load(std::memory_order_relaxed);
        total.remote += server->remote.load(std::memory_order_relaxed);
        total.rehomed += server->rehomed.load(std::memory_order_relaxed);
    }
    return total;
}

}  // namespace k42::vm
