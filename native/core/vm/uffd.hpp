// userfaultfd: the constants that older headers lack, and its calls with their partial results and retries.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/types.h>

#include <cstdint>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_POISON
#define UFFD_FEATURE_POISON (1 << 14)
#endif
#ifndef _UFFDIO_POISON
#define _UFFDIO_POISON 0x08
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)
#endif

namespace k42::vm {

constexpr uint64_t kPageSize = 4096;  // the unit of userfaultfd on x86-64 and of everything here

// What an ioctl on a range did: bytes done from its start, and the errno that stopped it (0: all done).
struct RangeResult {
    uint64_t done;
    int error;
};

// A new userfaultfd of the calling process, non-blocking, with the features that k42 needs; or -errno.
// `user_mode_only`: faults from within system calls are not handled, and no privilege is needed.
int open_userfaultfd(bool user_mode_only);

// Registers the range for MISSING and MINOR faults, and for writes to write-protected pages where they are `tracked`;
// 0 or errno.
int register_range(int uffd, uint64_t start, uint64_t length, bool tracked);

// Maps pages that are in the memfd (MINOR), and wakes who waits for them. Not `writable`: the next write is a fault,
// in a range whose writes are tracked.
RangeResult continue_range(int uffd, uint64_t start, uint64_t length, bool writable);

// Makes the next write to each page of the range a fault (`on`), or lets writes pass and wakes who waits; 0 or errno.
int protect_range(int uffd, uint64_t start, uint64_t length, bool on);

// Makes zero pages in the memfd, maps them, and wakes who waits for them.
RangeResult zero_range(int uffd, uint64_t start, uint64_t length);

// Makes accesses to the range raise SIGBUS, and wakes who waits for it.
RangeResult poison_range(int uffd, uint64_t start, uint64_t length);

// Reads at most `count` messages; how many, or -1 with errno set. Never waits, though the client can make its
// descriptor, and so ours, a blocking one at any time.
ssize_t read_messages(int uffd, uffd_msg* messages, size_t count);

// Reads what waits, which ends the events (a thread that moves a mapping waits for that, and until then ioctls on
// the userfaultfd get EAGAIN), and lets the faults that it read happen again.
void drain(int uffd);

// Lets the faults on the range happen again.
void wake_range(int uffd, uint64_t start, uint64_t length);

}  // namespace k42::vm
