"""`outsize train`: fine-tune a model on files of text or conversations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outsize.cli import options as shared
from outsize.cli import quiet
from outsize.cli.compiling import compile_first
from outsize.cli.config_file import merge, read_config, write_config
from outsize.config import ComputeType, OnDeviceFull, OptimizerName
from outsize.errors import ConfigError

if TYPE_CHECKING:
    from outsize.train.settings import TrainSettings

_EXAMPLES = """\
examples:
  outsize train Qwen3-0.6B notes.txt --out tuned
      once through the text, in the memory that is free
  outsize train Qwen3-0.6B chat.jsonl --out tuned --host 3GiB --disk /nvme/scratch --seq-len 512 --steps 20
      20 steps within 3 GiB of memory; lines such as {"messages": [{"role": "user", "content": "..."}, ...]}
  outsize train Qwen3-0.6B chat.jsonl@0.7 books.parquet@0.3 --out tuned --eval-split 0.02 --epochs 1
      two files, mixed by weight; 2 % of their sequences measure the model instead of training it
  outsize train Qwen3-0.6B notes.txt --out tuned --disk /nvme/scratch --checkpoint-every 10 --resume
      a commit every 10 steps; after a kill, the same command goes on where the last one was
  outsize train --config run.toml --lr 2e-5
      a file with the same names as these options; the command line wins

DATA: a text file, JSON lines, Parquet, or a folder that datasets saved. A record has "text"; or "prompt" and "completion",
of which the completion is learned; or "messages" (and "tools"), of which the assistant's are learned.

OUT becomes an ordinary Hugging Face folder with metrics.jsonl and report.html beside the weights, and the weights that were
best in an evaluation in OUT/best; outsize trace OUT draws one step in time. Until it is complete, the run lives in
OUT.partial. Ctrl-C finishes the step and saves, or commits where there are commits, without another evaluation; twice stops
at once. Room for the weights is held on the disk of OUT from the start; where they cannot be written there at the end, they
are saved in a --disk folder, the working directory or the home folder, and the error says where.
"""

_DEFAULTS: dict[str, Any] = {
    "overwrite": False,
    "batch_size": 8,
    "seq_len": 512,
    "too_long": "error",
    "keep": 1,
    "resume": False,
    "from_scratch": False,
    "eval": [],
    "optimizer": "adamw",
    "lr": 1e-5,
    "schedule": "cosine",
    "warmup": 10,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "seed": 0,
    "pin": [],
    "on_device_full": "error",
    "tracker": [],
    "trace_step": 4,
}


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line. Options that are not given are None: `_DEFAULTS` come after the config file."""
    parser = shared.command(commands, "train", "fine-tune a model on text or conversations", _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", nargs="?", help=shared.MODEL_HELP)
    parser.add_argument("data", metavar="DATA", nargs="*", help="files to train on, each FILE or FILE@WEIGHT")
    parser.add_argument("--out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        default=None,
        help="replace an earlier run in OUT once this is saved",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="read options from a TOML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved options and the plan, and stop"
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        default=None,
        help="begin with random weights drawn from --seed: of MODEL, only its config and tokenizer are read",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="number of updates")
    length.add_argument("--epochs", type=float, metavar="N", help="times through the data (1)")
    length.add_argument("--minutes", type=float, metavar="N", help="as many steps as fit into the time")
    _add_data(parser.add_argument_group("data"))
    _add_evaluation(parser.add_argument_group("evaluation"))
    _add_checkpoints(
        parser.add_argument_group(
            "checkpoints",
            "A commit copies nothing that lives on disk, so one per step is cheap. A kill loses what came after the last.",
        )
    )
    _add_learning(parser.add_argument_group("learning"))
    parser.add_argument(
        "--tracker",
        action="append",
        metavar="NAME",
        help="also report to tensorboard, or to a tracker of transformers such as wandb, mlflow",
    )
    _add(parser, "--trace-step", type=int, metavar="N", help="step to record for outsize trace, 0 for none")
    place = shared.add_place(parser)
    _add(
        place,
        "--on-device-full",
        choices=list(map(str, OnDeviceFull)),
        help="where the accelerator's memory runs out: stop, or try again in smaller tiles and go on with them",
    )
    shared.add_compile(place)
    parser.set_defaults(run=run)


def _add_data(data: argparse._ArgumentGroup) -> None:
    """What is trained on."""
    size = data.add_mutually_exclusive_group()
    _add(size, "--batch-size", type=int, metavar="B", help="sequences per step")
    size.add_argument("--batch-tokens", type=int, metavar="N", help="the same in tokens, such as 65536")
    _add(data, "--seq-len", type=int, metavar="T", help="tokens per sequence")
    data.add_argument(
        "--packing",
        choices=["packed", "padded"],
        help="fill sequences with several documents, kept apart, or one each (packed where the model can)",
    )
    _add(
        data,
        "--too-long",
        choices=["error", "skip", "cut"],
        help="what to do with conversations longer than a sequence",
    )
    _add(data, "--seed", type=int, help="for the order of the data, dropout and --from-scratch")


def _add_evaluation(evaluating: argparse._ArgumentGroup) -> None:
    """What the model is measured by."""
    evaluating.add_argument("--eval", action="append", metavar="FILE", help="measure the model by this file")
    evaluating.add_argument(
        "--eval-split", type=float, metavar="F", help="or this part of DATA, such as 0.02"
    )
    evaluating.add_argument(
        "--eval-every", type=int, metavar="N", help="steps between evaluations (at most 5 in a run)"
    )


def _add_checkpoints(keeping: argparse._ArgumentGroup) -> None:
    """What outlives the run."""
    keeping.add_argument("--checkpoint-every", type=int, metavar="N", help="steps between commits (none)")
    _add(keeping, "--keep", type=int, metavar="K", help="commits that are kept; each takes the state's size")
    keeping.add_argument("--checkpoint", metavar="DIR", help="folder of the commits (OUT.checkpoint)")
    keeping.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on from the last commit, bit by bit; begin where there is none",
    )


