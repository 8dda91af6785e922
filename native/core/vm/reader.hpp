// Reading absent pages of a local file without Python: a few threads a CPU take what the fault server finds absent in a
// file cache that has a `Source`, read it, and complete it. Whatever is not plain (an error, a file that changes or
// ends while it is read, no free frame) they undo and hand up: Python's way then says what is to be said.
//
// A run of pages in I/O belongs to the reader from begin_io() to the end of the job. The cache outlives it: a job is
// begun inside the gate of a region that shows the cache, and the FCM waits for the jobs (Source::drain) before it
// goes.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "vm/file_cache.hpp"
#include "vm/read_ahead.hpp"

namespace k42::vm {

class Prefetcher;

// A local file from which pages are filled by pread(), and what must be known of it to do so.
class Source {
  public:
    static constexpr uint32_t kMostPages = 64;  // of a run: 256 KiB; what is larger pays Python's O_DIRECT

    using Pattern = ReadAhead::Pattern;

    // `descriptor`: stays its owner's, which closes it after drain(). `size`: of the file, in bytes. `cluster`: pages
    // to read at once. `read_ahead`: knows how the file is read, and what to read ahead, which `prefetcher` does; or
    // nobody, without one. `id`: of the FCM, for what is left to Python.
    Source(int descriptor, uint64_t size, uint32_t cluster, ReadAhead& read_ahead, Prefetcher* prefetcher, uint64_t id)
        : descriptor_(descriptor),
          size_(size),
          cluster_(cluster),
          read_ahead_(read_ahead),
          prefetcher_(prefetcher),
          id_(id) {}

    // Whether a read may wait for another machine or process: such files must not keep threads from others.
    static bool may_hang(int descriptor);

    // 0 while its length is changed by us: nothing is filled then.
    void resize(uint64_t size) { size_.store(size, std::memory_order_seq_cst); }

    Pattern pattern() const { return read_ahead_.pattern(); }

    // What to read at once for a fault on `page` that needs `group`, at most kMostPages: more where misses follow each
    // other, no more where they are at random, as far as one can see.
    PageTable::Run around(uint64_t page, PageTable::Run group);
    // A miss of this client brings the run of this file's cache in: if it goes on where another ended, read-ahead is
    // told of both. Inside the gate of a region, as is the next.
    void missed(FileCache& cache, PageTable::Run run, Hat& client);
    // What was read ahead is used: the page bears the marker.
    void touched(FileCache& cache, uint64_t page, Hat& client);

    // A write of our own to the file is under way: its times then change by us. Such writes may overlap.
    void begin_write() {
        writing_.fetch_add(1, std::memory_order_seq_cst);
        writes_.fetch_add(1, std::memory_order_seq_cst);
    }
    void end_write() { writing_.fetch_sub(1, std::memory_order_seq_cst); }

    uint64_t pages_ahead() const { return pages_ahead_.load(std::memory_order_relaxed); }

    // Fills the run, whose frames are allocated. False: not done, some frames may be there.
    bool fill(int memfd, uint64_t first, uint32_t count) const;

    void begin() { active_.fetch_add(1, std::memory_order_relaxed); }
    void end() {
        std::lock_guard guard(lock_);
        if (active_.fetch_sub(1, std::memory_order_relaxed) == 1) idle_.notify_all();
    }
    // Waits for all who have begun; what is only read ahead ends soon. No region shows the file any more, so nobody
    // begins.
    void drain() {
        closing_.store(true, std::memory_order_relaxed);
        std::unique_lock guard(lock_);
        idle_.wait(guard, [&] { return active_.load(std::memory_order_relaxed) == 0; });
    }

  private:
    struct Recent {
        uint64_t first = 0;
        uint32_t count = 0;
        bool told = false;
    };

    // Misses far from all recent ones, less kNear for each that was near one, after which single pages are read: where
    // each page is wanted alone, its neighbours cost twice its time. Linux does so after as many (MMAP_LOTSAMISS).
    static constexpr uint32_t kManyStrays = 100, kNear = 8;
    static constexpr uint64_t kReach = 32;  // pages: ReadAhead::kMostStride

    // As of a moment; two moments that differ, or a first one that is odd, had a write of ours between.
    uint64_t writes() const {
        const uint64_t begun = writes_.load(std::memory_order_seq_cst);
        return 2 * begun + (writing_.load(std::memory_order_seq_cst) != 0);
    }
    // Of the recent misses the one that a miss on `page` may belong to, before or after it.
    Recent* near(uint64_t page);
    void tell(FileCache& cache, Recent& miss, Hat& client);

