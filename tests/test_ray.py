"""train_on_ray.py on a local Ray cluster of two nodes without GPUs. Skipped where Ray is not installed."""

import shutil
import sys
import threading
import time

import pytest

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

import train_on_ray  # noqa: E402
from vqa.core.errors import UserError  # noqa: E402

# In place of train_fold.py: 20 steps, each in a checkpoint; it begins where the checkpoint of its args file ends.
TRAIN = """
import sys, time
from pathlib import Path
checkpoint, starts = (Path(f"{sys.argv[1]}.{name}") for name in ("checkpoint", "starts"))
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
starts.open("a").write(f"{step}\\n")
if "broken" in sys.argv[1]:
    sys.exit(2)
for step in range(step + 1, 21):
    time.sleep(0.2)
    checkpoint.write_text(str(step))
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    (tmp_path / "train_fold.py").write_text(TRAIN)
    monkeypatch.setattr(train_on_ray, "PROJECT", tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_run_whose_node_is_lost_continues_on_another(cluster, tmp_path, monkeypatch, capfd):
    lost = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    names = ["one.json", "two.json", "broken.json"]

    def lose_a_node():
        while not all((tmp_path / f"{name}.checkpoint").exists() for name in names[:2]):
            time.sleep(0.1)
        time.sleep(0.5)
        cluster.remove_node(lost, allow_graceful=False)

    threading.Thread(target=lose_a_node, daemon=True).start()
    argv = ["train_on_ray.py", *names, "--gpus", "0", "--address", cluster.address]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match="1 of 3 runs are not finished"):
        train_on_ray.main()
    output = capfd.readouterr().out
    assert "one.json: finished" in output and "two.json: finished" in output
    assert "broken.json: failed with exit code 2" in output
    starts = [(tmp_path / f"{name}.starts").read_text().split() for name in names]
    assert sorted(map(len, starts)) == [1, 1, 2] and starts[2] == ["0"], "what failed by itself is not tried again"
    again = next(steps for steps in starts if len(steps) == 2)
    assert again[0] == "0" and int(again[1]) > 0, "from its checkpoint"
    assert [(tmp_path / f"{name}.checkpoint").read_text() for name in names[:2]] == ["20", "20"]


def test_each_run_has_a_folder_and_several_gpus_have_a_launcher():
    assert train_on_ray.run_names(["args/fold0.json"], ["42", "43"])[1] == ("args/fold0.json", "43")
    words = train_on_ray.train_command(("args/7b/fold0.json", "43"), 2, ["--fp16", "true"])
    assert words[-9:] == ["args/7b/fold0.json", "--resume_from_checkpoint", "auto", "--fp16", "true"] + [
        *("--seed", "43", "--output_dir", "checkpoints/seed43/7b/fold0")
    ]
    assert "--num_processes" in words and words[0] == ("setpriv" if shutil.which("setpriv") else sys.executable)
