"""Hardware address translation (HAT): what maps pages into a process (paper section 4).

Two kinds: `UffdHat` maps real memory of a client process through its userfaultfds, `SoftHat` keeps the mappings in
a table, for tests and simulation. Everything else of the virtual memory system is the same on both.
"""

from k42.vm.hat.interface import Hat
from k42.vm.hat.soft import SoftHat
from k42.vm.hat.uffd import UffdHat

__all__ = ["Hat", "SoftHat", "UffdHat"]
