// Which page goes next: the order in which the resident pages of one page table are looked at when frames are wanted.
//
// A page comes in at the end of a queue. At the front it is looked at: was it used since? Uses are seen as faults, so a
// page that is mapped is first unmapped softly (its frame stays) and looked at again later: a page that faulted in
// between was used. Three policies (paper 4.2 has a working set, FIFO with second chance):
// - fifo: a queue, and a reclaim queue behind it of a quarter of the pages. A page that enters the reclaim queue is
//   unmapped; a use there rescues it to the end of the first queue.
// - clock: one ring. A page that was used goes round once more.
// - s3fifo (Yang et al., SOSP 2023): a small queue for pages that came for the first time, a main queue for those that
//   were used there, and the names of those that left the small queue ("ghosts"): who comes back soon enters the main
//   queue.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <unordered_set>
#include <vector>

namespace k42::vm {

enum class Policy : uint8_t { fifo, clock, s3fifo };

// Page indices in order, five bytes each: enough for 4 PiB.
class IndexQueue {
  public:
    void push(uint64_t index) {
        std::array<uint8_t, 5> packed;
        std::memcpy(packed.data(), &index, packed.size());
        queue_.push_back(packed);
    }
    uint64_t pop() {
        uint64_t index = 0;
        std::memcpy(&index, queue_.front().data(), 5);
        queue_.pop_front();
        return index;
    }
    size_t size() const { return queue_.size(); }
    bool empty() const { return queue_.empty(); }

  private:
    std::deque<std::array<uint8_t, 5>> queue_;
};

class Replacement {
  public:
    // What a look at a page has to say: whether it was used since the last look, may be mapped, and was unmapped softly
    // at the last look.
    struct Look {
        uint32_t uses;
        bool mapped;
        bool probed;
    };
    enum class Verdict : uint8_t {
        evict,   // take its frame
        probe,   // unmap it softly, and put it back
        rescue,  // it was used: forget its uses, and put it back
        wait,    // put it back
        spare,   // put it back where it was: it is not the one to go
    };
    struct Candidate {
        uint64_t index;
        bool second;  // from the reclaim queue (fifo) or the main queue (s3fifo)
    };

    explicit Replacement(Policy policy = Policy::fifo) : policy_(policy) {}
    Replacement(const Replacement&) = delete;
    Replacement& operator=(const Replacement&) = delete;

    // A page became resident.
    void insert(uint64_t index) {
        std::lock_guard guard(lock_);
        ++inserted_;
        if (policy_ == Policy::s3fifo && ghosts_.erase(index)) {
            second_.push(index);
        } else {
            first_.push(index);
        }
    }

    // Takes up to `count` pages out, for the caller alone to look at; each is then evicted or put back.
    void next(size_t count, std::vector<Candidate>& out) {
        std::lock_guard guard(lock_);
        while (count-- > 0 && first_.size() + second_.size() > 0) {
            const bool second = first_.empty() || (!second_.empty() && prefers_second());
            out.push_back({second ? second_.pop() : first_.pop(), second});
        }
    }

    // `thorough`: do not trust that pages which nobody used since they came are not in use: look twice.
    Verdict judge(const Candidate& candidate, const Look& look, bool thorough) const {
        if (look.uses > 0) return Verdict::rescue;
        const bool unseen = thorough && look.mapped && !look.probed;
        if (policy_ == Policy::fifo && !candidate.second && thorough) return unseen ? Verdict::probe : Verdict::wait;
        return unseen ? Verdict::probe : Verdict::evict;
    }

    // Puts a page back at the end of the queue where its verdict belongs.
    void put_back(const Candidate& candidate, Verdict verdict) {
        std::lock_guard guard(lock_);
        bool second = candidate.second;
        if (verdict == Verdict::spare) {
            (second ? second_ : first_).push(candidate.index);
            return;
        }
        switch (policy_) {
            case Policy::fifo:
                second = verdict != Verdict::rescue;
                break;
            case Policy::clock:
                second = false;
                break;
            case Policy::s3fifo:
                second = candidate.second || verdict == Verdict::rescue;
                break;
        }
        (second ? second_ : first_).push(candidate.index);
    }

    // A page that was evicted, or went in another way: its name is remembered for a while.
    void evicted(const Candidate& candidate) {
        if (policy_ != Policy::s3fifo || candidate.second) return;
        std::lock_guard guard(lock_);
        if (!ghosts_.insert(candidate.index).second) return;
        ghost_order_.push(candidate.index);
        while (ghost_order_.size() > first_.size() + second_.size() + 64) ghosts_.erase(ghost_order_.pop());
    }

    // For who looks for pages of some owners alone: how many pages have come so far; and a note, which holds until
    // another page comes, that there are none of those whom `owners` (not 0) stands for.
    uint64_t inserted() const {
        std::lock_guard guard(lock_);
        return inserted_;
    }
    void note_none(uint64_t owners, uint64_t inserted) {
        std::lock_guard guard(lock_);
        none_of_ = owners;
        none_since_ = inserted;
    }
    bool has_none(uint64_t owners) const {
        std::lock_guard guard(lock_);
        return none_of_ == owners && none_since_ == inserted_;
    }

    // Pages in the queues; some may have gone meanwhile.
    size_t size() const {
        std::lock_guard guard(lock_);
        return first_.size() + second_.size();
    }

    // Drops what `gone(index)`, and second entries of the same page: of pages that went in other ways than eviction.
    template <typename Gone>
    void sweep(Gone&& gone) {
        std::lock_guard guard(lock_);
        std::unordered_set<uint64_t> seen;
        for (IndexQueue* queue : {&first_, &second_}) {
            for (size_t left = queue->size(); left > 0; --left) {
                const uint64_t index = queue->pop();
                if (seen.insert(index).second && !gone(index)) queue->push(index);
            }
        }
    }

  private:
    bool prefers_second() const {
        switch (policy_) {
            case Policy::fifo:
                return second_.size() * 3 >= first_.size();  // the reclaim queue is a quarter of all
            case Policy::clock:
                return false;  // there is one queue
            case Policy::s3fifo:
                return first_.size() * 10 < first_.size() + second_.size();  // the small queue is a tenth
        }
        return false;
    }

    const Policy policy_;
    mutable std::mutex lock_;  // protects all; a leaf: taken with page descriptors locked
    IndexQueue first_;
    IndexQueue second_;
    std::unordered_set<uint64_t> ghosts_;
    IndexQueue ghost_order_;
    uint64_t inserted_ = 0;
    uint64_t none_of_ = 0, none_since_ = 0;
};

}  // namespace k42::vm
