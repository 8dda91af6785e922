// Quiescence: the moment when every request that ran at a mark has ended.
//
// Where K42 counts two generations of requests a processor, one counter a processor is enough here: it is odd
// inside a request and never goes back. A mark notes the counters that are odd; it has elapsed when each of
// them has moved on. Requests that begin after the mark are never waited for.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "runtime/processor.hpp"

namespace k42::runtime {

class Mark {
  public:
    // A mark that waits for the requests that run now, on all processors.
    static Mark take();
    // A mark that waits for the requests that run now on these processors.
    static Mark take(const std::vector<Processor*>& processors);

    bool elapsed();

    // Does not wait for this processor's request.
    void forget(const Processor& p);

    // Whether it waits for the request that runs now on `p`; of the caller's own processor.
    bool includes(const Processor& p) const;

    // Whether one of those that it waits for waits for the end of a switch itself.
    bool waits_for_a_switch() const;

    // The processors that it still waits for will `collect` when their request ends.
    void watch();

  private:
    std::vector<std::pair<Processor*, std::uint64_t>> waiting_;
};

// Returns when every request that runs now on another processor has ended. Never waits for the caller's own.
void synchronize();

// The same for the requests on these processors alone.
void synchronize(const std::vector<Processor*>& processors);

}  // namespace k42::runtime
