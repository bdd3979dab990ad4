"""Where training rows come from: files and data sets of several formats, read into our own rows."""

import csv
import hashlib
import json
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from models.errors import ConfigError
from training.config.data import Source
from training.config.sets import SETS, hub_hint
from training.data.formats import FORMATS, Values, cells_as_values, check_columns
from training.data.rows import BadRowError, Record, Refused, Row, checked, complaint

CHUNK_BYTES = 1 << 20
# A prompt may be a long document; Python's own limit of a cell is 128 KiB.
LARGEST_CELL = 1 << 30


class Reading(NamedTuple):
    """What a source gave.

    Attributes:
        left_out: One line for each reason why rows were left out; empty where none were.
    """

    rows: list[Row]
    left_out: str
    left_out_rows: int


def read(source: Source, categories: Collection[str]) -> Reading:
    """Reads a source into rows, before any limit or weight.

    Args:
        categories: The names of ours that a row may give as its category.

    Raises:
        ConfigError: The source cannot be read or holds no rows, or rows are wrong: the message
            names file, line and reason of each kind of mistake.
    """
    refused: list[Refused] = []
    rows = list(checked(_ours(source), categories, refused))
    if refused and source.bad_rows == "error":
        raise ConfigError(complaint(refused))
    if not rows:
        reason = f": every one is wrong\n{complaint(refused)}" if refused else ""
        raise ConfigError(f"{source.name}: holds no rows{reason}")
    return Reading(rows, complaint(refused) if refused else "", len(refused))


def draw_rows(
    sources: Sequence[Source],
    categories: Collection[str],
    *,
    limit: int | None = None,
    seed: int,
    say: Callable[[str], object],
) -> list[Row]:
    """Reads sources and draws from them.

    Args:
        sources: Where the rows are; each source's limit and weight count.
        categories: The names that a row may give as its category.
        limit: At most so many rows in all, drawn at random; None for all.
        say: Gets a line for each source of which bad rows are left out.
    """
    readings = [(source, read(source, categories)) for source in sources]
    for source, reading in readings:
        if reading.left_out:
            say(f"{source.name}: {reading.left_out_rows} rows are left out: {reading.left_out}")
    return draw(readings, limit, seed)


def draw(readings: Sequence[tuple[Source, Reading]], limit: int | None, seed: int) -> list[Row]:
    """Returns at most `limit` of the rows that the sources' limits and weights leave, in order."""
    rows = [
        row
        for number, (source, reading) in enumerate(readings)
        for row in take(reading.rows, source, random.Random(f"{seed}/{number}"))
    ]
    if limit is None or len(rows) <= limit:
        return rows
    chosen = random.Random(seed).sample(range(len(rows)), limit)
    return [rows[at] for at in sorted(chosen)]


def take(rows: Sequence[Row], source: Source, rng: random.Random) -> list[Row]:
    """Returns the rows of a source as often as its limit and weight say."""
    if source.limit is not None:
        rows = _drawn(rows, source.limit, rng)
    whole, fraction = divmod(source.weight, 1)
    taken = [*rows] * int(whole)
    taken += _drawn(rows, round(len(rows) * fraction), rng)
    if rows and not taken:
        raise ConfigError(f"{source.name}: weight {source.weight} leaves none of {len(rows)} rows")
    return taken


def _drawn(rows: Sequence[Row], wanted: int, rng: random.Random) -> list[Row]:
    """Returns a random subset in its old order; the rows of a pair stay together."""
    if wanted >= len(rows):
        return list(rows)
    units = list(_units(rows))
    rng.shuffle(units)
    chosen: list[int] = []
    for unit in units:
        if len(chosen) + len(unit) <= wanted:
            chosen += unit
    return [rows[at] for at in sorted(chosen)]


def _units(rows: Sequence[Row]) -> Iterator[list[int]]:
    pairs: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        if row.pair is None:
            yield [at]
        else:
            pairs.setdefault(row.pair, []).append(at)
    yield from pairs.values()


