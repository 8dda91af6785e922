"""The gates of `k42.structures`: who may enter when, and what stopping one takes (section 4.3 of the paper)."""

from __future__ import annotations

from k42.errors import GateClosed


class Waits(Exception):
    """The call would wait now. What it did before that is done: a gate that was shut is shut."""


class Gate:
    """Requests enter and leave, unless someone stops the gate or shuts it down.

    Where the count of a processor is kept is not the model's business: `SharedGate` and `DistributedGate` do the same.
    """

    def __init__(self) -> None:
        self.state = "normal"  # then stopping, stopped, and normal again; at last shutdown
        self.requests: dict[int, int] = {}  # inside, by processor; none that are 0

    def inside(self) -> int:
        """Return how many requests are inside."""
        return sum(self.requests.values())

    def try_enter(self, processor: int) -> bool:
        """Enter, or return False when the gate is stopped, or is being stopped.

        Who is inside may enter again in any state: a stop waits for it anyway.

        Raises:
            GateClosed: the gate is shut.
        """
        if processor not in self.requests and self.state != "normal":
            if self.state == "shutdown":
                raise GateClosed
            return False
        self.requests[processor] = self.requests.get(processor, 0) + 1
        return True

    def enter(self, processor: int) -> None:
        """Enter; the gate lets nobody in while it is stopped.

        Raises:
            GateClosed: the gate is shut.
        """
        if not self.try_enter(processor):
            raise Waits

    def leave(self, processor: int) -> None:
        """Leave.

        Raises:
            RuntimeError: no request of this processor is inside.
        """
        if processor not in self.requests:
            raise RuntimeError
        self.requests[processor] -= 1
        if not self.requests[processor]:
            del self.requests[processor]

    def stop(self, processor: int) -> None:
        """Stop the gate in one step, or not at all: what a `stop` with no patience does."""
        self.begin_stop(processor)
        try:
            self.end_stop()
        except Waits:
            self.give_up_stop()
            raise

    def begin_stop(self, processor: int) -> None:
        """Let nobody in from now on; there is one stopper at a time.

        Raises:
            RuntimeError: the stopper is inside, and would wait for itself.
            GateClosed: the gate is shut.
        """
        if processor in self.requests:
            raise RuntimeError
        if self.state == "shutdown":
            raise GateClosed
        if self.state != "normal":
            raise Waits
        self.state = "stopping"

    def end_stop(self) -> None:
        """Those inside have left: the stopper is alone.

        Raises:
            GateClosed: the gate has been shut since the stop began.
        """
        if self.state == "shutdown":
            raise GateClosed
        if self.requests:
            raise Waits
        self.state = "stopped"

    def give_up_stop(self) -> None:
        """Let newcomers in again, because those inside took too long to leave."""
        if self.state == "stopping":
            self.state = "normal"

    def restart(self) -> None:
        """Let newcomers in again.

        Raises:
            GateClosed: the gate is shut.
            RuntimeError: the gate is not stopped.
        """
        if self.state == "shutdown":
            raise GateClosed
        if self.state != "stopped":
            raise RuntimeError
        self.state = "normal"

    def shutdown(self, processor: int) -> None:
        """Let nobody in any more; it waits for those inside.

        Raises:
            RuntimeError: the caller is inside, and would wait for itself.
        """
        if processor in self.requests:
            raise RuntimeError
        self.state = "shutdown"
        if self.requests:
            raise Waits


class SharedGate(Gate):
    """State and count in one word."""


class DistributedGate(Gate):
    """A count for each processor."""