def _add_learning(learning: argparse._ArgumentGroup) -> None:
    """How the model learns."""
    _add(
        learning,
        "--optimizer",
        choices=[name.value for name in OptimizerName],
        help="what turns gradients into updates; they differ in bytes per parameter",
    )
    _add(learning, "--lr", type=float, help="peak learning rate")
    _add(
        learning,
        "--schedule",
        choices=["cosine", "linear", "wsd", "constant"],
        help="how it falls to a tenth after the warm-up",
    )
    _add(learning, "--warmup", type=int, metavar="N", help="steps of warm-up")
    _add(learning, "--weight-decay", type=float, metavar="W", help="for matrices; norms and biases have none")
    _add(learning, "--max-grad-norm", type=_number_or_none, metavar="G", help="clip to this, or none")


def run(options: argparse.Namespace) -> int:
    """Train, then print what lived where."""
    values = resolve(options)
    if _is_plausible(values) and not options.dry_run:
        compile_first(
            OptimizerName(values["optimizer"]).rule, values.get("dtype")
        )  # before torch is imported
    quiet.after_imports()
    settings = settings_of(values)
    if options.dry_run:
        return _dry_run(settings, values)

    from outsize.train.loop import train
    from outsize.train.progress import RunConsole, progress_on

    console = RunConsole()
    profile = shared.profile_of(values.get("disk"))
    result = train(settings, watchers=[progress_on(console)], profile=profile)
    console.print(str(result.report), markup=False, highlight=False)
    stopped = "stopped early; " if result.interrupted else ""
    last = f", loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}" if result.losses else ""
    best = f"; best weights in {result.best}" if result.best is not None else ""
    saved = f"saved {result.out}{best}"
    steps = "1 step" if result.num_steps == 1 else f"{result.num_steps} steps"
    if result.checkpoint is not None:
        saved = (
            f"committed to {result.checkpoint}: the same command with --resume goes on"
            if result.interrupted
            else f"{saved}; commits are in {result.checkpoint}"
        )
    console.print(
        f"{stopped}{steps}{last}; {saved}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for name, reason in result.failures.items():
        print(f"warning: {name} failed: {reason}", file=sys.stderr)
    return 130 if result.interrupted else 0


def _is_plausible(values: Mapping[str, Any]) -> bool:
    """Whether a run will get as far as an update: what is wrong is refused at once, and not after a compilation."""
    is_known = values["optimizer"] in list(OptimizerName) and values.get("dtype") in (None, *ComputeType)
    given = values["data"] if isinstance(values["data"], list) else [values["data"]]
    has_data = all(Path(each).exists() or Path(each.rpartition("@")[0] or each).exists() for each in given)
    return is_known and has_data and (Path(values["model"]) / "config.json").is_file()


def resolve(options: argparse.Namespace) -> dict[str, Any]:
    """The options given, over those of the config file, over the defaults. Raises ConfigError."""
    given = {key: value for key, value in vars(options).items() if value not in (None, [])}
    for key in ("run", "command", "config", "dry_run"):
        given.pop(key, None)
    known = set(vars(options)) - {"run", "command", "config", "dry_run"}
    config = read_config(options.config, known) if options.config is not None else {}
    values = merge(_DEFAULTS, config, given)
    for name, hint in (
        ("model", "the folder of a Hugging Face model"),
        ("data", "a text file, JSON lines, Parquet, or a datasets folder"),
        ("out", "--out with a folder that does not exist yet"),
    ):
        if not values.get(name):
            raise ConfigError(f"{name.upper()} is missing", hint=f"pass {hint}, or put {name} into --config")
    if (num_tokens := values.pop("batch_tokens", None)) is not None:
        seq_len = values["seq_len"]
        if not 1 <= seq_len <= num_tokens:
            raise ConfigError(
                f"batch_tokens: {num_tokens} are no whole sequence of {seq_len}",
                hint="pass --seq-len of 2 or more, and at least as many --batch-tokens",
            )
        values["batch_size"] = num_tokens // seq_len
    return values


def settings_of(values: dict[str, Any]) -> TrainSettings:
    """Resolved options as settings; raises ConfigError."""
    from outsize.train.data import DataFile, Packing, TooLong
    from outsize.train.schedule import Shape
    from outsize.train.settings import Checkpointing, Evaluating, Learning, Length, TrainSettings

    get = values.get
    lengths = (get("steps"), get("epochs"), get("minutes"))
    return TrainSettings(
        model=Path(values["model"]),
        data=tuple(DataFile.parse(text) for text in values["data"]),
        out=Path(values["out"]),
        length=Length(
            steps=lengths[0], epochs=1.0 if lengths == (None,) * 3 else lengths[1], minutes=lengths[2]
        ),
        batch_size=values["batch_size"],
        seq_len=values["seq_len"],
        packing=_choice(Packing, "packing", values["packing"]) if get("packing") else None,
        too_long=_choice(TooLong, "too_long", values["too_long"]),
        learning=Learning(
            lr=values["lr"],
            warmup_steps=values["warmup"],
            weight_decay=values["weight_decay"],
            max_grad_norm=_clipping(values["max_grad_norm"]),
            schedule=_choice(Shape, "schedule", values["schedule"]),
            optimizer=_choice(OptimizerName, "optimizer", values["optimizer"]),
        ),
        evaluating=Evaluating(
            files=tuple(DataFile.parse(text) for text in values["eval"]),
            fraction=get("eval_split"),
            every=get("eval_every"),
        ),
        checkpointing=Checkpointing(
            every=get("checkpoint_every"),
            keep=values["keep"],
            folder=Path(values["checkpoint"]) if get("checkpoint") else None,
            resume=values["resume"],
        ),
        place=shared.load_options(values),
        attention=get("attention"),
        from_scratch=values["from_scratch"],
        seed=values["seed"],
        overwrite=values["overwrite"],
        trackers=tuple(values["tracker"]),
        trace_step=values["trace_step"],
    )


def _dry_run(settings: TrainSettings, values: dict[str, Any]) -> int:
    """Print the options as a config file, and the plan."""
    import outsize
    from outsize.model import find_weights, resolve_folder

    if not settings.from_scratch:
        find_weights(resolve_folder(settings.model))
    print(write_config(values))
    summary = outsize.preview(
        settings.model,
        attention=settings.attention,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        from_scratch=settings.from_scratch,
        profile=shared.profile_of(values.get("disk")),
        **settings.place,
    )
    print("\n".join(f"# {line}".rstrip() for line in str(summary).splitlines()))
    return 0 if summary.fits else 1


def _add(group: Any, name: str, *, help: str, **how: Any) -> None:
    """An option whose default stands in its help, and in `_DEFAULTS`."""
    default = _DEFAULTS[name.removeprefix("--").replace("-", "_")]
    group.add_argument(name, help=f"{help} ({default})", **how)


def _clipping(value: float | str) -> float | None:
    try:
        return None if str(value).lower() == "none" else float(value)
    except ValueError as error:
        raise ConfigError(
            f"max_grad_norm: {value!r} is not known",
            hint='a number, or "none" to leave gradients as they are',
        ) from error


def _choice(kind: Any, name: str, value: str) -> Any:
    if value not in list(kind):
        raise ConfigError(f"{name}: {value!r} is not known", hint=f"one of {', '.join(kind)}")
    return kind(value)


def _number_or_none(text: str) -> float | str:
    """A number or the word none, as they stand in a config file; None would mean that nothing was given."""
    try:
        return "none" if text.lower() == "none" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from error
