#include "runtime/retire.hpp"

#include <deque>
#include <utility>
#include <vector>

#include "runtime/processor.hpp"
#include "runtime/quiescence.hpp"

namespace k42::runtime {

// What one processor has retired; only its owner touches it.
struct Limbo {
    using Retired = std::pair<void*, void (*)(void*)>;
    struct Batch {
        Mark mark;
        std::vector<Retired> items;
    };

    std::vector<Retired> young;  // under no mark yet
    std::deque<Batch> batches;   // oldest first
    bool releasing = false;      // a release may retire: that only adds

    void stamp() {
        if (young.empty()) return;
        batches.push_back({Mark::take(), std::exchange(young, {})});
    }

    void release() {
        if (releasing) return;
        releasing = true;
        while (!batches.empty() && batches.front().mark.elapsed()) {
            const std::vector<Retired> items = std::move(batches.front().items);
            batches.pop_front();
            for (auto [object, release] : items) release(object);
        }
        releasing = false;
    }
};

namespace {

constexpr std::size_t together = 64;  // a heavy fence costs a microsecond or more: 20 ns for each

Limbo& limbo() {
    Processor& p = current();
    if (!p.limbo) p.limbo = new Limbo();
    return *p.limbo;
}

}  // namespace

void retire(void* object, void (*release)(void*)) {
    Limbo& l = limbo();
    l.young.emplace_back(object, release);
    if (l.young.size() < together) return;
    l.stamp();
    l.release();
}

void flush() {
    Limbo& l = limbo();
    l.stamp();
    l.release();
}

std::size_t retired() {
    const Limbo& l = limbo();
    std::size_t count = l.young.size();
    for (const Limbo::Batch& batch : l.batches) count += batch.items.size();
    return count;
}

}  // namespace k42::runtime
