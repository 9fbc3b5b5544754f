"""Read a file of rows as text cells, or say in one line what is wrong with it."""

import ast
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.core.io import atomic_write


def read_table(path: str | Path, required: tuple[str, ...]) -> pd.DataFrame:
    """A file of rows with the columns `required`: CSV (commas, semicolons or tabs), JSON, JSON lines or Parquet.

    Cells are text, nothing is interpreted ("NA" stays "NA"), a missing cell is ""; lists in JSON and Parquet stay
    lists. Raises UserError where the file cannot be read, and where a column is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson", ".parquet"):
        table = _read_records(Path(path), suffix)
    else:
        table = _read_csv(Path(path), suffix)
    if table.empty:
        raise UserError(f"{path}: it has no rows. Give a file that has some.")
    if missing := [name for name in required if name not in table.columns]:
        raise UserError(
            f"{path}: column {preview(missing, 10)} is missing (header: {', '.join(table.columns)}). Add it, or "
            "rename the column that holds it."
        )
    return table


def _read_csv(path: Path, suffix: str) -> pd.DataFrame:
    text = _decode(path)
    delimiter = _delimiter(text, suffix)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    remedy = "Quote the cells that contain commas, quotes or line breaks."
    try:
        header, *records = [cells for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not comma-separated values ({error}). {remedy}") from None
    for number, cells in enumerate(records, start=1):
        if len(cells) != len(header):
            raise UserError(f"{path}: row {number} has {len(cells)} cells, the header {len(header)}. {remedy}")
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns have the same name (header: {', '.join(header)}). Rename one.")
    return pd.DataFrame(records, columns=header, dtype=str)


def _delimiter(text: str, suffix: str) -> str:
    """A comma, unless the header has none and can be divided at semicolons or tabs."""
    if suffix == ".tsv":
        return "\t"
    header = next((line for line in text.splitlines() if line.strip()), "")
    return max(",;\t", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _read_records(path: Path, suffix: str) -> pd.DataFrame:
    """JSON (a list of objects), JSON lines or Parquet, with the cells as `read_table` gives them."""
    try:
        if suffix == ".parquet":
            records = pd.read_parquet(path).to_dict("records")
        elif suffix == ".json":
            records = json.loads(_decode(path))
        else:
            records = [json.loads(line) for line in _decode(path).splitlines() if line.strip()]
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as {suffix[1:]} ({' '.join(str(error).split())[:120]}).") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: it is not a list of objects, one for each row.")
    header = list(dict.fromkeys(str(name) for record in records for name in record))
    return pd.DataFrame([[_cell(record.get(name)) for name in header] for record in records], columns=header)


def _cell(value: object) -> object:
    """A value as text: whole numbers without a fraction, nothing for null; lists and dicts as they are."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple, dict)):
        return value
    if value is None or value is pd.NA or isinstance(value, float) and math.isnan(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def write_table(path: str | Path, table: pd.DataFrame, float_format: str | None = None) -> None:
    """Write a CSV atomically, in UTF-8 with LF. Cells with a carriage return are quoted: pandas forgets them."""
    texts = table.select_dtypes(exclude="number")
    returns = any("\r" in str(cell) for name in texts for cell in (name, *texts[name]))
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format=float_format, quoting=quoting)


def parse_list(cell: object) -> list | None:
    """A list, also in the text that JSON or Python write of it; of a mapping its values. None for anything else."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(cell) if isinstance(cell, str) else cell
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, (list, tuple, dict)):
            return list(value.values() if isinstance(value, dict) else value)
    return None


def check_ids(path: str | Path, ids: Sequence[str], remedy: str = "Give each row its own id.") -> None:
    """Raise UserError where an id is blank or occurs twice."""
    column = pd.Series(list(ids), dtype=object)  # pandas' own strings are eight times as slow here
    if blank := [n for n, row_id in enumerate(column, start=1) if not isinstance(row_id, str) or not row_id.strip()]:
        raise UserError(f"{path}: {len(blank)} rows have no id (row {preview(blank)}). {remedy}")
    if duplicates := list(column[column.duplicated()].unique()):
        raise UserError(f"{path}: {len(duplicates)} ids occur twice: {preview(duplicates)}. {remedy}")


def align_ids(
    path: str | Path, ids: Sequence[str], wanted: Sequence[str], source: str | Path, remedy: str
) -> np.ndarray:
    """Position of each id of `wanted`, which come from `source`, among the `ids` of the file at `path`: int (rows,).

    Raises UserError unless both hold the same ids, each once.
    """
    check_ids(path, ids, remedy)
    positions = pd.Index(ids).get_indexer(pd.Index(wanted))
    if missing := [wanted[int(i)] for i in np.flatnonzero(positions < 0)]:
        raise UserError(f"{path}: {len(missing)} ids of {source} are missing: {preview(missing)}. {remedy}")
    if len(ids) > len(wanted):
        extra = sorted(set(ids) - set(wanted))
        raise UserError(f"{path}: {len(extra)} ids are not in {source}: {preview(extra)}. {remedy}")
    return positions


def _decode(path: Path) -> str:
    """The file's text. It must be UTF-8, with or without a byte order mark."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of the contest's CSV.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    if not raw.strip():
        raise UserError(f"{path}: the file is empty. Copy it again.")
    remedy = "Save it again as UTF-8 (in Excel: 'CSV UTF-8')."
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:200]:
        raise UserError(f"{path}: the file is UTF-16. {remedy}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8, probably CP949 (EUC-KR). {remedy}") from None
