"""Write a model folder with random weights in the shape of a real model, to measure speed and memory.

    python benchmarks/random_model.py QWEN_FOLDER/config_3B.json /tmp/3b

QWEN_FOLDER holds the config, and beside it Qwen's `vocab.json`, `merges.txt` and `added_tokens.json`.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from anywhere

from vqa.core.io import read_json  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config.json of the shape")
    parser.add_argument("output_dir")
    args = parser.parse_args()
    write_random_model(Path(args.config), args.output_dir)


def write_random_model(config_file: Path, output_dir: str | Path) -> None:
    """Write weights (made on the GPU if there is one), config and processor. The 7B takes 17 GB."""
    qwen_processor(config_file.parent).save_pretrained(output_dir)
    values = read_json(config_file)
    torch.manual_seed(42)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(output_dir, max_shard_size="4GB")


def qwen_processor(folder: Path) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor from its vocabulary, with the chat template of this project's tiny model."""
    added = sorted(read_json(folder / "added_tokens.json").items(), key=lambda item: item[1])
    tokenizer = Qwen2Tokenizer(vocab=read_json(folder / "vocab.json"), merges=read_merges(folder / "merges.txt"))
    tokenizer.add_tokens([token for token, _ in added], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    template = (ROOT / "checkpoints/tiny/chat_template.jinja").read_text()
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=template)


def read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


if __name__ == "__main__":
    main()
