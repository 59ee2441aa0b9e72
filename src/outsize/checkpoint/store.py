"""A store of commits, as a run writes it: the disk tier of a runtime, and the manifests beside it.

    store = Store.claim(folder, commits=2)     # locked for this process
    store.resume()                             # the newest manifest, or None
    runtime.backing.commit_store = store                   # at its first call the runtime lays its records out here
    store.commit(draft)                        # declared now, durable later, by a thread of its own

The order in which a commit becomes durable: what was written to the data (fdatasync), the buffers (fsync, rename, fsync
of the folder), the manifest (fsync), its name (rename, then fsync of the folder). Only then are older commits removed,
and only when their names are gone for good are their extents free. So at any instant every manifest that can be read has
all of its bytes.
"""

from __future__ import annotations

import os
import shutil
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from outsize.block import Extent, Piece, Record
from outsize.checkpoint.convert import convert
from outsize.checkpoint.files import (
    COMMITS,
    DATA,
    HEADER,
    LOCK,
    MODEL,
    Header,
    buffers_path,
    commit_path,
    commit_paths,
    data_paths,
    plan_slabs,
    read_header,
    read_manifest,
    remove_commit_files,
    remove_durably,
    sync_folder,
    tidy,
    write_durably,
)
from outsize.checkpoint.manifest import Manifest, StoredBlock, StoredBuffers, StoredCell
from outsize.checkpoint.module_state import ModuleState, digest_of
from outsize.checkpoint.reading import CommitReader, open_data
from outsize.config import format_bytes
from outsize.errors import BudgetError, ConfigError, CorruptionError, StorageError, UsageError
from outsize.files import is_memory_backed
from outsize.model import Source
from outsize.model.writer import storage_errors
from outsize.store.commit_store import Layout, Opened
from outsize.store.snapshots import Snapshot, SnapshotBlock
from outsize.tier import IO_THREADS, DiskTier, DurableTier, StripedTier, VersionedTier
from outsize.tier.store import give_space_back, lock_file
from outsize.tier.striped import part_bytes


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit that is durable."""

    step: int
    path: Path


class Store:
    """The commits in one folder; make one with `claim`. `commits` is how many are kept.

    One process at a time has a store: the lock goes with it. `disks` are folders for the data, where it is not to lie in
    the store's own.
    """

    def __init__(self, folder: Path, commits: int, disks: Sequence[Path], lock_fd: int) -> None:
        self.folder = folder
        self.commits = commits
        self.resumed: Manifest | None = None
        self._resumed_pieces: frozenset[Piece] = frozenset()
        self._disks = tuple(disks)
        self._header = read_header(folder)
        self._manifests: dict[int, list[int]] = {}
        self._tier: VersionedTier | None = None
        self._records: Mapping[str, Record] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="outsize-commit")
        self._pending: list[Future[Committed]] = []
        self._last: Committed | None = None
        self._declared_step: int | None = None
        self._finalizer = weakref.finalize(self, os.close, lock_fd)

    @classmethod
    def claim(cls, folder: Path, commits: int, disks: Sequence[Path] = ()) -> Store:
        """Lock `folder` for this process, and make it where it is missing.

        Raises ConfigError where it cannot hold a store, StorageError naming the process that has it.
        """
        if commits < 1:
            raise ConfigError(f"keep: {commits} commits", hint="keep 1 or more")
        folder = Path(os.path.abspath(folder))
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"checkpoint: {folder} is a file", hint="pass a folder")
        if (
            folder.is_dir()
            and any(folder.iterdir())
            and read_header(folder) is None
            and not _is_begun(folder)
        ):
            raise ConfigError(
                f"checkpoint: {folder} holds something else",
                hint="pass a new folder, or that of a checkpoint",
            )
        with storage_errors(folder):
            (folder / COMMITS).mkdir(parents=True, exist_ok=True)
        lock_fd = lock_file(folder / LOCK)
        try:
            with storage_errors(folder):
                tidy(folder)
            return cls(folder, commits, disks, lock_fd)
        except BaseException:
            os.close(lock_fd)
            raise

    # -- what there is -------------------------------------------------------------------------------------------

    def resume(self) -> Manifest | None:
        """The newest commit, which the runtime then starts from; None where there is none.

        Raises CorruptionError where a manifest is damaged: no commit is passed over in silence.
        """
        paths = commit_paths(self.folder)
        if not paths:
            return None
        if self._header is None:
            raise CorruptionError(
                f"{self.folder} has commits and no store.json", hint="restore the folder from a copy"
            )
        manifests = [read_manifest(path, self._header) for path in paths]
        self._manifests = {manifest.step: manifest.offsets() for manifest in manifests}
        self.resumed = manifests[-1]
        self._resumed_pieces = frozenset(
            entry.piece for block in self.resumed.blocks for entry in block.record.entries if block.has(entry)
        )
        self._declared_step = self.resumed.step
        return self.resumed

    def reader(self) -> CommitReader:
        """The commit that was resumed."""
        assert self.resumed is not None and self._header is not None
        return CommitReader(self.folder, self._header, self.resumed)

    # -- what a runtime asks (`outsize.store.commit_store.CommitStore`) ---------------------------------------------------

    def holds(self, piece: Piece) -> bool:
        """Whether the commit that was resumed stores `piece`, whose values may then be others than those of the model."""
        return piece in self._resumed_pieces

    def open(
        self,
        records: Sequence[Record],
        layout: Layout,
        source: Source | None = None,
        *,
        limits: Sequence[int | None] = (),
        verify: bool,
        num_threads: int = IO_THREADS,
    ) -> Opened:
        """Lay the data out for `records`; blocks of the commit that was resumed are there, whatever their form was.

        What the commit does not store of them comes from `source`.
        """
        if self._tier is not None:
            raise UsageError("the model lives in its store already", hint="open a model once")
        if self.resumed is None and commit_paths(self.folder):
            raise UsageError(
                f"{self.folder} holds commits of an earlier run",
                hint="resume from them, or pass a new folder",
            )
        # A process that was killed between naming a commit and removing the one before left one too many: its space is
        # needed for what comes.
        self._remove_old()
        self._records = {record.name: record for record in records}
        as_they_are, others = self._restored(records)
        placed = {
            layout.bases[block.record.name] + cell.cell.offset: cell.offset
            for block in as_they_are
            for cell in block.cells
        }
        tier = self._open_tier(layout, set(placed.values()), limits, verify, num_threads)
        try:
            for block in as_they_are:
                for cell in block.cells:
                    for check in cell.checks:
                        tier.expect(check)
            versions = VersionedTier(
                tier,
                (*layout.kept, *layout.scratch),
                self._header.slabs if self._header is not None else (),
                placed=placed,
                held=[offset for offsets in self._manifests.values() for offset in offsets],
            )
            restored = {block.record.name for block in as_they_are}
            if others:
                with self.reader() as reader:
                    restored |= convert(reader, others, layout.bases, versions, source)
        except BaseException:
            tier.close()
            raise
        self._tier = versions
        return Opened(versions, frozenset(restored))

    def is_closing(self) -> None:
        """The runtime closes its disk: what is being committed is over first, or given up."""
        for future in self._pending:
            if not future.done() and not future.cancel():
                future.exception()

    # -- committing ----------------------------------------------------------------------------------------------

    def commit(
        self, draft: Manifest, state: ModuleState, begin: Callable[[Callable[[Snapshot], None]], None]
    ) -> None:
        """Declare a commit of what `draft` says, of `state`, and of all blocks, as they are once their pending updates are
        applied.

        `begin` starts the snapshot. Returns at once; a step that is committed, or on its way, is left as it is. Raises what
        went wrong with an earlier commit.
        """
        self.raise_failure()
        if draft.step == self._declared_step or draft.step in self._manifests:
            return
        tier = self._tier
        assert tier is not None, "the runtime has not laid its records out yet"
        future: Future[Committed] = Future()
        self._pending.append(future)

        def complete(snapshot: Snapshot) -> None:
            if future.set_running_or_notify_cancel():
                self._threads.submit(self._publish, tier, draft, state, snapshot, future)
            else:
                tier.end_commit()

        self._declared_step = draft.step
        try:
            begin(complete)
        except BaseException:
            self._declared_step = None
            future.cancel()  # blocks that are added later would be those of another step
            self._pending.remove(future)
            raise

    def wait(self) -> Committed | None:
        """Wait until every commit that has all its blocks is durable; the last that was declared here. Raises what went
        wrong."""
        while self._pending:
            self._last = self._pending.pop(0).result()
        return self._last

    def raise_failure(self) -> None:
        """Raise what went wrong with a commit that is over; forget those that are durable."""
        while self._pending and self._pending[0].done():
            self._last = self._pending.pop(0).result()

    def close(self) -> None:
        """End the thread and give the lock back."""
        self._threads.shutdown(wait=True)
        self._finalizer()

    def _publish(
        self,
        tier: VersionedTier,
        draft: Manifest,
        state: ModuleState,
        snapshot: Snapshot,
        future: Future[Committed],
    ) -> None:
        offsets = [stored.offset for block in snapshot.blocks.values() for stored in block.cells]
        path = commit_path(self.folder, draft.step)
        try:
            try:
                snapshot.wait()
                tier.sync()
                blocks = tuple(self._stored_block(tier, snapshot.blocks[name]) for name in self._records)
                data = state.dumps()
                write_durably(buffers_path(self.folder, draft.step), data)
                buffers = StoredBuffers(len(data), digest_of(data))
                manifest = replace(draft, blocks=blocks, buffers=buffers, extra_state=state.extra)
                write_durably(path, manifest.dumps())
            except BaseException:
                # A manifest that may be there after all keeps its extents: none of them is written over.
                with suppress(StorageError):
                    remove_commit_files(self.folder, draft.step)
                    tier.release(offsets)
                raise
            self._manifests[draft.step] = offsets
            self._remove_old()
        except BaseException as error:
            self._declared_step = None
            future.set_exception(error)
        else:
            future.set_result(Committed(draft.step, path))
        finally:
            tier.end_commit()

    def _remove_old(self) -> None:
        while len(self._manifests) > self.commits:
            oldest = min(self._manifests)
            remove_commit_files(self.folder, oldest)
            offsets = self._manifests.pop(oldest)
            if self._tier is not None:
                self._tier.release(offsets)

    def _stored_block(self, tier: VersionedTier, block: SnapshotBlock) -> StoredBlock:
        cells = tuple(
            StoredCell(
                Extent(stored.cell.offset - block.base, stored.cell.num_bytes),
                stored.offset,
                tuple(tier.checks(stored)),
            )
            for stored in block.cells
        )
        return StoredBlock(self._records[block.name], block.is_stored, cells)

    # -- laying out ----------------------------------------------------------------------------------------------

    def _restored(self, records: Sequence[Record]) -> tuple[list[StoredBlock], list[Record]]:
        """Blocks of the resumed commit that stay as they are, and records that must be brought into another form."""
        if self.resumed is None:
            return [], []
        by_name = {block.record.name: block for block in self.resumed.blocks}
        if by_name.keys() != self._records.keys():
            raise StorageError(
                f"{self.folder}: the commit of step {self.resumed.step} has {len(by_name)} blocks, "
                f"the model has {len(self._records)}, and they are not the same",
                hint="resume with the model that the commit was made of",
            )
        stored = [record for record in records if by_name[record.name].is_stored]
        as_they_are = [by_name[record.name] for record in stored if by_name[record.name].record == record]
        others = [record for record in stored if by_name[record.name].record != record]
        return as_they_are, others

    def _open_tier(
        self,
        layout: Layout,
        placed: set[int],
        limits: Sequence[int | None],
        verify: bool,
        num_threads: int,
    ) -> DurableTier:
        needed = Counter(cell.num_bytes for cell in layout.kept)
        needed = Counter({size: count * (1 + self.commits) for size, count in needed.items()})
        needed.update(cell.num_bytes for cell in layout.scratch)
        held = {offset for offsets in self._manifests.values() for offset in offsets}
        # What commits hold in another form stays beside what is laid out now.
        for size, count in Counter(self._size_of(offset) for offset in held - placed).items():
            needed[size] += count
        before = self._header
        names = before.data if before is not None else self._data_names()
        slabs, gone = plan_slabs(before.slabs if before is not None else (), dict(needed), held)
        header = Header(names, slabs)
        paths = data_paths(self.folder, header)
        for path in paths:
            _check_disk(path)
        if before is not None and self._manifests:
            open_data(self.folder, before).close()  # what is cut short would be made longer below
        if gone and len(paths) == 1 and paths[0].exists():
            give_space_back(paths[0], gone)
        size = header.num_bytes if len(paths) == 1 else part_bytes(header.num_bytes, len(paths))
        limit = min((each for each in limits if each is not None), default=None)
        if limit is not None and size > limit:
            raise BudgetError(
                f"the store takes {format_bytes(size)} on a disk that may hold {format_bytes(limit)}: commits of other "
                "forms (parameters frozen, compute type) are kept beside what is laid out now",
                hint="allow more disk, or export the commit and begin a new run from it",
            )
        # A file never ends before what the header says: it is written first where the file becomes shorter.
        is_shorter = before is not None and header.num_bytes < before.num_bytes
        opened: list[DurableTier] = []
        try:
            if is_shorter:
                write_durably(self.folder / HEADER, header.dumps())
            for path in paths:
                opened.append(
                    DiskTier(
                        path.parent,
                        size,
                        name=path.name,
                        verify=verify,
                        is_kept=True,
                        num_threads=num_threads,
                    )
                )
            if header != before and not is_shorter:
                write_durably(self.folder / HEADER, header.dumps())
        except BaseException:
            for tier in opened:
                tier.close()
            raise
        self._header = header
        return opened[0] if len(opened) == 1 else StripedTier(opened, header.num_bytes)

    def _size_of(self, offset: int) -> int:
        assert self._header is not None
        return next(slab.extent_bytes for slab in self._header.slabs if slab.offset <= offset < slab.stop)

    def _data_names(self) -> tuple[str, ...]:
        """In the store's own folder, unless the disks that were given are other ones."""
        if not self._disks:
            return (DATA,)
        own = os.stat(self.folder).st_dev
        if len(self._disks) == 1 and os.stat(self._disks[0]).st_dev == own:
            return (DATA,)
        name = f"outsize-{self.folder.name}-{uuid.uuid4().hex[:12]}.{DATA}"
        return tuple(str(disk.resolve() / name) for disk in self._disks)


