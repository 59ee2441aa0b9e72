"""The cache of packed weights: nothing is encoded twice, whatever happens to the files, and no bit depends on it."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import outsize
from outsize import Pins
from outsize.config import DiskBudget, Weights
from outsize.errors import ConfigError, FileChangedError, StorageError, StorageFullError
from outsize.model.encoding import EncodingSource
from outsize.model.packed import PackedCache
from outsize.model.writer import Planned
from outsize.quant import FORMATS
from tests.weight_files import CHANGES

DECODER = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 192,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def save_model(family, path, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**DECODER, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()
    model.save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path):
    return save_model("Qwen2", tmp_path / "model")


@pytest.fixture
def encoded(monkeypatch):
    """Number of weights that were encoded so far, in a list of one."""
    count = [0]
    for form in map(type, FORMATS.values()):

        def encode(self, weight_NK, original=form.encode):
            count[0] += weight_NK.numel()
            return original(self, weight_NK)

        monkeypatch.setattr(form, "encode", encode)
    return count


def streamed(folder, scratch, weights="int4"):
    scratch.mkdir(exist_ok=True)
    return outsize.load(folder, weights=weights, disk=scratch, home="disk", pins=Pins(weight_slots=1))


def logits_of(model):
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def expected(folder, weights="int4"):
    return logits_of(outsize.load(folder, weights=weights, home="host", disk=folder))


def entries(scratch):
    return [path for path in (scratch / "outsize-packed").glob("*") if path.is_dir()]


@pytest.mark.parametrize(
    ("family", "weights", "changes"),
    [
        ("Qwen2", "int4", {}),
        ("GptOss", "int8", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}),
        ("Mixtral", "int4", {"num_local_experts": 4}),
    ],
)
def test_weights_are_encoded_once(family, weights, changes, tmp_path, encoded, caplog):
    folder = save_model(family, tmp_path / "model", **changes)
    meant = expected(folder, weights)
    assert not (folder / "outsize-packed").exists(), "everything is in memory: nothing is cached"
    num_weights, encoded[0] = encoded[0], 0
    model = streamed(folder, tmp_path / "scratch", weights)
    assert torch.equal(logits_of(model), meant) and encoded[0] == num_weights
    assert torch.equal(logits_of(model), meant)
    assert torch.equal(logits_of(streamed(folder, tmp_path / "scratch", weights)), meant)
    # A model that fits into memory starts from the cache as well.
    resident = outsize.load(folder, weights=weights, home="host", disk=tmp_path / "scratch")
    assert torch.equal(logits_of(resident), meant)
    outsize.save(streamed(folder, tmp_path / "scratch", weights), tmp_path / "written")
    assert torch.equal(logits_of(outsize.load(tmp_path / "written")), meant)
    assert encoded[0] == num_weights
    (said,) = (record.message for record in caplog.records if "packing" in record.message)
    (entry,) = entries(tmp_path / "scratch")
    assert said == f"packing weights into {weights} (once; cached in {entry})"


@pytest.mark.parametrize(
    ("family", "weights", "changes"),
    [
        ("GptOss", "int8", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}),
        ("Mixtral", "int4", {"num_local_experts": 4}),
    ],
)
def test_experts_are_packed_one_at_a_time(family, weights, changes, tmp_path, monkeypatch):
    """In the memory of two: one is read while another is encoded."""
    folder = save_model(family, tmp_path / "model", **changes)
    read, pieces = EncodingSource._read, []

    def spy(source, piece, dtype):
        pieces.append(piece)
        return read(source, piece, dtype)

    monkeypatch.setattr(EncodingSource, "_read", spy)
    logits_of(streamed(folder, tmp_path / "scratch", weights))
    experts = [piece for piece in pieces if ".experts." in piece.parameter]
    stacks = {piece.parameter for piece in experts}
    assert len(stacks) == 4 and {piece.shape[0] for piece in experts} == {1}
    for stack in stacks:
        rows = [(piece.row_start, piece.row_stop) for piece in experts if piece.parameter == stack]
        assert rows == [(expert, expert + 1) for expert in range(4)]


def test_saving_encodes_once(folder, tmp_path, encoded):
    model = outsize.load(folder, weights="int4")
    num_weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in model_matrices(folder))
    outsize.save(model, tmp_path / "written")
    assert encoded[0] == num_weights


def model_matrices(folder):
    tensors = load_file(folder / "model.safetensors")
    return [value for name, value in tensors.items() if "proj.weight" in name]


def test_weights_that_changed_are_packed_again(folder, tmp_path):
    """Also in a file of the same size, with the same header and times."""
    before = logits_of(streamed(folder, tmp_path / "scratch"))
    path = folder / "model.safetensors"
    times = path.stat()
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = -tensors[name]
    save_file(tensors, tmp_path / "changed", metadata={"format": "pt"})
    path.write_bytes((tmp_path / "changed").read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns
    (old,) = entries(tmp_path / "scratch")
    after = logits_of(streamed(folder, tmp_path / "scratch"))
    assert torch.equal(after, expected(folder)) and not torch.equal(after, before)
    (new,) = entries(tmp_path / "scratch")
    assert new != old, "the entry of the model as it was is deleted"


def test_contents_count_where_times_are_always_the_same(folder, monkeypatch):
    from outsize.files import open_file
    from outsize.model import shards

    class Timeless:
        def __init__(self, status):
            self.st_size, self.st_mtime_ns, self.st_ctime_ns = status.st_size, 1, 1

    original = os.fstat
    monkeypatch.setattr(open_file.os, "fstat", lambda descriptor: Timeless(original(descriptor)))
    before = shards.Shards(folder).fingerprint()
    assert shards.Shards(folder).fingerprint() == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert shards.Shards(folder).fingerprint() != before


@pytest.mark.parametrize("is_packing", [True, False])
@pytest.mark.parametrize(("change", "said"), CHANGES.items())
def test_files_that_change_before_they_are_packed_or_meanwhile_are_named(
    change, said, is_packing, folder, tmp_path, monkeypatch
):
    model = streamed(folder, tmp_path / "scratch")
    if is_packing:
        form = type(FORMATS[Weights.INT4])
        encode, calls = form.encode, []

        def change_first(self, weight_NK):
            if not calls:
                change(folder)
            calls.append(weight_NK)
            return encode(self, weight_NK)

        monkeypatch.setattr(form, "encode", change_first)
    else:
        change(folder)
    with pytest.raises(FileChangedError, match=said):
        logits_of(model)
    assert not entries(tmp_path / "scratch"), "what was packed of other weights is not kept"


def flip(entry):
    """As a drive that fails: times stay."""
    file = entry / "model.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(entry):
    os.truncate(entry / "model.safetensors", (entry / "model.safetensors").stat().st_size - 1)


def forget_digests(entry):
    (entry / "digests.json").write_text("{")


def empty(entry):
    shutil.rmtree(entry)
    entry.mkdir()


@pytest.mark.parametrize("damage", [flip, cut, forget_digests, empty])
def test_a_damaged_entry_is_made_again(folder, tmp_path, encoded, damage):
    meant = logits_of(streamed(folder, tmp_path / "scratch"))
    (entry,) = entries(tmp_path / "scratch")
    intact = (entry / "model.safetensors").read_bytes()
    num_weights, encoded[0] = encoded[0], 0
    damage(entry)
    model = streamed(folder, tmp_path / "scratch")
    assert torch.equal(logits_of(model), meant) and torch.equal(logits_of(model), meant)
    assert encoded[0] == num_weights
    assert entries(tmp_path / "scratch") == [entry]
    assert (entry / "model.safetensors").read_bytes() == intact


@pytest.mark.parametrize("damage", [flip, shutil.rmtree])
def test_an_entry_may_be_damaged_or_deleted_between_passes(folder, tmp_path, damage):
    model = streamed(folder, tmp_path / "scratch")
    meant = logits_of(model)
    (entry,) = entries(tmp_path / "scratch")
    damage(entry)
    assert torch.equal(logits_of(model), meant)
    assert torch.equal(logits_of(streamed(folder, tmp_path / "scratch")), meant)


def full_at_once(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))


def full_later(monkeypatch):
    original, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)


def unwritable(monkeypatch):
    def mkdir(self, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", mkdir)


def damaged_at_once(monkeypatch):
    """A disk that gives back other bytes than it took."""
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: original(fd, bytes(len(data)), offset))


@pytest.mark.parametrize("trouble", [full_at_once, full_later, unwritable, damaged_at_once])
def test_without_a_cache_it_goes_on_and_says_so_once(folder, tmp_path, monkeypatch, caplog, trouble):
    meant = expected(folder)
    model = streamed(folder, tmp_path / "scratch")
    with monkeypatch.context() as patched:
        trouble(patched)
        assert torch.equal(logits_of(model), meant)
    assert torch.equal(logits_of(model), meant)
    assert sum("encoded again each time" in record.message for record in caplog.records) == 1
    assert not entries(tmp_path / "scratch")


def test_the_cache_folder_has_a_limit(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OUTSIZE_CACHE", str(tmp_path / "cache"))
    for limit, is_cached in (("0", False), ("100KiB", False), ("1 MiB", True)):
        monkeypatch.setenv("OUTSIZE_CACHE_LIMIT", limit)
        model = outsize.load(folder, weights="int4", pins=Pins(weight_slots=1, resident_bytes=0))
        logits_of(model)
        assert bool(list((tmp_path / "cache" / "packed").glob("model-int4-*"))) is is_cached
    monkeypatch.setenv("OUTSIZE_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match="OUTSIZE_CACHE_LIMIT: 'much' is not a size"):
        outsize.load(folder, weights="int4")


# The cache by itself


PLANNED = {"weight": Planned((1000,), torch.bfloat16)}


def cache_of(folder, name, limit=None):
    return PackedCache.of([DiskBudget(folder, limit)], Path(f"/models/{name}"), "int4", "v1", PLANNED)


def fill(writer, value=1.0):
    writer.write("weight", torch.full((600,), value, dtype=torch.bfloat16))
    writer.write("weight", torch.full((400,), value, dtype=torch.bfloat16))


def names(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir() if path.is_dir())


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    size = sum(path.stat().st_size for path in cache_of(tmp_path, "a").make(fill, print).folder.iterdir())
    shutil.rmtree(next(tmp_path.glob("a-*")))
    limit = 2 * size + 1000
    for age, name in ((300, "a"), (200, "b")):
        entry = cache_of(tmp_path, name, limit).make(fill, print).folder
        for path in (entry, *entry.iterdir()):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    assert cache_of(tmp_path, "a", limit).open() is not None  # used last, now
    cache_of(tmp_path, "c", limit).make(fill, print)
    assert names(tmp_path) == ["a", "c"]
    with pytest.raises(StorageFullError, match="packed weights take"):
        cache_of(tmp_path, "d", 1500).make(fill, print)
    assert names(tmp_path) == ["a", "c"], "nothing is deleted for what does not fit even then"


def test_the_next_folder_is_taken_where_one_has_no_room(tmp_path):
    places = [DiskBudget(tmp_path / "full", 10), DiskBudget(tmp_path / "free")]
    cache = PackedCache.of(places, tmp_path / "model", "int4", "v1", PLANNED)
    assert cache.make(fill, print).folder.parent == tmp_path / "free"
    assert cache.open() is not None


def test_of_two_that_begin_at_once_one_packs(tmp_path):
    calls, said, ready = [], [], threading.Event()

    def slowly(writer):
        calls.append(writer)
        ready.wait(10)
        fill(writer)

    def say(text):
        said.append(text)
        if "waiting" in text:
            ready.set()

    threads = [threading.Thread(target=lambda: cache_of(tmp_path, "a").make(slowly, say)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and names(tmp_path) == ["a"]
    assert sum("waiting for another process" in text for text in said) == 1
    target = torch.empty(1000, dtype=torch.bfloat16)
    cache_of(tmp_path, "a").open().read({"weight": target})
    assert (target == 1).all()


def test_an_interrupt_leaves_nothing_and_leftovers_are_removed(tmp_path):
    cache = cache_of(tmp_path, "a")

    def interrupted(writer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.make(interrupted, print)
    assert not names(tmp_path)
    left = tmp_path / f".{cache.owner}-0123.partial-x"  # of a process that was killed
    left.mkdir()
    cache.make(fill, print)
    assert not left.exists()


def test_no_read_goes_on_after_a_file_was_missing(tmp_path, monkeypatch):
    """What was started is over when the error comes: the caller fills the same tensors from elsewhere."""
    planned = {name: Planned((1000,), torch.bfloat16) for name in ("first", "second")}
    cache = PackedCache.of([DiskBudget(tmp_path)], Path("/models/a"), "int4", "v1", planned)

    def fill_both(writer):
        for name in planned:
            writer.write(name, torch.ones(1000, dtype=torch.bfloat16))

    made = cache.make(fill_both, print)
    original, ended = made._shards.start_read, []

    def start_read(name, target):
        if name == "second":
            raise StorageError("gone")
        reading = original(name, target)

        def slow():
            time.sleep(0.2)
            ended.append(name)

        return [*reading, ThreadPoolExecutor(1).submit(slow)]

    monkeypatch.setattr(made._shards, "start_read", start_read)
    with pytest.raises(StorageError, match="gone"):
        made.read({name: torch.zeros(1000, dtype=torch.bfloat16) for name in planned})
    assert ended == ["first"]


def test_an_entry_with_other_tensors_is_not_used(tmp_path):
    made = cache_of(tmp_path, "a").make(fill, print)
    save_file({"weight": torch.zeros(999, dtype=torch.bfloat16)}, made.folder / "model.safetensors")
    assert cache_of(tmp_path, "a").open() is None


def test_values_arrive_in_other_types(tmp_path):
    """Two bytes of codes that are no number in bfloat16 survive what reads one parameter in fp32."""
    made = cache_of(tmp_path, "a").make(lambda writer: fill(writer, 0.5), print)
    target = torch.empty(1000)
    made.read({"weight": target})
    assert (target == 0.5).all()
    flip(made.folder)
    with pytest.raises(StorageError, match="weight is not as it was written"):
        made.read({"weight": target})


@pytest.mark.parametrize("weights", Weights)
def test_the_key_depends_on_the_format(folder, tmp_path, weights):
    meant = expected(folder, weights)
    for each in Weights:
        logits_of(streamed(folder, tmp_path / "scratch", each))
    assert torch.equal(logits_of(streamed(folder, tmp_path / "scratch", weights)), meant)
    assert len(entries(tmp_path / "scratch")) == 2


PROCESS = """
import os, signal, sys, torch, outsize
from outsize import Pins
from outsize.model.packed import PackedWriter

