#include "vm/hat.hpp"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "vm/region.hpp"

namespace k42::vm {

UffdHat::~UffdHat() {
    for (int fd : fds_) {
        if (fd >= 0) close(fd);
    }
}

bool UffdHat::attach(int cpu, int uffd) {
    if (fds_[cpu] >= 0) return false;
    fds_[cpu] = uffd;
    return true;
}

RangeResult UffdHat::map(int cpu, uint64_t address, uint64_t length, bool writable) {
    return continue_range(fds_[cpu], address, length, writable);
}

RangeResult UffdHat::allow_write(int cpu, uint64_t address, uint64_t length) {
    const int error = protect_range(fds_[cpu], address, length, false);
    return {error ? 0 : length, error};
}

bool UffdHat::protect(const Region& region, uint64_t first_page, uint64_t count) {
    const uint64_t from = std::max(first_page, region.first_page);
    const uint64_t to = std::min(first_page + count, region.first_page + region.pages);
    if (from >= to) return true;
    for (const Window& window : windows_of(region.start)) {
        const uint64_t start = window.base + (from - region.first_page) * kPageSize;
        const int error = protect_range(fds_[window.cpu], start, (to - from) * kPageSize, true);
        // Gone, the window or the whole process: nobody writes there any more.
        if (error && error != ENOENT && error != ESRCH) return false;
    }
    return true;
}

void UffdHat::soft_unmap(const Region&, uint64_t, uint64_t) {}

RangeResult UffdHat::zero(int cpu, uint64_t address, uint64_t length, int, uint64_t) {
    return zero_range(fds_[cpu], address, length);
}

void UffdHat::wake(int cpu, uint64_t address, uint64_t length) { wake_range(fds_[cpu], address, length); }

void UffdHat::fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) {
    status_->report(address, length, reason);
    poison_range(fds_[cpu], address, length);
    wake(cpu, address, length);
}

void SoftHat::insert(int cpu, uint64_t address, uint64_t length, bool writable) {
    const auto start = canonical(cpu, address);
    std::lock_guard guard(lock_);
    for (uint64_t done = 0; start && done < length; done += kPageSize) mapped_[*start + done] = writable;
}

RangeResult SoftHat::map(int cpu, uint64_t address, uint64_t length, bool writable) {
    insert(cpu, address, length, writable);
    return {length, 0};
}

RangeResult SoftHat::allow_write(int cpu, uint64_t address, uint64_t length) {
    insert(cpu, address, length, true);
    return {length, 0};
}

bool SoftHat::protect(const Region& region, uint64_t first_page, uint64_t count) {
    std::lock_guard guard(lock_);
    for (uint64_t page = std::max(first_page, region.first_page); page < first_page + count; ++page) {
        const auto found = mapped_.find(region.start + (page - region.first_page) * kPageSize);
        if (found != mapped_.end() && page - region.first_page < region.pages) found->second = false;
    }
    return true;
}

void SoftHat::soft_unmap(const Region& region, uint64_t first_page, uint64_t count) {
    for (uint64_t page = std::max(first_page, region.first_page); page < first_page + count; ++page) {
        if (page - region.first_page < region.pages) unmapped(region, page);
    }
}

RangeResult SoftHat::zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) {
    if (fallocate(memfd, 0, off_t(offset), off_t(length)) < 0) return {0, errno};
    insert(cpu, address, length, true);
    return {length, 0};
}

void SoftHat::wake(int, uint64_t, uint64_t) {
    std::lock_guard guard(lock_);
    ++wakes_;
}

void SoftHat::fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) {
    const auto start = canonical(cpu, address);
    std::lock_guard guard(lock_);
    for (uint64_t done = 0; done < length; done += kPageSize) failed_[start.value_or(address) + done] = reason;
}

void SoftHat::unmapped(const Region& region, uint64_t page) {
    std::lock_guard guard(lock_);
    mapped_.erase(region.start + (page - region.first_page) * kPageSize);
}

bool SoftHat::is_mapped(uint64_t canonical_address) const {
    std::lock_guard guard(lock_);
    return mapped_.count(canonical_address) != 0;
}

bool SoftHat::is_writable(uint64_t canonical_address) const {
    std::lock_guard guard(lock_);
    const auto found = mapped_.find(canonical_address);
    return found != mapped_.end() && found->second;
}

std::vector<uint64_t> SoftHat::mapped() const {
    std::lock_guard guard(lock_);
    std::vector<uint64_t> addresses;
    for (const auto& [address, writable] : mapped_) addresses.push_back(address);
    return addresses;
}

std::map<uint64_t, std::string> SoftHat::failed() const {
    std::lock_guard guard(lock_);
    return failed_;
}

uint64_t SoftHat::wakes() const {
    std::lock_guard guard(lock_);
    return wakes_;
}

}  // namespace k42::vm
