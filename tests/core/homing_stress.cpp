// Stress of what keeps faults local: where threads are placed, and where the spans of windows are homed. What threads
// and masks are concerned is this program's own; no memory is mapped here.
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <set>

#include "check.hpp"
#include "runtime/retire.hpp"
#include "vm/affinity.hpp"
#include "vm/hat.hpp"
#include "vm/homing.hpp"

using namespace k42::testing;
using namespace k42::vm;

namespace {

void sticky_affinity() {
    begin("sticky_affinity");
    const std::vector<int> all = machine_cpus();
    if (all.size() < 2) {
        std::puts("  SKIPPED: one CPU only, nothing to stick to");
        return;
    }
    const std::vector<int> one{all[1]};
    const pid_t pid = getpid();
    const auto tid = pid_t(syscall(SYS_gettid));
    using S = StickyAffinity;
    uint64_t now = 1'000'000'000;
    auto burst = [&](S& sticky, pid_t process, pid_t thread, uint32_t faults, uint64_t gap) {
        int place = -1;
        for (uint32_t i = 0; i < faults; ++i) place = sticky.fault(process, thread, Hold::anywhere, now += gap);
        return place;
    };
    {
        Placement placement(all);
        S sticky(placement, 1);
        CHECK_EQUAL(burst(sticky, pid, tid, S::kBurst - 1, 1000), -1);
        CHECK(machine_cpus() == all && sticky.kept() == 0);
        CHECK_EQUAL(burst(sticky, pid, tid, 1, 1000), 1);
        CHECK(machine_cpus() == one && sticky.kept() == 1);
        burst(sticky, pid, tid, 3000, 1000);
        CHECK(sticky.kept() == 1);
        CHECK(sticky.release_idle(now + S::kIdle - 1) && machine_cpus() == one);
        CHECK(!sticky.release_idle(now + S::kIdle) && machine_cpus() == all);
        now += S::kIdle;
        // Faults now and then are no burst.
        CHECK_EQUAL(burst(sticky, pid, tid, 20, S::kGap + 1), -1);
        CHECK(machine_cpus() == all && sticky.kept() == 1);
        // A thread of another process than it says is left alone; so is one that is not to be held.
        S other(placement, 1);
        CHECK_EQUAL(burst(other, 1, tid, 10, 1000), -1);
        CHECK(machine_cpus() == all && other.kept() == 0);
        now += S::kIdle;
        other.release_idle(now);
        for (int i = 0; i < 10; ++i) CHECK_EQUAL(other.fault(pid, tid, Hold::nowhere, now += 1000), -1);
        CHECK(machine_cpus() == all && other.kept() == 0);
        // The end gives all masks back.
        burst(sticky, pid, tid, S::kBurst + 1, 1000);
        CHECK(machine_cpus() == one && sticky.kept() == 2);
        placement.release_all();
        CHECK(machine_cpus() == all);
        // A thread whose mask came back in the middle of a burst is placed anew.
        CHECK_EQUAL(burst(sticky, pid, tid, S::kBurst, 1000), 1);
        CHECK(machine_cpus() == one);
    }
    CHECK(machine_cpus() == all);
    {  // A mask that the program sets meanwhile stays, and is found out; one CPU alone is the program's wish.
        Placement placement(all);
        S sticky(placement, 1);
        burst(sticky, pid, tid, S::kBurst, 1000);
        CHECK(machine_cpus() == one);
        cpu_set_t mine;
        CPU_ZERO(&mine);
        CPU_SET(all[0], &mine);
        CHECK(sched_setaffinity(0, sizeof mine, &mine) == 0);
        CHECK_EQUAL(burst(sticky, pid, tid, S::kCheck + S::kBurst, 1000), 0);  // where it belongs now
        placement.release_all();
        CHECK(machine_cpus() == std::vector<int>{all[0]});
        now += S::kIdle;
        CHECK_EQUAL(burst(sticky, pid, tid, 10, 1000), 0);
        CHECK(machine_cpus() == std::vector<int>{all[0]});
        CHECK_EQUAL(sticky.kept(), uint64_t{1});
    }
    cpu_set_t mask;
    CPU_ZERO(&mask);
    for (int c : all) CPU_SET(c, &mask);
    CHECK(sched_setaffinity(0, sizeof mask, &mask) == 0);
    {  // Faults of one thread on two CPUs: it stays where it was held first, until both have seen it idle.
        Placement placement(all);
        S first(placement, 0), second(placement, 1);
        CHECK_EQUAL(burst(first, pid, tid, S::kBurst, 1000), 0);
        CHECK_EQUAL(burst(second, pid, tid, S::kBurst + 1, S::kIdle / 8), 0);
        CHECK(machine_cpus() == std::vector<int>{all[0]} && second.kept() == 0);
        burst(second, pid, tid, 20, S::kIdle / 2);
        first.release_idle(now);  // has not seen it for long
        CHECK(machine_cpus() == std::vector<int>{all[0]});
        CHECK(!second.release_idle(now + S::kIdle));
        CHECK(machine_cpus() == all);
        now += S::kIdle;
    }
    {  // Two threads at one server: the second is held elsewhere.
        Placement placement(all);
        S server(placement, 1);
        CHECK_EQUAL(burst(server, pid, tid, S::kBurst, 1000), 1);
        std::thread([&] {
            cpu_set_t every = mask;
            CHECK(sched_setaffinity(0, sizeof every, &every) == 0);
            CHECK(burst(server, pid, pid_t(syscall(SYS_gettid)), S::kBurst, 1000) != 1);
            CHECK(machine_cpus().size() == 1 && machine_cpus() != one);
        }).join();
    }
    CHECK(machine_cpus() == all);
}

// What is known of the spans of a window, against a model in plain arrays.
void span_homes() {
    begin("span_homes");
    Random random(seed());
    for (int round = 0; round < 40; ++round) {
        const uint64_t base = (1000 + random.below(8)) * kSpan + random.below(512) * kPageSize;
        const uint64_t length = (1 + random.below(40 * 512)) * kPageSize;
        Spans spans(base, length, 0);
        std::map<uint64_t, int> home;  // by number of the span
        uint64_t ranges = 0, most = random.one_in(3) ? random.below(6) : 1000;
        uint32_t now = 4000;
        for (int step = 0; step < 500; ++step) {
            now += uint32_t(random.below(3));
            const uint64_t address = base + random.below(length / kPageSize) * kPageSize;
            spans.note(address, now);
            const int from = home[address / kSpan], to = int(random.below(3));
            if (to == from) continue;
            const bool rests = spans.rests(address, now);
            const auto move = spans.follow(address, from, to, now, ranges, most);
            if (rests) CHECK(!move);
            if (!move) {
                CHECK(rests || ranges + 2 > most);
                continue;
            }
            CHECK(move->from == from && move->to == to && address - move->address < move->length);
            CHECK(move->address >= base && move->address + move->length <= base + length);
            CHECK(move->address == base || move->address % kSpan == 0);
            CHECK(move->address + move->length == base + length || (move->address + move->length) % kSpan == 0);
            for (uint64_t at = move->address / kSpan; at <= (move->address + move->length - 1) / kSpan; ++at) {
                CHECK_EQUAL(home[at], from);
                home[at] = to;
            }
            CHECK(spans.rests(address, now));
            uint64_t splits = 0;
            for (uint64_t at = base / kSpan + 1; at <= (base + length - 1) / kSpan; ++at) {
                splits += home[at] != home[at - 1];
            }
            CHECK_EQUAL(splits, spans.splits());
            CHECK_EQUAL(splits, ranges);
            CHECK(splits <= most);
        }
        // Idle ones are found once, all of them, in ranges of one home.
        std::set<uint64_t> found;
        const uint64_t mapped = spans.mapped();
        uint32_t steps = 1'000'000;
        CHECK(!spans.idle(now, steps));
        for (;;) {
            const auto idle = spans.idle(now + 2 * Spans::kIdle, steps);
            if (!idle) break;
            CHECK(idle->from == idle->to);
            for (uint64_t at = idle->address / kSpan; at <= (idle->address + idle->length - 1) / kSpan; ++at) {
                CHECK_EQUAL(home[at], idle->to);
                CHECK(found.insert(at).second);
            }
        }
        CHECK_EQUAL(found.size(), mapped);
        CHECK_EQUAL(spans.mapped(), uint64_t{0});
    }
    // Two CPUs that share a span: each move is damped twice as much as the one before.
    Spans spans(kSpan, kSpan, 0);
    uint64_t ranges = 0;
    uint32_t now = 1;
    int moves = 0, home = 0;
    for (; now < 60'000; ++now) {
        if (!spans.follow(kSpan, home, 1 - home, now, ranges, 10)) continue;
        home = 1 - home;
        ++moves;
    }
    CHECK(moves > 10 && moves < 26);
    CHECK(spans.follow(kSpan, home, 1 - home, now + 100'000, ranges, 10));
    CHECK(!spans.rests(kSpan, now + 100'000 + Spans::kRest));  // long at peace: as new
}

// Servers of two CPUs see faults of the same threads, hold them, move them and let them go, all at once: in the end
// every thread has its mask back.
void placement_races() {
    begin("placement_races");
    const std::vector<int> all = machine_cpus();
    if (all.size() < 2) return;
    Placement placement(all);
    std::atomic<bool> ended{false};
    std::atomic<pid_t> tids[3] = {};
    std::vector<std::thread> threads;
    for (auto& tid : tids) {
        threads.emplace_back([&] {
            tid = pid_t(syscall(SYS_gettid));
            while (!ended.load()) usleep(1000);
            CHECK(machine_cpus() == all);
        });
    }
    for (auto& tid : tids) {
        while (!tid.load()) usleep(100);
    }
    uint64_t kept[2] = {};
    in_threads(2, [&](int here) {
        Random random(seed() + uint64_t(here));
        StickyAffinity sticky(placement, here);
        uint64_t now = 1'000'000'000;
        for (int i = 0; i < 4000; ++i) {
            now += random.one_in(50) ? 3'000'000 : random.below(100'000);
            const auto hold = Hold(random.below(3));
            const int place = sticky.fault(getpid(), tids[random.below(3)].load(), hold, now);
            CHECK(place >= -1 && place < int(all.size()));
            if (random.one_in(20)) sticky.release_idle(now);
            random.maybe_yield(16);
        }
        kept[here] = sticky.kept();
        if (here == 0) sticky.release_idle(now + StickyAffinity::kIdle);
    });
    CHECK(kept[0] + kept[1] > 0);
    placement.release_all();
    ended = true;
    for (std::thread& thread : threads) thread.join();
}

// Windows come and go while servers find them, homing moves their spans, and idle ones are unmapped: what the commands
// say is always a part of a window of that time, and the HAT's counts are as if they had never been there.
void windows_come_and_go() {
    begin("windows_come_and_go");
    constexpr uint64_t kBase = 0x10'0000'0000, kLength = 12 * kSpan, kFar = 0x1'0000'0000;
    constexpr int kCpus = 2, kWindows = 3;
    RegionMap regions;
    auto* hat = new UffdHat(1, &regions, kCpus, StatusPage::create(), CommandRing::create(), 8);
    for (int cpu = 0; cpu < kCpus; ++cpu) CHECK(hat->attach(cpu, memfd_create("no userfaultfd", MFD_CLOEXEC)));
    void* memory = mmap(nullptr, sizeof(CommandMemory), PROT_READ, MAP_SHARED, hat->commands().descriptor(), 0);
    CHECK(memory != MAP_FAILED);
    std::atomic<int> busy{kCpus};
    std::atomic<uint64_t> asked{0}, commands{0};
    in_threads(kCpus + 2, [&](int who) {
        Random random(seed() + uint64_t(who));
        if (who < kCpus) {
            uint64_t now = 1ull << 33;
            auto& processor = k42::runtime::current();
            for (int i = 0; i < 20'000; ++i) {
                now += random.below(4'000'000) + (random.one_in(200) ? uint64_t{Spans::kIdle} << 20 : 0);
                const uint64_t address =
                    kBase + random.below(kWindows) * kFar + random.below(kLength / kPageSize) * kPageSize;
                k42::runtime::enter(processor);
                if (Window* window = hat->window(who, address)) {
                    CHECK(address - window->base < window->length);
                    asked.fetch_add(hat->follow(*window, who, address, int(random.below(3)) - 1, now));
                }
                (void)k42::runtime::leave(processor);
                random.maybe_yield(64);
            }
            busy.fetch_sub(1);
        } else if (who == kCpus) {
            bool there[kWindows] = {};
            while (busy.load() > 0) {
                const uint64_t which = random.below(kWindows);
                const uint64_t base = kBase + which * kFar;
                if (there[which]) {
                    CHECK(!hat->add_window(0, base + kSpan, kSpan, base, true));
                    CHECK(hat->remove_window(base));
                } else {
                    CHECK(hat->add_window(int(random.below(kCpus)), base, kLength, base, which != 2));
                }
                there[which] = !there[which];
                usleep(useconds_t(random.below(400)));
            }
            for (uint64_t which = 0; which < kWindows; ++which) {
                if (there[which]) CHECK(hat->remove_window(kBase + which * kFar));
            }
            k42::runtime::flush();
        } else {
            CommandReader reader(static_cast<const CommandMemory*>(memory));
            while (busy.load() > 0) {
                const auto command = reader.next();
                if (!command) {
                    usleep(100);
                    continue;
                }
                commands.fetch_add(1);
                CHECK(command->what == Command::What::rehome && command->from < kCpus && command->to < kCpus);
                const uint64_t which = (command->address - kBase) / kFar;
                const uint64_t at = (command->address - kBase) % kFar;
                CHECK(which < 2 && at < kLength && command->length <= kLength - at && command->length % kSpan == 0);
            }
        }
    });
    CHECK(asked.load() > 0 && commands.load() > 0);
    for (int cpu = 0; cpu < kCpus; ++cpu) CHECK(!hat->window(cpu, kBase));
    munmap(memory, sizeof(CommandMemory));
    hat->release();
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    sticky_affinity();
    placement_races();
    span_homes();
    windows_come_and_go();
    std::puts("ok");
}
