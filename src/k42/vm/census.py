"""What must hold of frames and pages at any time, under whatever load: `k42 stat --check` and `Client.check` ask."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import k42
from k42.vm.fcm import FileCacheManager
from k42.vm.pm import GlobalPageManager
from k42.vm.protocol import PAGE


def take_census(global_pm: GlobalPageManager, fcms: Iterable[FileCacheManager]) -> tuple[list[str], list[str]]:
    """What was found to hold, and what was not.

    The frames that are charged to accounts are counted while no frame is taken or given back anywhere, so they are
    exact; and so is the comparison with the pages. A frame that is between its taking and its page, or in a file that
    is just being opened or closed, may be missed: who finds a violation looks again.

    Args:
        global_pm: the frames.
        fcms: all file caches.
    """
    caches = []
    for fcm in fcms:
        with contextlib.suppress(k42.Destroyed):  # closed since it was listed
            caches.append(fcm.native())
    adds_up = global_pm.check()
    usage, accounts, orphans, moving = global_pm.native().census(caches)
    in_use = usage["file"] + usage["reserved"] + usage["overcommitted"]
    charged = sum(frames for frames, _ in accounts.values())
    resident = orphans + sum(pages for _, pages in accounts.values())
    overdrawn = {number: counts for number, counts in accounts.items() if counts[1] > counts[0]}
    held = sum(os.fstat(cache.memfd()).st_blocks for cache in caches) * 512 // PAGE
    good: list[str] = []
    bad: list[str] = []

    def expect(holds: bool, text: str) -> None:
        (good if holds else bad).append(text)

    expect(adds_up, f"frames in use, free and promised add up to the budget of {usage['budget']}")
    expect(in_use <= usage["budget"], f"{in_use} frames are in use, of {usage['budget']}")
    expect(charged == in_use, f"{charged} frames are charged to {len(accounts)} accounts, {in_use} are in use")
    expect(
        not overdrawn and not orphans,
        "no account has more pages than frames are charged to it"
        if not overdrawn and not orphans
        else f"(frames charged, pages) of accounts: {overdrawn}; pages of no account: {orphans}",
    )
    expect(
        resident <= in_use <= resident + moving,
        f"{in_use} frames are in use: {resident} pages of {len(caches)} files are resident, {moving} come or go",
    )
    expect(held <= usage["budget"], f"Linux counts {held} frames in the files' memory, {usage['budget']} may be")
    return good, bad
