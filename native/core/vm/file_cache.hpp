// The native half of a File Cache Manager (paper 4.4): the pages of one file, their frames in a memfd, and the
// protocol by which a page becomes resident, is mapped, and is given back. The fault engine and the Python objects
// go through the same functions on the same locked descriptors.
//
// A page is born absent. The fault that finds it so makes it resident: at once with zeros, or by marking it `io`,
// filling it with no lock held, and completing it. Faults that find it in I/O queue a wake-up and happen again.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "structures/page_table.hpp"
#include "vm/frame_pool.hpp"
#include "vm/hat.hpp"

namespace k42::vm {

enum class Fill : uint8_t { zero, store };

// What became of a fault.
enum class Outcome : uint8_t {
    mapped,       // pages were resident and are mapped
    zero_filled,  // pages were made with zeros and are mapped
    queued,       // the page is in I/O; its end wakes the fault
    absent,       // needs a fill from the store: begin_io() was not done
    no_frame,     // absent, and the pool granted none at once
    failed,       // cannot be mapped; the access ends in SIGBUS
};

// A fault as the HAT sees it: the page-aligned window address, on one CPU's window.
struct FaultAt {
    Hat* hat;
    int cpu;
    uint64_t address;
};

class FileCache {
  public:
    struct Counts {
        uint64_t mapped;       // faults that found their page resident
        uint64_t zero_filled;  // pages
        uint64_t filled;       // pages
        uint64_t queued;       // faults that found their page in I/O
        uint64_t evicted;      // pages
    };

    static constexpr uint32_t kMaxGroup = 512;  // pages: 2 MiB

    // Takes the memfd over: as long as anybody may punch pages out of it, its number means this file.
    FileCache(FramePool* pool, int memfd, uint64_t pages, Fill fill, Backing backing)
        : pool_(pool), memfd_(memfd), pages_(pages), fill_(fill), backing_(backing) {}
    ~FileCache();
    FileCache(const FileCache&) = delete;
    FileCache& operator=(const FileCache&) = delete;

    // Resolves a fault on `page` with what is at hand: maps the resident run around it within [first, first+count),
    // or zero-fills the absent one. Never blocks on more than descriptors that are held for moments.
    Outcome resolve(const FaultAt& fault, uint64_t page, uint64_t first, uint32_t count);

    // Marks the absent run around `page` within the range as in I/O for the caller; {_, 0} when `page` is not absent.
    struct Run {
        uint64_t first;
        uint32_t count;
    };
    Run begin_io(uint64_t page, uint64_t first, uint32_t count);
    // The run is filled: makes it resident, maps for `fault` what of it lies in the pages [begin, end) that its region
    // shows, wakes those who waited.
    Outcome complete_io(const FaultAt& fault, uint64_t page, Run run, uint64_t begin, uint64_t end);
    // The run could not be filled: absent again and its frames gone (give them back to the pool after it, not before),
    // those who waited try for themselves.
    void abort_io(Run run);

    // Gives up to `count` resident pages back, oldest first; the number given back. Clean file pages only.
    uint64_t give_back(uint64_t count);
    // Gives all pages back; no region shows the file any more.
    void clear();

    void attach(Region* region);
    void detach(Region* region);

    const PageTable& table() const { return table_; }
    Counts counts() const;
    int memfd() const { return memfd_; }
    uint64_t pages() const { return pages_; }
    Backing backing() const { return backing_; }
    Fill fill() const { return fill_; }

  private:
    struct Waiter;

    Outcome map_run(const FaultAt& fault, uint64_t page, Run run);
    Outcome zero_run(const FaultAt& fault, uint64_t page, Run run, Page** pages);
    static Run run_around(Page* const* pages, uint64_t first, uint32_t count, uint64_t page);
    void punch(uint64_t first, uint64_t count) const;
    static void wake_all(PageWaiter* waiters);
    static PageWaiter* take_waiters(Page** pages, uint32_t count);

    FramePool* const pool_;
    const int memfd_;
    const uint64_t pages_;
    const Fill fill_;
    const Backing backing_;
    PageTable table_;

    std::mutex regions_lock_;  // protects regions_; taken with a descriptor locked
    std::vector<Region*> regions_;

    std::atomic<uint64_t> mapped_{0}, zero_filled_{0}, filled_{0}, queued_{0}, evicted_{0};
};

}  // namespace k42::vm
