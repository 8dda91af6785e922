#include "vm/bare.hpp"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

namespace k42::vm {

namespace {

int checked(int result, const char* what) {
    if (result < 0) throw std::system_error(errno, std::generic_category(), what);
    return result;
}

// Faults of user mode are all that the yardstick has, and they need no privilege.
int open_blocking_userfaultfd() {
    return checked(int(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY)), "userfaultfd");
}

// A server that cannot serve leaves its client asleep for ever: better that the experiment ends here.
[[noreturn]] void give_up(const char* what) {
    std::perror(what);
    std::abort();
}

std::uint64_t now() {
    return std::uint64_t(std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

}  // namespace

Descriptor::~Descriptor() { close(fd_); }

BareWindow::BareWindow(int cpu, std::size_t bytes, std::size_t block, bool resident)
    : bytes_(bytes),
      block_(block),
      mapped_((bytes + block - 1) / block * block + block),
      memfd_(checked(memfd_create("k42-bare", MFD_CLOEXEC), "memfd_create")),
      uffd_(open_blocking_userfaultfd()) {
    map(resident);
    // The interpreter's threads take the signals, not the server.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    server_ = std::thread([this] { serve(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(cpu, &cpus);
    if (const int error = pthread_setaffinity_np(server_.native_handle(), sizeof(cpus), &cpus)) {
        stop();
        throw std::system_error(error, std::generic_category(), "pthread_setaffinity_np");
    }
}

BareWindow::~BareWindow() { stop(); }

void BareWindow::map(bool resident) {
    checked(ftruncate(memfd_.get(), off_t(mapped_)), "ftruncate");
    const auto shared = [this] {
        void* address = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_SHARED, memfd_.get(), 0);
        if (address == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
        return address;
    };
    if (resident) {
        void* filler = shared();
        std::memset(filler, 1, mapped_);
        munmap(filler, mapped_);
    }
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM;
    checked(ioctl(uffd_.get(), UFFDIO_API, &api), "UFFDIO_API");
    base_ = static_cast<std::byte*>(shared());
    uffdio_register registration{};
    registration.range = {reinterpret_cast<std::uintptr_t>(base_), mapped_};
    registration.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR;
    if (ioctl(uffd_.get(), UFFDIO_REGISTER, &registration) < 0) {
        const int error = errno;
        munmap(base_, mapped_);
        throw std::system_error(error, std::generic_category(), "UFFDIO_REGISTER");
    }
}

void BareWindow::serve() {
    const auto base = reinterpret_cast<std::uintptr_t>(base_);
    const std::uint64_t last = base + mapped_ - block_;
    for (;;) {
        uffd_msg message;
        if (read(uffd_.get(), &message, sizeof(message)) != ssize_t(sizeof(message))) {
            if (errno == EINTR || errno == EAGAIN) continue;
            give_up("reading the userfaultfd");
        }
        const std::uint64_t offset = message.arg.pagefault.address - base;
        const std::uint64_t start = base + offset / block_ * block_;
        // Counted before the page is there: who has touched it finds it counted.
        if (start != last) faults_.store(faults() + 1, std::memory_order_relaxed);
        int result;
        if (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) {
            uffdio_continue request{};
            request.range = {start, block_};
            result = ioctl(uffd_.get(), UFFDIO_CONTINUE, &request);
        } else {
            uffdio_zeropage request{};
            request.range = {start, block_};
            result = ioctl(uffd_.get(), UFFDIO_ZEROPAGE, &request);
        }
        if (result < 0) {
            // A fault that a signal interrupted is sent again, when its pages may be there already.
            uffdio_range range{start, block_};
            if (errno != EEXIST || ioctl(uffd_.get(), UFFDIO_WAKE, &range) < 0) give_up("serving a fault");
        }
        if (start == last) return;
    }
}

// Nothing but a fault ends the server's read: so it gets one, in a block that is kept for this.
void BareWindow::stop() {
    volatile std::byte* end = base_ + mapped_ - block_;
    *end = std::byte{1};
    server_.join();
    munmap(base_, mapped_);
}

double touch(std::byte* data, std::size_t bytes, std::size_t stride, bool write, std::uint64_t start) {
    volatile std::byte* bytes_of = data;
    while (now() < start) {
    }
    const std::uint64_t begin = now();
    for (std::size_t i = 0; i < bytes; i += stride) {
        if (write) {
            bytes_of[i] = std::byte{1};
        } else {
            static_cast<void>(bytes_of[i]);
        }
    }
    return double(now() - begin) * 1e-9;
}

Visit visit_pages(std::byte* data, std::size_t bytes, std::uint64_t count, std::uint64_t seed, std::uint64_t stamp) {
    constexpr std::size_t page = 4096;
    const std::uint64_t pages = bytes / page;
    Visit visit{0, 0};
    std::uint64_t random = seed;
    const std::uint64_t begin = now();
    for (std::uint64_t i = 0; i < count; ++i) {
        std::uint64_t number = i % pages;
        if (seed) {
            // xorshift64: Marsaglia, Xorshift RNGs, 2003.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            number = random % pages;
        }
        auto* words = reinterpret_cast<volatile std::uint64_t*>(data + number * page);
        // A write is the first touch: so it is one fault, as in a program that only writes.
        if (stamp) words[1] = stamp;
        visit.wrong += words[0] != number;
    }
    visit.seconds = double(now() - begin) * 1e-9;
    return visit;
}

}  // namespace k42::vm
