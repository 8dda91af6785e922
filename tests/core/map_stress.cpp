// The hash table and the map alone, against models and under contention: meant for ThreadSanitizer and
// AddressSanitizer. Keys and values are counted, so what is dropped twice, too early or never shows. Takes a seed.
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <unordered_map>

#include "check.hpp"
#include "runtime/quiescence.hpp"
#include "runtime/retire.hpp"
#include "runtime/translation.hpp"
#include "structures/hash_table.hpp"
#include "structures/map.hpp"

using namespace k42;
using namespace k42::testing;

namespace {

constexpr int kFew = kThreadSanitizer ? 1 : 4;  // how much more is done where it is fast

// HashTable

struct Node {
    Node* next = nullptr;
    size_t hash = 0;
    uint64_t number = 0;
    bool in = false;
};

void table_against_model() {
    begin("table_against_model");
    Random random(seed());
    constexpr size_t kNodes = 3000;
    HashTable<Node, HashOfNode> table;
    std::vector<Node> nodes(kNodes);
    for (size_t i = 0; i < kNodes; ++i) {
        nodes[i].number = i;
        nodes[i].hash = spread(i / 2);  // two of each hash
    }
    size_t in = 0, most = 0;
    const auto find = [&](size_t i) {
        return table.find(nodes[i].hash, [&](const Node& node) { return node.number == i; });
    };
    const auto check_all = [&] {
        size_t seen = 0;
        table.each([&](const Node& node) {
            CHECK(node.in);
            ++seen;
        });
        CHECK_EQUAL(seen, in);
        CHECK_EQUAL(table.size(), in);
        for (size_t i = 0; i < kNodes; ++i) CHECK(find(i) == (nodes[i].in ? &nodes[i] : nullptr));
    };
    CHECK_EQUAL(table.bytes(), size_t{0});
    // The share of insertions goes up and down: the table grows and shrinks through every size, several times.
    for (int step = 0; step < 120'000; ++step) {
        Node& node = nodes[random.below(kNodes)];
        const bool up = step / 15'000 % 2 == 0;
        CHECK(find(node.number) == (node.in ? &node : nullptr));
        if (!node.in && (up || random.one_in(8))) {
            node.in = true;
            table.insert(&node);
            most = std::max(most, ++in);
        } else if (node.in && (!up || random.one_in(8))) {
            node.in = false;
            table.remove(&node);
            --in;
        }
        // Buckets follow the nodes both ways: segments, of which the last may be empty, are at most 4 times the nodes.
        CHECK(table.bytes() <= (4 * in + 32) * sizeof(void*) + 256);
        if (step % 7500 == 0) check_all();
    }
    CHECK(most > kNodes * 3 / 4);
    check_all();
    size_t cursor = 0;  // sweep a half of them
    for (size_t i = 0; i < 2 * kNodes; ++i) {
        for (Node* node = table.sweep(cursor, [](const Node& n) { return n.number % 2 == 0; }); node;) {
            CHECK(node->in && node->number % 2 == 0);
            node->in = false;
            --in;
            node = node->next;
        }
    }
    check_all();
    cursor = 0;
    for (size_t i = in / 2; i > 0; --i) {
        Node* node = table.any(cursor);
        node->in = false;
        table.remove(node);
        --in;
    }
    check_all();
    for (Node* node = table.take_all(); node; node = node->next) {
        node->in = false;
        --in;
    }
    CHECK_EQUAL(in, size_t{0});
    check_all();
    CHECK(table.bytes() == 0 && table.any(cursor) == nullptr);
}

// Map

template <typename T>
struct Counted {
    Counted() { alive.fetch_add(1); }
    ~Counted() { alive.fetch_sub(1); }
    void hold() { CHECK(users.fetch_add(1) > 0); }
    void drop() {
        if (users.fetch_sub(1) == 1) delete static_cast<T*>(this);
    }
    std::atomic<int> users{1};
    static inline std::atomic<long> alive{0};
};

struct Name : Counted<Name> {
    explicit Name(uint64_t n) : number(n) {}
    const uint64_t number;
};

struct Box : Counted<Box> {
    Box(uint64_t n, uint64_t s) : number(n), stamp(s) {}
    ~Box() { stamp = UINT64_MAX; }
    uint64_t number, stamp;  // plain: the sanitizers see who comes too late
};

thread_local Random* chance = nullptr;  // of the thread: whether to ask, where to yield

struct Policy {
    using Key = Name*;
    using Guard = std::lock_guard<std::mutex>;

