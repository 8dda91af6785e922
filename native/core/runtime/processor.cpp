#include "runtime/processor.hpp"

#include <pthread.h>

#include <bit>
#include <memory>
#include <mutex>
#include <queue>
#include <utility>
#include <vector>

namespace k42::runtime {

constinit thread_local Processor* detail::current = nullptr;

namespace {

constexpr std::uint32_t nobody = UINT32_MAX;

// All processors: segment k holds 2^k of them, so that growth moves nothing.
class Registry {
  public:
    static Registry& instance() {
        static Registry* registry = new Registry();  // never destroyed: threads may outlive static destructors
        return *registry;
    }

    Processor& take() {
        std::lock_guard guard(lock_);
        if (!free_.empty()) {
            std::uint32_t id = free_.top();
            free_.pop();
            return at(id);
        }
        std::uint32_t id = count_.load(std::memory_order_relaxed);
        unsigned segment = segment_of(id);
        if (!segments_[segment].load(std::memory_order_relaxed))
            segments_[segment].store(new Processor*[std::size_t{1} << segment](), std::memory_order_release);
        auto* made = new Processor();
        made->id = id;
        slot(id) = made;
        count_.store(id + 1, std::memory_order_seq_cst);  // publishes the slot: readers go by the count
        return *made;
    }

    void give_back(Processor& p) {
        std::lock_guard guard(lock_);
        free_.push(p.id);
    }

    std::uint32_t count() const { return count_.load(std::memory_order_seq_cst); }
    Processor& at(std::uint32_t id) { return *slot(id); }

  private:
    Registry() { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

    static unsigned segment_of(std::uint32_t id) {
        return static_cast<unsigned>(std::bit_width(std::uint64_t{id} + 1)) - 1;
    }
    Processor*& slot(std::uint32_t id) {
        unsigned segment = segment_of(id);
        return segments_[segment].load(std::memory_order_acquire)[id + 1 - (std::uint64_t{1} << segment)];
    }

    static void before_fork() { instance().lock_.lock(); }
    static void after_fork_in_parent() { instance().lock_.unlock(); }

    // The child has one thread: every other processor lost its owner, perhaps in the middle of a request.
    static void after_fork_in_child() {
        Registry& r = instance();
        r.free_ = {};
        for (std::uint32_t id = 0; id < r.count(); ++id) {
            Processor& p = r.at(id);
            if (&p == detail::current) continue;
            p.depth = 0;
            p.requests.store((p.requests.load() + 1) & ~std::uint64_t{1});
            p.waits_for_switch_of.store(0);
            r.free_.push(id);
        }
        r.lock_.unlock();
    }

    // Protects free_ and the making of processors; taken at the beginning and end of a thread, and over a
    // fork. Order: innermost, nothing is taken under it.
    std::mutex lock_;
    // The lowest free id first, so that the processors in use stay dense.
    std::priority_queue<std::uint32_t, std::vector<std::uint32_t>, std::greater<>> free_;
    std::atomic<std::uint32_t> count_{0};
    std::atomic<Processor**> segments_[33] = {};
};

// Frees the processor when its thread ends.
struct Owner {
    Processor* processor = nullptr;
    void release() {
        if (!processor) return;
        if (processor->depth != 0) {  // the thread was ended in the middle of a call
            processor->depth = 0;
            processor->requests.store(processor->requests.load(std::memory_order_relaxed) + 1,
                                      std::memory_order_release);
        }
        Processor* freed = processor;
        processor = nullptr;
        detail::current = nullptr;
        Registry::instance().give_back(*freed);
    }
    ~Owner() { release(); }
};

thread_local Owner owner;

}  // namespace

Processor& detail::adopt() {
    Processor& taken = Registry::instance().take();
    owner.processor = &taken;
    current = &taken;
    return taken;
}

void release_current() {
    if (detail::current && detail::current->depth == 0) owner.release();
}

void post(Processor& to, void (*open)(void* what), void* what) {
    auto* mail = new Mail{open, what};
    mail->next = to.mail.load(std::memory_order_relaxed);
    // Here the mail first, then `watched`; the owner in `collect` the other way round: so one of the two sees it.
    while (!to.mail.compare_exchange_weak(mail->next, mail, std::memory_order_seq_cst, std::memory_order_relaxed)) {
    }
    to.watched.store(true, std::memory_order_seq_cst);
}

static void open_all(Processor& p) {
    Mail* last = p.mail.exchange(nullptr, std::memory_order_acquire);
    Mail* first = nullptr;
    while (last) {
        Mail* const before = last->next;
        last->next = first;
        first = std::exchange(last, before);
    }
    while (first) {
        const std::unique_ptr<Mail> mail(std::exchange(first, first->next));
        mail->open(mail->what);
    }
}

void open_mail(Processor& p) {
    if (p.depth == 0 && p.mail.load(std::memory_order_seq_cst)) open_all(p);
}

void open_mail_of_all() {
    for (std::uint32_t id = 0, n = processor_count(); id < n; ++id) open_all(processor(id));
}

std::uint32_t processor_count() { return Registry::instance().count(); }

Processor& processor(std::uint32_t id) { return Registry::instance().at(id); }

}  // namespace k42::runtime
