"""Cases of the differential harness (`tests.tools.differential`), and what one of them gives in this process.

Run as a module it reads cases from standard input, one JSON object a line, carries them out with the `outsize` that is
first on the path and the `tests/seams.py` that is named, and writes one JSON object a line of what came out: everything
that a redesign must not change, as text and numbers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

PROCESS_BYTES = 1 << 30
"""What the process is said to have, so that a budget leaves the same wherever and whenever it is asked for."""

FREE_BYTES = 64 << 30
LEDGER_ROWS = (
    "device Python and libraries:",
    "device KV cache:",
    "disk places of planes in memory, and commits:",
    "disk reserved for whole records and commits:",
    "host slots:",
    "host buffers:",
    "host slots and buffers:",
)
"""Rows of the report that checkouts before the ledger do not have, or one in the place of two."""

SLACK_BYTES = (96 << 20) + (12 << 20)
"""What a budget leaves for what is not planned, and for reading checkpoints."""

DEVICE_SLACK_BYTES = 64 << 20
KV_BYTES = 1 << 20
CHUNK = 2048
"""Elements: blocks of tiny models are updated in several chunks."""

STEPS = 3
DECODERS = ("llama", "llama_tied", "qwen3", "gemma2", "gpt2", "mixtral")
OTHERS = ("t5", "albert", "llava", "opt", "mamba", "qwen3_moe")
OPTIMIZERS = ("AdamW", "AdamW", "AdamW", "AdamW8bit", "Lion", "SGD", "SGDSaI", "Adan")
MACHINES = ("rtx4090-1ssd", "h200")


@dataclass(frozen=True)
class Case:
    """What is run: the model, where it may live, and what is done with it."""

    number: int
    kind: str
    model: str
    dtype: str = "float32"
    layers: int | None = None
    width: int = 1
    rows: int = 4
    length: int = 10
    files: str | None = None
    """The type of the weights in a checkpoint; None: a module is wrapped."""
    home: str | None = "disk"
    host_bytes: int | None = None
    """Of the host, beside the process and what is left for the unforeseen."""
    device_bytes: int | None = None
    """The same of a device with memory of its own; 0: one with more than enough; None: the host computes."""
    device_host_bytes: int | None = None
    pins: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "AdamW"
    max_grad_norm: float | None = None
    accumulation: int = 1
    keeps_gradients: bool = False
    frozen: str = ""
    """Parameters whose names match this do not train."""
    disturbance: str = ""
    retry: bool = False
    delays: bool = False
    machine: str = ""
    is_large: bool = False

    def __str__(self) -> str:
        shown = [
            f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.name != "number"
        ]
        changed = [
            text for text, each in zip(shown, fields(self)[1:], strict=True) if not _is_default(self, each)
        ]
        return f"{self.number}: {' '.join(changed)}"


def _is_default(case: Case, each: Any) -> bool:
    value = getattr(case, each.name)
    return value == each.default or value == {}


def draw(seed: int, number: int) -> Case:
    """Case `number` of those that `seed` draws; it depends on nothing else."""
    chance = random.Random(f"{seed}/{number}")
    if number % 25 == 24:
        return _large(chance, number)
    kind = chance.choices(("train", "commit", "generate", "evaluate", "preview"), (64, 12, 10, 6, 8))[0]
    if kind == "preview":
        return _preview(chance, number)
    name = chance.choice(DECODERS if kind == "generate" or chance.random() < 0.75 else OTHERS)
    where = _placement(chance, kind)
    return Case(
        number,
        kind,
        name,
        dtype=chance.choice(("float32", "bfloat16")),
        layers=chance.choice((None, None, 4, 5, 8)) if name in DECODERS and name != "gpt2" else None,
        rows=chance.choice((2, 4, 5)),
        length=chance.choice((8, 10, 13)),
        files=chance.choice((None, None, "float32", "bfloat16")) if name != "llava" else None,
        optimizer=chance.choice(OPTIMIZERS),
        max_grad_norm=chance.choice((None, None, 0.1)),
        accumulation=chance.choice((1, 1, 2)),
        keeps_gradients=chance.random() < 0.2,
        frozen=chance.choice(("", "", "", "norm", r"layers\.0\.|h\.0\.", "^(?!.*(down|fc|wo))")),
        disturbance=chance.choice(("", "", "", "read", "evaluate", "two graphs", "no step")),
        delays=chance.random() < 0.3,
        **where,
    )


def _placement(chance: random.Random, kind: str) -> dict[str, Any]:
    """Where planes may live: budgets, a device, a home, pins."""
    device = chance.random() < 0.35
    found: dict[str, Any] = {
        "home": chance.choice(("disk", "disk", "host", None, None) + ("device",) * device)
    }
    pins: dict[str, Any] = {}
    if found["home"] is None:
        tight = chance.choice((500_000, 800_000, 1_100_000, 1_500_000, 2_000_000, 3_000_000))
        if device:
            found["device_bytes"] = tight
            found["device_host_bytes"] = chance.choice((None, 400_000, 700_000))
        else:
            found["host_bytes"] = tight + (KV_BYTES if kind == "generate" else 0)
    elif device:
        found["device_bytes"] = 0
    if found.get("device_bytes") is not None:
        found["retry"] = chance.random() < 0.2
    for name, choices in {
        "weight_slots": (None, None, 1, 2, 3),
        "gradient_slots": (None, None, 1, 2),
        "tile_rows": (None, None, 1, 2),
        "kept_blocks": (None, None, 1, 2),
        "inputs": (None, None, None, "host", "disk", "device"),
        "verify": (None, None, None, False),
    }.items():
        if (value := chance.choice(choices)) is not None:
            pins[name] = value
    if found["home"] is None and chance.random() < 0.3:
        pins["resident_bytes"] = chance.choice((0, 50_000, 150_000, 300_000))
    elif found["home"] is None and not device and chance.random() < 0.3:
        pins["resident"] = chance.choice(([1, 2, 0], [2, 0, 1], [0, 3, 3]))
    return {**found, "pins": pins}


def _preview(chance: random.Random, number: int) -> Case:
    """A plan for a machine that is not here: operations are counted, and so every figure is the same each time."""
    return Case(
        number,
        "preview",
        chance.choice(("llama", "qwen3", "gpt2", "mixtral")),
        dtype=chance.choice(("float32", "bfloat16")),
        layers=None,
        rows=chance.choice((1, 4, 8)),
        length=chance.choice((16, 48)),
        home=chance.choice((None, "host", "disk")),
        machine=chance.choice(MACHINES),
        frozen=chance.choice(("", "all")),
        device_bytes=chance.choice((None, 900_000, 3_000_000)),
    )


def _large(chance: random.Random, number: int) -> Case:
    """Large enough for memory to show: its process runs nothing else."""
    return Case(
        number,
        "train",
        "llama",
        dtype=chance.choice(("float32", "bfloat16")),
        layers=8,
        width=12,
        rows=8,
        length=256,
        home=chance.choice(("disk", "host", None)),
        host_bytes=chance.choice((160_000_000, 220_000_000, 400_000_000)),
        pins=chance.choice(({}, {"inputs": "disk"}, {"kept_blocks": 2}, {"tile_rows": 2})),
        is_large=True,
    )


# -- carrying a case out -----------------------------------------------------------------------------------------


class Notes:
    """What came out of a case so far, by name."""

    def __init__(self, seams: ModuleType) -> None:
        self.seams = seams
        self.found: dict[str, Any] = {"plan": [], "bits": {}, "losses": [], "planned": {}, "moved": {}}
        self.labels: Counter[str] = Counter()

    def executed(self, model: Any, when: str) -> None:
        """The operations of the call that just ended, and since."""
        self.found["plan"].append(f"# {when}")
        self.found["plan"] += map(str, self.seams.plan_executed(model))

    def delay(self, chance: random.Random | None) -> Any:
        """Called as each transfer is started, from any thread; how late it is to begin."""

        def delay_s(verb: Any, label: str) -> float:
            self.labels[f"{verb} {label}"] += 1
            return chance.choice((0.0, 0.0, 0.001, 0.004)) if chance is not None else 0.0

        return delay_s

    def report(self, model: Any) -> None:
        """Figures of the public report, and what was planned."""
        import outsize

        told, seams = outsize.report(model), self.seams
        self.found["planned"] = {
            "placement": seams.placement_lines(model),
            "bytes": seams.planned_bytes(model),
            "rows": rows_of(told.rows),
            "budgets": [
                told.host_budget_bytes,
                told.device_budget_bytes,
                told.state_bytes,
                told.num_parameters,
            ],
            "tile_rows": seams.tile_rows_of(model),
        }
        self.found["moved"] = {
            "read": told.bytes_read,
            "written": told.bytes_written,
            "up": told.bytes_up,
            "down": told.bytes_down,
        }
        self.found["told"] = {
            "off plan": sorted(told.off_plan),
            "stepped down": len(told.stepped_down),
            "uncut": len(told.uncut),
            "attention": told.attention,
        }
        arena = seams.arena_of(model)
        self.found["memory"] = {
            "arena": [arena.limit_bytes, arena.in_use_bytes],
            "slots": [list(each) for each in seams.slots_taken(model)],
        }

    def weights(self, model: Any) -> None:
        """The bits of every parameter."""
        self.found["bits"] = {name: _bits(parameter.detach()) for name, parameter in model.named_parameters()}


def _bits(tensor: Any) -> str:
    import torch

    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).contiguous().flatten()
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def live_tensors() -> Any:
    """A context that counts the bytes of tensors that operations make in this thread; `most_bytes` were alive at once.

    Where a process' memory differs from run to run, this is exact.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveTensors(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.most_bytes = 0
            self._bytes = 0
            self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for given in tree_leaves((args, kwargs)):
                self._add(given, is_made=False)
            result = func(*args, **(kwargs or {}))
            for made in tree_leaves(result):
                self._add(made, is_made=True)
            return result

        def _add(self, value: Any, *, is_made: bool) -> None:
            if not isinstance(value, torch.Tensor):
                return
            storage = torch.Tensor.untyped_storage(value)
            key, num_bytes = storage._cdata, storage.nbytes() if is_made else 0
            if key in self._known:
                return

            def gone(_: object) -> None:
                self._bytes -= self._known.pop(key)[1]

            self._known[key] = weakref.ref(storage, gone), num_bytes
            self._bytes += num_bytes
            self.most_bytes = max(self.most_bytes, self._bytes)

    return LiveTensors()


