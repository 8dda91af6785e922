#include "vm/affinity.hpp"

#include <dirent.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

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

}  // namespace

void StickyAffinity::fault(pid_t pid, pid_t tid, uint64_t now) {
    for (Thread& thread : threads_) {
        if (thread.tid != tid) continue;
        if (now - thread.last > kGap && !thread.held) thread.faults = 0;
        thread.last = now;
        if (++thread.faults == kBurst && !thread.held) {  // not again when the count has wrapped: `own` is kept
            hold(thread);
            kept_ += thread.held;
        }
        return;
    }
    Thread thread{};
    thread.pid = pid;
    thread.tid = tid;
    thread.last = now;
    thread.faults = 1;
    threads_.push_back(thread);
}

void StickyAffinity::hold(Thread& thread) const {
    // The number comes from Linux, but as its process numbers threads: make sure it is that process's thread here.
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d", thread.pid, thread.tid);
    if (access(path, F_OK) != 0) return;
    if (sched_getaffinity(thread.tid, sizeof thread.own, &thread.own) != 0) return;
    // Its program, or the server of another CPU, has decided already; or never wants it here.
    if (CPU_COUNT(&thread.own) < 2 || !CPU_ISSET(cpu_, &thread.own)) return;
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(cpu_, &here);
    thread.newest = newest_task();
    thread.held = sched_setaffinity(thread.tid, sizeof here, &here) == 0;
}

void StickyAffinity::give_back(Thread& thread) const {
    if (!thread.held) return;
    widen(thread.tid, thread.own);
    const pid_t newest = newest_task();
    if (newest != thread.newest) widen_newer(thread.pid, thread, newest);
}

void StickyAffinity::widen(pid_t task, const cpu_set_t& own) const {
    cpu_set_t mask;
    // A mask that the program changed meanwhile is left alone.
    if (sched_getaffinity(task, sizeof mask, &mask) == 0 && only(mask, cpu_)) sched_setaffinity(task, sizeof own, &own);
}

void StickyAffinity::widen_newer(pid_t pid, const Thread& holder, pid_t newest) const {
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
        if (is_newer(task)) widen(task, holder.own);
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

bool StickyAffinity::release_idle(uint64_t now) {
    for (size_t i = 0; i < threads_.size();) {
        if (now - threads_[i].last < kIdle) {
            ++i;
            continue;
        }
        give_back(threads_[i]);
        threads_[i] = threads_.back();
        threads_.pop_back();
    }
    return !threads_.empty();
}

void StickyAffinity::release_all() {
    for (Thread& thread : threads_) give_back(thread);
    threads_.clear();
}

}  // namespace k42::vm
