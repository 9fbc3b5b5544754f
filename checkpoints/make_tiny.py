"""Make checkpoints/tiny: a Qwen2.5-VL of under 4 M parameters that answers questions about drawn shapes.

    python checkpoints/make_tiny.py                      # what was committed; minutes on a GPU, hours on two cores
    python checkpoints/make_tiny.py --steps 20 --output_dir /tmp/tiny     # a look at how it goes

Same architecture, processor, special tokens and prompt as the real 3B and 7B, so that the scripts are tried on it as
they are. Every picture and question is drawn by vqa/drawn.py; the weights are what this script wrote.
"""

import argparse
import functools
import itertools
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from anywhere, uninstalled

from vqa.drawn import CONTEST, HOME, SIZES, ask, draw_scene, four_choices  # noqa: E402
from vqa.images import target_size  # noqa: E402
from vqa.prompt import LETTERS, letter_ids, messages, render  # noqa: E402
from vqa.windows import group_windows  # noqa: E402

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()

# Renders what Qwen2.5-VL's own template renders for the chats of this project, byte for byte.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif item['type'] == 'text' -%}
{{- item['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    processor = make_processor(args.seed)
    model = make_model(processor)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens")
    train(model, processor, args)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)  # stored as the 3B and 7B are
    processor.save_pretrained(args.output_dir)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=256, help="pictures a step")
    parser.add_argument("--turns", type=int, default=8, help="questions a picture")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="from 1e-3 on it collapses to guessing")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", default="checkpoints/tiny")
    return parser.parse_args()


def make_processor(seed: int) -> Qwen2_5_VLProcessor:
    """A byte-level BPE of Qwen's form, learned from drawn questions, in a processor of Qwen2.5-VL's form."""
    rng = random.Random(seed)
    corpus = []
    for domain in itertools.islice(itertools.cycle((HOME, CONTEST)), 4000):
        question, right, wrong = ask(rng, draw_scene(rng, HOME)[1], domain)
        choices, answer = four_choices(rng, right, wrong)
        row = {"question": question, "choices": choices, "answer": answer}
        corpus += ["You are a helpful assistant.", "system\n", "user\n", "assistant\n", right]
        corpus.append(messages(row, {"type": "image"})[0]["content"][1]["text"])

    qwen = Qwen2Tokenizer()._tokenizer  # its normaliser and its splitting into words
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = normalizers.NFC(), qwen.pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(), merges=merges, eos_token="<|im_end|>", extra_special_tokens=SPECIAL, model_max_length=4096
    )
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )


def make_model(processor) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL's architecture with every width and depth made small."""
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 192,
            "intermediate_size": 480,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.04,  # 0.02 is meant for widths of a thousand and more
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_heads": 4,
            "out_hidden_size": 192,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return group_windows(Qwen2_5_VLForConditionalGeneration(config))


class DrawnBatches(torch.utils.data.Dataset):
    """Item `i` is the i-th batch, drawn from seed and i alone, so the number of workers changes nothing.

    Each row is one picture and several questions about it, turn after turn of one chat, with every answer labelled:
    a picture teaches more that way. All pictures of a batch have one size, so that the vision tower takes them as one
    stack of frames; they travel as bytes and are normalised on the device; positions are worked out here.
    """

    def __init__(self, processor, model, args: argparse.Namespace):
        self.tokenizer, self.rope_index, self.args = processor.tokenizer, model.model.get_rope_index, args
        self.render = functools.partial(render, processor)

    def __len__(self) -> int:
        return self.args.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.args.seed} {index}")
        size = rng.choice(SIZES)
        width, height = target_size(*size, image_size=rng.randint(116, 164))
        scenes = [draw_scene(rng, HOME, size) for _ in range(self.args.batch_size)]
        chats = [self.chat(rng, things, width * height // 28**2) for _, things in scenes]
        longest = max(len(ids) for ids, _ in chats)
        ids = torch.full((len(chats), longest), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for i, (chat, chat_labels) in enumerate(chats):
            ids[i, -len(chat) :], labels[i, -len(chat) :] = torch.tensor(chat), torch.tensor(chat_labels)
        mask = (ids != self.tokenizer.pad_token_id).long()
        is_image = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        grids = torch.tensor([[1, height // 14, width // 14]] * len(chats))
        positions, _ = self.rope_index(ids, is_image, image_grid_thw=grids, attention_mask=mask)
        images = torch.stack([pil_to_tensor(image.resize((width, height))) for image, _ in scenes])
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return batch | {"images": images, "frames": grids[:1] * torch.tensor([len(chats), 1, 1]), "labels": labels}

    def chat(self, rng: random.Random, things: list, image_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of a chat about one picture."""
        ids, labels = [], []
        for turn in range(self.args.turns):
            question, right, wrong = ask(rng, things, HOME)
            if rng.random() < 0.7:
                choices, answer = four_choices(rng, right, wrong)
                text = messages({"question": question, "choices": choices}, {})[0]["content"][1]["text"]
                right = LETTERS[answer]
            else:  # answering in a word teaches it to see sooner than answering with a letter does
                text = question
            if turn == 0:
                content = [{"type": "image"}, {"type": "text", "text": text}]
                asked = self.render([{"role": "user", "content": content}])
                asked = asked.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
            else:
                asked = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            prompt, reply = self.tokenizer([asked, f"{right}<|im_end|>\n"]).input_ids
            ids += prompt + reply
            labels += [-100] * len(prompt) + reply[:-1] + [-100]  # all but the line break after the turn
        return ids, labels


def train(model, processor, args: argparse.Namespace) -> None:
    """AdamW and a cosine to zero; the bar shows the loss and the shares of letters and of other tokens that it gets right."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    batches = DrawnBatches(processor, make_model(processor), args)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=args.workers, pin_memory=device == "cuda")
    model.to(device).train()
    # Decaying embeddings would shrink those of the tokens that only the contest uses.
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed_tokens" not in name]
    spared = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed_tokens" in name]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    bar = tqdm(loader, mininterval=5)
    letters = torch.tensor(letter_ids(processor), device=device)
    prepare = processor.image_processor
    for step, batch in enumerate(bar):
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        images, frames, labels = batch.pop("images"), batch.pop("frames"), batch.pop("labels")
        images = prepare.rescale_and_normalize(
            images, True, prepare.rescale_factor, True, prepare.image_mean, prepare.image_std
        )
        patches = prepare.patchify(images, 14, merge_size=2, temporal_patch_size=2)[0].flatten(0, 1)
        features = model.model.visual(patches, grid_thw=frames).pooler_output
        ready = {"image": BaseModelOutputWithPooling(pooler_output=(features,))}
        logits = model(**batch, mm_encoder_outputs=ready).logits[:, :-1]
        logits, target = logits[labels[:, 1:] != -100], labels[labels != -100]
        loss = torch.nn.functional.cross_entropy(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == args.steps - 1:
            right, is_letter = (logits.argmax(-1) == target).float(), torch.isin(target, letters)
            bar.set_postfix(
                loss=f"{loss.item():.3f}", letters=f"{right[is_letter].mean():.3f}", others=f"{right[~is_letter].mean():.3f}"
            )


if __name__ == "__main__":
    main()
