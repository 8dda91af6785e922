#include "vm/hat.hpp"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

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

RangeResult UffdHat::map(int cpu, uint64_t address, uint64_t length) {
    return continue_range(fds_[cpu], address, length);
}

RangeResult UffdHat::zero(int cpu, uint64_t address, uint64_t length, int, uint64_t) {
    return zero_range(fds_[cpu], address, length);
}

void UffdHat::wake(int cpu, uint64_t address, uint64_t length) { wake_range(fds_[cpu], address, length); }

void UffdHat::fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) {
    status_->report(address, length, reason);
    poison_range(fds_[cpu], address, length);
    wake(cpu, address, length);
}

void SoftHat::insert(int cpu, uint64_t address, uint64_t length) {
    const auto start = canonical(cpu, address);
    std::lock_guard guard(lock_);
    for (uint64_t done = 0; start && done < length; done += kPageSize) mapped_.insert(*start + done);
}

RangeResult SoftHat::map(int cpu, uint64_t address, uint64_t length) {
    insert(cpu, address, length);
    return {length, 0};
}

RangeResult SoftHat::zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) {
    if (fallocate(memfd, 0, off_t(offset), off_t(length)) < 0) return {0, errno};
    insert(cpu, address, length);
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

std::vector<uint64_t> SoftHat::mapped() const {
    std::lock_guard guard(lock_);
    return {mapped_.begin(), mapped_.end()};
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
