#include "runtime/quiescence.hpp"

#include <chrono>
#include <thread>

namespace k42::runtime {

Mark Mark::take() {
    Mark mark;
    fence_heavy();  // what the caller made unreachable before requests are looked at: pairs with `enter`
    for (std::uint32_t id = 0, n = processor_count(); id < n; ++id) {
        Processor& p = processor(id);
        std::uint64_t requests = p.requests.load(std::memory_order_acquire);
        if (requests & 1) mark.waiting_.emplace_back(&p, requests);
    }
    return mark;
}

Mark Mark::take(const Processor& p) {
    Mark mark;
    std::uint64_t requests = p.requests.load(std::memory_order_relaxed);
    if (requests & 1) mark.waiting_.emplace_back(const_cast<Processor*>(&p), requests);
    return mark;
}

Mark Mark::take_of_others() {
    Mark mark = take();
    std::erase_if(mark.waiting_, [](auto& w) { return w.first == current_or_null(); });
    return mark;
}

bool Mark::elapsed() {
    // Acquire: what those requests did happens before what the caller frees.
    std::erase_if(waiting_, [](auto& w) { return w.first->requests.load(std::memory_order_acquire) != w.second; });
    return waiting_.empty();
}

void Mark::watch() {
    for (auto& [p, requests] : waiting_) p->watched.store(true, std::memory_order_relaxed);
}

void synchronize() {
    Mark mark = Mark::take_of_others();
    // Requests are short; those that are not leave the CPU to others.
    for (int turn = 0; !mark.elapsed(); ++turn) {
        if (turn < 16) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }
}

}  // namespace k42::runtime