    bool copying = false;  // values with even stamps are copied
    bool asking = false;   // which key is the same is only found out without locks

    void hold(Name* name) const { name->hold(); }
    void drop(Name* name) const { name->drop(); }
    static Box* box(const void* value) { return static_cast<Box*>(const_cast<void*>(value)); }
    void hold_value(void* value) const { box(value)->hold(); }
    void drop_value(void* value) const { box(value)->drop(); }
    void drop_value_later(void* value) const {
        runtime::retire(value, [](void* v) { box(v)->drop(); });
    }
    bool copies(const void* value) const { return copying && box(value)->stamp % 2 == 0; }
    void* copy(void* value) const {
        if (chance) chance->maybe_yield(16);
        return new Box(box(value)->number, box(value)->stamp);
    }
    bool wait(MakingWait& waiting) const {
        if (waiting.endless()) return false;
        waiting.sleep();
        return true;
    }

    class Probe {
      public:
        explicit Probe(uint64_t number, bool asks = false) : name_(new Name(number)), asks_(asks) {}
        Probe(const Probe&) = delete;
        Probe& operator=(const Probe&) = delete;
        ~Probe() {
            for (auto& [name, same] : asked_) name->drop();
            if (opened_) opened_->drop();
            name_->drop();
        }
        size_t hash() const { return spread(name_->number / 4); }  // keys that share one must be told apart
        Name* key() const { return name_; }
        bool same(Name* name) {
            if (!asks_) return name->number == name_->number;
            for (auto& [other, same] : asked_) {
                if (other == name) return same;
            }
            name->hold();
            opened_ = name;
            return true;
        }
        bool open() const { return opened_ != nullptr; }
        bool settle() {
            if (chance) chance->maybe_yield(8);
            asked_.emplace_back(opened_, opened_->number == name_->number);
            opened_ = nullptr;
            return true;
        }

      private:
        Name* const name_;
        const bool asks_;
        Name* opened_ = nullptr;
        std::vector<std::pair<Name*, bool>> asked_;
    };
};

struct Request {
    runtime::Processor& p = runtime::current();
    Request() { runtime::enter(p); }
    ~Request() {
        if (runtime::leave(p)) runtime::collect();
    }
};

struct Kind {
    const char* name;
    size_t partitions;
    bool local, copying, asking;
};
constexpr Kind kinds[] = {
    {"shared", 1, false, false, false},
    {"partitioned", 8, false, false, true},
    {"replicated", 8, true, false, false},
    {"replicated, asking", 8, true, false, true},
    {"replicated, copying", 8, true, true, false},
    {"one partition, all", 1, true, true, true},
};

// A map with the local tables of its processors; every call is a request.
class TestMap {
  public:
    using Core = Map<Policy>;
    using Status = Core::Status;
    explicit TestMap(const Kind& kind) : kind_(kind), core_(kind.partitions, Policy{kind.copying, kind.asking}) {}
    ~TestMap() { core_.dismantle(); }

    // What a call returned: the stamp of a box that belonged there.
    struct Result {
        Status status;
        uint64_t stamp = 0;
        bool found() const { return status == Status::found; }
    };

