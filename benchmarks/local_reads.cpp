// How to read a local file that is in nobody's cache: preadv by threads, or io_uring by one; through Linux's page
// cache, or past it (O_DIRECT). What k42's stores do follows from what this says.
//
//   g++ -O2 -std=c++20 -pthread benchmarks/local_reads.cpp -o /tmp/local_reads && /tmp/local_reads FOLDER [MIB]
//
// Random: 4 KiB at a time, each page once. In order: 256 KiB at a time. Each line is the median of five interleaved
// rounds, in µs for 4 KiB; before each the file's pages are dropped from Linux's cache.
#include <fcntl.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kPage = 4096;

[[noreturn]] void fail(const char* what) {
    std::perror(what);
    std::exit(1);
}

// Just enough of a ring: one submitter, who also takes what has ended.
class Ring {
  public:
    explicit Ring(unsigned depth) {
        io_uring_params parameters{};
        fd_ = int(syscall(SYS_io_uring_setup, depth, &parameters));
        if (fd_ < 0) fail("io_uring_setup");
        const std::size_t bytes = std::max(parameters.sq_off.array + parameters.sq_entries * sizeof(unsigned),
                                           parameters.cq_off.cqes + parameters.cq_entries * sizeof(io_uring_cqe));
        auto* rings = map(bytes, IORING_OFF_SQ_RING);
        sqes_ = reinterpret_cast<io_uring_sqe*>(map(parameters.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
        sq_tail_ = reinterpret_cast<unsigned*>(rings + parameters.sq_off.tail);
        sq_mask_ = *reinterpret_cast<unsigned*>(rings + parameters.sq_off.ring_mask);
        sq_array_ = reinterpret_cast<unsigned*>(rings + parameters.sq_off.array);
        cq_head_ = reinterpret_cast<unsigned*>(rings + parameters.cq_off.head);
        cq_tail_ = reinterpret_cast<unsigned*>(rings + parameters.cq_off.tail);
        cq_mask_ = *reinterpret_cast<unsigned*>(rings + parameters.cq_off.ring_mask);
        cqes_ = reinterpret_cast<io_uring_cqe*>(rings + parameters.cq_off.cqes);
    }
    ~Ring() { close(fd_); }

    void read(int fd, char* to, std::size_t bytes, off_t at, unsigned slot) {
        const unsigned tail = *sq_tail_, index = tail & sq_mask_;
        io_uring_sqe& sqe = sqes_[index];
        std::memset(&sqe, 0, sizeof sqe);
        sqe.opcode = IORING_OP_READ;
        sqe.fd = fd;
        sqe.addr = reinterpret_cast<std::uintptr_t>(to);
        sqe.len = unsigned(bytes);
        sqe.off = std::uint64_t(at);
        sqe.user_data = slot;
        sq_array_[index] = index;
        std::atomic_ref(*sq_tail_).store(tail + 1, std::memory_order_release);
        ++pending_;
    }

    // Submits, waits for one at least, and calls `ended(slot)` for each.
    template <class Ended>
    void wait(std::size_t bytes, Ended ended) {
        if (syscall(SYS_io_uring_enter, fd_, pending_, 1, IORING_ENTER_GETEVENTS, nullptr, 0) < 0)
            fail("io_uring_enter");
        pending_ = 0;
        unsigned head = *cq_head_;
        const unsigned tail = std::atomic_ref(*cq_tail_).load(std::memory_order_acquire);
        for (; head != tail; ++head) {
            const io_uring_cqe& cqe = cqes_[head & cq_mask_];
            if (cqe.res != int(bytes)) fail("a read by io_uring");
            ended(unsigned(cqe.user_data));
        }
        std::atomic_ref(*cq_head_).store(head, std::memory_order_release);
    }

  private:
    char* map(std::size_t bytes, off_t what) const {
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, what);
        if (at == MAP_FAILED) fail("mmap");
        return static_cast<char*>(at);
    }

    int fd_;
    unsigned pending_ = 0, sq_mask_, cq_mask_;
    unsigned *sq_tail_, *sq_array_, *cq_head_, *cq_tail_;
    io_uring_sqe* sqes_;
    io_uring_cqe* cqes_;
};

char* buffer(std::size_t bytes) { return static_cast<char*>(std::aligned_alloc(kPage, bytes)); }

double by_threads(int fd, const std::vector<off_t>& places, std::size_t bytes, unsigned count) {
    std::atomic<std::size_t> next{0};
    std::vector<std::thread> threads;
    const auto start = std::chrono::steady_clock::now();
    for (unsigned i = 0; i < count; ++i)
        threads.emplace_back([&] {
            char* to = buffer(bytes);
            for (std::size_t n; (n = next.fetch_add(1)) < places.size();)
                if (pread(fd, to, bytes, places[n]) != ssize_t(bytes)) fail("pread");
            std::free(to);
        });
    for (auto& thread : threads) thread.join();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
}

double by_ring(int fd, const std::vector<off_t>& places, std::size_t bytes, unsigned depth) {
    Ring ring(depth);
    char* to = buffer(bytes * depth);
    std::size_t next = 0, ended = 0;
    const auto start = std::chrono::steady_clock::now();
    const auto submit = [&](unsigned slot) {
        if (next < places.size()) ring.read(fd, to + slot * bytes, bytes, places[next++], slot);
    };
    for (unsigned slot = 0; slot < depth; ++slot) submit(slot);
    while (ended < places.size())
        ring.wait(bytes, [&](unsigned slot) {
            ++ended;
            submit(slot);
        });
    const double took = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
    std::free(to);
    return took;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) return std::fprintf(stderr, "usage: local_reads FOLDER [MIB]\n"), 2;
    const std::size_t size = (argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 256) << 20;
    const std::string path = std::string(argv[1]) + "/local_reads.data";
    const int made = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (made < 0) fail(path.c_str());
    std::vector<char> chunk(1 << 20);
    std::mt19937_64 random(42);
    for (std::size_t at = 0; at < size; at += chunk.size()) {
        for (std::size_t i = 0; i < chunk.size(); i += 8) {
            const std::uint64_t word = random();
            std::memcpy(&chunk[i], &word, 8);
        }
        if (pwrite(made, chunk.data(), chunk.size(), off_t(at)) != ssize_t(chunk.size())) fail("pwrite");
    }
    fsync(made);
    const int direct = open(path.c_str(), O_RDONLY | O_DIRECT);
    const int cached = open(path.c_str(), O_RDONLY);
    unlink(path.c_str());

