#include "vm/guard.hpp"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "vm/access.hpp"
#include "vm/status_page.hpp"
#include "vm/uffd.hpp"

namespace k42::vm {

namespace {

std::atomic<WindowRecord*> windows{nullptr};
// Protects the list against writers; readers (the handler) take nothing. A leaf, held over a fork.
std::mutex windows_lock;
// Whom our handlers found there. Never freed, only replaced: a handler may be reading.
std::atomic<const struct sigaction*> previous_bus{nullptr};
std::atomic<const struct sigaction*> previous_segv{nullptr};
// Whether this thread is in a handler that ours has called. Initial-exec: read in a handler.
constinit thread_local bool handed_on __attribute__((tls_model("initial-exec"))) = false;

// snprintf is not async-signal-safe; this is.
class Line {
  public:
    Line& text(const char* s) {
        while (*s && size_ < sizeof buffer_) buffer_[size_++] = *s++;
        return *this;
    }
    Line& number(uint64_t n, unsigned base) {
        char digits[24];
        int count = 0;
        do {
            digits[count++] = "0123456789abcdef"[n % base];
            n /= base;
        } while (n);
        while (count && size_ < sizeof buffer_) buffer_[size_++] = digits[--count];
        return *this;
    }
    void print() const { [[maybe_unused]] const auto written = write(STDERR_FILENO, buffer_, size_); }

  private:
    char buffer_[640];
    size_t size_ = 0;
};

void explain(int number, uint64_t address) {
    for (WindowRecord* w = windows.load(std::memory_order_acquire); w; w = w->next) {
        const uint64_t base = w->base.load(std::memory_order_acquire);
        if (base == 0 || address - base >= w->length) continue;
        const char* reason = "the page could not be had";
        const FailureRecord* failure = StatusPage::find(w->status, address);
        if (number == SIGSEGV && w->owner == getpid()) {
            reason = "it is mapped for reading only";
        } else if (number == SIGSEGV) {
            reason = "it belongs to the parent process: open it again in the forked child";
        } else if (w->abandoned->load(std::memory_order_relaxed)) {
            reason = "the kernel (k42 serve) that served it is gone and none took over";
        } else if (failure) {
            reason = failure->reason;
        }
        Line()
            .text(number == SIGBUS ? "k42: bus error in the mapping of " : "k42: no access to the mapping of ")
            .text(w->name)
            .text(", offset ")
            .number(w->offset + (address - base), 10)
            .text(" (address 0x")
            .number(address, 16)
            .text("): ")
            .text(reason)
            .text("\n")
            .print();
        return;
    }
}

void on_fault(int number, siginfo_t* info, void* context) {
    const int error = errno;
    if (number == SIGBUS) leave_guarded_touch(reinterpret_cast<uint64_t>(info->si_addr), context);
    explain(number, reinterpret_cast<uint64_t>(info->si_addr));
    errno = error;
    const struct sigaction& previous = *(number == SIGBUS ? previous_bus : previous_segv).load();
    const bool none = previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN;
    if (none || handed_on) {
        // On return the access happens again, and ends the process. (A handler that ours has called, and that calls
        // whom it found there, may have found ours.)
        signal(number, SIG_DFL);
        return;
    }
    handed_on = true;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else {
        previous.sa_handler(number);
    }
    handed_on = false;
}

bool is_ours(const struct sigaction& action) {
    return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == on_fault;
}

void install(int number, std::atomic<const struct sigaction*>& previous) {
    struct sigaction there{};
    sigaction(number, nullptr, &there);
    if (is_ours(there)) return;
    previous.store(new struct sigaction(there));
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(number, &action, nullptr);
}

// A forked child has no windows, but may have inherited pointers to them: nothing else may come to their addresses.
void reserve_in_child() {
    bool some = false;
    for (WindowRecord* w = windows.load(std::memory_order_acquire); w; w = w->next) {
        const uint64_t base = w->base.load(std::memory_order_acquire);
        if (base == 0) continue;
        mmap(reinterpret_cast<void*>(base), w->length, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        some = true;
    }
    static bool installed = false;  // a child may fork again
    if (some && !installed) install(SIGSEGV, previous_segv);
    installed = installed || some;
}

}  // namespace

void lead_bus_handlers() {
    struct sigaction there{};
    if (sigaction(SIGBUS, nullptr, &there) == 0 && is_ours(there)) return;
    std::lock_guard guard(windows_lock);
    install(SIGBUS, previous_bus);
}

WindowRecord* list_window(uint64_t base, uint64_t length, uint64_t offset, bool copies, const std::string& name,
                          const void* status, const std::atomic<bool>* abandoned) {
    static std::once_flag once;
    std::call_once(once, [] {
        pthread_atfork([] { windows_lock.lock(); }, [] { windows_lock.unlock(); },
                       [] {
                           windows_lock.unlock();
                           reserve_in_child();
                       });
    });
    lead_bus_handlers();
    std::lock_guard guard(windows_lock);
    WindowRecord* record = windows.load(std::memory_order_relaxed);
    while (record && record->base.load(std::memory_order_relaxed) != 0) record = record->next;
    const bool fresh = record == nullptr;
    if (fresh) record = new WindowRecord;
    record->length = length;
    record->offset = offset;
    record->copies = copies;
    record->status = status;
    record->abandoned = abandoned;
    record->owner = getpid();
    std::strncpy(record->name, name.c_str(), sizeof record->name - 1);
    record->base.store(base, std::memory_order_release);
    if (fresh) {
        record->next = windows.load(std::memory_order_relaxed);
        windows.store(record, std::memory_order_release);
    }
    return record;
}

void unlist_window(WindowRecord* record) { record->base.store(0, std::memory_order_release); }

Guard::Guard(int socket, int grace_ms)
    : socket_(socket), grace_ms_(grace_ms), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    thread_ = std::thread([this] { run(); });
}

void Guard::stop() {
    if (!thread_.joinable()) return;
    if (pid_ != getpid()) {
        // A forked child has the object but not the thread; a thread of the child's own may have its handle by now.
        new std::thread(std::move(thread_));
        if (agent_) agent_->forget_in_child();
        return;
    }
    if (agent_) agent_->stop();
    stopping_.store(true);
    const uint64_t one = 1;
    [[maybe_unused]] const auto written = write(wake_, &one, sizeof one);
    thread_.join();
    close(wake_);
}

void Guard::forget_in_child() {
    // No lock: a thread that the child does not have may hold it.
    for (int uffd : windows_.uffds) {
        if (uffd >= 0) close(uffd);
    }
    windows_.uffds.clear();
}

Guard::~Guard() {
    stop();
    forget_in_child();
}

void Guard::run() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);  // signals are the program's, not this thread's
    pthread_setname_np(pthread_self(), "k42-guard");

    pollfd watched[2] = {{socket_, POLLRDHUP, 0}, {wake_, POLLIN, 0}};
    while (poll(watched, 2, -1) < 0 || watched[0].revents == 0) {
        if (stopping_.load()) return;
    }
    pollfd stop_only = {wake_, POLLIN, 0};
    if (poll(&stop_only, 1, grace_ms_) > 0 || stopping_.load()) return;
    abandon();
}