    Result get(uint64_t number) {
        Request request;
        Policy::Probe probe = this->probe(number);
        return unboxed(number, core_.get(local(), probe));
    }
    Status set(uint64_t number, uint64_t stamp) {
        Request request;
        Policy::Probe probe = this->probe(number);
        return core_.set(probe, new Box(number, stamp));
    }
    Result set_default(uint64_t number, uint64_t stamp) {
        Request request;
        Policy::Probe probe = this->probe(number);
        Box* box = new Box(number, stamp);
        Result result = unboxed(number, core_.set_default(local(), probe, box));
        box->drop();
        return result;
    }
    Result remove(uint64_t number) {
        Request request;
        Policy::Probe probe = this->probe(number);
        return unboxed(number, core_.remove(probe));
    }
    // The number and stamp of any.
    std::optional<std::pair<uint64_t, uint64_t>> remove_any(size_t start) {
        Request request;
        auto entry = core_.remove_any(start);
        if (!entry) return {};
        Box* box = Policy::box(entry->value);
        CHECK_EQUAL(entry->key->number, box->number);
        std::pair<uint64_t, uint64_t> result{box->number, box->stamp};
        box->drop();
        entry->key->drop();
        return result;
    }
    // One more, in one step; false when there is none.
    bool increment(uint64_t number) {
        Request request;
        for (;;) {
            Policy::Probe probe = this->probe(number);
            const Core::Result before = core_.get(local(), probe);
            if (before.status != Status::found) return false;
            // By identity: only the master's own value will do.
            void* master = nullptr;
            CHECK(core_.gather(probe, [&](void* v, uint32_t p) {
                if (p == Core::nobody) {
                    master = v;
                } else {
                    held_.push_back(v);
                }
            }) != Status::failed);
            drop_held();
            Policy::box(before.value)->drop();
            if (!master) return false;
            Box* after = new Box(number, Policy::box(master)->stamp + 1);
            const Status status = core_.replace(probe, master, after);
            after->drop();
            Policy::box(master)->drop();
            if (status == Status::found) return true;
        }
    }
    template <typename Make>
    Result find_or_make(uint64_t number, Make make) {
        Request request;
        Policy::Probe probe = this->probe(number);
        return unboxed(number, core_.find_or_make(local(), probe, make));
    }
    // All stamps of a key at one moment: the master's first.
    std::vector<uint64_t> gather(uint64_t number) {
        Request request;
        Policy::Probe probe = this->probe(number);
        std::vector<uint64_t> stamps;
        std::vector<void*> values;
        core_.gather(probe, [&](void* v, uint32_t) { values.push_back(v); });
        for (void* v : values) {
            stamps.push_back(Policy::box(v)->stamp);
            Policy::box(v)->drop();
        }
        return stamps;
    }
    void empty() {
        Request request;
        core_.empty();
    }
    std::map<uint64_t, uint64_t> snapshot() {
        Request request;
        std::map<uint64_t, uint64_t> all;
        for (size_t i = 0; i < core_.partitions(); ++i) {
            std::vector<std::pair<Name*, void*>> some;
            core_.snapshot(i, [&](size_t n) { some.reserve(n); }, [&](Name* n, void* v) { some.emplace_back(n, v); });
            for (auto& [n, v] : some) {
                CHECK(all.emplace(n->number, Policy::box(v)->stamp).second);
                n->drop();
                Policy::box(v)->drop();
            }
        }
        return all;
    }
    size_t size() const { return core_.size(); }
    size_t replicas() { return kind_.local ? local()->size() : 0; }

  private:
    Policy::Probe probe(uint64_t number) const { return Policy::Probe(number, kind_.asking); }
    Core::Local* local() {
        if (!kind_.local) return nullptr;
        std::lock_guard guard(lock_);
        Core::Local*& local = locals_[runtime::current().id];
        if (!local) local = &core_.join();
        return local;
    }
    static Result unboxed(uint64_t number, Core::Result result) {
        if (!result.value) return {result.status};
        Box* box = Policy::box(result.value);
        CHECK_EQUAL(box->number, number);
        const Result unboxed{result.status, box->stamp};
        box->drop();
        return unboxed;
    }
    static void drop_held() {
        for (void* v : held_) Policy::box(v)->drop();
        held_.clear();
    }

