"""The notebook, executed on a small demo with other settings."""

import html
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ENVIRONMENT, ROOT, command
from nbclient import NotebookClient

from vqa.evaluation.experiment_log import COLUMNS

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "notebooks" / "kaggle.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(the executed notebook, the folder that it worked in): one fold of the demo, 30 rows, two steps."""
    folder = tmp_path_factory.mktemp("notebook")
    project = folder / "project"
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split("\n")
    for name in filter(None, files):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    for fold in (1, 2):
        (project / f"args/demo/fold{fold}.json").unlink()
    demo = ["--train_rows", "30", "--test_rows", "8", "--output_dir", project / "data" / "demo"]
    assert command(sys.executable, "data/make_demo.py", *demo).returncode == 0
    last = folder / "last" / "vqa" / "checkpoints" / "demo" / "fold9"
    last.mkdir(parents=True)
    (last / "args.json").write_text("{}")
    kept = folder / "last" / "vqa" / "outputs" / "demo" / ".parts" / "fold9" / "view.npz"
    kept.parent.mkdir(parents=True)
    kept.touch()
    log = folder / "last" / "vqa" / "experiments" / "log.csv"
    log.parent.mkdir()
    log.write_text(",".join(COLUMNS) + "\n1,,training" + "," * (len(COLUMNS) - 3) + "\n")
    settings = {
        "PROJECT": str(project),
        "DATA": "",
        "MODEL": "",
        "ARGS": "args",  # without DATA, the demo's
        "LAST": str(folder / "last"),
        "WORK": str(folder / "work"),
        "INSTALL": "",
        "FLAGS": ["--max_steps", "2", "--eval_steps", "2", "--save_steps", "2", "--max_train_rows", "16"],
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", []))
    assert all(f"\n{name} = " in f"\n{cell.source}" for name in settings), "a setting was renamed"
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    left_out = ("PYTEST_CURRENT_TEST", "EXPERIMENTS_LOG")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in left_out}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["IPYTHONDIR"] = str(folder / "ipython")
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(env=environment)
    return notebook, folder


def test_it_ends_with_a_submission_and_two_pages(executed):
    notebook, folder = executed
    sample = pd.read_csv(folder / "work" / "data" / "demo" / "sample_submission.csv")
    submission = pd.read_csv(folder / "submission.csv")
    assert list(submission["id"]) == list(sample["id"]) and submission["answer"].isin(list("abcd")).all()
    pages = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "display_data"
    ]
    assert len(pages) == 2
    assert "<h1>Data</h1>" in html.unescape(pages[0]) and "<h1>Out-of-fold results</h1>" in html.unescape(pages[1])
    assert all(page.startswith('<iframe srcdoc="&lt;!doctype html&gt;') and page.count('"') == 6 for page in pages)
    assert json.loads((folder / "work/checkpoints/demo/fold0/metrics.json").read_text())["steps"] == 2
    kinds = list(pd.read_csv(folder / "work/experiments/log.csv")["kind"])
    assert kinds == ["training", "training", "prediction", "ensemble"], "the last session's, and this one's"


def test_the_last_sessions_folds_are_brought_back(executed):
    notebook, folder = executed
    assert (folder / "work" / "checkpoints" / "demo" / "fold9" / "args.json").read_text() == "{}"
    assert (folder / "work" / "outputs" / "demo" / ".parts" / "fold9" / "view.npz").is_file()
    text = "".join(str(output.get("text", "")) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "checkpoints/demo/fold9: copied from the last session" in text and "Not finished" not in text


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