def identify(source: Source) -> dict[str, str]:
    """Returns what tells one state of a source from another.

    Returns:
        The file's name and its SHA-256; for rows of the package, their SHA-256; or
        `hub:NAME@REVISION` and the commit; for a folder laid out like a hub repository, each data
        file in it.
    """
    if source.path is not None:
        return {source.path: _sha256(Path(source.path))}
    if source.package is not None:
        rows = "".join(json.dumps(record.values) for record in _package_records(source))
        return {source.name: hashlib.sha256(rows.encode()).hexdigest()}
    builder = _from_hub(source, lambda load: load.load_dataset_builder(**_where(source)))
    if Path(str(source.hub)).is_dir():
        files = sorted(
            {str(file) for files in builder.config.data_files.values() for file in files}
        )
        return {f"hub:{file}": _sha256(Path(file)) for file in files}
    return {f"hub:{source.hub}@{source.revision or 'main'}": str(builder.hash)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _ours(source: Source) -> Iterator[Record]:
    convert = FORMATS[source.format]
    for record in _records(source):
        if isinstance(record.values, BadRowError):
            yield record
            continue
        try:
            if (values := convert(record.values, source)) is not None:
                yield record._replace(values=values)
        except BadRowError as error:
            yield record._replace(values=error)


# --- files ----------------------------------------------------------------------------------------


def _records(source: Source) -> Iterator[Record]:
    if source.package is not None:
        return _package_records(source)
    if source.path is None:
        return _hub_records(source)
    path = Path(source.path)
    readers: dict[str, Callable[[Path, Source], Iterator[Record]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_list,
        ".csv": _delimited,
        ".tsv": _delimited,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path}: is of an unknown kind; the ending must be one of {', '.join(readers)}; or "
            f"name a public set: {', '.join(SETS)}"
        )
    return _readable(path, reader(path, source))


def _readable(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from records
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error


def _json_lines(path: Path, source: Source) -> Iterator[Record]:
    # Not str.splitlines(): a JSON string may hold U+2028 as it is, which is a line end to that.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Record(_json_object(line), str(path), number, "line")


def _json_object(line: str) -> Values | BadRowError:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRowError(f"is no JSON: {error}")
    return values if isinstance(values, dict) else BadRowError("must be a JSON object, one a line")


def _json_list(path: Path, source: Source) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        text = file.read()
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is no JSON: {error}; one object a line is .jsonl") from error
    if not isinstance(values, list):
        raise ConfigError(f"{path}: must hold a list of objects; one object a line is .jsonl")
    for number, value in enumerate(values, start=1):
        fields = value if isinstance(value, dict) else BadRowError("must be a JSON object")
        yield Record(fields, str(path), number, "row")


def _delimited(path: Path, source: Source) -> Iterator[Record]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(LARGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            check_columns(str(path), header, source)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield Record(cells_as_values(header, cells), str(path), line, "line")
                line = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}: is no CSV: {error}") from error


def _parquet(path: Path, source: Source) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_columns(str(path), file.schema_arrow.names, source)
            batches = (batch.to_pylist() for batch in file.iter_batches())
            for number, values in enumerate(chain.from_iterable(batches), start=1):
                yield Record(values, str(path), number, "row")
    except pa.ArrowException as error:
        raise ConfigError(f"{path}: is no parquet file: {_first_line(error)}") from error


# --- the hub --------------------------------------------------------------------------------------


def _package_records(source: Source) -> Iterator[Record]:
    from training.demo_data.everyday import everyday
    from training.demo_data.render import render

    rows: Sequence[Values] = everyday() if source.package == "everyday" else render(0)["train"]
    for number, values in enumerate(rows, start=1):
        yield Record(values, source.name, number, "row")


def _hub_records(source: Source) -> Iterator[Record]:
    dataset: Any = _from_hub(
        source, lambda load: load.load_dataset(**_where(source), split=source.split)
    )
    check_columns(source.name, dataset.column_names, source)
    for number, values in enumerate(dataset, start=1):
        yield Record(values, source.name, number, "row")


def _where(source: Source) -> dict[str, Any]:
    # `datasets` knows a folder again by its README alone, and would give the rows of before.
    fresh = {"download_mode": "force_redownload"} if Path(str(source.hub)).is_dir() else {}
    return {"path": source.hub, "name": source.subset, "revision": source.revision, **fresh}


def _from_hub(source: Source, load: Callable[[Any], Any]) -> Any:
    """Calls `datasets`, which runs no code of a data set's own and unpickles nothing."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return load(datasets)
    except Exception as error:  # what it raises ranges from OSError to its own and the hub's
        hint = "check the name and the network, or save it as a file and use path"
        if source.set is not None:
            hint = hub_hint(source.set)
        raise ConfigError(
            f"{source.name}: the hub did not give this data set: {_first_line(error)}; {hint}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
