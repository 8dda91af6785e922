"""``python -m k42``."""

from k42.cli import main

main()
