"""Keys and values in pages: tables, prefixes, and the attention function that reads them."""

from outsize.kv.attention import switched
from outsize.kv.pages import PAGE_TOKENS, PagePool, pages_for, prefix_hashes
from outsize.kv.probe import NotPageableError, Pageable, probe
from outsize.kv.store import PagedKV, Pass, Segment, page_bytes, unplanned_memory

__all__ = [
    "PAGE_TOKENS",
    "NotPageableError",
    "PagePool",
    "Pageable",
    "PagedKV",
    "Pass",
    "Segment",
    "page_bytes",
    "pages_for",
    "prefix_hashes",
    "probe",
    "switched",
    "unplanned_memory",
]
