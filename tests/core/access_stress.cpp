// Stress of guarded touches: threads read and write pages that a server of this process grants or marks as failed at
// random. Whoever succeeds sees right bytes, no write of anybody is lost when marks go, and once nothing fails any more
// everything can be had.
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>

#include "check.hpp"
#include "vm/access.hpp"
#include "vm/guard.hpp"
#include "vm/status_page.hpp"
#include "vm/uffd.hpp"

using namespace k42::testing;
using namespace k42::vm;

namespace {

constexpr uint64_t kPages = 512;
constexpr uint64_t kLength = kPages * kPageSize;
constexpr int kThreads = 4;

uint64_t pattern(uint64_t page) { return (page + 1) * 0x9E3779B97F4A7C15ull; }

// One touch: reads the page's first word and the thread's own, and writes the latter if asked to. No memcpy: what the
// sanitizers put in its place is not made to be left in the middle.
struct Touch {
    volatile uint64_t* page;
    int slot;
    uint64_t write;  // 0: nothing
    uint64_t first = 0;
    uint64_t own = 0;

    static void run(void* self) {
        auto* touch = static_cast<Touch*>(self);
        touch->first = touch->page[0];
        touch->own = touch->page[touch->slot];
        if (touch->write) touch->page[touch->slot] = touch->write;
    }
};

void pages_that_fail_and_recover(bool copies) {
    begin(copies ? "copies of pages that fail and recover" : "shared pages that fail and recover");
    const int memfd = memfd_create("k42-stress", MFD_CLOEXEC);
    CHECK(memfd >= 0 && ftruncate(memfd, kLength) == 0);
    for (uint64_t page = 0; page < kPages; ++page) {
        const uint64_t word = pattern(page);
        CHECK(pwrite(memfd, &word, sizeof word, off_t(page * kPageSize)) == sizeof word);
    }
    void* base = mmap(nullptr, kLength, PROT_READ | PROT_WRITE, copies ? MAP_PRIVATE : MAP_SHARED, memfd, 0);
    CHECK(base != MAP_FAILED);
    const auto start = reinterpret_cast<uint64_t>(base);
    const int uffd = open_userfaultfd(false);
    CHECK(uffd >= 0 && register_range(uffd, start, kLength, false) == 0);
    const auto status = StatusPage::create();
    void* shown = mmap(nullptr, StatusPage::kBytes, PROT_READ, MAP_SHARED, status->descriptor(), 0);
    std::atomic<bool> abandoned{false};
    WindowRecord* window = list_window(start, kLength, 0, copies, "the stress", shown, &abandoned);

    std::atomic<bool> failing{true}, ending{false};
    std::atomic<uint64_t> failed{0}, granted{0};
    std::thread server([&] {
        uint64_t turn = 0;
        while (!ending.load()) {
            pollfd polled{uffd, POLLIN, 0};
            if (poll(&polled, 1, 10) <= 0) continue;
            uffd_msg message;
            if (read_messages(uffd, &message, 1) != 1) continue;
            const uint64_t page = message.arg.pagefault.address & ~(kPageSize - 1);
            if (turn % 7 == 0) usleep(useconds_t(turn % 200));  // meanwhile a marked page is looked at
            if (++turn % 3 && failing.load()) {
                status->report(page, kPageSize, "as the test wants it");
                poison_range(uffd, page, kPageSize);
                wake_range(uffd, page, kPageSize);
            } else {
                continue_range(uffd, page, kPageSize, true);
                wake_range(uffd, page, kPageSize);
                granted.fetch_add(1);
            }
        }
    });
    in_threads(kThreads, [&](int who) {
        // All on the same page at about the same time, each until it succeeds: then a page heals, is granted and is
        // written to by one while another still goes about healing it. Faults that were sent before the page was marked
        // are granted after it, over the mark.
        auto until_had = [&](uint64_t page, uint64_t write) {
            for (;;) {
                Touch touch{reinterpret_cast<volatile uint64_t*>(start + page * kPageSize), 8 * (who + 1), write};
                AccessFailure failure;
                if (touch_guarded(*window, start + page * kPageSize, kPageSize, Touch::run, &touch, failure)) {
                    CHECK_EQUAL(touch.first, pattern(page));
                    return touch.own;
                }
                CHECK(failure.address - start < kLength && !failure.abandoned);
                CHECK(copies || !failure.marked);
                // As the kernel when it is asked to show a page once more, which may fail, too.
                if (failed.fetch_add(1) % 3 == 0 && failure.marked) {
                    continue_range(uffd, start + page * kPageSize, kPageSize, true);
                }
            }
        };
        for (uint64_t page = 0; page < kPages; ++page) {
            if (who == 0 && page == kPages - 10) failing.store(false);
            until_had(page, page + 1);
            CHECK_EQUAL(until_had(page, 0), page + 1);
        }
        for (uint64_t page = 0; page < kPages; ++page) CHECK_EQUAL(until_had(page, 0), page + 1);
    });
    ending.store(true);
    server.join();
    CHECK(failed.load() > 0 && granted.load() > 0);
    unlist_window(window);
    munmap(base, kLength);
    munmap(shown, StatusPage::kBytes);
    close(uffd);
    close(memfd);
}

}  // namespace

// The SIGBUS handler may read what it found there before for ever.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() { return "leak:k42::vm::"; }

int main(int argc, char** argv) {
    start_program(argc, argv);
    const int uffd = open_userfaultfd(false);
    if (uffd < 0) {
        std::printf("SKIPPED, NOT TESTED: real page faults (userfaultfd: %s)\n", strerror(-uffd));
    } else {
        close(uffd);
        for (int i = 0; i < 10; ++i) pages_that_fail_and_recover(i % 2);
    }
    std::puts("ok");
}
