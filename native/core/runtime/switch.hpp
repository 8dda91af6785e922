// A switch: the moments in which a live object has no caller, so that its implementation can be replaced.
//
// The paper's section 2.2.1 and K42's hot-swapping count the calls through a mediator. Here the requests are counted
// already: calls miss while the object is being switched; those of requests that are older than the switch go on
// with the old representatives, recursive ones too, and younger ones wait. When the older requests have ended, nobody
// is inside.
//
// Waiting for each other is possible, and K42's swaps deadlocked on it: an older request may wait for a lock, or for
// another switch, behind a younger one that waits here. So newcomers are held up for a limited time only: then they go
// on, and the switch tries again, with more patience, until its own time is over. A wait of which the runtime knows
// that it cannot end (an older request that itself waits for a switch) is given up at once. Once nobody is inside,
// newcomers wait for the end, however long the transfer takes; so whoever works on it must not wait for them, and a
// call by which it would wait for itself, directly or by way of other switches, fails.
#pragma once

#include <chrono>

#include "runtime/quiescence.hpp"
#include "runtime/translation.hpp"

namespace k42::runtime {

enum class Wait {
    over,
    circle,       // the caller works on that switch, or on one that it waits for: it would never end
    interrupted,  // the caller's `pause` said so
};

class Switch {
  public:
    enum class Outcome { quiet, destroyed, in_request, busy, timeout, interrupted };

    using Held = bool (*)(void* object);  // whether a suspended request uses the object
    using Pause = bool (*)();             // between waits; false: give up

    // Waits until nobody is inside the object. `quiet`: nobody is, and nobody enters until `end`. Else nothing has
    // changed: it was destroyed; the caller is inside a request itself, or works on a switch of this object; another
    // switch of it runs and did not end, or requests did not, within the timeout; or `pause` said so.
    Outcome begin(const Reference& reference, std::chrono::nanoseconds timeout, Held held, Pause pause);

    // Between a quiet `begin` and `end` the thread that began works on the switch, and others may: they cannot wait for
    // its end.
    void add_worker();
    void remove_worker();

    // The object; between a quiet `begin` and `end`.
    void* object() const { return object_; }

    // Lets the calls go on, which find what the object is now. Runs the destruction that came meanwhile.
    void end();

  private:
    Outcome attempt(const Reference& reference, std::chrono::steady_clock::time_point until, Held held, Pause pause);
    void close();

    Coid coid_ = 0;
    void* object_ = nullptr;
    // Protected by the lock of all switches, in translation.cpp:
    Mark mark_;            // the requests that were there before
    Ending ending_{};      // of a destruction that came during the switch,
    bool doomed_ = false;  // if one did
    std::vector<Processor*> workers_;

    // Whether a worker is `p`, or waits for a switch that needs it.
    bool needs(const Processor& p) const;

    friend Miss begin_miss(Processor&, Coid);
    friend Wait await_switch(Processor&, Coid, bool (*)());
    friend bool destroy(Reference&, Ending, bool*);
    friend struct World;
};

// Waits until the object is not being switched, with a `pause` now and then. Inside a request; the caller must hold no
// lock.
Wait await_switch(Processor& p, Coid coid, bool (*pause)());

}  // namespace k42::runtime
