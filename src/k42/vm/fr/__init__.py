"""File representatives (FR): the kernel's face of a file; they fill absent pages and write dirty ones (paper 4.4)."""

from k42.vm.fr.file import FileFR
from k42.vm.fr.interface import FileRepresentative, Traits
from k42.vm.fr.zero import ZeroFR

__all__ = ["FileFR", "FileRepresentative", "Traits", "ZeroFR"]