folder, scratch, dies_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
write = PackedWriter.write

def counted(self, name, values):
    global dies_at
    dies_at -= 1
    if not dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, values)

PackedWriter.write = counted
model = outsize.load(folder, weights="int4", disk=scratch, home="disk", pins=Pins(weight_slots=1))
sys.stdin.readline()
ids = torch.arange(12)[None]
with torch.no_grad():
    print(model(input_ids=ids).logits.double().sum().item())
"""


@pytest.mark.skipif(not os.environ.get("OUTSIZE_SOAK"), reason="starts five interpreters")
def test_processes_that_begin_at_once_or_are_killed(folder, tmp_path):
    def started(dies_at=0):
        command = [sys.executable, "-c", PROCESS, str(folder), str(tmp_path / "scratch"), str(dies_at)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    (tmp_path / "scratch").mkdir()
    killed = started(dies_at=5)
    killed.communicate("go\n")
    assert killed.returncode == -signal.SIGKILL
    several = [started() for _ in range(3)]
    for process in several:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate() for process in several]
    alone = started().communicate("go\n")
    assert len({out for out, _ in (*said, alone)}) == 1 and alone[0]
    assert sum("packing weights into int4" in err for _, err in (*said, alone)) == 1
    kept = sorted(path.name for path in (tmp_path / "scratch" / "outsize-packed").iterdir())
    assert len(kept) == 2 and kept[0].endswith(".lock"), kept