def build(case: Case) -> Any:
    """The plain model of a case, its frozen part frozen."""
    import torch

    from tests.zoo import ZOO

    specimen = ZOO[case.model]
    changes: dict[str, Any] = {} if case.layers is None else {"num_hidden_layers": case.layers}
    if case.layers is not None and "layer_types" in specimen.settings:
        changes["layer_types"] = ["full_attention"] * case.layers
    if case.width > 1:
        changes |= {"hidden_size": 32 * case.width, "intermediate_size": 48 * case.width, "vocab_size": 2000}
        changes["max_position_embeddings"] = 512
    model = specimen.build(case.number, **changes).train()
    if case.kind == "generate":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
        model.generation_config.eos_token_id = None
    return freeze(model, case)


def freeze(model: Any, case: Case) -> Any:
    for name, parameter in model.named_parameters():
        if case.frozen and re.search(case.frozen, name):
            parameter.requires_grad_(False)
    return model


def options_of(case: Case, disk: Path) -> dict[str, Any]:
    """The arguments of `outsize.load` or `outsize.wrap`."""
    import outsize

    options: dict[str, Any] = {"dtype": case.dtype, "disk": str(disk), "home": case.home}
    pins = {name: tuple(value) if isinstance(value, list) else value for name, value in case.pins.items()}
    options["pins"] = outsize.Pins(**pins)
    if case.host_bytes is not None:
        options["host"] = PROCESS_BYTES + SLACK_BYTES + case.host_bytes
    if case.retry:
        options["on_device_full"] = "retry"
    return options


