"""What both kinds of HAT can do.

Their state is kept per CPU in the native half, as K42 keeps its page tables per processor: faults on different CPUs
meet nothing in common here, so one representative serves them all.
"""

from __future__ import annotations

import k42
from k42 import _native
from k42.vm.protocol import PAGE


class Hat(k42.Object):
    """The interface, and what both kinds do alike."""

    def native(self) -> _native.Hat:
        """The native half."""
        raise NotImplementedError

    def add_window(self, cpu: int, base: int, size: int, canonical: int, *, follows: bool = False) -> bool:
        """Lists a window: `size` bytes at `base` that show the region's addresses from `canonical`.

        Its faults are served on this CPU; with `follows` its spans of 2 MiB move to the CPUs of the threads that fault
        there. Returns False, and nothing changed, when it overlaps another window.
        """
        return self.native().add_window(cpu, base, size, canonical, follows)

    def remove_window(self, base: int, size: int) -> None:
        """Forgets a window, and lets faults that wait on it happen again (and find it gone)."""
        self.native().remove_window(base)
        self.native().wake_everywhere(base, size)

    def shows(self, cpu: int, address: int, canonical: int) -> bool:
        """Whether a window shows the region's address `canonical` at `address`."""
        return self.native().canonical(cpu, address) == canonical

    def wake(self, cpu: int, address: int) -> None:
        """Lets a fault on the page at `address` happen again."""
        self.native().wake(cpu, address, PAGE)

    def fail(self, cpu: int, address: int, reason: str) -> None:
        """Ends accesses to the page at `address` with SIGBUS; the client prints `reason`."""
        self.native().fail(cpu, address, PAGE, reason.encode(errors="replace").decode())  # names may be any bytes
