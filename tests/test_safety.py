"""Safe by default: what a downloaded folder or a CSV cannot make the scripts do."""

import json
import os
import shutil
import socket
import sys
import zipfile

import pytest
import torch
from conftest import TINY
from peft import PeftModel

from vqa.config.arguments import ModelArguments
from vqa.core.errors import UserError
from vqa.modeling.loading import is_adapter, load_base, load_processor


def test_base_weights_in_pickles_are_not_loaded(tmp_path, model):
    folder = tmp_path / "pickled"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only as pickles.*Use a folder with model.safetensors"):
        load_base(str(folder), load_in_4bit=False, dtype=torch.float32)


def test_an_adapter_in_pickles_is_none(trained, tmp_path):
    shutil.copytree(
        trained / "checkpoints" / "fold0", tmp_path / "fold", ignore=shutil.ignore_patterns("checkpoint-*")
    )
    assert is_adapter(tmp_path / "fold")
    (tmp_path / "fold" / "adapter_model.safetensors").rename(tmp_path / "fold" / "adapter_model.bin")
    assert not is_adapter(tmp_path / "fold")


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    """A model folder whose config names its own classes: it loads as what transformers knows, or not at all."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nEvil = None\n")
    assert ModelArguments().trust_remote_code is False
    load_processor(str(folder))
    load_base(str(folder), load_in_4bit=False, dtype=torch.float32)
    assert not (tmp_path / "was_run").exists()


def test_a_folds_metadata_does_not_lead_out_of_its_folder(trained, script, tmp_path):
    fold = tmp_path / "fold0"
    shutil.copytree(trained / "checkpoints" / "fold0", fold)
    shutil.copytree(fold / "ema", tmp_path / "elsewhere")
    metrics = json.loads((fold / "metrics.json").read_text())
    (fold / "metrics.json").write_text(json.dumps(metrics | {"best": "../elsewhere"}))
    code, _, error = script("predict", fold, "--output_dir", tmp_path / "outputs")
    assert (code, error.count("\n")) == (2, 1) and "unknown weights" in error


def test_a_checkpoints_pickles_run_nothing(trained, script, tmp_path):
    """A checkpoint whose optimiser state would run code when unpickled: refused, and the code is not run."""
    fold = tmp_path / "fold0"
    shutil.copytree(trained / "checkpoints" / "fold0" / "checkpoint-2", fold / "checkpoint-2")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)

    torch.save(Evil(), fold / "checkpoint-2" / "optimizer.pt")
    assert zipfile.is_zipfile(fold / "checkpoint-2" / "optimizer.pt")
    args = [trained / "args" / "fold0.json", "--output_dir", fold, "--resume_from_checkpoint", "auto"]
    with pytest.raises(Exception, match="[Ww]eights.only"):
        script("train_fold", *args)
    assert not (tmp_path / "was_run").exists()


def test_offline_means_that_nothing_is_asked_of_the_network(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert os.environ["HF_HUB_OFFLINE"] == "1" and "huggingface_hub" in sys.modules
    with pytest.raises(UserError, match="neither a model folder nor reachable"):
        load_processor("Some/Model-3B")
    base = load_base(TINY, load_in_4bit=False, dtype=torch.float32)
    assert load_processor(TINY) and not isinstance(base, PeftModel)
