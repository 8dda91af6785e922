// Stress of the agent: the ring of commands, and ranges that move from one userfaultfd to another, are unmapped and
// hidden while threads touch them, with faults served in this process.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>

#include "check.hpp"
#include "vm/agent.hpp"
#include "vm/guard.hpp"
#include "vm/uffd.hpp"

using namespace k42::testing;
using namespace k42::vm;

namespace {

const CommandMemory* map_ring(const CommandRing& ring) {
    void* memory = mmap(nullptr, sizeof(CommandMemory), PROT_READ, MAP_SHARED, ring.descriptor(), 0);
    CHECK(memory != MAP_FAILED);
    return static_cast<const CommandMemory*>(memory);
}

// What was posted comes out once, whole and in the order of each writer; what the ring has no room for is lost.
void ring() {
    begin("ring");
    constexpr int kWriters = 3;
    constexpr uint64_t kPosts = 20'000;
    const auto made = CommandRing::create();
    const CommandMemory* memory = map_ring(*made);
    CommandReader reader(memory);
    CHECK(!reader.next());
    for (uint64_t i = 1; i <= CommandMemory::kEntries; ++i) made->post({Command::What::rehome, 1, 2, i, i});
    for (uint64_t i = 1; i <= CommandMemory::kEntries; ++i) {
        CHECK(reader.next() == (Command{Command::What::rehome, 1, 2, i, i}));
    }
    CHECK(!reader.next() && reader.lost() == 0);
    for (uint64_t i = 1; i <= CommandMemory::kEntries + 5; ++i) made->post({Command::What::soft_unmap, 0, 0, i, i});
    CHECK(reader.next() == (Command{Command::What::soft_unmap, 0, 0, CommandMemory::kEntries + 1, 512}));
    CHECK_EQUAL(reader.lost(), uint64_t{CommandMemory::kEntries});  // those before it in turn
    uint64_t known = 1, lost = reader.lost();
    while (reader.next()) ++known;
    CHECK_EQUAL(known + reader.lost(), uint64_t{CommandMemory::kEntries + 5});
    lost = reader.lost();

    uint64_t got = 0, newest[kWriters] = {};
    in_threads(kWriters + 1, [&](int who) {
        if (who < kWriters) {
            for (uint64_t i = 1; i <= kPosts; ++i) {
                made->post({Command::What::rehome, uint16_t(who), uint16_t(i), i << 12, i * 3 + uint64_t(who)});
                if (i % 64 == 0) std::this_thread::yield();
            }
            return;
        }
        while (got + reader.lost() - lost < kWriters * kPosts) {
            const auto command = reader.next();
            if (!command) {
                std::this_thread::yield();
                continue;
            }
            ++got;
            CHECK(command->from < kWriters);
            const uint64_t i = command->address >> 12;
            CHECK(i > newest[command->from] && i <= kPosts);
            newest[command->from] = i;
            CHECK(*command ==
                  (Command{Command::What::rehome, command->from, uint16_t(i), i << 12, i * 3 + command->from}));
        }
    });
    CHECK(!reader.next());
    munmap(const_cast<CommandMemory*>(memory), sizeof *memory);
}

// Two userfaultfds of this process, each with a thread that serves its faults; a memfd whose words say where they are.
class Served {
  public:
    static constexpr uint64_t kSpan = 16 * kPageSize, kSpans = 6, kLength = kSpans * kSpan;

    Served() {
        memfd = memfd_create("stress", MFD_CLOEXEC);
        CHECK(memfd >= 0 && ftruncate(memfd, kLength) == 0);
        for (uint64_t page = 0; page < kLength / kPageSize; ++page) {
            const uint64_t word = page + 1;
            CHECK(pwrite(memfd, &word, 8, off_t(page * kPageSize)) == 8);
        }
        for (int& uffd : uffds) {
            uffd = open_userfaultfd(false);
            CHECK(uffd >= 0);
        }
    }
    ~Served() {
        stop_serving();
        close(memfd);
    }

