#include "vm/hat.hpp"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "runtime/retire.hpp"
#include "vm/region.hpp"

namespace k42::vm {

Hat::~Hat() {
    for (auto& [canonical, window] : listed_) delete window;
}

bool Hat::add_window(int cpu, uint64_t base, uint64_t length, uint64_t canonical, bool follows) {
    auto made = std::make_unique<Window>(cpu, base, length, canonical, follows);
    std::lock_guard guard(listed_lock_);
    if (!windows_.insert(base, base + length, made.get())) return false;
    listed_.insert({canonical, made.release()});
    return true;
}

bool Hat::remove_window(uint64_t base) {
    const auto found = windows_.remove(base);
    if (!found) return false;
    Window* const window = *found;
    {
        std::lock_guard guard(listed_lock_);
        for (auto [it, end] = listed_.equal_range(window->canonical); it != end; ++it) {
            if (it->second != window) continue;
            listed_.erase(it);
            break;
        }
    }
    removed(*window);
    runtime::retire(window);
    return true;
}

std::optional<uint64_t> Hat::canonical(int cpu, uint64_t address) const {
    runtime::Processor& processor = runtime::current();
    runtime::enter(processor);
    const Window* found = window(cpu, address);
    const auto shown = found ? std::optional(found->canonical + (address - found->base)) : std::nullopt;
    (void)runtime::leave(processor);
    return shown;
}

UffdHat::~UffdHat() {
    for (Descriptor& descriptor : fds_) {
        if (descriptor.fd >= 0) close(descriptor.fd);
    }
}

bool UffdHat::attach(int cpu, int uffd) {
    int none = -1;
    return fds_[cpu].fd.compare_exchange_strong(none, uffd, std::memory_order_acq_rel);
}

bool UffdHat::follow(const Window& window, int cpu, uint64_t address, int place, uint64_t now_ns) {
    if (!window.spans) return false;
    const uint32_t now = Spans::tick(now_ns);
    if (window.spans->note(address, now) && spans_.fetch_add(1, std::memory_order_relaxed) >= most_spans_) {
        unmap_idle(now);
    }
    if (place < 0 || place == cpu || descriptor(place) < 0 || window.spans->rests(address, now)) return false;
    std::optional<SpanMove> move;
    {
        std::lock_guard guard(homing_lock_);
        move = window.spans->follow(address, cpu, place, now, ranges_, kMostRanges);
    }
    if (!move) return false;
    commands_->post({Command::What::rehome, uint16_t(move->from), uint16_t(move->to), move->address, move->length});
    return true;
}

// The page tables of a span without faults go: the range is remapped where it is, which, unlike MADV_DONTNEED, also
// removes the marks of write-protected pages. A bounded search at each new span, so that memory which is mapped faster
// than it gets idle is no reason to search for long.
void UffdHat::unmap_idle(uint32_t now) {
    constexpr uint32_t kSteps = 256;
    std::vector<SpanMove> idle;
    {
        std::lock_guard guard(homing_lock_);
        std::lock_guard listed(listed_lock_);
        uint32_t steps = kSteps;
        for (size_t windows = listed_.size() + 1; windows > 0 && steps > 0 && !listed_.empty(); --windows) {
            auto at = listed_.lower_bound(idle_hand_);
            if (at == listed_.end()) at = listed_.begin();
            Spans* spans = at->second->spans.get();
            idle_hand_ = at->first;
            while (spans && steps > 0) {
                const auto range = spans->idle(now, steps);
                if (!range) break;
                idle.push_back(*range);
            }
            if (steps > 0) ++idle_hand_;
        }
    }
    for (const SpanMove& range : idle) {
        spans_.fetch_sub((range.address + range.length - 1) / kSpan - range.address / kSpan + 1,
                         std::memory_order_relaxed);
        commands_->post({Command::What::rehome, uint16_t(range.from), uint16_t(range.to), range.address, range.length});
    }
}

void UffdHat::removed(const Window& window) {
    if (!window.spans) return;
    std::lock_guard guard(homing_lock_);
    window.spans->end();
    ranges_ -= window.spans->splits();
    spans_.fetch_sub(window.spans->mapped(), std::memory_order_relaxed);
}

// Calls `call` on parts of the range that each lie in one span: spans may be of different userfaultfds, and Linux then
// takes no range across. It takes any of the client's userfaultfds for any of them.
template <class Call>
static RangeResult by_span(uint64_t address, uint64_t length, Call call) {
    uint64_t done = 0;
    while (done < length) {
        const uint64_t at = address + done;
        const uint64_t part = std::min(length - done, kSpan - at % kSpan);
        const RangeResult result = call(at, part);
        done += result.done;
        if (result.error) return {done, result.error};
    }
    return {done, 0};
}

RangeResult UffdHat::map(int cpu, uint64_t address, uint64_t length, bool writable) {
    return by_span(address, length,
                   [&](uint64_t at, uint64_t part) { return continue_range(descriptor(cpu), at, part, writable); });
}

RangeResult UffdHat::allow_write(int cpu, uint64_t address, uint64_t length) {
    const int error = protect_range(descriptor(cpu), address, length, false);
    return {error ? 0 : length, error};
}

// What of the pages a region shows, in one of its windows.
static SpanMove shown_part(const Window& window, const Region& region, uint64_t first_page, uint64_t count) {
    const uint64_t from = std::max(first_page, region.first_page);
    const uint64_t to = std::min(first_page + count, region.first_page + region.pages);
    if (from >= to) return {0, 0, window.cpu, window.cpu};
    return {window.base + (from - region.first_page) * kPageSize, (to - from) * kPageSize, window.cpu, window.cpu};
}

bool UffdHat::protect(const Region& region, uint64_t first_page, uint64_t count, uint32_t used) {
    bool safe = true;
    each_window(region.start, [&](const Window& window) {
        const SpanMove part = shown_part(window, region, first_page, count);
        if (!part.length || !may_have_used(window, used)) return;
        // Any of the client's userfaultfds does it, for spans of all of them.
        const int error = protect_range(descriptor(window.cpu), part.address, part.length, true);
        // Gone, the window or the whole process: nobody writes there any more.
        if (error && error != ENOENT && error != ESRCH) safe = false;
    });
    return safe;
}

void UffdHat::soft_unmap(const Region& region, uint64_t first_page, uint64_t count, uint32_t used) {
    each_window(region.start, [&](const Window& window) {
        const SpanMove part = shown_part(window, region, first_page, count);
        if (!part.length || !may_have_used(window, used)) return;
        commands_->post({Command::What::soft_unmap, uint16_t(part.from), uint16_t(part.to), part.address, part.length});
    });
}

RangeResult UffdHat::zero(int cpu, uint64_t address, uint64_t length, int, uint64_t) {
    return by_span(address, length, [&](uint64_t at, uint64_t part) { return zero_range(descriptor(cpu), at, part); });
}

void UffdHat::wake(int cpu, uint64_t address, uint64_t length) { wake_range(descriptor(cpu), address, length); }

void UffdHat::wake_everywhere(uint64_t address, uint64_t length) {
    for (int cpu = 0; cpu < cpus(); ++cpu) {
        if (descriptor(cpu) >= 0) wake(cpu, address, length);
    }
}

void UffdHat::fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) {
    status_->report(address, length, reason);
    poison_range(descriptor(cpu), address, length);
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

bool SoftHat::protect(const Region& region, uint64_t first_page, uint64_t count, uint32_t) {
    std::lock_guard guard(lock_);
    for (uint64_t page = std::max(first_page, region.first_page); page < first_page + count; ++page) {
        const auto found = mapped_.find(region.start + (page - region.first_page) * kPageSize);
        if (found != mapped_.end() && page - region.first_page < region.pages) found->second = false;
    }
    return true;
}

void SoftHat::soft_unmap(const Region& region, uint64_t first_page, uint64_t count, uint32_t) {
    for (uint64_t page = std::max(first_page, region.first_page); page < first_page + count; ++page) {
        if (page - region.first_page < region.pages) unmapped(region, page);
    }
}

RangeResult SoftHat::zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) {
    if (fallocate(memfd, 0, off_t(offset), off_t(length)) < 0) return {0, errno};
    insert(cpu, address, length, true);
    return {length, 0};
}

void SoftHat::wake_everywhere(uint64_t address, uint64_t length) { wake(0, address, length); }

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
