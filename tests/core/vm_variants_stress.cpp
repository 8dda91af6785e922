// The native halves of Process and Region, shared and distributed, and changed from one to the other while they are
// used. Meant for ThreadSanitizer and AddressSanitizer; asserts what happened, never how fast. Takes a seed.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "check.hpp"
#include "runtime/quiescence.hpp"
#include "vm/region_gate.hpp"
#include "vm/region_map.hpp"

using namespace k42;
using namespace k42::vm;
using namespace k42::testing;

namespace k42::vm {
// The map looks at no region: here one is a number that says where it is, and whether it may still be seen.
struct Region {
    uint64_t start;
    bool alive = true;  // plain: ThreadSanitizer sees a look-up that comes too late
};
}  // namespace k42::vm

namespace {

// Against a model, by one thread, with changes of the implementation at any point.
void map_against_model() {
    begin("map_against_model");
    Random random(seed());
    for (int round = 0; round < 20; ++round) {
        RegionMap map(round % 2);
        std::map<uint64_t, std::pair<uint64_t, Region*>> model;
        std::vector<std::unique_ptr<Region>> regions;
        for (int i = 0; i < 3'000; ++i) {
            const uint64_t start = random.below(200);
            switch (random.below(8)) {
                case 0: {
                    const uint64_t end = start + random.below(20);
                    const bool fits = end > start && std::none_of(model.begin(), model.end(), [&](const auto& entry) {
                                          return entry.first < end && start < entry.second.first;
                                      });
                    regions.push_back(std::make_unique<Region>(Region{start}));
                    CHECK_EQUAL(map.insert(start, end, regions.back().get()), fits);
                    if (fits) model[start] = {end, regions.back().get()};
                    break;
                }
                case 1:
                    CHECK_EQUAL(map.remove(start).has_value(), model.erase(start) == 1);
                    break;
                case 2:
                    if (random.one_in(8)) map.replicate(random.one_in(2));
                    break;
                default: {
                    const auto found = map.lookup(start);
                    auto entry = model.upper_bound(start);
                    const bool is = entry != model.begin() && start < std::prev(entry)->second.first;
                    CHECK_EQUAL(found.has_value(), is);
                    if (is) CHECK(found->value == std::prev(entry)->second.second && found->start <= start);
                }
            }
            CHECK_EQUAL(map.size(), model.size());
        }
        CHECK_EQUAL(map.snapshot().size(), model.size());
    }
}

// Regions that stay are always found, those that were removed never, and none is used after the requests that could
// have found it.
void map_changes_under_load() {
    begin("map_changes_under_load");
    constexpr int kReaders = 3, kRegions = 16;
    RegionMap map;
    std::vector<Region> stay(kRegions);
    for (uint64_t i = 0; i < kRegions; ++i) {
        stay[i].start = i * 100;
        CHECK(map.insert(i * 100, i * 100 + 50, &stay[i]));
    }
    std::atomic<bool> stop{false};
    std::atomic<uint64_t> looked{0}, went{0};
    std::atomic<int> changes{0};
    in_threads(kReaders + 2, [&](int who) {
        Random random(seed() + uint64_t(who));
        if (who == 0) {  // changes the implementation
            for (int i = 0; i < 600; ++i) {
                map.replicate(i % 2);
                changes.fetch_add(1);
                random.maybe_yield(2);
            }
            while (looked.load() < 20'000 || went.load() < 300) std::this_thread::yield();
            stop.store(true);
        } else if (who == 1) {  // regions that come and go between the others
            while (!stop.load()) {
                const uint64_t start = random.below(kRegions) * 100 + 50;
                auto region = std::make_unique<Region>(Region{start});
                CHECK(map.insert(start, start + 50, region.get()));
                CHECK(map.lookup(start + 7)->value == region.get());
                random.maybe_yield(2);
                CHECK(map.remove(start) == region.get());
                CHECK(!map.lookup(start + 7));
                runtime::synchronize();
                region->alive = false;
                went.fetch_add(1);
            }
        } else {
            while (!stop.load()) {
                const runtime::Within within;  // as a fault: what it found stays
                const uint64_t address = random.below(kRegions * 100);
                const auto found = map.lookup(address);
                if (address % 100 < 50) {
                    CHECK(found && found->value == &stay[address / 100]);
                } else if (found) {
                    CHECK(found->value->alive && found->start == found->value->start && found->start <= address);
                }
                looked.fetch_add(1, std::memory_order_relaxed);
                random.maybe_yield(64);
            }
        }
    });
    std::printf("  %llu look-ups, %d changes, %llu regions\n", static_cast<unsigned long long>(looked.load()),
                changes.load(), static_cast<unsigned long long>(went.load()));
    runtime::flush();
}

// Whoever stops the gate is alone, whatever it is made of meanwhile; everybody gets in between.
void gate_changes_under_load(bool changing) {
    begin("gate_changes_under_load");
    constexpr int kRequests = 3, kStoppers = 2;
    RegionGate gate(!changing);
    std::atomic<bool> stop{false};
    long plain = 0;  // changed by who is alone, read by who is inside
    std::atomic<uint64_t> entered{0}, held_up{0};
    std::atomic<int> stops{0};
    in_threads(kRequests + kStoppers + 1, [&](int who) {
        Random random(seed() + uint64_t(who));
        if (who < kRequests) {
            long seen = 0;
            while (!stop.load()) {
                const auto entry = gate.try_enter();
                CHECK(entry != RegionGate::Entry::rejected);
                if (entry == RegionGate::Entry::stopped) {
                    held_up.fetch_add(1);
                    CHECK(gate.enter());
                }
                CHECK(gate.inside() > 0 && plain >= seen);
                seen = plain;
                random.maybe_yield(16);
                CHECK(gate.leave());
                entered.fetch_add(1);
                random.maybe_yield(32);
            }
        } else if (who < kRequests + kStoppers) {
            for (int i = 0; i < 400; ++i) {
                CHECK(gate.stop() == RegionGate::Stop::stopped);
                ++plain;
                CHECK_EQUAL(gate.inside(), 0u);
                random.maybe_yield(2);
                CHECK(gate.restart());
                random.maybe_yield(2);
            }
            if (stops.fetch_add(1) + 1 == kStoppers + 1) stop.store(true);
        } else {
            for (int i = 0; i < 300; ++i) {
                if (changing) gate.distribute(i % 2);
                random.maybe_yield(2);
            }
            if (stops.fetch_add(1) + 1 == kStoppers + 1) stop.store(true);
        }
    });
    CHECK(!gate.restart() && !gate.leave());
    CHECK_EQUAL(plain, 400L * kStoppers);
    std::printf("  %llu entered, %llu held up\n", static_cast<unsigned long long>(entered.load()),
                static_cast<unsigned long long>(held_up.load()));
    runtime::flush();
}

// After a shutdown has returned nobody is inside and nobody gets in, also when the gate is changed at that moment.
void gate_shutdown_races_change() {
    begin("gate_shutdown_races_change");
    for (int round = 0; round < 300; ++round) {
        RegionGate gate(round % 2);
        bool shut = false;  // plain: who is inside after it is a race
        std::atomic<uint64_t> inside{0};
        in_threads(4, [&](int who) {
            Random random(seed() + uint64_t(round * 8 + who));
            if (who == 0) {
                for (int i = 0; i < 3; ++i) gate.distribute((round + i) % 2 == 0);
            } else if (who == 1) {
                random.maybe_yield(2);
                gate.shutdown();
                shut = true;
                CHECK(gate.inside() == 0 && gate.try_enter() == RegionGate::Entry::rejected && !gate.enter());
                CHECK(gate.stop() == RegionGate::Stop::rejected);
            } else {
                while (gate.enter()) {
                    CHECK(!shut);
                    inside.fetch_add(1);
                    random.maybe_yield(4);
                    CHECK(gate.leave());
                }
            }
        });
        CHECK(gate.try_enter() == RegionGate::Entry::rejected);
        gate.distribute(true);  // stays shut
        gate.distribute(false);
        CHECK(gate.try_enter() == RegionGate::Entry::rejected && !gate.restart());
    }
    runtime::flush();
}

// A processor that comes first while the gate is stopped finds it stopped.
void gate_newcomer_at_a_stop() {
    begin("gate_newcomer_at_a_stop");
    RegionGate gate(true);
    CHECK(gate.try_enter() == RegionGate::Entry::entered && gate.leave());
    CHECK(gate.stop() == RegionGate::Stop::stopped);
    in_threads(3, [&](int) { CHECK(gate.try_enter() == RegionGate::Entry::stopped && !gate.leave()); });
    CHECK(gate.restart());
    in_threads(3, [&](int) { CHECK(gate.try_enter() == RegionGate::Entry::entered && gate.leave()); });
    CHECK(gate.traffic().distributed && gate.traffic().uses.size() >= 2);
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    map_against_model();
    map_changes_under_load();
    gate_changes_under_load(false);
    gate_changes_under_load(true);
    gate_shutdown_races_change();
    gate_newcomer_at_a_stop();
    std::puts("ok");
}
