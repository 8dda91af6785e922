// The native half of a File Cache Manager (paper 4.4): the pages of one file, their frames in a memfd, and the
// protocol by which a page becomes resident, is mapped, written back, and given back. The fault engine and the Python
// objects go through the same functions on the same locked descriptors.
//
// A page is born absent. The fault that finds it so makes it resident: at once with zeros, or by marking it `io`,
// filling it with no lock held, and completing it. Faults that find it in I/O queue a wake-up and happen again.
//
// A clean page is mapped so that writing to it is a fault, which marks it dirty. Writing back protects it again, in all
// windows, before it reads the frame: a write that comes later makes it dirty again and is never missed. Only clean
// pages are evicted: the frame is punched out of the memfd, which removes all its mappings at once.
//
// A snapshot is a file cache that reads what it does not have itself from its source. The source in turn does not let a
// page of its own change before its heir, the youngest of its snapshots, has it: share() protects all pages, and a
// write to one that was not allowed since is answered `shared` (src/k42/vm/snapshot.py does the rest).
//
// The journal, one byte a page in a memfd of its own, says what outlives this process: which frames are valid and which
// are dirty. It is written before a frame becomes less than it says, and after it has become more.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/processor.hpp"
#include "vm/frame_pool.hpp"
#include "vm/hat.hpp"
#include "vm/hints.hpp"
#include "vm/page_table.hpp"
#include "vm/replicated_page_table.hpp"

namespace k42::vm {

enum class Fill : uint8_t {
    zero,    // anonymous memory: zeros, but for pages that its store has
    store,   // the store has all pages
    source,  // a snapshot: as `zero`, but pages that are nowhere are asked for
};

// What the page table is: see the three classes of that name. The first two can be changed into each other.
enum class Tables : uint8_t { shared, replicated, partitioned };

class Source;

// What became of a fault.
enum class Outcome : uint8_t {
    mapped,       // pages were resident and are mapped
    zero_filled,  // pages were made with zeros and are mapped
    queued,       // the page is in I/O; its end wakes the fault
    absent,       // needs a fill from the store: begin_io() was not done
    no_frame,     // absent, and the pool granted none at once
    failed,       // cannot be mapped; the access ends in SIGBUS
    shared,       // a write to a page that the heir may need as it is: see FileCache::allow()
};

// A fault as the HAT sees it: the page-aligned window address, on one CPU's window.
struct FaultAt {
    Hat* hat;
    int cpu;
    uint64_t address;
    bool write = false;    // it wants to write
    bool guarded = false;  // the page is mapped there, and write-protected
    bool tracked = false;  // the window's region tracks writes
};

class FileCache {
  public:
    struct Counts {
        uint64_t mapped;       // faults that found their page resident
        uint64_t zero_filled;  // pages
        uint64_t filled;       // pages
        uint64_t queued;       // faults that found their page in I/O
        uint64_t evicted;      // pages
        uint64_t dirtied;      // times that a clean page became dirty
        uint64_t written;      // pages written back
        uint64_t probed;       // pages unmapped softly, to see whether they are used
        uint64_t rescued;      // pages not evicted because they were used
        uint64_t read_ahead;   // pages that native threads read ahead
        uint64_t resident;     // pages now
        uint64_t dirty;        // pages now, those being written included
    };

    using Run = PageTable::Run;

    static constexpr uint32_t kMaxGroup = 512;  // pages: 2 MiB

    // Takes the descriptors over: as long as anybody may punch pages out of the memfd, its number means this file.
    // `memfd`: of the frames. `journal`: a memfd of one byte a page. `cpus`: how many the faults come from.
    FileCache(FramePool* pool, int memfd, int journal, uint64_t pages, Fill fill, Backing backing, Policy policy,
              int cpus, Tables tables = Tables::shared);
    ~FileCache();
    FileCache(const FileCache&) = delete;
    FileCache& operator=(const FileCache&) = delete;

