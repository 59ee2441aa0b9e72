"""`outsize checkpoint`: what a run has committed, whether it is whole, and out of the store as an ordinary folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from outsize.cli import options as shared
from outsize.cli import quiet
from outsize.config import ComputeType, format_bytes
from outsize.errors import ConfigError

_EXAMPLES = """\
examples:
  outsize checkpoint list tuned.checkpoint
      the commits in it, and the disk they take
  outsize checkpoint verify tuned.checkpoint
      read every byte of the last commit and check it
  outsize checkpoint export tuned.checkpoint tuned-120 --step 120
      an ordinary Hugging Face folder; a run that goes on is not disturbed
  outsize checkpoint export tuned.checkpoint shared --dcp --step 120
      a torch.distributed.checkpoint folder with weights and optimizer state, for FSDP2
  outsize checkpoint remove tuned.checkpoint --all
      give the space back

outsize train --checkpoint-every N makes commits, in OUT.checkpoint; --resume goes on from the last.
"""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(commands, "checkpoint", "look at, check, export and remove commits", _EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        one.add_argument(
            "folder", metavar="DIR", type=Path, help="folder of commits, such as tuned.checkpoint"
        )
        return one

    def with_step(one: argparse.ArgumentParser) -> None:
        one.add_argument("--step", type=int, metavar="N", help="the commit after step N (the last)")

    def with_base(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--base", type=Path, metavar="DIR", help="where the model's own files are, if they were moved"
        )

    verb("list", "list the commits of a run").set_defaults(run=_list)
    show = verb("show", "say what a commit holds")
    with_step(show)
    show.set_defaults(run=_show)
    check = verb("verify", "read all of a commit and check every byte")
    with_step(check)
    with_base(check)
    check.set_defaults(run=_verify)
    export = verb("export", "write a commit as a Hugging Face folder, or for torch.distributed.checkpoint")
    export.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    with_step(export)
    with_base(export)
    export.add_argument(
        "--dtype", choices=[str(kind) for kind in ComputeType], help="number type of the weights"
    )
    export.add_argument("--dcp", action="store_true", help="weights and optimizer state, in fp32, for FSDP2")
    export.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    export.set_defaults(run=_export)
    come = verb("import", "make a commit of a torch.distributed.checkpoint folder, as FSDP2 users have them")
    come.add_argument(
        "dcp", metavar="DCP", type=Path, help="folder that dcp.save wrote; its index is a pickle: trust it"
    )
    come.add_argument("--model", metavar="MODEL", required=True, help="Hugging Face folder of its model")
    come.add_argument(
        "--dtype",
        choices=[str(kind) for kind in ComputeType],
        default="float32",
        help="number type to compute in",
    )
    come.set_defaults(run=_import)
    remove = verb("remove", "remove a commit, or the whole store")
    what = remove.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="N", help="the commit after step N")
    what.add_argument("--all", action="store_true", help="everything")
    remove.set_defaults(run=_remove)


def _list(options: argparse.Namespace) -> int:
    quiet.after_imports()
    from outsize.checkpoint.catalogue import contents

    found = contents(options.folder)
    print(f"{'step':>10}  {'written':<25}  {'bytes':>10}")
    for commit in found.commits:
        if commit.manifest is None:
            print(f"{commit.step:>10}  damaged: {commit.error.message if commit.error else ''}")
        else:
            size = format_bytes(commit.manifest.num_bytes)
            print(f"{commit.step:>10}  {commit.manifest.written:<25}  {size:>10}")
    count = len(found.commits)
    print(
        f"{count} commit{'s' if count != 1 else ''} in {found.folder}, which takes {format_bytes(found.num_bytes)}"
    )
    return 0 if all(commit.manifest is not None for commit in found.commits) else 1


def _show(options: argparse.Namespace) -> int:
    quiet.after_imports()
    from outsize.checkpoint.catalogue import describe
    from outsize.checkpoint.export import read_commit

    manifest = read_commit(options.folder, options.step, lambda reader: reader.manifest)
    for name, words in describe(manifest):
        print(f"{name:<16}{words}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    quiet.after_imports()
    from rich.progress import Progress

    from outsize.checkpoint.catalogue import verify

    with Progress(transient=True) as progress:
        task = progress.add_task("verifying", total=None)

        def tell(block: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=f"verifying {block}")

        manifest = verify(options.folder, options.step, tell, base=options.base)
    print(f"step {manifest.step}: {format_bytes(manifest.num_bytes)} are as they were written")
    if manifest.base is not None and not manifest.is_whole:
        print(f"weights that were never updated are in {options.base or manifest.base.folder}, as they were")
    return 0


def _export(options: argparse.Namespace) -> int:
    quiet.after_imports()
    if options.dcp:
        if options.dtype is not None:
            raise ConfigError("--dtype: --dcp writes fp32 masters", hint="leave one of them out")
        from outsize.checkpoint.dcp import export_dcp

        manifest = export_dcp(
            options.folder, options.out, step=options.step, overwrite=options.overwrite, base=options.base
        )
    else:
        from outsize.checkpoint.export import export

        manifest = export(
            options.folder,
            options.out,
            step=options.step,
            dtype=options.dtype,
            overwrite=options.overwrite,
            base=options.base,
        )
    print(f"step {manifest.step}: saved {options.out}")
    return 0


def _import(options: argparse.Namespace) -> int:
    quiet.after_imports()
    from outsize.checkpoint.dcp import import_dcp
    from outsize.model import resolve_folder

    step = import_dcp(options.dcp, options.folder, model=resolve_folder(options.model), dtype=options.dtype)
    print(f"step {step}: {options.folder} goes on from it with outsize.checkpoint.resume")
    return 0


def _remove(options: argparse.Namespace) -> int:
    quiet.after_imports()
    from outsize.checkpoint.catalogue import contents
    from outsize.checkpoint.store import remove_commit, remove_store

    if options.all:
        freed = remove_store(options.folder)
        what = f"the commits in {options.folder}" if options.folder.exists() else str(options.folder)
        print(f"removed {what}: {format_bytes(freed)} are free again")
        return 0
    found = contents(options.folder)
    steps = [commit.step for commit in found.commits]
    if options.step not in steps:
        raise ConfigError(
            f"{options.folder} has no commit of step {options.step}",
            hint=f"it has {', '.join(map(str, steps)) or 'none'}",
        )
    remove_commit(options.folder, options.step)
    print(f"removed the commit of step {options.step}; the next run uses its space again")
    return 0