def opened(case: Case, folder: Path) -> Any:
    """The model of a case under Outsize."""
    import torch

    import outsize

    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    if case.files is None:
        model = outsize.wrap(build(case), **options_of(case, disk))
    else:
        files = folder / "model"
        if not files.exists():
            build(case).to(getattr(torch, case.files)).save_pretrained(files)
        model = freeze(outsize.load(files, **options_of(case, disk)).train(), case)
    return model


def batch_of(case: Case, seed: int) -> dict[str, Any]:
    from tests.zoo import ZOO

    batch = ZOO[case.model].batch(rows=case.rows, length=case.length, seed=seed)
    return batch


def train(model: Any, optimizer: Any, case: Case, notes: Notes, first: int = 0, commit: Any = None) -> None:
    """Three steps, with an evaluation after the second, and what disturbs a plan."""
    import torch

    for step in range(first, first + STEPS):
        for part in range(case.accumulation):
            batch = batch_of(case, 10 * step + part)
            loss = _loss(model(**batch))
            if case.disturbance == "evaluate" and step == 1:
                with torch.no_grad():
                    notes.found["losses"].append(float(_loss(model(**batch_of(case, 77)))).hex())
            if case.disturbance == "two graphs" and step == 1:
                (loss + _loss(model(**batch_of(case, 78)))).backward()
            else:
                loss.backward()
            notes.found["losses"].append(float(loss.detach()).hex())
            notes.executed(model, f"step {step} part {part}")
        if case.disturbance == "no step" and step == 1:
            continue
        optimizer.step()
        if not case.keeps_gradients:
            optimizer.zero_grad()
        if case.disturbance == "read" and step == 1:
            name, parameter = list(model.named_parameters())[3]
            notes.found["losses"].append(f"{name} {_bits(parameter.detach())}")
        if commit is not None:
            commit()
        if step == first + 1:
            with torch.no_grad():
                notes.found["losses"].append(float(_loss(model(**batch_of(case, 99)))).hex())
            notes.executed(model, "evaluation")