    // Resolves a fault on `page` with what is at hand: maps the resident run around it within `around`, or zero-fills
    // the absent one within `group`, which is part of `around`. Never blocks on more than descriptors that are held for
    // moments.
    Outcome resolve(const FaultAt& fault, uint64_t page, Run group, Run around);

    // How many pages to map for a fault that `region` takes with its `around`: twice as many as the last time where
    // faults of one CPU go on where the last one's pages ended.
    Run widened(int cpu, uint64_t page, const Region& region);

    // Marks the absent run around `page` within the range as in I/O for the caller; {_, 0} when `page` is not absent.
    Run begin_io(uint64_t page, Run within);
    // The same with the first absent run in the range, for who brings in what is absent; {_, 0}: there is none.
    Run begin_fill(Run within);
    // The run is filled: makes it resident, wakes those who waited; and with a `fault` maps for it what lies in the
    // pages [begin, end) that its region shows.
    // `own`: no store has these bytes, nor a source for long; the pages are dirty. `owner`: the account to which the
    // frames were charged.
    Outcome complete_io(const FaultAt* fault, uint64_t page, Run run, uint64_t begin, uint64_t end, bool own = false,
                        uint16_t owner = 0);
    // The run could not be filled: absent again, and so many frames that were taken for it are the pool's again; those
    // who waited try for themselves.
    void abort_io(Run run, uint64_t frames = 0, uint16_t owner = 0);

    // Takes frames back, by the policy of replacement: at most `count`. Dirty pages that would have to go stand in line
    // for take_laundry() instead.
    struct Reclaimed {
        uint64_t given;  // frames
        uint64_t dirty;  // pages put in line
    };
    // `whose`: the number of an account, whose pages alone go; or one of these.
    static constexpr uint32_t kAboveShare = 0;  // of those that have more than their shares, down to these
    static constexpr uint32_t kAnybodys = 1 << 16;
    Reclaimed reclaim(uint64_t count, bool thorough, uint32_t whose = kAnybodys);

    // Writing back. The next run of dirty pages of the range that nobody writes yet: protected in all windows and the
    // caller's to write, until end_write(). `busy`: pages before it that others write, or that could not be protected.
    struct Writing {
        Run run;
        uint32_t busy;
    };
    Writing begin_write(Run within);
    // The same with pages that stand in line to be evicted; {_, 0}: none does.
    Run take_laundry(uint32_t most);
    // `written`: the store has them. `evict`: take the frames of those that are clean now. Frames given back.
    uint64_t end_write(Run run, bool written, bool evict);
    // Dirty pages of the range, those being written included, as runs in ascending order.
    std::vector<Run> dirty_runs(uint64_t first, uint64_t end) const;
    // Waits until a write-back or a fill ends after `seen`, as counted by endings(); false when the time came first.
    uint64_t endings() const;
    bool wait_ending(uint64_t seen, std::chrono::milliseconds timeout);

    // Takes the pages [first, end) away, `dirty` ones too or not; the number of those that cannot go now because they
    // are in I/O.
    uint64_t discard(uint64_t first, uint64_t end, bool dirty);
    // The file has so many pages from now on; those beyond must be discarded, until none is left. False, and nothing
    // changed, for no page, or more than the journal has room for.
    bool resize(uint64_t pages);

    // From now on an heir reads pages here: no write to any page passes without allow(). For the caller, who holds
    // writers off by the gates of the regions, all pages are shared at one moment. False: some may be writable still.
    bool share();
    // No heir any more.
    void unshare() { heir_.store(false, std::memory_order_seq_cst); }
    // Counts the calls of share().
    uint64_t generation() const { return generation_.load(std::memory_order_seq_cst); }
    // The heir has this page of its own: writes to it may pass. Nothing where share() was called since `generation`.
    void allow(uint64_t page, uint64_t generation);
    // Of a snapshot: makes sure that the page does not come from the source any more.
    enum class Owned { lacks, owned, busy };  // busy: in I/O
    Owned own(uint64_t page);
    // The pages that are here alone, ascending: dirty or in swap space; `all`: and what else is resident.
    std::vector<uint64_t> owned(bool all) const;
    // Whether swap space has the page.
    bool stored(uint64_t page) const { return journaled(page) & kStored; }

