"""Draw the pictures of the README and of docs/ into docs/pictures/.

    python docs/make_pictures.py                # charts, from benchmarks/results/
    python docs/make_pictures.py --pages        # screenshots of the demo's two pages too, after `make demo`

The screenshots need the browser `chromium`, and a font with Hangul.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from anywhere

from vqa.core.io import read_json  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"
BLUE, GREY, RED = "#2563c9", "#b6bec9", "#c23b3b"
WIDEST = 9  # points: a change beyond it is written, not drawn
# name -> (page below outputs/demo, top and height of the part that is shown, in CSS pixels)
SCREENSHOTS = {
    "explore": ("explore", 0, 1000),
    "analyze": ("analyze", 0, 870),
}
WIDTH = 1000  # of the browser's window, in CSS pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", action="store_true", help="take screenshots of explore.py's and analyze.py's pages")
    args = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    draw_speed()
    draw_ladder()
    if args.pages:
        for script, inputs in (("explore", ["data/demo/train.csv", "data/demo/test.csv"]), ("analyze", demo_folds())):
            subprocess.run([sys.executable, f"{script}.py", *inputs], cwd=ROOT, check=True)
        for name, place in SCREENSHOTS.items():
            take_screenshot(name, *place)


def demo_folds() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("checkpoints/demo/fold*"))


def draw_speed() -> None:
    """Training rows per second beside other trainers."""
    rates = read_json(RESULTS / "peers.json")["rows_per_second"]
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    colours = [BLUE if name.startswith("this project") else GREY for name in rates]
    bars = axes.barh(list(rates), list(rates.values()), color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set(title="3B: training rows per second", xmargin=0.1)
    save(figure, axes, "speed")


def draw_ladder() -> None:
    """What each technique adds to the one that it builds on, as measured by benchmarks/ladder.py."""
    rungs = [rung for rung in read_json(RESULTS / "ladder.json")["rungs"] if "change" in rung]
    figure = Figure(figsize=(8, 9.5), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for height, rung in enumerate(reversed(rungs)):
        change, low, high = (100 * rung[key] for key in ("change", "from", "to"))
        if abs(change) > WIDEST:
            axes.text(-WIDEST, height, f"{change:+.1f}", va="center")
            continue
        colour = {1: BLUE, 0: GREY, -1: RED}[rung["sign"]]
        axes.plot([max(low, -WIDEST), min(high, WIDEST)], [height, height], color=GREY, linewidth=3)
        axes.plot(change, height, "o", color=colour)
    labels = [f"{rung['rung']}  (against {rung['against']})" for rung in rungs]
    axes.set_yticks(range(len(rungs)), labels[::-1], fontsize=8)
    axes.set(xlabel="change of test accuracy in points, 95 % interval", xlim=(-WIDEST, WIDEST), ymargin=0.01)
    save(figure, axes, "ladder")


def save(figure: Figure, axes, name: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / f"{name}.png", dpi=130, metadata={"Software": None})


def take_screenshot(name: str, page: str, top: int, height: int) -> None:
    """A part of a page of the demo, at 1.5 times the resolution, in few colours."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        window = [f"--window-size={WIDTH},{top + height}", "--force-device-scale-factor=1.5", "--hide-scrollbars"]
        url = (ROOT / "outputs" / "demo" / page / "index.html").as_uri()
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
        subprocess.run([*browser, *window, f"--screenshot={picture}", url], check=True, capture_output=True)
        image = Image.open(picture).convert("RGB")
        image = image.crop((0, round(1.5 * top), image.width, image.height))
        image.quantize(128).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
