// Adaptive read-ahead: which pages to bring in before anybody touches them, from the trend of faults.
//
// As in Linux's mm/readahead.c: a stream of misses that moves on gets a window of pages ahead of it, and one page of
// the window bears a marker; when that page is touched the next window, twice as large, is asked for, so that a steady
// reader never waits. Unlike there, the streams are found by where they are, not by who reads: several threads may read
// several places of one file. Pure policy: no I/O, no clock.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>

namespace k42::vm {

class ReadAhead {
  public:
    // How the file will be read, as a client advises: see Advice in src/k42/vm/readahead.py.
    enum class Pattern : uint8_t { normal, sequential, random };

    struct Ahead {
        uint64_t first;
        uint64_t count;
        uint64_t marker;  // a page of these, at whose first touch touched() is due
    };

    // `pages`: of the file. `limit`: the largest window; 0: never reads ahead. `least`: the first window: large where a
    // request takes long, however little it asks for.
    ReadAhead(uint64_t pages, uint64_t limit, uint64_t least) : limit_(limit), least_(least), pages_(pages) {}

    Pattern pattern() const { return pattern_.load(std::memory_order_relaxed); }

    // What was learnt before is forgotten.
    void advise(Pattern pattern) {
        std::lock_guard guard(lock_);
        pattern_.store(pattern, std::memory_order_relaxed);
        known_ = 0;
    }

    void resize(uint64_t pages) {
        std::lock_guard guard(lock_);
        pages_ = pages;
    }

    // A fault found a page absent, and brings in `count` pages from `first`: what to read beyond them, if any.
    std::optional<Ahead> missed(uint64_t first, uint64_t count) {
        std::lock_guard guard(lock_);
        if (limit_ == 0 || pattern() == Pattern::random) return std::nullopt;
        if (Stream* const found = find(first)) return go_on(to_front(found), first, first + count);
        known_ = std::min(known_ + 1, streams_.size());
        Stream& stream = to_front(&streams_[known_ - 1]);
        stream = Stream{first, first + count, 0, 0, kNone};
        if (pattern() == Pattern::sequential) {
            stream.window = limit_;
        } else if (first == 0 && count > 1 && count < least_) {  // most who begin at the beginning go on
            stream.window = first_window(count, 0);
        } else {
            return std::nullopt;
        }
        return ask(stream, stream.end);
    }

    // A page with a marker was touched, and its marker is gone: what to read next, if any.
    std::optional<Ahead> touched(uint64_t page) {
        std::lock_guard guard(lock_);
        for (size_t i = 0; i < known_; ++i) {
            if (streams_[i].marker != page) continue;
            Stream& stream = to_front(&streams_[i]);
            stream.last = page;
            stream.window = next_window(stream.window);
            return ask(stream, stream.end);
        }
        return std::nullopt;  // of a stream that was forgotten
    }

  private:
    static constexpr size_t kStreams = 8;        // places read at a time; the least recent is forgotten
    static constexpr uint64_t kMostStride = 32;  // pages: of larger steps most of what were read would be for nothing
    static constexpr uint64_t kLeastWindow = 4;  // pages
    static constexpr uint64_t kNone = UINT64_MAX;

    struct Stream {
        uint64_t last = 0;    // the page of its last miss or touched marker
        uint64_t end = 0;     // what it was given reaches up to here
        uint64_t stride = 0;  // pages from miss to miss; 0: not known
        uint64_t window = 0;  // pages; 0: no trend is known yet
        uint64_t marker = kNone;
    };

    Stream& to_front(Stream* stream) {
        std::rotate(streams_.data(), stream, stream + 1);
        return streams_[0];
    }

    uint64_t first_window(uint64_t count, uint64_t stride) const {
        return std::min(std::max({least_, 2 * count, 2 * stride}), limit_);
    }
    // As Linux does it.
    uint64_t next_window(uint64_t window) const { return std::min((window < limit_ / 16 ? 4 : 2) * window, limit_); }

    // The stream that a miss belongs to: one that it continues for certain before one that it might.
    Stream* find(uint64_t page) {
        Stream* possible = nullptr;
        for (size_t i = 0; i < known_; ++i) {
            Stream& stream = streams_[i];
            const bool forward = page > stream.last;
            const uint64_t step = page - stream.last;
            if (stream.window) {
                if (page + stream.window >= stream.last && page <= stream.end + stream.window) return &stream;
            } else if (page == stream.end || (forward && step == stream.stride)) {
                return &stream;
            } else if (forward && step <= kMostStride && !possible) {
                possible = &stream;
            }
        }
        return possible;
    }

    std::optional<Ahead> go_on(Stream& stream, uint64_t page, uint64_t end) {
        if (!stream.window) {
            const bool contiguous = page == stream.end;
            const uint64_t step = page - stream.last;
            const bool known = step == stream.stride;
            stream.last = page;
            stream.end = end;
            stream.stride = contiguous ? 0 : step;
            if (!contiguous && !known) return std::nullopt;  // a first step: the next will tell
            stream.window = first_window(end - page, stream.stride);
            return ask(stream, end);
        }
        if (page <= stream.last) return std::nullopt;  // by threads that do not keep in step
        if (page < stream.end) {
            // It was given and is not there: dropped, or evicted before it was used. Less, then.
            stream.window /= 2;
            stream.last = page;
            stream.end = end;
            if (stream.window < kLeastWindow) {
                stream.window = stream.stride = 0;
                stream.marker = kNone;
                return std::nullopt;
            }
            return ask(stream, end);
        }
        // It ran past what it was given, without having touched the marker.
        stream.window = next_window(stream.window);
        stream.last = page;
        return ask(stream, end);
    }

    std::optional<Ahead> ask(Stream& stream, uint64_t first) {
        if (first >= pages_) {
            stream.marker = kNone;
            return std::nullopt;
        }
        const uint64_t count = std::min(stream.window, pages_ - first);
        stream.end = first + count;
        uint64_t marker = first;
        // The first page of the window that will be touched.
        if (const uint64_t behind = stream.stride ? (first - stream.last) % stream.stride : 0) {
            marker = first + stream.stride - behind;
        }
        stream.marker = std::min(marker, stream.end - 1);
        return Ahead{first, count, stream.marker};
    }

    const uint64_t limit_, least_;
    std::atomic<Pattern> pattern_{Pattern::normal};  // read without the lock

    std::mutex lock_;  // protects what follows; a leaf
    uint64_t pages_;
    std::array<Stream, kStreams> streams_;  // the first `known_`, the most recent first
    size_t known_ = 0;
};

}  // namespace k42::vm