    // Keeps the frames of the run, all of which must be resident: false else. Pins count.
    bool pin(Run run);
    void unpin(Run run);
    // The pages that are pinned, with how often; and to correct that after a take-over, when the journal says something
    // else than those who pinned.
    std::vector<std::pair<uint64_t, uint32_t>> pinned();
    void set_pins(uint64_t page, uint32_t count);

    // How many resident pages stand on each account, and how many other descriptors there are: of pages in I/O, or that
    // are just coming or going, each with a frame or without.
    struct Tally {
        std::map<uint16_t, uint64_t> resident;
        uint64_t moving = 0;
    };
    void tally(Tally& sum) const;

    // How many pages of the range are there, or on their way.
    uint64_t present(uint64_t first, uint64_t end) const;

    // The fault that maps this page, be it on another one around it, gives the hint once. Of more than kMarkers the
    // oldest goes. There is one queue for all.
    static constexpr uint32_t kMarkers = 8;
    void set_marker(HintQueue* queue, uint64_t id, uint64_t page);

    // After the death of the process that wrote the journal: makes resident what is valid, and frees all other frames.
    // The number of pages made resident.
    uint64_t restore();

    // Absent pages are read by native threads from now on. Before any region shows the file.
    void read_from(std::unique_ptr<Source> source);
    Source* source() const { return source_.get(); }
    // For such a thread: marks the absent run around `page` that is to be read at once as in I/O, for a fault of this
    // client that needs `group`. {_, 0}: there is none now. Inside the gate of a region; Source::end() when all is
    // done.
    Run begin_read(uint64_t page, Run group, Hat& client);

    // Makes the page table replicated, or shared again, while faults come. False, and nothing changed, for a
    // partitioned one.
    bool replicate(bool replicated);
    Tables tables() const;
    // Copies of page descriptors that processors have.
    size_t copies() const { return replicated_ ? replicated_->copies() : 0; }
    // Gives all pages back; no region shows the file any more.
    void clear();

    void attach(Region* region);
    void detach(Region* region);

    const PageTable& table() const { return *table_; }
    Counts counts() const;
    size_t bytes() const;
    FramePool& pool() { return *pool_; }
    int memfd() const { return memfd_; }
    int journal() const { return journal_fd_; }
    uint64_t pages() const { return pages_.load(std::memory_order_acquire); }
    Backing backing() const { return backing_; }
    Fill fill() const { return fill_; }

  private:
    struct Waiter;
    struct Journal;

    // Of the faults of one CPU.
    struct alignas(runtime::apart) CpuCounts {
        std::atomic<uint64_t> mapped{0}, zero_filled{0}, filled{0}, queued{0}, dirtied{0};
        // Of resident pages: where those ended that were mapped last, and how many were to be mapped.
        std::atomic<uint64_t> next{0};
        std::atomic<uint32_t> reach{0};
    };

    // Bits of the journal.
    static constexpr uint8_t kValid = 1;                     // the frame holds the page
    static constexpr uint8_t kDirty = 2;                     // and the store does not
    static constexpr uint8_t kStored = 4;                    // of anonymous memory: the store holds a page
    static constexpr uint32_t kOnePin = 16, kMostPins = 15;  // of 15 pins and more the number is not known

