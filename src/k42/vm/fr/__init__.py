"""File representatives (FR): the kernel's face of a file; they fill absent pages and write dirty ones (paper 4.4)."""

from k42.vm.fr.compressed import CompressedFR, compress
from k42.vm.fr.file import FileFR
from k42.vm.fr.interface import FileRepresentative, Traits
from k42.vm.fr.resumed import ResumedFR
from k42.vm.fr.swap import SwapFR
from k42.vm.fr.url import UrlFR
from k42.vm.fr.user import Store, UserFR
from k42.vm.fr.zero import ZeroFR

__all__ = [
    "CompressedFR",
    "FileFR",
    "FileRepresentative",
    "ResumedFR",
    "Store",
    "SwapFR",
    "Traits",
    "UrlFR",
    "UserFR",
    "ZeroFR",
    "compress",
]
