// A value that one thread makes while others wait for it, and the end of waits that would never end.
//
// Making runs code that is not ours, which may ask for the next value to be made: threads then wait for each other,
// and where that closes a circle nobody would ever go on. So whoever is about to wait says so first and looks then: of
// the threads that close a circle, the last to say so sees all of it.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "runtime/processor.hpp"
#include "structures/futex.hpp"

namespace k42 {

// Whether threads are still there: a fork leaves the child its own one alone.
class Forks {
  public:
    static uint32_t count() { return of_process().count_; }

    // Whether the thread of `p` has been there since there were `then` forks, and lived through them.
    static bool survived(const runtime::Processor& p, uint32_t then) {
        const Forks& forks = of_process();
        return forks.count_ == then || forks.survivor_ == &p;
    }

  private:
    Forks() {
        pthread_atfork(nullptr, nullptr, [] {
            ++of_process().count_;
            of_process().survivor_ = runtime::current_or_null();
        });
    }
    static Forks& of_process() {
        static Forks* forks = new Forks();
        return *forks;
    }

    // Changed while there is one thread.
    uint32_t count_ = 0;
    const runtime::Processor* survivor_ = nullptr;
};

class Making {
  public:
    explicit Making(const runtime::Processor& maker) : maker_(&maker), forks_(Forks::count()) {}

    // By the maker: made, or given up; those that wait look again.
    void end() {
        ended_.store(1, std::memory_order_release);
        futex_wake_all(ended_);
    }
    bool ended() const { return ended_.load(std::memory_order_acquire) != 0; }

    // A fork has left its maker behind: it never ends, somebody else is to make the value.
    bool lost() const { return !Forks::survived(*maker_, forks_); }

  private:
    friend class MakingWait;

    const runtime::Processor* const maker_;  // stands for its thread, which is inside a request all the while
    const uint32_t forks_;
    std::atomic<uint32_t> ended_{0};
};

// Its scope is a thread's wait for a making.
class MakingWait {
  public:
    MakingWait(const runtime::Processor& waiter, std::shared_ptr<Making> making)
        : waiter_(&waiter), making_(std::move(making)) {
        Waits& waits = all();
        std::lock_guard guard(waits.lock);
        waits.items.push_back(this);
        const Making* wanted = making_.get();
        // A circle without this thread is not ours to find: it ends after as many steps as there are waits.
        for (size_t steps = 0; wanted && steps < waits.items.size(); ++steps) {
            if (wanted->maker_ == waiter_) endless_ = true;
            wanted = waits.wanted_by(wanted->maker_);
        }
    }
    MakingWait(const MakingWait&) = delete;
    MakingWait& operator=(const MakingWait&) = delete;
    ~MakingWait() {
        Waits& waits = all();
        std::lock_guard guard(waits.lock);
        waits.items.erase(std::find(waits.items.begin(), waits.items.end(), this));
    }

    // Whoever makes it waits, in the end, for this thread.
    bool endless() const { return endless_; }

    // Until the making has ended; may return early (a signal), so callers look again.
    void sleep() {
        if (!making_->ended()) futex_wait(making_->ended_, 0);
    }

  private:
    struct Waits {
        std::mutex lock;  // protects items; innermost
        std::vector<MakingWait*> items;

        // The innermost wait of that thread: a finaliser may wait within another wait of the same thread.
        const Making* wanted_by(const runtime::Processor* thread) const {
            for (size_t i = items.size(); i-- > 0;) {
                if (items[i]->waiter_ == thread) return items[i]->making_.get();
            }
            return nullptr;
        }
    };
    static Waits& all() {
        static Waits* waits = [] {
            pthread_atfork([] { all().lock.lock(); }, [] { all().lock.unlock(); }, after_fork_in_child);
            return new Waits();  // never destroyed, like the processors
        }();
        return *waits;
    }
    // The waits of others were on their stacks.
    static void after_fork_in_child() {
        Waits& waits = all();
        std::erase_if(waits.items, [](MakingWait* w) { return w->waiter_ != runtime::current_or_null(); });
        waits.lock.unlock();
    }

    const runtime::Processor* const waiter_;
    const std::shared_ptr<Making> making_;
    bool endless_ = false;
};

}  // namespace k42
