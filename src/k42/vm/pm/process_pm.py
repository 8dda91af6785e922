"""The page manager of one process: forwards to the Global PM and accounts (paper section 4.2)."""

from __future__ import annotations

import k42
from k42.vm.pm.global_pm import Backing, GlobalPageManager


class PageManager(k42.Object):
    """The interface."""

    def allocate(self, frames: int, backing: Backing) -> None:
        """Takes frames of 4 KiB for this process.

        Raises:
            OutOfFrames: there are none to be had.
        """
        raise NotImplementedError

    def release(self, frames: int, backing: Backing) -> None:
        """Gives frames back that were not used after all."""
        raise NotImplementedError


class ProcessPM(PageManager):
    """Redirects to the Global PM, as the paper's does.

    Args of ``create``:
        global_pm: the frames.
    """

    class Root(k42.SharedRoot):
        """Holds the Global PM."""

        def __init__(self, global_pm: GlobalPageManager) -> None:
            self.global_pm = global_pm

    root: Root

    def allocate(self, frames: int, backing: Backing) -> None:
        """Takes frames; see `PageManager.allocate`."""
        self.root.global_pm.allocate(frames, backing)

    def release(self, frames: int, backing: Backing) -> None:
        """Gives frames back."""
        self.root.global_pm.release(frames, backing)
