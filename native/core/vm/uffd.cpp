#include "vm/uffd.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFDIO_CONTINUE_MODE_WP
#define UFFDIO_CONTINUE_MODE_WP (1ull << 1)
#endif

namespace k42::vm {

namespace {

int raw_userfaultfd(bool user_mode_only) {
    const int flags = O_CLOEXEC | O_NONBLOCK;
    if (user_mode_only) return int(syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY));
    const int fd = int(syscall(SYS_userfaultfd, flags));
    if (fd >= 0 || errno != EPERM) return fd;
    // Access to the device node is the other way to the full mode.
    const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0) {
        errno = EPERM;
        return -1;
    }
    const int made = ioctl(device, USERFAULTFD_IOC_NEW, flags);
    const int error = errno;
    close(device);
    errno = error;
    return made;
}

// How often an ioctl is tried while Linux says EAGAIN. A move of the agent's is over in one or two; a hostile client
// can go on for ever, and is told to fault again.
constexpr int kTries = 1000;

// An ioctl on a range, repeated on the rest of it while Linux says EAGAIN: the address space is changing under it. The
// event of that change may wait to be read, perhaps by this thread, or by one that waits for a lock that this one
// holds: so it is read here. `progress` is where the ioctl's argument says how far it came.
template <class Request, class Count>
RangeResult on_range(int uffd, unsigned long call, Count Request::* progress, uint64_t start, uint64_t length,
                     uint64_t mode = 0) {
    uint64_t done = 0;
    for (int tries = 0;;) {
        Request request{};
        request.range = {start + done, length - done};
        request.mode = mode;
        const int error = ioctl(uffd, call, &request) < 0 ? errno : 0;
        const auto count = int64_t(request.*progress);  // negative where nothing was done
        if (count > 0) done += uint64_t(count);
        if (error == 0 || done >= length) return {length, 0};
        if (error != EAGAIN) return {done, error};
        if (count > 0) continue;
        if (++tries == kTries) return {done, error};
        drain(uffd);
        sched_yield();
    }
}

}  // namespace

int open_userfaultfd(bool user_mode_only) {
    const int fd = raw_userfaultfd(user_mode_only);
    if (fd < 0) return -errno;
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_THREAD_ID |
                   UFFD_FEATURE_POISON | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_PAGEFAULT_FLAG_WP |
                   UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    if (ioctl(fd, UFFDIO_API, &api) < 0) {
        close(fd);
        return -EOPNOTSUPP;  // EINVAL here means that a feature is missing
    }
    return fd;
}

int register_range(int uffd, uint64_t start, uint64_t length, bool tracked) {
    uffdio_register request{};
    request.range = {start, length};
    request.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR;
    if (tracked) request.mode |= UFFDIO_REGISTER_MODE_WP;
    return ioctl(uffd, UFFDIO_REGISTER, &request) < 0 ? errno : 0;
}

RangeResult continue_range(int uffd, uint64_t start, uint64_t length, bool writable) {
    const uint64_t mode = writable ? 0 : UFFDIO_CONTINUE_MODE_WP;
    return on_range(uffd, UFFDIO_CONTINUE, &uffdio_continue::mapped, start, length, mode);
}

int protect_range(int uffd, uint64_t start, uint64_t length, bool on) {
    for (int tries = 0;;) {
        uffdio_writeprotect request{};
        request.range = {start, length};
        request.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
        if (ioctl(uffd, UFFDIO_WRITEPROTECT, &request) == 0) return 0;
        if (errno != EAGAIN || ++tries == kTries) return errno;
        drain(uffd);
        sched_yield();
    }
}

RangeResult zero_range(int uffd, uint64_t start, uint64_t length) {
    return on_range(uffd, UFFDIO_ZEROPAGE, &uffdio_zeropage::zeropage, start, length);
}

RangeResult poison_range(int uffd, uint64_t start, uint64_t length) {
    return on_range(uffd, UFFDIO_POISON, &uffdio_poison::updated, start, length);
}

ssize_t read_messages(int uffd, uffd_msg* messages, size_t count) {
    iovec whole{messages, count * sizeof(uffd_msg)};
    ssize_t size = preadv2(uffd, &whole, 1, -1, RWF_NOWAIT);
    if (size < 0 && errno == EOPNOTSUPP) size = read(uffd, messages, count * sizeof(uffd_msg));  // before Linux 6.10
    return size < 0 ? size : size / ssize_t(sizeof(uffd_msg));
}

void drain(int uffd) {
    uffd_msg messages[16];
    const ssize_t count = read_messages(uffd, messages, 16);
    for (ssize_t i = 0; i < count; ++i) {
        if (messages[i].event == UFFD_EVENT_FORK) close(int(messages[i].arg.fork.ufd));  // asked for by none of ours
        if (messages[i].event != UFFD_EVENT_PAGEFAULT) continue;
        wake_range(uffd, messages[i].arg.pagefault.address & ~(kPageSize - 1), kPageSize);
    }
}

void wake_range(int uffd, uint64_t start, uint64_t length) {
    uffdio_range range{start, length};
    ioctl(uffd, UFFDIO_WAKE, &range);
}

}  // namespace k42::vm
