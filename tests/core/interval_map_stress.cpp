// The interval maps alone, against a model and under contention: meant for ThreadSanitizer and AddressSanitizer. Takes
// a seed.
#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>

#include "check.hpp"
#include "runtime/processor.hpp"
#include "runtime/retire.hpp"
#include "structures/interval_map.hpp"

using namespace k42;
using namespace k42::testing;

namespace {

// Who looks up: all in the same map, or each in a replica.
template <class Map>
auto& joined(Map& map) {
    if constexpr (requires { map.join(); }) {
        return map.join();
    } else {
        return map;
    }
}

// One thread that looks up on behalf of several processors.
template <template <class...> class Map>
void against_model() {
    Random random(seed());
    Map<uint64_t> map;
    using Interval = k42::Interval<uint64_t>;
    std::map<uint64_t, Interval> model;
    std::vector<decltype(&joined(map))> users;
    for (int i = 0; i < 3; ++i) users.push_back(&joined(map));
    constexpr uint64_t kSpace = 400;
    for (int i = 0; i < 60'000; ++i) {
        const uint64_t start = random.below(kSpace);
        switch (random.below(5)) {
            case 0:
            case 1: {
                const uint64_t end = start + random.below(12);  // empty ranges too
                const Interval* first = nullptr;
                for (const auto& [s, known] : model) {
                    if (!first && start < known.end && s < end) first = &known;
                }
                Interval overlapped{};
                CHECK_EQUAL(map.insert(start, end, i, &overlapped), start < end && !first);
                if (start >= end) break;
                if (first) {
                    CHECK(overlapped == *first);
                } else {
                    model[start] = {start, end, uint64_t(i)};
                }
                break;
            }
            case 2: {
                const auto removed = map.remove(start);
                const auto known = model.find(start);
                CHECK_EQUAL(removed.has_value(), known != model.end());
                if (known != model.end()) {
                    CHECK_EQUAL(*removed, known->second.value);
                    model.erase(known);
                }
                break;
            }
            default: {
                const auto found = users[random.below(users.size())]->lookup(start);
                auto known = model.upper_bound(start);
                const bool inside = known != model.begin() && std::prev(known)->second.end > start;
                CHECK_EQUAL(found.has_value(), inside);
                if (inside) CHECK(*found == std::prev(known)->second);
            }
        }
        CHECK_EQUAL(map.size(), model.size());
        if constexpr (requires { users[0]->copies(); }) {  // memory: at most half of the copies are dead, and a few
            for (auto* user : users) CHECK(user->copies() <= 2 * kSpace + 64);
        }
    }
    auto known = model.begin();
    for (const Interval& interval : map.snapshot()) CHECK(interval == (known++)->second);
    CHECK(known == model.end());
}

template <template <class...> class Map>
void at_the_edges() {
    constexpr uint64_t kTop = std::numeric_limits<uint64_t>::max();
    Map<int> map;
    auto& user = joined(map);
    CHECK(!user.lookup(0) && !map.remove(0));
    CHECK(!map.insert(5, 5, 0) && !map.insert(6, 5, 0));
    CHECK(map.insert(0, 1, 1) && map.insert(kTop - 1, kTop, 2) && map.insert(1, kTop - 1, 3));
    CHECK(!map.insert(0, kTop, 4) && !map.insert(7, 8, 4));
    CHECK(user.lookup(0)->value == 1 && user.lookup(1)->value == 3 && user.lookup(kTop - 1)->value == 2);
    CHECK(!user.lookup(kTop));
    CHECK(!map.remove(2) && map.remove(1) == 3 && !user.lookup(5) && map.size() == 2);
}

// Whoever inserts a range owns its keys: a plain owner a key tells when two do.
template <template <class...> class Map>
void insertion_excludes() {
    constexpr uint64_t kSpace = 64;
    Map<int> map;
    std::vector<int> owner(kSpace, -1);
    std::atomic<int> inserted{0};
    in_threads(6, [&](int who) {
        Random random(seed() + who);
        auto& user = joined(map);
        for (int i = 0; i < 5'000; ++i) {
            const uint64_t start = random.below(kSpace);
            const uint64_t end = std::min(kSpace, start + 1 + random.below(6));
            if (who >= 4) {
                if (const auto found = user.lookup(start)) {
                    CHECK(found->start <= start && start < found->end && found->value < 4);
                }
                continue;
            }
            if (!map.insert(start, end, who)) continue;
            inserted.fetch_add(1, std::memory_order_relaxed);
            for (uint64_t k = start; k < end; ++k) {
                CHECK_EQUAL(owner[k], -1);
                owner[k] = who;
            }
            random.maybe_yield(4);
            CHECK(user.lookup(end - 1)->value == who);
            CHECK(!map.insert(start, end, who));
            for (uint64_t k = start; k < end; ++k) {
                CHECK_EQUAL(owner[k], who);
                owner[k] = -1;
            }
            CHECK(map.remove(start) == who);
            CHECK(!user.lookup(start) || user.lookup(start)->value != who);
        }
    });
    CHECK_EQUAL(map.size(), size_t{0});
    CHECK(inserted > 1'000);
}

// No look-up that begins after a removal has returned finds what was removed, on any processor; what one that began
// before has found stays readable to the end of its request. `gone` is raised when a removal has returned.
template <template <class...> class Map>
void removal_is_seen() {
    struct Box {
        explicit Box(uint64_t n) : number(n) {}
        ~Box() { number = UINT64_MAX; }
        uint64_t number;
    };
    constexpr uint64_t kSlots = 8;
    constexpr int kWriters = 2, kReaders = 3;
    constexpr uint64_t kRounds = kThreadSanitizer ? 2'500 : 8'000;
    Map<Box*> map;
    std::atomic<uint64_t> gone[kSlots] = {};  // boxes of a slot with smaller numbers have been removed
    std::atomic<int> left{kWriters};
    std::atomic<uint64_t> hits{0};
    in_threads(kWriters + kReaders, [&](int who) {
        runtime::Processor& here = runtime::current();
        Random random(seed() + who);
        auto& user = joined(map);
        if (who < kWriters) {
            for (uint64_t i = 1; i <= kRounds; ++i) {
                const uint64_t slot = who + kWriters * random.below(kSlots / kWriters);
                // Ranges of any size within the slot, so that old copies are overlapped in many ways.
                const uint64_t start = slot * 16 + random.below(15),
                               end = start + 1 + random.below(slot * 16 + 16 - start);
                auto* box = new Box(i);
                CHECK(map.insert(start, end, box));
                random.maybe_yield(2);
                CHECK(map.remove(start) == box);
                gone[slot].store(i + 1);
                runtime::retire(box);
            }
            left.fetch_sub(1);
            while (runtime::retired()) {
                runtime::flush();
                std::this_thread::yield();
            }
            return;
        }
        uint64_t mine = 0;
        while (left.load()) {
            const uint64_t slot = random.below(kSlots), key = slot * 16 + random.below(16);
            runtime::enter(here);
            const uint64_t least = gone[slot].load();
            if (const auto found = user.lookup(key)) {
                ++mine;
                CHECK(found->start <= key && key < found->end);
                CHECK(found->value->number >= least);
                random.maybe_yield(16);
                CHECK(found->value->number >= least && found->value->number <= kRounds);
            }
            (void)runtime::leave(here);
        }
        hits += mine;
    });
    CHECK_EQUAL(map.size(), size_t{0});
    CHECK(hits > 0);
}

// A replica holds copies of what lives, and not for ever of what is gone.
void replicas_stay_small() {
    begin("replicas_stay_small");
    ReplicatedIntervalMap<int> map;
    auto& reader = map.join();
    for (uint64_t i = 0; i < 20'000; ++i) {
        const uint64_t start = i * 10;  // never the same again
        CHECK(map.insert(start, start + 10, 1) && reader.lookup(start + 5) && map.remove(start) == 1);
        CHECK(reader.copies() <= 40);
    }
    for (uint64_t i = 0; i < 1'000; ++i) CHECK(map.insert(i * 10, i * 10 + 10, 2) && reader.lookup(i * 10 + 9));
    CHECK(reader.copies() >= 1'000 && reader.copies() <= 2'040);
}

template <template <class...> class Map>
void all(const char* name) {
    std::printf("%s\n", name);
    begin("against_model");
    against_model<Map>();
    begin("at_the_edges");
    at_the_edges<Map>();
    begin("insertion_excludes");
    insertion_excludes<Map>();
    begin("removal_is_seen");
    removal_is_seen<Map>();
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    replicas_stay_small();
    all<SharedIntervalMap>("shared");
    all<ReplicatedIntervalMap>("replicated");
    std::puts("ok");
}
