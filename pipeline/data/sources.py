"""Where records come from: JSON lists, JSON Lines, Parquet and Hugging Face `datasets` folders.

A place is a path or an address.

A file is first cut into chunks without its records being kept (`index_file`), then any process
reads any chunk (`read_chunk`): memory does not depend on a file's size. Nothing here judges a
record, except whether it can be read at all; and nothing is unpickled.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.files import GLOB, describe, find, is_remote, open_file, read_part
from pipeline.data.layouts import READ, may_hold_content, other_layout

CHUNK_RECORDS = 256
CHUNK_BYTES = 4 << 20
MAX_RECORD = 64 << 20
"""Bytes of one record's text; a longer one is taken for an unclosed bracket."""
_READ = 1 << 20
_TABLE_ROWS = 64
_BOM = b"\xef\xbb\xbf"

# A string, a bracket, or the quotation mark of a string that ends beyond the text at hand.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|"', re.DOTALL)
_SCALAR = re.compile(r'[^,\[\]{}"\s]+')
_SPACE = re.compile(r"[ \t\r\n]*")


class SourceError(ValueError):
    """A file of records can't be used: which, where in it, why, and the way out."""


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a record that is there but can't be read."""

    reason: str
    """A key of `conversations.REASONS`."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive records of one file."""

    file: str
    kind: Literal["list", "lines", "parquet", "arrow"]
    start: int
    """First byte; of a table, the row group or record batch."""
    end: int
    """Byte after the last; unused for tables."""
    first: int
    """Index in the file of the first record, from 0."""
    line: int
    """Line of the first record, from 1; of a table, its row."""
    count: int


def find_files(place: str, folder: Path, split: str) -> list[str]:
    """The files behind a file's path, a glob, a folder that `datasets` made, or an address.

    Args:
        place: relative ones count from `folder`.
        split: whose files are taken of a folder.

    Raises:
        SourceError: there is none.
    """
    if is_remote(place):
        return find(place)
    return [str(path) for path in _local_files(folder / place, split)]


def locate(file: str, folder: Path) -> str:
    """Where a file that `find_files` found, perhaps on another machine, is here."""
    return file if is_remote(file) else str(folder / file)


def _local_files(place: Path, split: str) -> list[Path]:
    if place.is_file():
        return [place]
    if place.is_dir():
        return _files_of_folder(place, split)
    if GLOB.intersection(place.name):
        found = sorted(path for path in place.parent.glob(place.name) if path.is_file())
        if found:
            return found
    raise SourceError(f"there is no file or folder {str(place)!r}")


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in names:
            raise SourceError(
                f"{folder} holds the splits {', '.join(names)} but no {split!r}; name a folder "
                f"in it, such as {folder / names[0] if names else folder}"
            )
        folder = folder / split
    if (folder / "state.json").is_file():  # Dataset.save_to_disk
        state = json.loads((folder / "state.json").read_text())
        return [folder / file["filename"] for file in state["_data_files"]]
    found = sorted(folder.rglob("*.parquet")) or sorted(folder.rglob("*.arrow"))
    found = found or sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")])
    own = [path for path in found if path.name.startswith(split) or path.parent.name == split]
    if not found:
        raise SourceError(f"folder {folder} holds no .parquet, .arrow, .jsonl or .json file")
    return own or found


def index_file(place: str | Path) -> Iterator[Chunk]:
    """The chunks of a file, in order; only their places are kept.

    Raises:
        SourceError: the file's frame is broken (not records in it: those are read later).
    """
    place, name = str(place), _name(str(place))
    try:
        with open_file(place) as file:
            head = file.read(_READ)
            if head and (other := describe(head)):
                raise SourceError(f"{name} {other}")
            if head[:4] == b"PAR1":
                yield from _index_parquet(place)
            elif name.endswith(".arrow"):
                yield from _index_arrow(place)
            elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise SourceError(f"{name} is UTF-16 text; convert it to UTF-8")
            elif head[:2] == b"\x1f\x8b":
                raise SourceError(f"{name} is compressed; decompress it (gunzip) first")
            else:
                start = len(_BOM) if head.startswith(_BOM) else 0
                file.seek(start)
                text = head[start:].lstrip()
                yield from _index_text(place, file, start, text)
    except OSError as error:
        raise SourceError(f"can't read {place}: {error.strerror or error}") from None


def _name(place: str) -> str:
    return place.rpartition("/")[2]


def _index_text(place: str, file: BinaryIO, start: int, head: bytes) -> Iterator[Chunk]:
    name = _name(place)
    if head.startswith(b"["):
        yield from _grouped(place, "list", _scan_list(name, file, start))
        return
    if not name.endswith(".jsonl") and head.partition(b"\n")[0].strip() == b"{":
        raise SourceError(
            f"{name} holds one JSON object over several lines; write a JSON list of records, "
            "or one record a line (JSON Lines)"
        )
    yield from _grouped(place, "lines", _scan_lines(name, file, start))


