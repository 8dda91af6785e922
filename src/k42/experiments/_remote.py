"""A second process of the experiment `remote`: maps a URL by the kernel of another, reads it and compares it."""

from __future__ import annotations

import sys
from pathlib import Path

from k42 import vm


def main() -> None:
    """Read all of the URL; the arguments are the socket, the URL, and the file that it is."""
    socket, url, path = sys.argv[1:]
    expected = Path(path).read_bytes()
    sys.stdin.readline()
    with vm.connect(socket) as client, client.open(url) as mapping:
        if mapping.read(len(expected)) != expected:
            sys.exit(f"{url} is not what it must be")


if __name__ == "__main__":
    main()
