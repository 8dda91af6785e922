// One page that the kernel writes and one client reads: why accesses were ended. The client's SIGBUS handler
// prints it, where neither locks nor memory allocation nor the socket can be used.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string_view>

namespace k42::vm {

struct FailureRecord {
    std::atomic<uint64_t> sequence;  // 0: never written; odd: being written
    uint64_t address;
    uint64_t length;
    char reason[232];
};

// Shared memory that the kernel writes and a client reads: sealed in size, since a client that shrank it would kill
// the kernel at its next write. fd -1 with errno set when it is not to be had.
struct SealedMemory {
    int fd;
    void* address;
};
SealedMemory make_sealed_memory(const char* name, size_t bytes);
// The same of memory that a kernel made which has gone; takes the descriptor over if it succeeds.
SealedMemory adopt_sealed_memory(int fd, size_t bytes);

class StatusPage {
  public:
    static constexpr size_t kRecords = 16;
    static constexpr size_t kBytes = kRecords * sizeof(FailureRecord);

    // The kernel's side: a new sealed memfd; nullptr with errno set. The descriptor stays the object's.
    static std::unique_ptr<StatusPage> create();
    // The one that a kernel left which has gone; takes the descriptor over. nullptr with errno set.
    static std::unique_ptr<StatusPage> adopt(int fd);
    ~StatusPage();
    StatusPage(const StatusPage&) = delete;
    StatusPage& operator=(const StatusPage&) = delete;

    int descriptor() const { return fd_; }
    void report(uint64_t address, uint64_t length, std::string_view reason);

    // The client's side: the newest record over `address` in the mapped page; safe in a signal handler.
    static const FailureRecord* find(const void* page, uint64_t address);
    // The sequence of the newest record; 0 when there is none.
    static uint64_t newest(const void* page);
    // Copies the reason of the newest record over `address`, and returns its sequence; 0 when there is none.
    static uint64_t copy_reason(const void* page, uint64_t address, char (&reason)[sizeof(FailureRecord::reason)]);

  private:
    StatusPage(int fd, FailureRecord* records) : fd_(fd), records_(records) {}

    int fd_;
    FailureRecord* records_;
    std::atomic_flag writing_;  // protects records_ and next_; a leaf, held for one record
    uint64_t next_ = 0;
};

static_assert(StatusPage::kBytes == 4096);

}  // namespace k42::vm