def _grouped(
    file: str, kind: Literal["list", "lines"], places: Iterator[tuple[int, int, int]]
) -> Iterator[Chunk]:
    """Chunks of (first byte, byte after the last, line) of single records."""
    first = count = start = end = line = 0
    for begin, after, at in places:
        if count and (count == CHUNK_RECORDS or after - start > CHUNK_BYTES):
            yield Chunk(
                file=file, kind=kind, start=start, end=end, first=first, line=line, count=count
            )
            first, count = first + count, 0
        if not count:
            start, line = begin, at
        end, count = after, count + 1
    if count:
        yield Chunk(file=file, kind=kind, start=start, end=end, first=first, line=line, count=count)


def _scan_lines(name: str, file: BinaryIO, offset: int) -> Iterator[tuple[int, int, int]]:
    number = 0
    while line := file.readline(MAX_RECORD):
        number += 1
        if len(line) == MAX_RECORD:
            raise SourceError(f"line {number} of {name} is longer than {MAX_RECORD >> 20} MiB")
        if line.strip():
            yield offset, offset + len(line), number
        offset += len(line)


class _Window:
    """Part of a file as text with one character a byte, so that places in it are byte offsets."""

    def __init__(self, name: str, file: BinaryIO, offset: int) -> None:
        self.name, self.file, self.offset = name, file, offset
        self.text, self.at, self.line, self._counted = "", 0, 1, 0

    def more(self) -> bool:
        """Drop what lies behind, double what lies ahead; whether there was anything to read."""
        self.count_lines()
        self.text, kept = self.text[self.at :], self.at
        self.offset, self.at, self._counted = self.offset + kept, 0, 0
        if len(self.text) > MAX_RECORD:
            raise self.error(
                f"a record does not end within {MAX_RECORD >> 20} MiB: an unpaired bracket or "
                "quotation mark? Fix the file"
            )
        read = self.file.read(max(_READ, len(self.text)))
        self.text += read.decode("latin-1")
        return bool(read)

    def skip_space(self) -> str:
        """Go to the next character that is not white space, and return it; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def count_lines(self) -> int:
        """The line of the present place, from 1."""
        self.line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self.line

    def error(self, why: str) -> SourceError:
        return SourceError(
            f"{self.name} is not valid JSON (line {self.count_lines()}: {why}); "
            "write a JSON list, or one object a line (JSON Lines)"
        )


def _scan_list(name: str, file: BinaryIO, offset: int) -> Iterator[tuple[int, int, int]]:
    window = _Window(name, file, offset)
    window.skip_space()
    window.at += 1  # the bracket that made it a list
    if window.skip_space() == "]":
        window.at += 1
    else:
        while True:
            character = window.skip_space()
            if character in ("", ",", "]", "}"):
                found = {"": "the list is cut off", "]": "a comma before the closing bracket"}
                raise window.error(found.get(character, f"{character!r} where a record must start"))
            length = _element_length(window)
            line = window.count_lines()
            start = window.offset + window.at
            window.at += length
            yield start, start + length, line
            character = window.skip_space()
            if character not in (",", "]"):
                found = {"": "the list is cut off"}
                raise window.error(found.get(character, f"{character!r} after a record, no comma"))
            window.at += 1
            if character == "]":
                break
    if window.skip_space():
        raise window.error("text after the closing bracket of the list")


def _element_length(window: _Window) -> int:
    while (end := _element_end(window.text, window.at)) is None:
        if not window.more():
            raise window.error("the record that starts here is cut off, or a bracket is missing")
    return end - window.at


def _element_end(text: str, start: int) -> int | None:
    """Where the JSON value that starts there ends; None: beyond the text."""
    if text[start] not in '{["':
        match = _SCALAR.match(text, start)
        return match.end() if match and match.end() < len(text) else None
    depth = 0
    for token in _TOKEN.finditer(text, start):
        character = text[token.start()]
        if character == '"':
            if token.end() - token.start() == 1:
                return None
        else:
            depth += 1 if character in "[{" else -1
        if depth == 0:
            return token.end()
    return None


def _index_parquet(place: str) -> Iterator[Chunk]:
    try:
        with open_file(place) as file:
            meta = pq.read_metadata(file)
    except pa.ArrowException as error:
        raise SourceError(f"{_name(place)} is not a readable Parquet file: {error}") from None
    _check_columns(_name(place), meta.schema.to_arrow_schema().names)
    first = 0
    for group in range(meta.num_row_groups):
        count = meta.row_group(group).num_rows
        yield _table_chunk(place, "parquet", group, first, count)
        first += count


def _index_arrow(place: str) -> Iterator[Chunk]:
    first = 0
    try:
        with _open_arrow(place) as reader:
            _check_columns(_name(place), reader.schema.names)
            for number, batch in enumerate(reader):
                yield _table_chunk(place, "arrow", number, first, batch.num_rows)
                first += batch.num_rows
    except pa.ArrowException as error:
        raise SourceError(f"{_name(place)} is not a readable Arrow stream: {error}") from None


def _open_arrow(place: str) -> Any:
    return pa.ipc.open_stream(open_file(place) if is_remote(place) else pa.memory_map(place))


def _check_columns(name: str, names: Sequence[str]) -> None:
    if "conversations" not in names:
        how = other_layout(list(names))
        raise SourceError(
            f"{name} has no column `conversations`; it has {', '.join(names)}. "
            + (f"That is {how}" if how else "Rename or convert it: a list of {from, value}")
        )


def _table_chunk(
    place: str, kind: Literal["parquet", "arrow"], start: int, first: int, count: int
) -> Chunk:
    return Chunk(
        file=place, kind=kind, start=start, end=0, first=first, line=first + 1, count=count
    )


def read_chunk(chunk: Chunk, place: str | Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of each record of a chunk; an `Unreadable` instead of one that can't be."""
    place = str(place)
    if chunk.kind in ("list", "lines"):
        data = read_part(place, chunk.start, chunk.end)
        found = (_elements if chunk.kind == "list" else _lines)(data, chunk.line)
    else:
        found = _rows(chunk, place)
    number = 0
    for item in found:
        number += 1
        yield item
    if number != chunk.count:
        raise SourceError(
            f"{_name(place)} has {number} records from line {chunk.line} on where it had "
            f"{chunk.count} before: it was changed while being read; rerun"
        )


