"""File representatives (FR): the kernel's face of a file; they fill absent pages (paper section 4)."""

from k42.vm.fr.file import FileFR
from k42.vm.fr.interface import FileRepresentative
from k42.vm.fr.zero import ZeroFR

__all__ = ["FileFR", "FileRepresentative", "ZeroFR"]