    static inline thread_local std::vector<void*> held_;
    const Kind kind_;
    Core core_;
    std::mutex lock_;  // protects locals_
    std::unordered_map<uint32_t, Core::Local*> locals_;
};

using Status = TestMap::Status;

// Runs test(map) for each kind; nothing is left of it afterwards.
template <typename Test>
void with_each(const char* name, Test test) {
    for (const Kind& kind : kinds) {
        static char title[128];
        std::snprintf(title, sizeof title, "%s (%s)", name, kind.name);
        begin(title);
        {
            TestMap map(kind);
            test(map);
        }
        while (runtime::retired() != 0) runtime::flush();
        CHECK_EQUAL(Box::alive.load(), 0L);
        CHECK_EQUAL(Name::alive.load(), 0L);
    }
}

// Threads that keep what they retired to themselves would hide it.
template <typename Work>
void in_flushed_threads(int n, Work work) {
    in_threads(n, [&](int i) {
        Random random(seed() + uint64_t(i) * 1000);
        chance = &random;
        work(i, random);
        chance = nullptr;
        while (runtime::retired() != 0) {
            runtime::flush();
            std::this_thread::yield();
        }
    });
}

void map_against_model(TestMap& map) {
    Random random(seed());
    std::map<uint64_t, uint64_t> model;
    for (uint64_t stamp = 1; stamp < 12'000; ++stamp) {
        const uint64_t number = random.below(stamp / 1000 % 2 ? 300 : 40);
        const auto known = model.find(number);
        const bool there = known != model.end();
        switch (random.below(random.one_in(20) ? 9 : 7)) {
            case 0:
                CHECK(map.set(number, stamp) == (there ? Status::found : Status::absent));
                model[number] = stamp;
                break;
            case 1: {
                const auto result = map.remove(number);
                CHECK(result.status == (there ? Status::found : Status::absent));
                if (there) CHECK_EQUAL(result.stamp, known->second);
                model.erase(number);
                break;
            }
            case 2: {
                const auto result = map.set_default(number, stamp);
                CHECK(result.status == (there ? Status::found : Status::made));
                CHECK_EQUAL(result.stamp, model.emplace(number, stamp).first->second);
                break;
            }
            case 3: {
                const bool fails = random.one_in(3);
                const auto result = map.find_or_make(number, [&] { return fails ? nullptr : new Box(number, stamp); });
                CHECK(result.status == (there ? Status::found : fails ? Status::failed : Status::made));
                if (there || !fails) CHECK_EQUAL(result.stamp, model.emplace(number, stamp).first->second);
                break;
            }
            case 4:
                CHECK_EQUAL(map.increment(number), there);
                if (there) ++known->second;
                for (uint64_t each : map.gather(number)) CHECK_EQUAL(each, known->second);
                break;
            case 7:
                CHECK(map.snapshot() == model);
                if (random.one_in(3)) {
                    map.empty();
                    model.clear();
                }
                break;
            case 8:
                if (const auto any = map.remove_any(random.below(8))) {
                    CHECK_EQUAL(model.at(any->first), any->second);
                    model.erase(any->first);
                } else {
                    CHECK(model.empty());
                }
                break;
            default: {
                const auto result = map.get(number);
                CHECK_EQUAL(result.found(), there);
                if (there) CHECK_EQUAL(result.stamp, known->second);
            }
        }
        CHECK_EQUAL(map.size(), model.size());
        CHECK_EQUAL(map.gather(number).empty(), !model.count(number));
    }
}

// All race for one key: one makes it, the others find what it made.
void one_makes(TestMap& map) {
    constexpr int kThreads = 5, kRounds = 150 * kFew;
    std::atomic<int> makes{0}, made{0}, found{0}, failed{0};
    std::barrier round(kThreads);
    in_flushed_threads(kThreads, [&](int who, Random& random) {
        for (uint64_t i = 0; i < kRounds; ++i) {
            round.arrive_and_wait();
            const auto result = map.find_or_make(7, [&]() -> Box* {
                random.maybe_yield(2);
                if (makes.fetch_add(1) == 0 && i % 3 == 0) return nullptr;  // the first one fails
                return new Box(7, 10 * i + uint64_t(who));
            });
            (result.status == Status::made ? made : result.found() ? found : failed).fetch_add(1);
            if (result.status != Status::failed) CHECK_EQUAL(result.stamp / 10, i);
            round.arrive_and_wait();
            if (who != 0) continue;
            CHECK_EQUAL(made.exchange(0), 1);
            CHECK_EQUAL(failed.exchange(0), i % 3 == 0);
            CHECK_EQUAL(found.exchange(0), kThreads - 1 - (i % 3 == 0));
            CHECK_EQUAL(makes.exchange(0), 1 + (i % 3 == 0));
            CHECK_EQUAL(map.size(), size_t{1});
            if (i % 2) {
                map.empty();
            } else {
                CHECK(map.remove(7).found());
            }
            CHECK_EQUAL(map.size(), size_t{0});
        }
    });
}

// A value set while another is made is the one that is found; removed and set by others, there is one life after the
// other, each made or set once.
void lives_of_a_key(TestMap& map) {
    constexpr int kThreads = 4, kRounds = 600 * kFew;
    std::atomic<long> begun{0}, ended{0};
    in_flushed_threads(kThreads, [&](int, Random& random) {
        for (int i = 0; i < kRounds; ++i) {
            const uint64_t number = random.below(3);
            switch (random.below(4)) {
                case 0:
                    if (map.remove(number).found()) ended.fetch_add(1);
                    break;
                case 1:
                    if (map.set(number, uint64_t(i)) == Status::absent) begun.fetch_add(1);
                    break;
                case 2:
                    if (map.set_default(number, uint64_t(i)).status == Status::made) begun.fetch_add(1);
                    break;
                default: {
                    const auto result = map.find_or_make(number, [&] {
                        random.maybe_yield(2);
                        return new Box(number, uint64_t(i));
                    });
                    if (result.status == Status::made) begun.fetch_add(1);
                }
            }
        }
    });
    CHECK_EQUAL(size_t(begun - ended), map.size());
    map.empty();
}

// Nobody sees an older value than anybody has seen before: neither by look-ups nor by the writer's own account.
void never_back(TestMap& map) {
    constexpr int kReaders = 3, kKeys = 4;
    constexpr uint64_t kWrites = 2500 * kFew;
    std::atomic<uint64_t> seen[kKeys] = {};
    std::atomic<bool> done{false};
    for (uint64_t k = 0; k < kKeys; ++k) map.set(k, 0);
    in_flushed_threads(kReaders + 1, [&](int who, Random& random) {
        if (who == 0) {
            for (uint64_t i = 1; i <= kWrites; ++i) {
                const uint64_t k = random.below(kKeys);
                const uint64_t next = seen[k].load() + 1;
                if (i % 3) {
                    map.set(k, next);
                } else {
                    while (map.gather(k).front() < next) CHECK(map.increment(k));
                }
                uint64_t before = seen[k].load();
                while (before < next && !seen[k].compare_exchange_weak(before, next)) {
                }
                random.maybe_yield(4);
            }
            done = true;
            return;
        }
        while (!done) {
            const uint64_t k = random.below(kKeys);
            const uint64_t least = seen[k].load();
            const auto result = map.get(k);
            CHECK(result.found() && result.stamp >= least);
            uint64_t before = least;
            while (before < result.stamp && !seen[k].compare_exchange_weak(before, result.stamp)) {
            }
            random.maybe_yield(32);
        }
    });
}

// What was emptied is seen by nobody any more; what is entered later is fresh.
void emptied(TestMap& map) {
    constexpr int kReaders = 3;
    constexpr uint64_t kKeys = 60, kGenerations = 60 * kFew;
    std::atomic<uint64_t> generation{1};
    in_flushed_threads(kReaders + 1, [&](int who, Random& random) {
        if (who == 0) {
            for (uint64_t g = 1; g <= kGenerations; ++g) {
                for (uint64_t k = 0; k < kKeys; ++k) map.set(k, g);
                CHECK_EQUAL(map.size(), kKeys);
                map.empty();
                CHECK_EQUAL(map.size(), size_t{0});
                generation.store(g + 1);
            }
            return;
        }
        for (uint64_t least = 0; least <= kGenerations;) {
            least = generation.load();
            const auto result = map.get(random.below(kKeys));
            CHECK(!result.found() || result.stamp >= least);
            random.maybe_yield(32);
        }
    });
    CHECK(map.snapshot().empty());
}

// Growth and shrinking lose nothing that stays.
void growth(TestMap& map) {
    constexpr uint64_t kStay = 200, kCome = 4000;
    std::atomic<bool> done{false};
    for (uint64_t k = 0; k < kStay; ++k) map.set(k, k);
    in_flushed_threads(4, [&](int who, Random& random) {
        if (who == 0) {
            for (int turn = 0; turn < 2 * kFew; ++turn) {
                for (uint64_t k = 0; k < kCome; ++k) map.set(kStay + k, k);
                for (uint64_t k = 0; k < kCome; ++k) CHECK_EQUAL(map.remove(kStay + k).stamp, k);
            }
            done = true;
            return;
        }
        while (!done) {
            const uint64_t k = random.below(kStay);
            const auto result = map.get(k);
            CHECK(result.found() && result.stamp == k);
            map.get(kStay + random.below(kCome));  // its replicas come and go, too
            if (who == 1 && random.one_in(200)) {
                const auto all = map.snapshot();
                for (uint64_t j = 0; j < kStay; ++j) CHECK(all.count(j));
            }
        }
    });
    CHECK_EQUAL(map.size(), kStay);
}

// Nothing is lost of what all add to in single steps.
void single_steps(TestMap& map) {
    constexpr int kThreads = 4;
    constexpr uint64_t kKeys = 3, kSteps = 300 * kFew;
    for (uint64_t k = 0; k < kKeys; ++k) map.set(k, 0);
    in_flushed_threads(kThreads, [&](int, Random& random) {
        for (uint64_t i = 0; i < kSteps; ++i) {
            for (uint64_t k = 0; k < kKeys; ++k) CHECK(map.increment(k));
            const auto stamps = map.gather(random.below(kKeys));
            for (uint64_t stamp : stamps) CHECK_EQUAL(stamp, stamps.front());
        }
    });
    for (uint64_t k = 0; k < kKeys; ++k) CHECK_EQUAL(map.get(k).stamp, kThreads * kSteps);
}

// Threads come and go, and their processors' tables with them; what they hold stays bounded while keys come and go.
void churn(TestMap& map) {
    constexpr int kWaves = 12 * kFew, kWidth = 4;
    constexpr uint64_t kKeys = 50;
    uint64_t next = 0;
    for (int wave = 0; wave < kWaves; ++wave) {
        const uint64_t first = next;
        next += kKeys;
        in_flushed_threads(kWidth, [&](int who, Random& random) {
            for (uint64_t k = first + uint64_t(who); k < next; k += kWidth) map.set(k, k);
            for (int i = 0; i < 200; ++i) {
                const uint64_t k = first + random.below(kKeys);
                const auto result = map.get(k);
                if (result.found()) CHECK_EQUAL(result.stamp, k);
            }
            for (uint64_t k = first + uint64_t(who); k < next; k += kWidth) CHECK(map.remove(k).found());
            CHECK(map.replicas() <= 8 * kKeys);
        });
        CHECK_EQUAL(map.size(), size_t{0});
    }
}

// Whoever would wait for itself is told, alone or in a circle; everybody else goes on.
void circles(TestMap& map) {
    const auto own = map.find_or_make(1, [&] {
        CHECK(map.find_or_make(1, [&]() -> Box* { CHECK(false); }).status == Status::failed);
        return new Box(1, 11);
    });
    CHECK(own.status == Status::made && own.stamp == 11);
    for (uint64_t round = 0; round < 100u * kFew; ++round) {
        const uint64_t base = 100 + 8 * round;
        std::atomic<int> refused{0};
        std::barrier inside(3);
        in_flushed_threads(3, [&](int who, Random&) {
            const uint64_t mine = base + uint64_t(who), next = base + uint64_t((who + 1) % 3);
            const auto result = map.find_or_make(mine, [&] {
                inside.arrive_and_wait();
                const auto other = map.find_or_make(next, [&]() -> Box* { return new Box(next, 0); });
                if (other.status == Status::failed) refused.fetch_add(1);
                return new Box(mine, 1);
            });
            CHECK(result.status == Status::made || result.found());
        });
        CHECK_EQUAL(refused.load(), 1);
    }
    map.empty();
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    table_against_model();
    with_each("map_against_model", map_against_model);
    with_each("one_makes", one_makes);
    with_each("lives_of_a_key", lives_of_a_key);
    with_each("never_back", never_back);
    with_each("emptied", emptied);
    with_each("growth", growth);
    with_each("single_steps", single_steps);
    with_each("churn", churn);
    with_each("circles", circles);
    std::puts("ok");
}
