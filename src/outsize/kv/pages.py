"""Pages: who uses which, and what prefixes they hold. No tensor is here; `store.py` has the bytes.

A page holds the keys and values of PAGE_TOKENS tokens in all layers. A request's pages are its table: token `i` is in page
`table[i // PAGE_TOKENS]` (Kwon et al., "PagedAttention", 2023). A full page is known by a hash of all tokens up to its
end, so that a prompt that begins like an earlier one finds its pages, in use or freed and not yet given to another.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

PAGE_TOKENS = 16
"""Tokens of a page: a vector register of fp32, and few tokens computed again where a prompt's last page is partial."""

SCRATCH = 0
"""The page that belongs to nobody: tokens that only fill a pass write there."""


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens`."""
    return -(-num_tokens // PAGE_TOKENS)


def prefix_hashes(tokens: Sequence[int], salt: bytes = b"") -> list[bytes]:
    """A hash for each full page of `tokens`, of all tokens up to its end; `salt` keeps prefixes apart that differ in how
    they are computed."""
    hashes: list[bytes] = []
    before = salt
    for start in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = array("q", tokens[start : start + PAGE_TOKENS]).tobytes()
        before = hashlib.blake2b(before + page, digest_size=16).digest()
        hashes.append(before)
    return hashes


class PagePool:
    """Pages 1 to `num_pages - 1`, each with the number of its users; page 0 is SCRATCH."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 1, num_pages
        self.num_pages = num_pages
        self._num_users = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))
        """Pages without users, the longest unused first; some hold a prefix that may be asked for again."""
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages without users."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that one request could have."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages; what they held is forgotten."""
        assert count <= self.num_free, f"{count} pages of {self.num_free}"
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._forget(page)
            self._num_users[page] = 1
        return pages

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix, each with one user more."""
        pages: list[int] = []
        for digest in hashes:
            if (page := self._page_of.get(digest)) is None:
                break
            self._free.pop(page, None)
            self._num_users[page] += 1
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """Let others find a full page that has been computed; where its prefix is known already, nothing changes."""
        assert self._num_users[page], page
        if digest not in self._page_of and page not in self._hash_of:
            self._page_of[digest], self._hash_of[page] = page, digest

    def forget(self) -> None:
        """No page holds a known prefix any more; their users stay."""
        self._page_of.clear()
        self._hash_of.clear()

    def free(self, pages: Sequence[int]) -> None:
        """Take one user from each page; a prefix loses its last pages first when others need room."""
        for page in reversed(pages):
            assert self._num_users[page] > 0, f"page {page} has no user"
            self._num_users[page] -= 1
            if not self._num_users[page]:
                self._free[page] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the books are right: the users are `tables`, and nobody else."""
        users = [0] * self.num_pages
        for table in tables:
            for page in table:
                users[page] += 1
        assert users == self._num_users, (users, self._num_users)
        free = {page for page in range(1, self.num_pages) if not users[page]}
        assert free == set(self._free), (free, set(self._free))
        assert all(self._page_of[digest] == page for page, digest in self._hash_of.items())
        assert len(self._page_of) == len(self._hash_of)

    def repair(self, tables: Iterable[Sequence[int]]) -> None:
        """Make the books right after an exception in the midst of a change: the users are `tables`, and nobody else."""
        users = [0] * self.num_pages
        for table in tables:
            for page in table:
                users[page] += 1
        free = [page for page in (*self._free, *range(1, self.num_pages)) if not users[page]]
        self._num_users, self._free = users, OrderedDict.fromkeys(free)
        # `register` adds to `_hash_of` last, and `_forget` removes from it first: what it holds is whole.
        self._page_of = {digest: page for page, digest in self._hash_of.items()}

    def _forget(self, page: int) -> None:
        if (digest := self._hash_of.pop(page, None)) is not None:
            del self._page_of[digest]
