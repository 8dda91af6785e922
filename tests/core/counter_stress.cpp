// The counters alone, against a model and under contention: meant for ThreadSanitizer and AddressSanitizer.
// Takes a seed.
#include <limits>
#include <map>
#include <mutex>
#include <optional>

#include "check.hpp"
#include "runtime/processor.hpp"
#include "structures/counter.hpp"

using namespace k42;
using namespace k42::testing;

namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
__extension__ using Wide = __int128;

bool fits(Wide n) { return kLeast <= n && n <= kMost; }

// A number of any size, often at an edge.
int64_t any(Random& random) {
    switch (random.below(4)) {
        case 0:
            return kMost - int64_t(random.below(3));
        case 1:
            return kLeast + int64_t(random.below(3));
        case 2:
            return int64_t(random.below(9)) - 4;
        default:
            return int64_t(random.next());
    }
}

// What a processor adds to.
template <typename Count>
auto& joined(Count& count) {
    if constexpr (requires { count.join(); }) {
        return count.join();
    } else {
        return count;
    }
}

template <typename Count>
int64_t sure(const Count& count) {
    const std::optional<int64_t> value = count.value();
    CHECK(value.has_value());
    return *value;
}

// One thread: what is added, refused, and read.

template <typename Count>
void whole_against_model(const char* name) {
    begin(name);
    Random random(seed());
    for (int i = 0; i < 300; ++i) {
        const int64_t start = any(random);
        Count count(start);
        Wide model = start;
        for (int j = 0; j < 100; ++j) {
            const int64_t k = any(random);
            CHECK_EQUAL(count.add(k), fits(model + k));
            if (fits(model + k)) model += k;
            CHECK_EQUAL(count.value(), int64_t(model));
            CHECK_EQUAL(count.approximate(), int64_t(model));
        }
    }
}

template <typename Count>
void parts_against_model(const char* name) {
    begin(name);
    Random random(seed());
    for (int i = 0; i < 100; ++i) {
        const int64_t start = any(random);
        Count count(start);
        std::vector<std::pair<typename Count::Part*, Wide>> parts;
        for (int j = 0; j < 300; ++j) {
            if (parts.empty() || random.one_in(4)) parts.emplace_back(&count.join(), 0);
            auto& [part, model] = parts[random.below(parts.size())];
            const int64_t k = any(random);
            CHECK_EQUAL(part->add(k), fits(model + k));
            if (fits(model + k)) model += k;
            Wide sum = start;
            for (auto& each : parts) sum += each.second;
            const auto value = count.value();
            CHECK_EQUAL(value.has_value(), fits(sum));
            if (value) CHECK_EQUAL(*value, int64_t(sum));
            CHECK(count.approximate() == value);
        }
    }
}

// Many threads: nothing is lost, and what is read is between what was done and what was begun, and never less than
// what was read before.

template <typename Count>
void readers_and_adders(const char* name) {
    begin(name);
    constexpr int kAdders = 4, kReaders = 2;
    constexpr int64_t kAdds = kThreadSanitizer ? 20'000 : 100'000;
    Count count(7);
    std::atomic<int64_t> begun{7}, done{7};
    std::atomic<int> left{kAdders};
    in_threads(kAdders + kReaders, [&](int i) {
        if (i < kAdders) {
            auto& mine = joined(count);  // while others gather
            Random random(seed() + uint64_t(i));
            for (int64_t j = 0; j < kAdds; ++j) {
                const int64_t k = int64_t(random.below(3));
                begun.fetch_add(k);
                CHECK(mine.add(k));
                done.fetch_add(k);
            }
            left.fetch_sub(1);
            return;
        }
        int64_t last = 7;
        while (left.load()) {
            const int64_t least = done.load();
            const int64_t value = i % 2 ? sure(count) : *std::optional<int64_t>(count.approximate());
            CHECK(least <= value && last <= value && value <= begun.load());
            last = value;
        }
    });
    CHECK_EQUAL(sure(count), begun.load());
}

// Whoever sees an add sees what came before it: plain data, which ThreadSanitizer watches.
template <typename Count>
void an_add_publishes(const char* name) {
    begin(name);
    for (int round = 0; round < 500; ++round) {
        Count count(0);
        int data = 0;
        in_threads(2, [&](int i) {
            if (i == 0) {
                auto& mine = joined(count);
                data = round;
                CHECK(mine.add(1));
            } else {
                while (sure(count) == 0) std::this_thread::yield();
                CHECK_EQUAL(data, round);
            }
        });
    }
}

// Threads come and go; their processors go on with the parts that they find.
template <typename Count>
void parts_outlive_threads(const char* name) {
    begin(name);
    constexpr int kWaves = 60, kWidth = 6, kAdds = 300;
    Count count(0);
    std::mutex lock;  // protects parts
    std::map<uint32_t, typename Count::Part*> parts;
    for (int wave = 0; wave < kWaves; ++wave) {
        in_threads(kWidth, [&](int) {
            const uint32_t id = runtime::current().id;
            typename Count::Part* mine;
            {
                std::lock_guard guard(lock);
                auto& entry = parts[id];
                if (!entry) entry = &count.join();
                mine = entry;
            }
            for (int i = 0; i < kAdds; ++i) CHECK(mine->add(1));
        });
        CHECK_EQUAL(sure(count), int64_t(wave + 1) * kWidth * kAdds);
    }
    CHECK(parts.size() <= runtime::processor_count());
}

// Where neighbours lie: packed ones share a line, padded ones not even a pair of lines.
void layout() {
    begin("layout");
    PackedCount packed_count(0);
    PaddedCount padded_count(0);
    for (int i = 0; i < 4; ++i) {
        const auto* first = reinterpret_cast<const char*>(&packed_count.join());
        const auto* second = reinterpret_cast<const char*>(&packed_count.join());
        CHECK_EQUAL(second - first, 8);
        CHECK_EQUAL(reinterpret_cast<uintptr_t>(first) / 64, reinterpret_cast<uintptr_t>(second) / 64);
        CHECK_EQUAL(reinterpret_cast<uintptr_t>(&padded_count.join()) % runtime::apart, 0u);
        CHECK_EQUAL(sizeof(PaddedPart), runtime::apart);
    }
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    layout();
    whole_against_model<SharedCount>("shared_against_model");
    whole_against_model<AtomicCount>("atomic_against_model");
    parts_against_model<PackedCount>("packed_against_model");
    parts_against_model<PaddedCount>("padded_against_model");
    readers_and_adders<SharedCount>("shared_readers_and_adders");
    readers_and_adders<AtomicCount>("atomic_readers_and_adders");
    readers_and_adders<PackedCount>("packed_readers_and_adders");
    readers_and_adders<PaddedCount>("padded_readers_and_adders");
    an_add_publishes<SharedCount>("shared_add_publishes");
    an_add_publishes<AtomicCount>("atomic_add_publishes");
    an_add_publishes<PackedCount>("packed_add_publishes");
    an_add_publishes<PaddedCount>("padded_add_publishes");
    parts_outlive_threads<PackedCount>("packed_parts_outlive_threads");
    parts_outlive_threads<PaddedCount>("padded_parts_outlive_threads");
    return 0;
}