def _loss(output: Any) -> Any:
    return output if not hasattr(output, "loss") else output.loss


def optimizer_of(model: Any, case: Case) -> Any:
    import outsize

    return getattr(outsize, case.optimizer)(model, lr=3e-3, max_grad_norm=case.max_grad_norm)


def run_train(case: Case, folder: Path, notes: Notes) -> None:
    model = opened(case, folder)
    train(model, optimizer_of(model, case), case, notes)
    notes.weights(model)
    notes.executed(model, "reading all weights")
    notes.seams.flush(model)
    notes.report(model)
    notes.seams.close(model)


def run_commit(case: Case, folder: Path, notes: Notes) -> None:
    """Commits after each step, and a second model that goes on from the last."""
    import outsize

    for first in (0, STEPS):
        model = opened(case, folder)
        optimizer = optimizer_of(model, case)
        store = folder / "store"
        resumed = outsize.checkpoint.resume(model, optimizer, store)
        assert (resumed is not None) is (first > 0)

        def commit(model: Any = model, optimizer: Any = optimizer, store: Path = store) -> None:
            outsize.checkpoint.commit(model, optimizer, store)

        train(model, optimizer, case, notes, first, commit)
        outsize.checkpoint.finish(model)
        notes.seams.flush(model)
        notes.report(model)
        sizes = [
            (
                re.sub(r"[0-9a-f]{8,}|\d{3,}", "N", file.name),
                file.stat().st_size if file.suffix != ".json" else 0,
            )
            for file in store.rglob("*")
            if file.is_file()
        ]
        notes.found[f"store after {first}"] = sorted(map(str, sizes))
        notes.weights(model)
        notes.found[f"bits after {first}"] = notes.found["bits"]
        outsize.checkpoint.close(model)


def run_generate(case: Case, folder: Path, notes: Notes) -> None:
    import torch

    from outsize.serve import Request, Sampling, open_engine

    model = opened(case, folder)
    engine = open_engine(model, kv=KV_BYTES, pass_tokens=32, deterministic=case.delays)
    generator = torch.Generator().manual_seed(case.number)
    streams = []
    for length in (9, 30, 4):
        prompt = tuple(torch.randint(4, 198, (length,), generator=generator).tolist())
        streams.append(engine.submit(Request(prompt, Sampling(temperature=1.0, seed=5), 6, logprobs=1)))
    for stream in streams:
        for each in stream.wait():
            notes.found["losses"].append(f"{each.tokens} {[value.hex() for value in each.logprobs]}")
        notes.executed(model, "a request")
    notes.seams.flush(model)
    notes.report(model)
    notes.seams.close(model)


def run_evaluate(case: Case, folder: Path, notes: Notes) -> None:
    """Calls that only read: weights stay in their files."""
    import torch

    model = opened(case, folder).eval()
    with torch.no_grad():
        for seed in range(3):
            notes.found["losses"].append(float(_loss(model(**batch_of(case, seed)))).hex())
            notes.executed(model, f"call {seed}")
    notes.seams.flush(model)
    notes.report(model)
    notes.seams.close(model)