    void serve() {
        for (int uffd : uffds) {
            servers.emplace_back([this, uffd] {
                while (!stopping.load()) {
                    pollfd polled{uffd, POLLIN, 0};
                    poll(&polled, 1, 10);
                    uffd_msg messages[16];
                    const ssize_t count = read_messages(uffd, messages, 16);
                    for (ssize_t i = 0; i < count; ++i) {
                        if (messages[i].event != UFFD_EVENT_PAGEFAULT) {
                            CHECK_EQUAL(int(messages[i].event), int(UFFD_EVENT_REMAP));
                            events.fetch_add(1);
                            continue;
                        }
                        const uint64_t page = messages[i].arg.pagefault.address & ~(kPageSize - 1);
                        // All pages are there: a zero would be one that Linux made where nobody served.
                        CHECK(messages[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
                        const RangeResult result = continue_range(uffd, page, kPageSize, true);
                        if (result.error) wake_range(uffd, page, kPageSize);
                        faults.fetch_add(1);
                    }
                }
            });
        }
    }
    void stop_serving() {
        stopping = true;
        for (auto& server : servers) server.join();
        servers.clear();
    }

    // A window on it, as a client shows it.
    unsigned char* show(Guard& guard, bool writable) {
        const int flags = (writable ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE;
        void* base = mmap(nullptr, kLength, writable ? PROT_READ | PROT_WRITE : PROT_READ, flags, memfd, 0);
        CHECK(base != MAP_FAILED);
        const auto address = reinterpret_cast<uint64_t>(base);
        CHECK_EQUAL(register_range(uffds[0], address, kLength, writable), 0);
        guard.add_range({address, kLength, memfd, 0, writable ? Windows::Kind::shared : Windows::Kind::read});
        return static_cast<unsigned char*>(base);
    }

    int memfd;
    int uffds[2];
    std::vector<std::thread> servers;
    std::atomic<bool> stopping{false};
    std::atomic<uint64_t> faults{0}, events{0};
};

struct Connection {
    Connection() { CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0); }
    ~Connection() {
        for (int end : ends) close(end);
    }
    int ends[2];
};

void moves_under_touches(bool writable) {
    begin(writable ? "moves under touches, shared" : "moves under touches, read-only");
    Connection connection;
    Served served;
    const auto commands = CommandRing::create();
    {
        Guard guard(connection.ends[0], 1000);
        for (size_t cpu = 0; cpu < 2; ++cpu) guard.watch(cpu, served.uffds[cpu]);
        guard.obey(commands->descriptor());
        served.serve();
        unsigned char* base = served.show(guard, writable);
        std::atomic<int> touching{3};
        in_threads(4, [&](int who) {
            Random random(seed() + uint64_t(who));
            if (who == 3) {
                uint16_t from = 0;
                while (touching.load() > 0) {
                    const uint64_t span = random.below(Served::kSpans);
                    const uint64_t at = reinterpret_cast<uint64_t>(base) + span * Served::kSpan;
                    const auto what = random.one_in(3) ? Command::What::soft_unmap : Command::What::rehome;
                    const uint64_t spans = 1 + random.below(Served::kSpans - span);
                    const auto to = uint16_t(random.below(2));
                    commands->post({what, from, to, at, spans * Served::kSpan});
                    from = to;
                    usleep(200);
                }
                return;
            }
            for (int i = 0; i < 6000; ++i) {
                const uint64_t page = random.below(Served::kLength / kPageSize);
                auto* words = reinterpret_cast<volatile uint64_t*>(base + page * kPageSize);
                CHECK_EQUAL(words[0], page + 1);
                if (writable) {
                    words[1 + who] = words[1 + who] + 1;  // each thread's own word: no update is lost
                }
                random.maybe_yield(4);
            }
            touching.fetch_sub(1);
        });
        CHECK(served.events.load() > 0);
        if (writable) {
            uint64_t written = 0;
            for (uint64_t page = 0; page < Served::kLength / kPageSize; ++page) {
                uint64_t words[4];
                CHECK(pread(served.memfd, words, sizeof words, off_t(page * kPageSize)) == ssize_t(sizeof words));
                written += words[1] + words[2] + words[3];
            }
            CHECK_EQUAL(written, uint64_t{3 * 6000});
        }
        guard.remove_range(reinterpret_cast<uint64_t>(base));
        munmap(base, Served::kLength);
        guard.stop();  // before the servers: nothing of it needs the kernel
        served.stop_serving();
    }
    std::printf("  %llu faults, %llu moves\n", static_cast<unsigned long long>(served.faults.load()),
                static_cast<unsigned long long>(served.events.load()));
}

// A window goes, and something else of the program's comes to its addresses: commands that are on their way spare it.
void late_commands() {
    begin("late commands");
    Connection connection;
    Served served;
    const auto commands = CommandRing::create();
    Guard guard(connection.ends[0], 1000);
    for (size_t cpu = 0; cpu < 2; ++cpu) guard.watch(cpu, served.uffds[cpu]);
    guard.obey(commands->descriptor());
    served.serve();
    Random random(seed());
    for (int round = 0; round < 150; ++round) {
        unsigned char* base = served.show(guard, true);
        const auto address = reinterpret_cast<uint64_t>(base);
        for (int i = 0; i < 8; ++i) {
            const auto what = i % 2 ? Command::What::soft_unmap : Command::What::rehome;
            commands->post({what, 0, uint16_t(random.below(2)), address, Served::kLength});
        }
        for (uint64_t i = random.below(2000); i > 0; --i) std::atomic_signal_fence(std::memory_order_seq_cst);
        if (random.one_in(2)) usleep(useconds_t(random.below(300)));
        guard.remove_range(address);
        void* other =
            mmap(base, Served::kLength, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        CHECK(other == base);
        memset(base, 7, Served::kLength);
        for (int i = 0; i < 8; ++i) {
            const auto what = i % 2 ? Command::What::soft_unmap : Command::What::rehome;
            commands->post({what, 0, 1, address, Served::kLength});
        }
        if (random.one_in(2)) usleep(useconds_t(random.below(300)));
        for (uint64_t i = 0; i < Served::kLength; i += kPageSize) CHECK_EQUAL(int(base[i]), 7);
        munmap(base, Served::kLength);
    }
    guard.stop();
    served.stop_serving();
}

// Private copies are the client's only ones: no command touches them.
void copies_are_kept() {
    begin("copies are kept");
    Connection connection;
    Served served;
    const auto commands = CommandRing::create();
    Guard guard(connection.ends[0], 1000);
    for (size_t cpu = 0; cpu < 2; ++cpu) guard.watch(cpu, served.uffds[cpu]);
    guard.obey(commands->descriptor());
    served.serve();
    void* memory = mmap(nullptr, Served::kLength, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, served.memfd, 0);
    CHECK(memory != MAP_FAILED);
    auto* base = static_cast<unsigned char*>(memory);
    const auto address = reinterpret_cast<uint64_t>(base);
    CHECK_EQUAL(register_range(served.uffds[0], address, Served::kLength, false), 0);
    guard.add_range({address, Served::kLength, served.memfd, 0, Windows::Kind::copies});
    memset(base, 9, Served::kLength);
    for (uint16_t i = 0; i < 20; ++i) {
        commands->post({Command::What::soft_unmap, 0, 0, address, Served::kLength});
        commands->post({Command::What::rehome, 0, uint16_t(i % 2), address, Served::kLength});
    }
    usleep(20'000);
    for (uint64_t i = 0; i < Served::kLength; i += 512) CHECK_EQUAL(int(base[i]), 9);
    guard.remove_range(address);
    munmap(base, Served::kLength);
    guard.stop();
    served.stop_serving();
}

// Spans of one window are on two userfaultfds. Any of them maps a page of any span and write-protects across all; the
// fault of a write comes on the span's own.
void any_userfaultfd_serves_all() {
    begin("any userfaultfd serves all");
    Served served;
    constexpr uint64_t kHalf = Served::kLength / 2;
    void* memory = mmap(nullptr, Served::kLength, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, served.memfd, 0);
    CHECK(memory != MAP_FAILED);
    const auto base = reinterpret_cast<uint64_t>(memory);
    CHECK_EQUAL(register_range(served.uffds[0], base, kHalf, true), 0);
    CHECK_EQUAL(register_range(served.uffds[1], base + kHalf, kHalf, true), 0);
    CHECK(continue_range(served.uffds[0], base, Served::kLength, true).error != 0);  // not across
    CHECK_EQUAL(continue_range(served.uffds[0], base + kHalf, kHalf, true).error, 0);
    CHECK_EQUAL(continue_range(served.uffds[1], base, kHalf, true).error, 0);
    auto* bytes = static_cast<volatile unsigned char*>(memory);
    for (uint64_t at = 0; at < Served::kLength; at += kPageSize) bytes[at + 100] = 1;
    for (int uffd : served.uffds) {
        CHECK_EQUAL(protect_range(uffd, base, Served::kLength, true), 0);
        for (uint64_t at = 0; at < Served::kLength; at += kPageSize) {
            std::thread writer([&] { bytes[at + 100] = bytes[at + 100] + 1; });
            const int own = served.uffds[at >= kHalf];
            pollfd polled{own, POLLIN, 0};
            CHECK(poll(&polled, 1, -1) == 1);
            uffd_msg message;
            CHECK_EQUAL(read_messages(own, &message, 1), ssize_t{1});
            CHECK(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
            CHECK_EQUAL(message.arg.pagefault.address & ~(kPageSize - 1), base + at);
            CHECK_EQUAL(protect_range(own, base + at, kPageSize, false), 0);
            writer.join();
        }
    }
    for (uint64_t at = 0; at < Served::kLength; at += kPageSize) CHECK_EQUAL(int(bytes[at + 100]), 3);
    munmap(memory, Served::kLength);
}

// Nobody reads the events: the agent waits, its client does not. Its end, or the kernel's, frees it.
void kernel_stopped(bool gone) {
    begin(gone ? "the kernel has gone" : "the kernel is stopped");
    Connection connection;
    Served served;
    const auto commands = CommandRing::create();
    Guard guard(connection.ends[0], 20);
    for (size_t cpu = 0; cpu < 2; ++cpu) guard.watch(cpu, served.uffds[cpu]);
    guard.obey(commands->descriptor());
    unsigned char* base = served.show(guard, true);
    const auto address = reinterpret_cast<uint64_t>(base);
    commands->post({Command::What::rehome, 0, 1, address, Served::kSpan});
    pollfd moved{served.uffds[1], POLLIN, 0};
    CHECK(poll(&moved, 1, -1) == 1);  // the event waits to be read
    if (gone) {
        shutdown(connection.ends[1], SHUT_RDWR);
        guard.remove_range(address);  // waits for the agent, which the guard frees when it gives the kernel up
        CHECK(guard.abandoned()->load());
    }
    guard.stop();
    munmap(base, Served::kLength);
}

}  // namespace

// A signal handler may read a guard's flag for ever.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() {
    return "leak:k42::vm::Guard::Guard";
}

int main(int argc, char** argv) {
    start_program(argc, argv);
    ring();
    const int uffd = open_userfaultfd(false);
    if (uffd < 0) {
        std::printf("SKIPPED, NOT TESTED: real page faults (userfaultfd: %s)\n", strerror(-uffd));
    } else {
        close(uffd);
        moves_under_touches(true);
        moves_under_touches(false);
        late_commands();
        copies_are_kept();
        any_userfaultfd_serves_all();
        kernel_stopped(false);
        kernel_stopped(true);
    }
    std::puts("ok");
}