def remove_commit(folder: Path, step: int) -> None:
    """Remove one commit of a store that no process has open; its space is used again by the next run."""
    lock_fd = lock_file(folder / LOCK)
    try:
        remove_commit_files(folder, step)
    finally:
        os.close(lock_fd)


def remove_store(folder: Path) -> int:
    """Remove a whole store, data on other drives included; the bytes that are free again.

    Nothing else that lies in the folder is touched; the folder stays where there is any, or a link leads to it. A store
    whose header is damaged can be removed too: data that it has on drives of its own then stays. Commits go first: a
    kill in between leaves none that names missing bytes. Raises ConfigError where there is no store, StorageError where
    a process has it open.
    """
    is_link = folder.is_symlink()
    folder = folder.resolve()
    if not (folder / HEADER).exists() and not (folder.is_dir() and _is_begun(folder)):
        raise ConfigError(f"{folder} is no checkpoint", hint="pass a folder such as tuned.checkpoint")
    try:
        header = read_header(folder)
    except StorageError:
        header = None
    paths = data_paths(folder, header) if header is not None else [folder / DATA]
    lock_fd = lock_file(folder / LOCK)
    try:
        for path in commit_paths(folder):
            remove_commit_files(folder, int(path.stem))
        freed = 0
        for path in paths:
            with storage_errors(path):
                if path.is_file():
                    freed += path.stat().st_blocks * 512
                    remove_durably(path)
        with storage_errors(folder):
            tidy(folder)
            shutil.rmtree(folder / MODEL, ignore_errors=True)
            with suppress(OSError):  # something else lies there
                (folder / COMMITS).rmdir()
            # As long as there is a header it is a store, and can be removed again.
            remove_durably(folder / HEADER)
            (folder / LOCK).unlink()
            if not is_link:
                with suppress(OSError):
                    folder.rmdir()
            sync_folder(folder.parent)
    finally:
        os.close(lock_fd)
    return freed


def _is_begun(folder: Path) -> bool:
    """Whether nothing but the beginnings of a store are here: a process was killed before it wrote the header.

    The lock comes before everything but an empty folder of commits, and the data are a file.
    """
    found = {path.name: path for path in folder.iterdir()}
    if found.keys() == {COMMITS}:
        return found[COMMITS].is_dir() and not any(found[COMMITS].iterdir())
    return (
        found.keys() <= {COMMITS, LOCK, DATA, MODEL, f".{MODEL}.partial", f".{HEADER}.partial"}
        and LOCK in found
        and found[LOCK].is_file()
        and (DATA not in found or found[DATA].is_file())
    )


def _check_disk(path: Path) -> None:
    if not path.parent.is_dir():
        raise StorageError(
            f"the store's data lies in {path.parent}, which does not exist",
            hint="mount that drive, or move the file there",
        )
    if is_memory_backed(path.parent):
        raise ConfigError(
            f"{path.parent} is on tmpfs or ramfs: what is kept there takes up memory, and does not last",
            hint="pass a folder on an NVMe or other local disk, such as one under /var/tmp",
        )