    const int descriptor_;
    std::atomic<uint64_t> size_;
    const uint32_t cluster_;
    ReadAhead& read_ahead_;
    Prefetcher* const prefetcher_;
    const uint64_t id_;
    std::atomic<uint64_t> writing_{0}, writes_{0};

    std::atomic<uint64_t> active_{0};
    std::atomic<bool> closing_{false};
    std::mutex lock_;  // orders the last end() and drain(); a leaf
    std::condition_variable idle_;

    std::mutex recent_lock_;  // protects what follows; before the prefetcher's alone
    std::array<Recent, 32> recent_;
    size_t next_ = 0;
    std::atomic<uint32_t> strays_{0};  // read without the lock

    friend class Prefetcher;
    std::atomic<uint64_t> pages_ahead_{0};
    bool reading_ahead_ = false;  // under the prefetcher's lock
};

// What one fault needs read. Holds a reference to the HAT, and an active count of the source.
struct ReadJob {
    FileCache* cache = nullptr;
    FaultAt fault{};
    uint64_t canonical = 0;
    uint64_t page = 0;
    PageTable::Run run{0, 0};
};

// On whose account frames are taken: its number, and the client whose it is, if it may go meanwhile, and another get
// the number.
struct Payer {
    uint16_t account = 0;
    const Hat* client = nullptr;
};

// For who has marked a run as in I/O: takes frames for it, and fills them. False: neither, and it is absent again.
bool fill_run(FileCache& cache, PageTable::Run run, Payer payer);

// Brings in the absent pages of the range one after the other, for no fault.
struct ReadIn {
    uint64_t reached;  // where it ended: before what is not plain
    uint64_t pages;    // that were absent
};
ReadIn read_in(FileCache& cache, uint64_t first, uint64_t end, Payer payer);

// The jobs of one CPU, and its threads, which come as they are needed.
class Reader {
  public:
    // `cpu`: where the threads run. `hand_up`: takes a fault that could not be finished here.
    Reader(int cpu, std::function<void(const ReadJob&)> hand_up) : cpu_(cpu), hand_up_(std::move(hand_up)) {}
    ~Reader() { stop(); }

    // Never waits for a store.
    void submit(const ReadJob& job);
    // Ends the threads; jobs that were not begun are undone. Nobody submits any more.
    void stop();

    // Those of its threads: what they look up they use inside requests alone, which are short.
    void add_processors(std::vector<runtime::Processor*>& out);

    uint64_t finished() const { return finished_.load(std::memory_order_relaxed); }  // faults
    uint64_t given_up() const { return given_up_.load(std::memory_order_relaxed); }  // handed up instead

  private:
    void serve();
    bool read(const ReadJob& job);
    void give_up(const ReadJob& job);

    const int cpu_;
    const std::function<void(const ReadJob&)> hand_up_;
    std::atomic<uint64_t> finished_{0}, given_up_{0};

    std::mutex lock_;  // protects what follows; a leaf
    std::vector<std::thread> threads_;
    std::vector<runtime::Processor*> processors_;
    std::condition_variable filled_;
    std::deque<ReadJob> jobs_;
    size_t idle_ = 0;  // threads that wait
    bool stopped_ = false;
};

// Reads local files ahead, in a few threads that run on any CPU. One of them at most reads for one file at a time: two
// would wait for each other, as Linux has one lock for all who make or remove frames of a memfd.
class Prefetcher {
  public:
    // `rest`: is told of the pages for which no frames were to be had here: Python asks all others for theirs.
    explicit Prefetcher(HintQueue& rest) : rest_(rest) {}
    ~Prefetcher() { stop(); }
    Prefetcher(const Prefetcher&) = delete;
    Prefetcher& operator=(const Prefetcher&) = delete;

    // A client came to a page of this cache, which has a source. `missed`: pages from there on that were absent; 0: it
    // bears the marker. Inside the gate of a region. Losing one costs time, never a byte, so a full queue drops.
    void push(FileCache& cache, uint64_t page, uint32_t missed, Hat& client);
    // Ends the threads; jobs that were not begun are dropped.
    void stop();

    HintQueue& rest() { return rest_; }

  private:
    static constexpr size_t kThreads = 4, kMostJobs = 256;

    struct Job {
        FileCache* cache;
        Hat* client;
        uint64_t page;
        uint32_t missed;
    };

    void serve();
    void read(const Job& job);
    static void let_go(const Job& job);

    HintQueue& rest_;

    std::mutex lock_;  // protects what follows, and Source::reading_ahead_; a leaf: taken with descriptors locked
    std::vector<std::thread> threads_;
    std::condition_variable filled_;
    std::deque<Job> jobs_;
    size_t idle_ = 0;  // threads that wait
    bool stopped_ = false;
};

}  // namespace k42::vm