def _elements(data: bytes, line: int) -> Iterator[tuple[int, Any]]:
    text, at = data.decode("latin-1") + " ", 0
    while at < len(data):
        gap = at
        while text[at] in ", \t\r\n":
            at += 1
        line += text.count("\n", gap, at)
        end = _element_end(text, at)
        if end is None:
            return
        yield line, _parse(data[at:end])
        line += text.count("\n", at, end)
        at = end


def _lines(data: bytes, line: int) -> Iterator[tuple[int, Any]]:
    for number, text in enumerate(data.split(b"\n"), line):
        if text.strip():
            yield number, _parse(text)


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable("encoding", f"byte {error.start} of the record is not UTF-8")
    except RecursionError:
        return Unreadable("malformed", "nested too deeply")
    except ValueError as error:  # bad JSON, or an integer of thousands of digits
        return Unreadable("malformed", f"not JSON: {error}")


def _rows(chunk: Chunk, place: str) -> Iterator[tuple[int, Any]]:
    line = chunk.line
    for batch in _batches(chunk, place):
        for start in range(0, batch.num_rows, _TABLE_ROWS):
            for record in _dicts(batch.slice(start, _TABLE_ROWS)):
                yield line, record
                line += 1


def _batches(chunk: Chunk, place: str) -> Iterator[pa.RecordBatch]:
    if chunk.kind == "parquet":
        try:
            with open_file(place) as opened, pq.ParquetFile(opened) as file:
                columns = _columns(file.schema_arrow)
                yield from file.iter_batches(_TABLE_ROWS, row_groups=[chunk.start], columns=columns)
        except (OSError, pa.ArrowException) as error:  # a damaged page is an OSError
            raise SourceError(
                f"can't read row group {chunk.start} of {_name(place)}: {error}; if the file is "
                "damaged, fetch or write it again"
            ) from None
        return
    with _open_arrow(place) as reader:
        for number, batch in enumerate(reader):
            if number == chunk.start:
                yield batch.select(_columns(batch.schema))
                return


def _columns(schema: pa.Schema) -> list[str]:
    """Columns that are read: what a record has, and what may be content that it has no place for;
    numbers and times stay on disk."""
    return [
        field.name
        for field in schema
        if field.name in READ or may_hold_content(field.name, _is_numeric(field.type))
    ]


def _is_numeric(kind: pa.DataType) -> bool:
    """Numbers, truths and times, alone or in lists."""
    while (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        kind = kind.value_type
    return pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)


def _dicts(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [Unreadable("encoding", "a text of the row is not UTF-8")]
        return [record for row in range(batch.num_rows) for record in _dicts(batch.slice(row, 1))]


def iter_records(place: str | Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of every record of a file, in order; an `Unreadable` where one can't be."""
    for chunk in index_file(place):
        yield from read_chunk(chunk, place)