def run_preview(case: Case, folder: Path, notes: Notes) -> None:
    import outsize
    from outsize.hardware import machine

    build(case).config.save_pretrained(folder / "model")
    device = None if case.device_bytes is None else case.device_bytes + DEVICE_SLACK_BYTES
    summary = outsize.preview(
        folder / "model",
        home=case.home,
        dtype=case.dtype,
        batch_size=case.rows,
        seq_len=case.length,
        hardware=machine(case.machine),
        train=not case.frozen,
        device=device,
    )
    told = json.loads(summary.to_json(), parse_float=lambda text: float(f"{float(text):.9g}"))
    notes.found["planned"] = {key: value for key, value in told.items() if key != "reason"}
    notes.found["planned"]["rows"] = rows_of(summary.rows)
    notes.found["reason"] = numbers_in(told["reason"])


def rows_of(rows: Iterable[Any]) -> list[str]:
    """Rows of the report in any order, without those of 0 bytes and those that checkouts before the ledger do not have."""
    lines = (f"{row.tier} {row.what}: {row.num_bytes}" for row in rows if row.num_bytes)
    return sorted(line for line in lines if not line.startswith(LEDGER_ROWS))


RUNS = {
    "train": run_train,
    "commit": run_commit,
    "generate": run_generate,
    "evaluate": run_evaluate,
    "preview": run_preview,
}


def numbers_in(text: str) -> list[str]:
    """The figures of a message, whose words may change."""
    return re.findall(r"\d+(?:\.\d+)?", text)


def carry_out(case: Case, seams: ModuleType, folder: Path) -> dict[str, Any]:
    """What a case gives; of an error its type and the figures in its message."""
    import pytest
    import torch

    from outsize import OutsizeError
    from tests.doubles import SlowTier

    torch.manual_seed(case.number)
    notes = Notes(seams)
    delay = notes.delay(random.Random(case.number) if case.delays else None)
    error: BaseException | None = None
    with pytest.MonkeyPatch.context() as patch:
        if not case.is_large:
            seams.set_chunk(patch, CHUNK)
            seams.move_small_inputs(patch, 1, 4096)
        seams.set_process_memory(patch, PROCESS_BYTES, FREE_BYTES)
        seams.stop_guessing(patch)
        if case.device_bytes is not None and case.kind != "preview":
            limit = int((case.device_bytes + DEVICE_SLACK_BYTES) / 0.95) if case.device_bytes else None
            seams.with_twin(patch, delay, limit, case.device_host_bytes)
        with seams.wrapped_disk(patch, lambda disk: SlowTier(disk, delay)):
            _reset_peak()
            before = _memory("VmRSS:")
            try:
                with live_tensors() as live:
                    RUNS[case.kind](case, folder, notes)
                notes.found["tensors"] = live.most_bytes
            except Exception as raised:
                error = raised
                notes.found["error"] = [type(raised).__name__, *numbers_in(str(raised))]
                if not isinstance(raised, OutsizeError):
                    notes.found["crash"] = "".join(traceback.format_exception(raised)[-4:])
            if case.is_large:  # in a process with others, a peak depends on what malloc kept of them
                notes.found["peak"] = [before, _memory("VmHWM:")]
        if error is not None:
            error.__traceback__ = None
            with suppress(BaseException):
                seams.close_all()
    notes.found["transfers"] = sorted(f"{count} {label}" for label, count in notes.labels.items())
    return notes.found


def _reset_peak() -> None:
    """From now on the most memory of this process counts anew (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def main() -> None:
    seams_path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    specification = importlib.util.spec_from_file_location("seams_of_this_checkout", seams_path)
    assert specification is not None and specification.loader is not None
    seams = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(seams)
    results = sys.stdout
    sys.stdout = sys.stderr
    import outsize

    print(json.dumps({"outsize": outsize.__file__}), file=results, flush=True)
    for line in sys.stdin:
        case = Case(**json.loads(line))
        own = Path(tempfile.mkdtemp(dir=folder))
        start = time.perf_counter()
        found = carry_out(case, seams, own)
        print(f"{time.perf_counter() - start:6.1f} s  {case}", file=sys.stderr, flush=True)
        shutil.rmtree(own, ignore_errors=True)
        print(json.dumps({"case": asdict(case), "found": found}), file=results, flush=True)


if __name__ == "__main__":
    main()