    struct Case {
        std::string name;
        bool ordered, ring, direct;
        unsigned width;
        std::vector<double> values{};
    };
    std::vector<Case> cases;
    for (const bool ordered : {false, true})
        for (const unsigned width : {1u, 4u, 8u, 16u})
            for (const bool ring : {false, true})
                for (const bool past : {false, true})
                    if (!past || direct >= 0)
                        cases.push_back({std::string(ordered ? "in order, " : "random,   ") +
                                             (ring ? "io_uring, depth " : "preadv, threads ") + std::to_string(width) +
                                             (past ? ", O_DIRECT" : ""),
                                         ordered, ring, past, width});
    for (int round = 0; round < 5; ++round)
        for (Case& each : cases) {
            const std::size_t bytes = each.ordered ? 64 * kPage : kPage;
            std::vector<off_t> places(size / bytes);
            for (std::size_t i = 0; i < places.size(); ++i) places[i] = off_t(i * bytes);
            if (!each.ordered) {
                std::shuffle(places.begin(), places.end(), random);
                places.resize(std::min<std::size_t>(places.size(), 4096));
            }
            const int fd = each.direct ? direct : cached;
            posix_fadvise(cached, 0, 0, POSIX_FADV_DONTNEED);
            posix_fadvise(cached, 0, 0, each.ordered ? POSIX_FADV_SEQUENTIAL : POSIX_FADV_RANDOM);
            const double took = (each.ring ? by_ring : by_threads)(fd, places, bytes, each.width);
            each.values.push_back(took * kPage / (double(places.size()) * double(bytes)));
        }
    for (Case& each : cases) {
        std::sort(each.values.begin(), each.values.end());
        std::printf("%-45s %8.2f\n", each.name.c_str(), each.values[each.values.size() / 2]);
    }
}