    Run begin_locked(uint64_t page, Run within, Page** pages);
    Outcome resolve_resident(const FaultAt& fault, Page* page, Run around);
    Outcome map_run(const FaultAt& fault, uint64_t page, Run run, bool writable);
    Outcome zero_run(const FaultAt& fault, uint64_t page, Run run, Page** pages);
    void make_dirty(Page* page, int cpu);
    bool may_change(const Page* page) const {
        return !heir_.load(std::memory_order_seq_cst) || page->is(Page::kAllowed);
    }
    void note_use(const FaultAt& fault, Page** pages, uint32_t count) const;
    void adopt(const FaultAt& fault, Page** pages, uint32_t count);
    bool spared(const Page& page, uint32_t whose, uint64_t going) const;
    void note_mapped(const FaultAt& fault, Run mapped);
    Writing begin_write_locked(Run within, Page** pages);
    // Evicts this run of locked pages, clean or not; their frames are the pool's again.
    void drop(Run run, Page** pages);
    // How many were spared.
    uint64_t look_at(const std::vector<Replacement::Candidate>& candidates, size_t begin, size_t end,
                     Replacement& order, bool thorough, uint32_t whose, Reclaimed& result);
    template <typename Chosen>
    std::vector<Run> runs_of(Chosen&& chosen) const;
    template <typename Visit>
    void each_region(Visit&& visit);
    static Run run_around(Page* const* pages, uint64_t first, uint32_t count, uint64_t page);
    void punch(uint64_t first, uint64_t count) const;
    void ended();
    template <typename Visit>
    void each_journaled(uint64_t first, uint64_t end, Visit&& visit) const;
    template <typename Visit>
    void each_stored(uint64_t first, uint64_t end, Visit&& visit) const;
    void write_pins(uint64_t page, uint32_t count);
    void forget_stored(uint64_t first, uint64_t end);
    // Of a page without a frame the journal may say that it is valid, where its writer died before it made the frame.
    void forget_holes();
    static void wake_all(PageWaiter* waiters);
    static PageWaiter* take_waiters(Page** pages, uint32_t count);
    bool replaceable() const { return backing_ == Backing::file; }
    uint8_t journaled(uint64_t page) const { return journal_[page].load(std::memory_order_relaxed); }
    bool anonymous() const { return fill_ != Fill::store; }
    void write_journal(uint64_t page, uint8_t value) { journal_[page].store(value, std::memory_order_release); }

    FramePool* const pool_;
    const int memfd_;
    const int journal_fd_;
    std::atomic<uint64_t> pages_;
    const Fill fill_;
    const Backing backing_;
    std::unique_ptr<PageTable> table_;
    ReplicatedPageTable* replicated_ = nullptr;  // the same, unless it is partitioned

    std::unique_ptr<Source> source_;

    std::atomic<uint8_t>* journal_ = nullptr;  // a byte a page, and addresses for those to come
    uint64_t journal_bytes_ = 0;
    std::atomic<bool> stored_{false};  // some page is, or was, in the store of anonymous memory

    std::atomic<bool> heir_{false};  // read with the page's descriptor locked; share() locks all that are there
    std::atomic<uint64_t> generation_{0};

    std::mutex regions_lock_;  // protects regions_; taken with descriptors locked; before the HAT's
    std::vector<Region*> regions_;

    std::mutex laundry_lock_;  // protects laundry_; a leaf: taken with descriptors locked
    std::deque<uint64_t> laundry_;

    std::mutex pins_lock_;  // protects pins_; a leaf: taken with descriptors locked
    std::map<uint64_t, uint32_t> pins_;

    mutable std::mutex endings_lock_;  // protects endings_; a leaf
    std::condition_variable ending_;
    uint64_t endings_ = 0;

    // Of read-ahead. Read by every fault, written seldom: by the fault that takes a marker away, and by set_marker().
    struct alignas(runtime::apart) Markers {
        std::atomic<uint32_t> set{0};  // bit i: pages[i] is a marker
        std::atomic<uint64_t> pages[kMarkers];
        std::atomic<HintQueue*> hints{nullptr};
        std::atomic<uint64_t> id{0};
        std::mutex lock;    // of set_marker(), and protects `next`; a leaf
        uint32_t next = 0;  // the oldest
    } markers_;

    const int cpus_;
    std::unique_ptr<CpuCounts[]> cpu_counts_;
    alignas(runtime::apart) std::atomic<uint64_t> evicted_{0};
    std::atomic<uint64_t> cleaned_{0}, written_{0}, probed_{0}, rescued_{0};
    std::atomic<uint64_t> prefetched_{0}, prefilled_dirty_{0};
    std::atomic<size_t> next_part_{0};
};

}  // namespace k42::vm
