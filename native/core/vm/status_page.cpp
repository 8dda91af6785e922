#include "vm/status_page.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace k42::vm {

SealedMemory make_sealed_memory(const char* name, size_t bytes) {
    const int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return {-1, nullptr};
    void* address = MAP_FAILED;
    if (ftruncate(fd, off_t(bytes)) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
        address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    if (address != MAP_FAILED) return {fd, address};
    const int error = errno;
    close(fd);
    errno = error;
    return {-1, nullptr};
}

SealedMemory adopt_sealed_memory(int fd, size_t bytes) {
    struct stat status;
    if (fstat(fd, &status) < 0) return {-1, nullptr};
    if (status.st_size != off_t(bytes) || !(fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK)) {
        errno = EINVAL;
        return {-1, nullptr};
    }
    void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return address == MAP_FAILED ? SealedMemory{-1, nullptr} : SealedMemory{fd, address};
}

std::unique_ptr<StatusPage> StatusPage::adopt(int fd) {
    const SealedMemory found = adopt_sealed_memory(fd, kBytes);
    if (found.fd < 0) return nullptr;
    std::unique_ptr<StatusPage> page(new StatusPage(fd, static_cast<FailureRecord*>(found.address)));
    page->next_ = (newest(found.address) + 1) / 2;
    return page;
}

std::unique_ptr<StatusPage> StatusPage::create() {
    const SealedMemory made = make_sealed_memory("k42-status", kBytes);
    if (made.fd < 0) return nullptr;
    return std::unique_ptr<StatusPage>(new StatusPage(made.fd, static_cast<FailureRecord*>(made.address)));
}

StatusPage::~StatusPage() {
    munmap(records_, kBytes);
    close(fd_);
}

void StatusPage::report(uint64_t address, uint64_t length, std::string_view reason) {
    while (writing_.test_and_set(std::memory_order_acquire)) sched_yield();
    const uint64_t sequence = 2 * ++next_;
    FailureRecord& record = records_[next_ % kRecords];
    record.sequence.store(sequence - 1, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    record.address = address;
    record.length = length;
    const size_t size = std::min(reason.size(), sizeof(record.reason) - 1);
    std::memcpy(record.reason, reason.data(), size);
    record.reason[size] = '\0';
    record.sequence.store(sequence, std::memory_order_release);
    writing_.clear(std::memory_order_release);
}

const FailureRecord* StatusPage::find(const void* page, uint64_t address) {
    const auto* records = static_cast<const FailureRecord*>(page);
    const FailureRecord* newest = nullptr;
    uint64_t newest_sequence = 0;
    for (size_t i = 0; i < kRecords; ++i) {
        const uint64_t sequence = records[i].sequence.load(std::memory_order_acquire);
        if (sequence & 1 || sequence <= newest_sequence) continue;
        const bool over = address - records[i].address < records[i].length;
        std::atomic_thread_fence(std::memory_order_acquire);
        if (!over || records[i].sequence.load(std::memory_order_relaxed) != sequence) continue;
        newest = &records[i];
        newest_sequence = sequence;
    }
    return newest;
}

uint64_t StatusPage::newest(const void* page) {
    const auto* records = static_cast<const FailureRecord*>(page);
    uint64_t newest = 0;
    for (size_t i = 0; i < kRecords; ++i)
        newest = std::max(newest, records[i].sequence.load(std::memory_order_acquire));
    return newest;
}

uint64_t StatusPage::copy_reason(const void* page, uint64_t address, char (&reason)[sizeof(FailureRecord::reason)]) {
    for (;;) {
        reason[0] = '\0';
        const FailureRecord* record = find(page, address);
        if (!record) return 0;
        const uint64_t sequence = record->sequence.load(std::memory_order_acquire);
        std::memcpy(reason, record->reason, sizeof reason);
        reason[sizeof reason - 1] = '\0';
        std::atomic_thread_fence(std::memory_order_acquire);
        // Else the kernel has written another over it: look again.
        if (!(sequence & 1) && record->sequence.load(std::memory_order_relaxed) == sequence) return sequence;
    }
}

}  // namespace k42::vm
