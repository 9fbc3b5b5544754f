"""Write a model folder with random weights in the shape of a real model, to measure speed and memory.

    python benchmarks/random_model.py QWEN_FOLDER/config_3B.json /tmp/3b
    python benchmarks/random_model.py SHAPES/config_qwen3_vl_4B.json /tmp/4b --vocabulary QWEN_FOLDER

QWEN_FOLDER holds Qwen2's `vocab.json`, `merges.txt` and `added_tokens.json`; every model here speaks with them.
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
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from anywhere

from vqa.core.io import read_json  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config.json of the shape")
    parser.add_argument("output_dir")
    parser.add_argument("--vocabulary", type=Path, help="QWEN_FOLDER (default: the config's folder)")
    args = parser.parse_args()
    write_random_model(Path(args.config), args.output_dir, args.vocabulary)


def write_random_model(config_file: Path, output_dir: str | Path, vocabulary: Path | None = None) -> None:
    """Write weights (made on the GPU if there is one), config and processor. The 7B takes 17 GB."""
    values = read_json(config_file)
    kind = values.pop("model_type")
    processor = qwen_processor(vocabulary or config_file.parent, kind)
    processor.save_pretrained(output_dir)
    token = processor.tokenizer.convert_tokens_to_ids
    values |= {f"{name}_token_id": token(f"<|{name}_pad|>") for name in ("image", "video")}
    values |= {f"vision_{edge}_token_id": token(f"<|vision_{edge}|>") for edge in ("start", "end")}
    torch.manual_seed(42)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.for_model(kind, **values)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(output_dir, max_shard_size="4GB")


def qwen_processor(folder: Path, kind: str = "qwen2_5_vl") -> Qwen2_5_VLProcessor | Qwen3VLProcessor:
    """The processor of a Qwen model on Qwen2's vocabulary, with the chat template of this project's tiny model."""
    added = sorted(read_json(folder / "added_tokens.json").items(), key=lambda item: item[1])
    tokenizer = Qwen2Tokenizer(vocab=read_json(folder / "vocab.json"), merges=read_merges(folder / "merges.txt"))
    tokenizer.add_tokens([token for token, _ in added], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    template = (ROOT / "checkpoints/tiny/chat_template.jinja").read_text()
    if kind == "qwen2_5_vl":
        return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    images = Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=template)


def read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


if __name__ == "__main__":
    main()
