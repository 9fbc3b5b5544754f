"""Pages: one HTML file each that needs nothing beside it and no network. Whatever stands in a CSV is escaped."""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from vqa.core.io import atomic_write
from vqa.data.images import thumbnail_image
from vqa.data.prompt import LETTERS

THUMBNAIL = 320  # pixels of the longer side


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


_templates.filters["percent"] = lambda share, digits=0: f"{share:.{digits}%}"


_templates.filters["thousands"] = lambda number: f"{number:,.0f}"


class Page:
    """The page `index.html` of a folder, and the figures that go into it and, as PNG files, beside it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.figures: dict[str, str] = {}

    def add(self, name: str, figure: Figure) -> None:
        """Draw a figure into `<name>.png`; the template shows it as `figures.<name>`."""
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=200, metadata={"Software": None})
        with atomic_write(self.folder / f"{name}.png") as temporary:
            temporary.write_bytes(drawn.getvalue())
        self.figures[name] = data_uri(drawn.getvalue(), "png")

    def write(self, template: str, **values) -> Path:
        """Render a template of `templates/` and write the page."""
        html = _templates.get_template(template).render(figures=self.figures, **values)
        with atomic_write(self.folder / "index.html") as temporary:
            temporary.write_text(html, encoding="utf-8")
        return self.folder / "index.html"


class Highlights(list):
    """What stands first on a page, each with the section that shows more."""

    def add(self, section: str, text: str) -> None:
        self.append({"section": section, "text": text})

    def print(self) -> None:
        for remark in self:
            print(f"- {remark['text']}")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(path: str | Path) -> str | None:
    """A small JPEG of an image as a data URI; None where it cannot be read."""
    drawn = io.BytesIO()
    try:
        thumbnail_image(path, THUMBNAIL).save(drawn, "JPEG", quality=80)
    except Exception:  # PIL raises many kinds for damaged files; which are damaged is told in words elsewhere
        return None
    return data_uri(drawn.getvalue(), "jpeg")


def card(row: dict, labels: list[str], shares: dict[str, list[float]] | None = None) -> dict:
    """What a card shows of a row: image, labels, question, choices and, by model, the probability of each choice."""
    choices = [
        {
            "letter": LETTERS[i],
            "text": text,
            "right": row.get("answer") == i,
            "shares": {name: values[i] for name, values in (shares or {}).items()},
        }
        for i, text in enumerate(row["choices"])
    ]
    return {
        "image": thumbnail(row["image"]),
        "id": row["id"],
        "labels": labels,
        "question": row["question"],
        "choices": choices,
    }
