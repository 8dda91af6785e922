// A request for the length of a scope: what `retire` releases stays until it has ended. For code of the core, which
// calls no Clustered Object; a destruction that waits for the caller's calls goes on at the end of its next one.
#pragma once

#include "runtime/processor.hpp"

namespace k42::runtime {

class Within {
  public:
    Within() : processor_(current()) { enter(processor_); }
    ~Within() { (void)leave(processor_); }
    Within(const Within&) = delete;
    Within& operator=(const Within&) = delete;

    Processor& processor() const { return processor_; }

  private:
    Processor& processor_;
};

}  // namespace k42::runtime
