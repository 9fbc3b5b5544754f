"""Read a CSV file as text cells, or say in one line what is wrong with it."""

import csv
import io
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from vqa.core.errors import UserError, preview

if TYPE_CHECKING:
    pass


def read_table(path: str | Path, required: tuple[str, ...]) -> pd.DataFrame:
    """A CSV file as text cells, nothing interpreted ("NA" stays "NA"), with the columns `required` in it."""
    reader = csv.reader(io.StringIO(_decode(Path(path)), newline=""), strict=True)
    remedy = "quote the fields that hold commas, quotes or line breaks"
    try:
        header, *records = [cells for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not comma-separated values ({error}); {remedy}") from None
    for number, cells in enumerate(records, start=1):
        if len(cells) != len(header):
            raise UserError(f"{path}: row {number} has {len(cells)} cells, the header {len(header)}; {remedy}")
    table = pd.DataFrame(records, columns=header, dtype=str)
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns have the same name (the header has {', '.join(header)}); rename one")
    require_columns(path, table, required)
    if table.empty:
        raise UserError(f"{path}: no rows below the header; give a file that has some")
    return table


def require_columns(path: str | Path, table: pd.DataFrame, required: tuple[str, ...]) -> None:
    """Raise UserError unless the table has these columns."""
    if missing := [name for name in required if name not in table.columns]:
        raise UserError(
            f"{path}: column {preview(missing, 10)} is missing (the header has {', '.join(table.columns)}); "
            "add it or rename the one that stands for it"
        )


def numbered_columns(table: pd.DataFrame, name: str) -> list[str]:
    """The columns `answer1`, `answer2`, ... or of another name, as far as they go without a gap."""
    return list(takewhile(table.columns.__contains__, (f"{name}{number}" for number in count(1))))


def _decode(path: Path) -> str:
    """The file's text, which has to be UTF-8 (with or without a byte order mark)."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of the contest's CSV") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not raw.strip():
        raise UserError(f"{path}: the file is empty; copy it again")
    remedy = "save it again as UTF-8 (in Excel: 'CSV UTF-8')"
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:200]:
        raise UserError(f"{path}: the file is UTF-16; {remedy}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8, probably CP949 (EUC-KR); {remedy}") from None
