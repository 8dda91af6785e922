#include "vm/affinity.hpp"

#include <dirent.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>

namespace k42::vm {

namespace {

bool only(const cpu_set_t& mask, int cpu) { return CPU_COUNT(&mask) == 1 && CPU_ISSET(cpu, &mask); }

// The number given last to a thread or process: the last field of /proc/loadavg.
pid_t newest_task() {
    FILE* file = fopen("/proc/loadavg", "re");
    if (!file) return 0;
    pid_t newest = 0;
    if (fscanf(file, "%*s %*s %*s %*s %d", &newest) != 1) newest = 0;
    fclose(file);
    return newest;
}

// The CPU on which the thread last ran; -1: it is not one of this process.
int last_cpu(pid_t pid, pid_t tid) {
    char text[1024];
    snprintf(text, sizeof text, "/proc/%d/task/%d/stat", pid, tid);
    FILE* file = fopen(text, "re");
    if (!file) return -1;
    const size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = 0;
    // The name, in parentheses, may have any characters; the CPU is the 37th word after it.
    const char* at = strrchr(text, ')');
    for (int word = 0; at && word < 37; ++word) at = strchr(at + 1, ' ');
    return at ? atoi(at) : -1;
}

}  // namespace

Placement::Place Placement::place(pid_t pid, pid_t tid, int here, Hold hold, uint64_t now) {
    std::lock_guard guard(lock_);
    if (const auto found = held_.find(tid); found != held_.end()) return {found->second->place, found->second, false};
    cpu_set_t own;
    if (sched_getaffinity(tid, sizeof own, &own) != 0) return {-1, nullptr, false};
    if (CPU_COUNT(&own) == 1) {  // its program has decided
        for (size_t i = 0; i < cpus_.size(); ++i) {
            if (CPU_ISSET(cpus_[i], &own)) return {int(i), nullptr, false};
        }
        return {-1, nullptr, false};
    }
    const int place = hold != Hold::nowhere ? choose(own, pid, tid, here, hold) : -1;
    if (place < 0) return {-1, nullptr, false};
    auto held = std::make_shared<Held>();
    held->pid = pid;
    held->tid = tid;
    held->place = place;
    held->own = own;
    held->newest = newest_task();
    held->last.store(now, std::memory_order_relaxed);
    if (records_) {
        if (free_records_.empty()) return {-1, nullptr, false};
        held->record = free_records_.back();
        held->record->pid = pid;
        held->record->cpu = cpus_[size_t(place)];
        held->record->newest = held->newest;
        held->record->own = own;
        held->record->tid.store(tid, std::memory_order_release);
        free_records_.pop_back();
    }
    cpu_set_t there;
    CPU_ZERO(&there);
    CPU_SET(cpus_[place], &there);
    if (sched_setaffinity(tid, sizeof there, &there) != 0) {
        forget_record(*held);
        return {-1, nullptr, false};
    }
    held_[tid] = held;
    ++count_[place];
    return {place, held, true};
}

int Placement::choose(const cpu_set_t& own, pid_t pid, pid_t tid, int here, Hold hold) const {
    // The number comes from Linux, but as its process numbers threads: make sure it is that process's thread here.
    const int last = last_cpu(pid, tid);
    if (last < 0) return -1;
    const auto allowed = [&](size_t i) { return CPU_ISSET(cpus_[i], &own); };
    if (hold == Hold::here) return allowed(size_t(here)) ? here : -1;
    int chosen = -1;
    const auto rank = [&](int i) { return std::tuple(count_[i], i != here, cpus_[i] != last); };
    for (size_t i = 0; i < cpus_.size(); ++i) {
        if (allowed(i) && (chosen < 0 || rank(int(i)) < rank(chosen))) chosen = int(i);
    }
    return chosen;
}

void Placement::forget(const std::shared_ptr<Held>& held) {
    held->active.store(false, std::memory_order_relaxed);
    forget_record(*held);
    --count_[held->place];
    held_.erase(held->tid);
}

void Placement::forget_record(Held& held) {
    if (!held.record) return;
    held.record->tid.store(0, std::memory_order_release);
    free_records_.push_back(held.record);
    held.record = nullptr;
}

Placement::~Placement() {
    release_all();
    if (records_) munmap(records_, kRecordBytes);
}

int Placement::keep_records(int memfd) {
    if (ftruncate(memfd, kRecordBytes) < 0) return -1;
    void* memory = mmap(nullptr, kRecordBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (memory == MAP_FAILED) return -1;
    std::lock_guard guard(lock_);
    records_ = static_cast<HeldRecord*>(memory);
    int given_back = 0;
    for (size_t i = kRecords; i-- > 0;) {
        HeldRecord& record = records_[i];
        free_records_.push_back(&record);
        const pid_t tid = record.tid.load(std::memory_order_acquire);
        const auto place = std::find(cpus_.begin(), cpus_.end(), record.cpu);
        if (tid == 0) continue;
        if (place != cpus_.end() && last_cpu(record.pid, tid) >= 0) {  // it is that process's thread still
            Held held{};
            held.pid = record.pid;
            held.tid = tid;
            held.place = int(place - cpus_.begin());
            held.own = record.own;
            held.newest = record.newest;
            give_back(held);
            ++given_back;
        }
        record.tid.store(0, std::memory_order_release);
    }
    return given_back;
}

bool Placement::still_held(const std::shared_ptr<Held>& held) {
    std::lock_guard guard(lock_);
    cpu_set_t mask;
    if (!held->active.load(std::memory_order_relaxed)) return false;
    if (sched_getaffinity(held->tid, sizeof mask, &mask) == 0 && only(mask, cpus_[held->place])) return true;
    forget(held);
    return false;
}

void Placement::release(const std::shared_ptr<Held>& held, uint64_t now, uint64_t idle) {
    std::lock_guard guard(lock_);
    if (!held->active.load(std::memory_order_relaxed)) return;
    // Another server's clock reading may be newer than ours.
    if (int64_t(now - held->last.load(std::memory_order_relaxed)) < int64_t(idle)) return;
    give_back(*held);
    forget(held);
}

void Placement::release_all() {
    std::lock_guard guard(lock_);
    while (!held_.empty()) {
        const std::shared_ptr<Held> held = held_.begin()->second;
        give_back(*held);
        forget(held);
    }
}

void Placement::give_back(const Held& held) const {
    widen(held.tid, held);
    const pid_t newest = newest_task();
    if (newest != held.newest) widen_newer(held.pid, held, newest);
}

void Placement::widen(pid_t task, const Held& holder) const {
    cpu_set_t mask;
    // A mask that the program changed meanwhile is left alone.
    if (sched_getaffinity(task, sizeof mask, &mask) == 0 && only(mask, cpus_[holder.place])) {
        sched_setaffinity(task, sizeof holder.own, &holder.own);
    }
}

void Placement::widen_newer(pid_t pid, const Held& holder, pid_t newest) const {
    // Numbers are given in ascending order, and start again at the end.
    const auto is_newer = [&](pid_t task) {
        return newest > holder.newest ? task > holder.newest && task <= newest : task > holder.newest || task <= newest;
    };
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR* tasks = opendir(path);
    if (!tasks) return;
    while (const dirent* entry = readdir(tasks)) {
        const pid_t task = atoi(entry->d_name);
        if (task == 0) continue;
        if (is_newer(task)) widen(task, holder);
        snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, task);
        FILE* children = fopen(path, "re");
        pid_t child;
        while (children && fscanf(children, "%d", &child) == 1) {
            if (is_newer(child)) widen_newer(child, holder, newest);
        }
        if (children) fclose(children);
    }
    closedir(tasks);
}

int StickyAffinity::fault(pid_t pid, pid_t tid, Hold hold, uint64_t now) {
    for (Thread& thread : threads_) {
        if (thread.tid != tid) continue;
        if (thread.held && (!thread.held->active.load(std::memory_order_relaxed) ||
                            (thread.faults % kCheck == 0 && !placement_.still_held(thread.held)))) {
            thread.held.reset();
            thread.faults = 0;
            thread.place = -1;
        }
        if (now - thread.last > kGap && !thread.held) {
            thread.faults = 0;
            thread.place = -1;
        }
        thread.last = now;
        if (++thread.faults == kBurst && !thread.held) {
            Placement::Place place = placement_.place(pid, tid, here_, hold, now);
            thread.place = place.cpu;
            thread.held = std::move(place.held);
            kept_ += place.fresh;
        }
        // Not at each fault: a thread that is on its way here may still fault elsewhere.
        if (thread.held && now - thread.held->last.load(std::memory_order_relaxed) > kIdle / 4) {
            thread.held->last.store(now, std::memory_order_relaxed);
        }
        return thread.place;
    }
    threads_.push_back({tid, now, 1, -1, nullptr});
    return -1;
}

bool StickyAffinity::release_idle(uint64_t now) {
    for (size_t i = 0; i < threads_.size();) {
        if (now - threads_[i].last < kIdle) {
            ++i;
            continue;
        }
        if (threads_[i].held) placement_.release(threads_[i].held, now, kIdle);
        threads_[i] = std::move(threads_.back());
        threads_.pop_back();
    }
    return !threads_.empty();
}

}  // namespace k42::vm
