// The yardstick of the experiments: the least that a page fault served in user space can cost. One
// userfaultfd, one server thread on the CPU that faults, and nothing on the way from one to the other.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

namespace k42::vm {

// Owns a file descriptor.
class Descriptor {
  public:
    explicit Descriptor(int fd) : fd_(fd) {}
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return fd_; }

  private:
    const int fd_;
};

// Memory whose faults a server thread of its own takes, `block` bytes at a time.
class BareWindow {
  public:
    // `bytes` and `block` are multiples of the page size. With `resident` every frame is there, and a fault
    // only maps it (UFFDIO_CONTINUE); else a fault makes a page of zeros first (UFFDIO_ZEROPAGE). The server
    // runs on `cpu`. Throws std::system_error when Linux refuses any of it.
    BareWindow(int cpu, std::size_t bytes, std::size_t block, bool resident);
    ~BareWindow();
    BareWindow(const BareWindow&) = delete;
    BareWindow& operator=(const BareWindow&) = delete;

    std::byte* data() const { return base_; }
    std::size_t size() const { return bytes_; }
    std::uint64_t faults() const { return faults_.load(std::memory_order_relaxed); }  // served so far

  private:
    void map(bool resident);
    void serve();
    void stop();

    const std::size_t bytes_;
    const std::size_t block_;
    const std::size_t mapped_;  // rounded to blocks, and one more: see stop()
    const Descriptor memfd_;
    const Descriptor uffd_;
    std::byte* base_ = nullptr;
    std::atomic<std::uint64_t> faults_{0};  // written by the server alone
    std::thread server_;
};

// Waits until `start` (ns, CLOCK_MONOTONIC) without giving up the CPU, so that threads begin at one moment;
// then touches one byte every `stride` bytes. Returns the seconds that the touching took.
double touch(std::byte* data, std::size_t bytes, std::size_t stride, bool write, std::uint64_t start);

// Visits pages of memory in which each page begins with its number (64 bits): checks that number, and with a `stamp`
// that is not 0 writes it into the 64 bits behind. `count` of them, at random from `seed`; with the seed 0 in their
// order, from the first on.
struct Visit {
    double seconds;
    std::uint64_t wrong;  // pages that began with something else
};
Visit visit_pages(std::byte* data, std::size_t bytes, std::uint64_t count, std::uint64_t seed, std::uint64_t stamp);

}  // namespace k42::vm
