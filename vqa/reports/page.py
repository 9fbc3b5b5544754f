"""Pages: one HTML file each that needs no other file and no network. All text from a CSV is escaped."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from vqa.core.figures import save_figure
from vqa.core.io import atomic_write
from vqa.data.images import thumbnail_image
from vqa.data.rows import LETTERS, Row

THUMBNAIL = 320  # pixels of the longer side

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters["percent"] = lambda fraction, digits=0: f"{fraction:.{digits}%}"
_templates.filters["thousands"] = lambda number: f"{number:,.0f}"


class Highlight(NamedTuple):
    """A sentence for the top of a page, and the section with the details."""

    section: str
    text: str


class Page:
    """The file `index.html` of a folder, its highlights, and its figures, which are also written as PNG files."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.figures: dict[str, str] = {}
        self.highlights: list[Highlight] = []

    def highlight(self, section: str, text: str) -> None:
        """Add a sentence to the top of the page, with a link to a section."""
        self.highlights.append(Highlight(section, text))

    def add_figure(self, name: str, figure: Figure) -> None:
        """Draw a figure into `<name>.png`; the template shows it as `figures.<name>`."""
        self.figures[name] = data_uri(save_figure(figure, self.folder / f"{name}.png"), "png")

    def write(self, template: str, **values) -> Path:
        """Print the highlights, render a template of `templates/` and write the page. Returns its path."""
        html = _templates.get_template(template).render(figures=self.figures, highlights=self.highlights, **values)
        path = self.folder / "index.html"
        with atomic_write(path) as temporary:
            temporary.write_text(html, encoding="utf-8")
        for highlight in self.highlights:
            print(f"- {highlight.text}")
        return path


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(path: str | Path) -> str | None:
    """A small JPEG of an image as a data URI; None where the image cannot be read."""
    buffer = io.BytesIO()
    try:
        thumbnail_image(path, THUMBNAIL).save(buffer, "JPEG", quality=80)
    except Exception:  # PIL raises many kinds for damaged files; explore.py lists them in a warning
        return None
    return data_uri(buffer.getvalue(), "jpeg")


def card(row: Row, labels: list[str], probs: Mapping[str, Sequence[float]] | None = None) -> dict:
    """What the card of a row shows: images, labels, question, choices and each model's probability of each choice."""
    choices = [
        {
            "letter": LETTERS[i],
            "text": text,
            "right": row.get("answer") == i,
            "probs": {name: values[i] for name, values in (probs or {}).items()},
        }
        for i, text in enumerate(row["choices"])
    ]
    images = [thumbnail(path) for path in row["images"]]
    return {"images": images, "id": row["id"], "labels": labels, "question": row["question"], "choices": choices}
