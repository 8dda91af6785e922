// What the stress programs share: checks, repeatable random numbers, threads that start together, and an end
// to hangs. A lost wake-up shows as a hang, so every program sets a watchdog; nothing else here looks at
// time.
#pragma once

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
            std::_Exit(1);                                                                \
        }                                                                                 \
    } while (0)

#define CHECK_EQUAL(left, right)                                                                           \
    do {                                                                                                   \
        const auto check_left = (left);                                                                    \
        const auto check_right = (right);                                                                  \
        if (!(check_left == check_right)) {                                                                \
            std::fprintf(stderr, "%s:%d: %s is %lld, %s is %lld\n", __FILE__, __LINE__, #left,             \
                         static_cast<long long>(check_left), #right, static_cast<long long>(check_right)); \
            std::_Exit(1);                                                                                 \
        }                                                                                                  \
    } while (0)

namespace k42::testing {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

inline std::atomic<const char*> current_test{"start"};

// Ends the program when it hangs: two minutes without a next test.
inline void begin(const char* test) {
    current_test.store(test);
    alarm(120);
    std::printf("%s\n", test);
    std::fflush(stdout);
}

inline void watch_for_hangs() {
    signal(SIGALRM, [](int) {
        static const char message[] = "no progress for two minutes: a lost wake-up or a deadlock in: ";
        [[maybe_unused]] auto written = write(STDERR_FILENO, message, sizeof message - 1);
        const char* test = current_test.load();
        size_t length = 0;
        while (test[length]) ++length;
        written = write(STDERR_FILENO, test, length);
        written = write(STDERR_FILENO, "\n", 1);
        _exit(1);
    });
}

// splitmix64: any seed is good, and the same seed gives the same numbers everywhere.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    uint64_t below(uint64_t bound) { return next() % bound; }
    bool one_in(uint64_t n) { return below(n) == 0; }
    // Now and then lets another thread run: a context switch where it hurts most.
    void maybe_yield(uint64_t n) {
        if (one_in(n)) std::this_thread::yield();
    }

  private:
    uint64_t state_;
};

// The seed of the whole program: argv[1], or a fixed one. Thread i of a test uses seed() + i.
inline uint64_t& seed() {
    static uint64_t value = 42;
    return value;
}

inline void start_program(int argc, char** argv) {
    if (argc > 1) seed() = std::strtoull(argv[1], nullptr, 0);
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed()));
    watch_for_hangs();
}

// Runs work(i) in n threads that start at once.
template <class Work>
void in_threads(int n, Work work) {
    std::barrier start(n);
    std::vector<std::thread> threads;
    for (int i = 0; i < n; ++i) {
        threads.emplace_back([&, i] {
            start.arrive_and_wait();
            work(i);
        });
    }
    for (std::thread& thread : threads) thread.join();
}

// The CPUs that this program may use.
inline std::vector<int> machine_cpus() {
    cpu_set_t mask;
    CHECK(sched_getaffinity(0, sizeof mask, &mask) == 0);
    std::vector<int> cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
    }
    return cpus;
}

}  // namespace k42::testing
