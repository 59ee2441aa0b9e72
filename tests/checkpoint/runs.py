"""Runs that commit, for the tests of this folder."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import outsize
from outsize.checkpoint.files import commit_paths, read_header, read_manifest
from tests.running import adamw, loss_of, opened
from tests.seams import close_unchecked, commit_store_of
from tests.zoo import ZOO


def batches(count, name="llama", first=0):
    return [ZOO[name].batch(seed=seed) for seed in range(first, first + count)]


class Run:
    """A model with an optimizer and a store; `go` trains and commits after each step."""

    def __init__(
        self, folder, store="run", *, name="llama", keep=1, optimizer=adamw, prepare=None, **options
    ):
        options = {"home": "disk", "disk": str(folder), **options}
        self.model = opened(ZOO[name].build().train(), **options)
        if prepare is not None:
            prepare(self.model)
        self.optimizer = optimizer(self.model)
        self.path = Path(folder) / store
        self.keep = keep
        self.resumed = outsize.checkpoint.resume(self.model, self.optimizer, self.path, keep=keep)

    @property
    def step(self):
        return self.optimizer.num_updates

    def go(self, some, every=1):
        losses = []
        for batch in some:
            loss = loss_of(self.model(**batch))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if every and self.step % every == 0:
                outsize.checkpoint.commit(
                    self.model, self.optimizer, self.path, keep=self.keep, extra={"losses": losses}
                )
        return losses

    def finish(self):
        return outsize.checkpoint.finish(self.model)

    @property
    def versions(self):
        return commit_store_of(self.model)

    def end(self, *, finish=True):
        """Close as a process that ends would."""
        if finish:
            self.finish()
        close_unchecked(self.model)


def manifests(store):
    header = read_header(store)
    return [read_manifest(path, header) for path in commit_paths(store)]


def check_store(store):
    """No extent of a commit overlaps another's, unless it is the same, and all lie in slabs and in the data."""
    header = read_header(store)
    held = {}
    for manifest in manifests(store):
        own = set()
        for block in manifest.blocks:
            for cell in block.cells:
                assert cell.offset not in own, "one commit has an extent twice"
                own.add(cell.offset)
                assert held.setdefault(cell.offset, cell.cell.num_bytes) == cell.cell.num_bytes
    places = sorted(held.items())
    for (one, size), (other, _) in pairwise(places):
        assert one + size <= other, "extents overlap"
    sizes = {offset: slab.extent_bytes for slab in header.slabs for offset in slab.extents()}
    assert all(sizes[offset] == size for offset, size in held.items())


def manifest_body(path):
    return json.loads(path.read_text())
