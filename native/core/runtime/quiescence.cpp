#include "runtime/quiescence.hpp"

#include <algorithm>
#include <chrono>
#include <thread>

namespace k42::runtime {

namespace {

void note(std::vector<std::pair<Processor*, std::uint64_t>>& waiting, Processor& p) {
    const std::uint64_t requests = p.requests.load(std::memory_order_acquire);
    if (requests & 1) waiting.emplace_back(&p, requests);
}

}  // namespace

Mark Mark::take() {
    Mark mark;
    fence_heavy();  // what the caller made unreachable before requests are looked at: pairs with `enter`
    for (std::uint32_t id = 0, n = processor_count(); id < n; ++id) note(mark.waiting_, processor(id));
    return mark;
}

Mark Mark::take(const std::vector<Processor*>& processors) {
    Mark mark;
    // Our own request needs no fence: we are in it.
    const bool alone =
        std::all_of(processors.begin(), processors.end(), [](auto* p) { return p == current_or_null(); });
    if (!alone) fence_heavy();
    for (Processor* p : processors) note(mark.waiting_, *p);
    return mark;
}

void Mark::forget(const Processor& p) {
    std::erase_if(waiting_, [&](auto& w) { return w.first == &p; });
}

bool Mark::includes(const Processor& p) const {
    const std::uint64_t requests = p.requests.load(std::memory_order_relaxed);
    return std::any_of(waiting_.begin(), waiting_.end(),
                       [&](auto& w) { return w.first == &p && w.second == requests; });
}

bool Mark::waits_for_a_switch() const {
    return std::any_of(waiting_.begin(), waiting_.end(),
                       [](auto& w) { return w.first->waits_for_switch_of.load(std::memory_order_relaxed) != 0; });
}

bool Mark::elapsed() {
    // Acquire: what those requests did happens before what the caller frees.
    std::erase_if(waiting_, [](auto& w) { return w.first->requests.load(std::memory_order_acquire) != w.second; });
    return waiting_.empty();
}

void Mark::watch() {
    for (auto& [p, requests] : waiting_) p->watched.store(true, std::memory_order_relaxed);
}

static void wait_for(Mark mark) {
    if (Processor* p = current_or_null()) mark.forget(*p);
    // Requests are short; those that are not leave the CPU to others.
    for (int turn = 0; !mark.elapsed(); ++turn) {
        if (turn < 16) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }
}

void synchronize() { wait_for(Mark::take()); }

void synchronize(const std::vector<Processor*>& processors) { wait_for(Mark::take(processors)); }

}  // namespace k42::runtime
