"""Opening files past the page cache, and moving all bytes of a request or saying why not.

file = OpenFile.open(path)                 # holds the descriptor: the file may be renamed or removed meanwhile
file.read(offset, view, "L07.weight")      # aligned, or `read_range` for any range
file.check()                               # FileChangedError where path and contents are not what was opened
"""

from outsize.files.filesystem import direct_alignment, is_memory_backed
from outsize.files.open_file import FULL_ERRNOS, OpenFile, open_direct

__all__ = ["FULL_ERRNOS", "OpenFile", "direct_alignment", "is_memory_backed", "open_direct"]
