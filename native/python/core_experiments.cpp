// What the experiments measure the core with: k42._native.CoreLoop, an operation of the core in a native loop, on an
// object of its own that all threads share. Nothing of Python is in the loop.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>

#include "arguments.hpp"
#include "reference.hpp"
#include "structures/counter.hpp"
#include "structures/gate.hpp"
#include "structures/interval_map.hpp"
#include "structures/map.hpp"
#include "structures/pool.hpp"

namespace k42::edge {

namespace {

class Loop {
  public:
    virtual ~Loop() = default;
    // Waits for `start` (ns of the steady clock, on Linux that of time.monotonic_ns()), makes the calls, and returns
    // the seconds that they took. Inside of a request, by any number of threads.
    virtual double run(uint64_t calls, uint64_t start) = 0;
    // The calls that were made, where the object counts them.
    virtual std::optional<int64_t> counted() const { return std::nullopt; }
};

// What is measured is a function call, as it is from another file; what it returns is wanted.
template <typename Body>
[[gnu::noinline]] auto call(Body& body) {
    return body();
}

template <typename Body>
double timed(uint64_t calls, uint64_t start, Body body) {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point from{std::chrono::nanoseconds(start)};
    while (Clock::now() < from) {
    }
    const auto begin = Clock::now();
    for (uint64_t i = 0; i < calls; ++i) {
        const auto result = call(body);
        asm volatile("" ::"g"(&result) : "memory");
    }
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

// What a processor calls of an object: its part where it has parts, which `join` makes, else the object.
template <typename Whole>
class Local {
  public:
    explicit Local(Whole& whole) : whole_(whole) {}
    auto& mine() {
        if constexpr (requires { whole_.join(); }) {
            std::lock_guard guard(lock_);
            void*& part = parts_[runtime::current().id];
            if (!part) part = &whole_.join();
            return *static_cast<std::remove_reference_t<decltype(whole_.join())>*>(part);
        } else {
            return whole_;
        }
    }

  private:
    Whole& whole_;
    std::mutex lock_;                  // protects parts_
    std::map<uint32_t, void*> parts_;  // by processor
};

template <typename Count>
class CounterAdd : public Loop {
  public:
    double run(uint64_t calls, uint64_t start) override {
        auto& part = local_.mine();
        return timed(calls, start, [&] { return part.add(1); });
    }
    std::optional<int64_t> counted() const override { return count_.value(); }

  private:
    Count count_{0};
    Local<Count> local_{count_};
};

template <typename Gate>
class GatePass : public Loop {
  public:
    double run(uint64_t calls, uint64_t start) override {
        auto& part = local_.mine();
        return timed(calls, start, [&] {
            part.try_enter();  // nobody stops it
            return part.leave();
        });
    }

  private:
    Gate gate_;
    Local<Gate> local_{gate_};
};

template <typename Map>
class IntervalLookup : public Loop {
  public:
    IntervalLookup() {
        for (uint64_t i = 0; i < 64; ++i) map_.insert(16 * i, 16 * i + 8, i);
    }
    double run(uint64_t calls, uint64_t start) override {
        auto& part = local_.mine();
        return timed(calls, start, [&] { return part.lookup(16 * 42); });
    }

  private:
    Map map_;
    Local<Map> local_{map_};
};

template <typename Pool>
class PoolTake : public Loop {
  public:
    PoolTake() {
        for (uint64_t i = 0; i < 1024; ++i) pool_.add(i);
    }
    double run(uint64_t calls, uint64_t start) override {
        auto& part = local_.mine();
        return timed(calls, start, [&] {
            uint64_t item = 0;
            if (!pool_.try_take(part, item)) pool_.take(part, item);
            if (!pool_.try_give(part, item)) pool_.give(part, item);
            return item;
        });
    }

  private:
    static auto made() {
        if constexpr (std::is_same_v<Pool, DistributedPool<uint64_t>>) {
            return Pool(0, 64);
        } else {
            return Pool(0);
        }
    }
    Pool pool_ = made();
    Local<Pool> local_{pool_};
};

// Integers as keys, values without counts: the map as a page table has it.
struct Integers {
    using Key = uint64_t;
    using Guard = std::lock_guard<std::mutex>;
    void hold(Key) const {}
    void drop(Key) const {}
    void hold_value(void*) const {}
    void drop_value(void*) const {}
    void drop_value_later(void*) const {}
    bool copies(const void*) const { return false; }
    void* copy(void*) const { return nullptr; }
    bool wait(MakingWait&) const { return false; }

    class Probe {
      public:
        explicit Probe(Key key) : key_(key) {}
        size_t hash() const { return key_ * 0x9E3779B97F4A7C15u >> 16; }
        Key key() const { return key_; }
        bool same(Key key) const { return key == key_; }
        bool open() const { return false; }
        bool settle() const { return true; }

      private:
        Key key_;
    };
};

template <size_t partitions, bool replicated>
class MapGet : public Loop {
  public:
    using Core = Map<Integers>;
    MapGet() {
        const Request request;
        for (uint64_t key = 0; key < 64; ++key) {
            Integers::Probe probe(key);
            core_.set(probe, this);
        }
    }
    ~MapGet() override { core_.dismantle(); }
    double run(uint64_t calls, uint64_t start) override {
        Core::Local* local = replicated ? &local_.mine() : nullptr;
        return timed(calls, start, [&] {
            Integers::Probe probe(42);
            return core_.get(local, probe).value;
        });
    }

  private:
    Core core_{partitions};
    Local<Core> local_{core_};
};

// From the coid to the local representative, as in each call on a reference.
class Translation : public Loop {
  public:
    Translation() { runtime::create(reference_, this); }
    ~Translation() override {
        bool deferred;
        runtime::destroy(reference_, {[](void*) {}, [](void*) { return false; }}, &deferred);
    }
    double run(uint64_t calls, uint64_t start) override {
        runtime::Processor& p = runtime::current();
        if (!runtime::translate(p, reference_.coid())) {
            runtime::begin_miss(p, reference_.coid());
            runtime::install(p, reference_.coid(), this);
        }
        return timed(calls, start, [&] { return runtime::translate(p, reference_.coid()); });
    }

  private:
    runtime::Reference reference_;
};

template <typename L>
std::unique_ptr<Loop> make_loop() {
    return std::make_unique<L>();
}

constexpr struct {
    const char* name;
    std::unique_ptr<Loop> (*make)();
} loops[] = {
    {"counter.add/SharedCounter", make_loop<CounterAdd<SharedCount>>},
    {"counter.add/AtomicCounter", make_loop<CounterAdd<AtomicCount>>},
    {"counter.add/PackedCounter", make_loop<CounterAdd<PackedCount>>},
    {"counter.add/DistributedCounter", make_loop<CounterAdd<PaddedCount>>},
    {"gate.enter+leave/SharedGate", make_loop<GatePass<SharedGate>>},
    {"gate.enter+leave/DistributedGate", make_loop<GatePass<DistributedGate>>},
    {"intervals.get/SharedIntervalMap", make_loop<IntervalLookup<SharedIntervalMap<uint64_t>>>},
    {"intervals.get/ReplicatedIntervalMap", make_loop<IntervalLookup<ReplicatedIntervalMap<uint64_t>>>},
    {"map.get/SharedMap", make_loop<MapGet<1, false>>},
    {"map.get/PartitionedMap", make_loop<MapGet<64, false>>},
    {"map.get/ReplicatedMap", make_loop<MapGet<64, true>>},
    {"pool.take+give_back/SharedPool", make_loop<PoolTake<SharedPool<uint64_t>>>},
    {"pool.take+give_back/DistributedPool", make_loop<PoolTake<DistributedPool<uint64_t>>>},
    {"translation", make_loop<Translation>},
};

using Self = Holder<std::unique_ptr<Loop>>;

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    std::string name;
    if (!unpack_new(type->tp_name, args, kwargs, name)) return nullptr;
    here();
    for (const auto& loop : loops) {
        if (name == loop.name) return Self::make(type, loop.make());
    }
    PyErr_Format(PyExc_ValueError, "there is no native loop '%s'", name.c_str());
    return nullptr;
}

PyObject* run(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t calls, start;
    if (!unpack("run", args, nargs, calls, start)) return nullptr;
    const Request request;
    double seconds;
    {
        Detached detached;
        seconds = Self::of(self)->run(calls, start);
    }
    return PyFloat_FromDouble(seconds);
}

PyObject* counted(PyObject* self, PyObject*) {
    const auto count = Self::of(self)->counted();
    return count ? PyLong_FromLongLong(*count) : Py_NewRef(Py_None);
}

PyMethodDef methods[] = {
    {"run", fast(run), METH_FASTCALL,
     PyDoc_STR("run($self, calls, start, /)\n--\n\n"
               "Wait for `start` (monotonic ns), make so many calls; return the seconds that they took.")},
    {"counted", counted, METH_NOARGS,
     PyDoc_STR("counted($self, /)\n--\n\nReturn the calls that all threads made, where the object counts them.")},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("CoreLoop(operation, /)\n--\n\nAn operation of the core in a native loop.")},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.CoreLoop", sizeof(Self), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

}  // namespace

int add_core_experiments(PyObject* module) { return add_type(module, &spec) ? 0 : -1; }

}  // namespace k42::edge