void Guard::abandon() {
    abandoned_->store(true);
    std::vector<pollfd> polled;
    while (!stopping_.load()) {
        {
            // Not `changing`: the agent may hold it, until an event is read here.
            std::lock_guard guard(windows_.lock);
            polled.assign(1, {wake_, POLLIN, 0});
            for (int uffd : windows_.uffds) {
                if (uffd < 0) continue;
                polled.push_back({uffd, POLLIN, 0});
                // Faults that the dead kernel had read happen again when woken, and are then read here.
                for (const Windows::Range& range : windows_.ranges) wake_range(uffd, range.base, range.length);
            }
        }
        // One turn a second finds windows and userfaultfds that were added meanwhile.
        const int ready = poll(polled.data(), polled.size(), 1000);
        for (size_t i = 1; ready > 0 && i < polled.size(); ++i) {
            uffd_msg messages[16];
            if (!(polled[i].revents & POLLIN)) continue;
            const ssize_t count = read_messages(polled[i].fd, messages, 16);
            for (ssize_t k = 0; k < count; ++k) {
                if (messages[k].event != UFFD_EVENT_PAGEFAULT) continue;
                const uint64_t page = messages[k].arg.pagefault.address & ~(kPageSize - 1);
                poison_range(polled[i].fd, page, kPageSize);
                wake_range(polled[i].fd, page, kPageSize);
            }
        }
    }
}

}  // namespace k42::vm
