"""Files of training data as records: JSON lines, Parquet, a folder of `datasets`, or plain text.

Tables of text (.csv) and archives are refused by name. A byte order mark is not part of a text.

A record is a mapping with a place (`chat.jsonl:17`), so that whatever is wrong with it later can be named.
"""

from __future__ import annotations

import codecs
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from outsize.errors import DataError

PART_BYTES = 1 << 20
"""Bytes of plain text in one record."""

_JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})
_PARQUET = frozenset({".parquet", ".pq"})
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_UNPACK = {
    ".gz": "gunzip -k",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".zst": "unzstd",
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xf",
}
"""Commands that unpack a file and leave it in place."""

_OPENINGS = (b"[", b"{")
"""How a line begins where a file is one JSON value over many lines."""
_ONE_VALUE_HINT = (
    "one JSON object per line is read, not one value over all; jq -c '.[]' FILE makes lines of a list"
)

FORMATS_HINT = 'each line is a JSON object with "text", with "prompt" and "completion", or with "messages"'


class FileKind(StrEnum):
    """How a path is read."""

    TEXT = "text"
    JSON_LINES = "JSON lines"
    PARQUET = "Parquet"
    DATASETS = "datasets folder"


@dataclass(frozen=True, slots=True)
class Record:
    """One record; `number` counts from 1 (lines of a text file, rows elsewhere).

    `continues`: the document goes on in the next record, as the parts of a plain text file do.
    """

    fields: Mapping[str, Any]
    path: Path
    number: int
    continues: bool = False

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.path}:{self.number}"


def file_kind(path: Path) -> FileKind:
    """How `path` would be read. Raises DataError for what cannot be."""
    if not path.exists():
        raise DataError(
            f"no such file: {path}", hint="pass a text file, JSON lines, Parquet, or a datasets folder"
        )
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
            raise DataError(
                f"{path} holds several splits", hint=f"pass one: {path / (splits or ['train'])[0]}"
            )
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return FileKind.DATASETS
        raise DataError(
            f"{path} is a folder, but not one that datasets saved",
            hint="pass files, or what save_to_disk wrote",
        )
    if not path.is_file():
        raise DataError(
            f"{path} is not a file", hint="pass a text file, JSON lines, Parquet, or a datasets folder"
        )
    if path.stat().st_size == 0:
        raise DataError(
            f"{path} is empty", hint="pass a text file, JSON lines, Parquet, or a datasets folder"
        )
    _check_format(path)
    if path.suffix.lower() in _JSON_LINES:
        return FileKind.JSON_LINES
    return FileKind.PARQUET if path.suffix.lower() in _PARQUET else FileKind.TEXT


def _check_format(path: Path) -> None:
    """Raise DataError for a table or an archive, whose bytes would otherwise be taken for plain text."""
    suffix = path.suffix.lower()
    if (delimiter := _DELIMITERS.get(suffix)) is not None:
        program = (
            f"import datasets; datasets.Dataset.from_csv({str(path)!r}, sep={delimiter!r})"
            f".to_json({f'{path}.jsonl'!r})"
        )
        raise DataError(
            f"{path}: {suffix} files are not read",
            hint=f'write JSON lines, with a column "text", or "prompt" and "completion": python -c {shlex.quote(program)}',
        )
    if suffix in _UNPACK:
        raise DataError(
            f"{path}: compressed files are not read",
            hint=f"unpack it: {_UNPACK[suffix]} {shlex.quote(str(path))}",
        )


def read_records(path: Path) -> Iterator[Record]:
    """All records of `path` in order. Raises DataError naming the place of what cannot be read."""
    try:
        match file_kind(path):
            case FileKind.TEXT:
                yield from _read_text(path)
            case FileKind.JSON_LINES:
                yield from _read_json_lines(path)
            case FileKind.PARQUET:
                yield from _read_parquet(path)
            case FileKind.DATASETS:
                yield from _read_datasets(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint="pass a file that you may read") from error


def _read_json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    fields = _json_object(line, f"{path}:{number}")
                except DataError as error:
                    if line.strip() in _OPENINGS or line.lstrip().startswith(b"[{"):
                        raise DataError(error.message, hint=_ONE_VALUE_HINT) from error
                    raise
                yield Record(_without_null_columns(fields), path, number)


def _json_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        # Without the line break an object that is cut short ends in this line, not at column 1 of the next.
        value = json.loads(line.rstrip(), object_pairs_hook=_object)
    except _RepeatedKey as error:
        raise DataError(f"{place}: {error}", hint="keep one of them") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason})", hint=FORMATS_HINT) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not JSON ({error.msg}, column {error.colno})", hint=FORMATS_HINT
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: not JSON that can be read (nested too deep)", hint=FORMATS_HINT) from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise DataError(f"{place}: not JSON that can be read ({error})", hint=FORMATS_HINT) from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(value).__name__}", hint=FORMATS_HINT)
    return value


class _RepeatedKey(Exception):
    """An object has a key twice, of which json would drop the first. Never leaves this file."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKey(f"{json.dumps(repeated)} is there {names.count(repeated)} times in one object")
    return value


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow", hint="pip install 'outsize[data]'"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(_without_nulls(row), path, number)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: row {number + 1}: {_first_line(error)}", hint="the file is damaged or cut off"
        ) from error


def _read_datasets(path: Path) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path}: reading this folder needs datasets", hint="pip install 'outsize[data]'"
        ) from error
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises errors of many kinds for damaged folders
        raise DataError(f"{path}: {_first_line(error)}", hint="save it again with save_to_disk") from error
    for number, row in enumerate(rows, 1):
        yield Record(_without_nulls(row), path, number)


def _without_null_columns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` without those that are null: lines that were a table have a field for every column.

    Nulls further down are values: arguments of a tool call may hold one.
    """
    return {name: value for name, value in fields.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    """Tables fill what a row leaves out with null, also inside messages; chat templates take null for a value."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _read_text(path: Path) -> Iterator[Record]:
    """Parts of about a mebibyte that end at a line break: no token spans two of them."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # drops a byte order mark
    line = 1
    found = False
    with path.open("rb") as file:
        part = file.read(PART_BYTES)
        while part:
            part += file.readline(PART_BYTES)
            following = file.read(PART_BYTES)
            try:
                text = decoder.decode(part, final=not following)
            except UnicodeDecodeError as error:
                wrong = line + error.object[: error.start].count(b"\n")
                raise DataError(
                    f"{path}:{wrong}: not UTF-8 text ({error.reason})",
                    hint="pass a text file, or JSON lines (.jsonl)",
                ) from error
            found = found or bool(text.strip())
            yield Record({"text": text}, path, line, continues=bool(following))
            line += part.count(b"\n")
            part = following
    if not found:
        raise DataError(
            f"{path} holds no text", hint="pass a text file, JSON lines, Parquet, or a datasets folder"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
