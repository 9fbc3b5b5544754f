"""Make checkpoints/tiny: a Qwen2.5-VL of under 4 M parameters that answers questions about drawn shapes.

    python checkpoints/make_tiny.py                                       # minutes on a GPU, hours on two cores
    python checkpoints/make_tiny.py --steps 20 --output_dir /tmp/tiny     # a quick try

It has the architecture, processor, special tokens and prompt of the real 3B and 7B, so the scripts run on it
unchanged. vqa/data/synthetic.py draws every picture and question; this script wrote the committed weights.
"""

import argparse
import copy
import functools
import itertools
import json
import random
import shutil
import sys
import tempfile
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

from vqa.core.cli import make_parser  # noqa: E402
from vqa.data.collator import Collator  # noqa: E402
from vqa.data.images import target_size  # noqa: E402
from vqa.data.prompt import LETTERS, build_messages, letter_ids, render_chat  # noqa: E402
from vqa.data.synthetic import (  # noqa: E402
    COLOURS,
    CONTEST,
    CORNERS,
    HOME,
    SHAPES,
    SIZES,
    Domain,
    ask,
    draw_row,
    draw_scene,
    four_choices,
)
from vqa.inference.scoring import score_rows  # noqa: E402
from vqa.modeling.families.qwen2_5_vl import batch_vision_windows  # noqa: E402
from vqa.modeling.loading import load_base, load_processor  # noqa: E402

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()

# Renders what Qwen2.5-VL's own template renders for the chats of this project, byte for byte.
CHAT_TEMPLATE = """\
{%- set image = namespace(number=0) -%}
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
{%- set image.number = image.number + 1 -%}
{%- if add_vision_id -%}
{{- 'Picture ' ~ image.number ~ ': ' -}}
{%- endif -%}
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
    if args.evaluate:
        evaluate(args.output_dir, args.evaluate)
        return
    set_seed(args.seed)
    if args.start_from:
        processor = Qwen2_5_VLProcessor.from_pretrained(args.start_from)
        model = batch_vision_windows(
            Qwen2_5_VLForConditionalGeneration.from_pretrained(args.start_from, dtype=torch.float32)
        )
    else:
        processor = make_processor(args.seed)
        model = make_model(processor)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens")
    train(model, processor, args)


def evaluate(folder: str, count: int) -> None:
    """Print the accuracy of the model in `folder` on `count` new rows of each domain, by kind of question.

    It is scored like in the scripts: the collator's prompt, the logits of the letters.
    """
    processor, model = load_processor(folder), load_base(folder, load_in_4bit=False, dtype=torch.float32)
    for name, domain in (("home", HOME), ("contest", CONTEST)):
        rng, rows, kinds = random.Random(f"evaluate {name}"), [], []
        with tempfile.TemporaryDirectory() as pictures:
            for number in range(count):
                image, row = draw_row(rng, domain)
                path = Path(pictures, f"{number}.png")
                image.save(path)
                rows.append({**row, "id": f"{number}", "images": [str(path)]})
                kinds.append(kind_of(row["choices"][row["answer"]], domain))
            probs = score_rows(model, rows, Collator(processor, 126), letter_ids(processor), 32, label=name)
        right = probs.argmax(1) == [row["answer"] for row in rows]
        by_kind = {kind: right[[k == kind for k in kinds]].mean() for kind in sorted(set(kinds))}
        print(f"{name}: {right.mean():.1%} of {count}; " + ", ".join(f"{k} {v:.0%}" for k, v in by_kind.items()))


def kind_of(answer: str, domain: Domain) -> str:
    """The kind of question that an answer belongs to."""
    kinds = ((kind, names) for words in domain.words.values() for kind, names in words.items())
    return next(kind for kind, names in kinds if any(answer in words for words in names.values()))


def save(model, processor, folder: str) -> None:
    """Write the model folder atomically, in bfloat16 like the 3B and 7B."""
    part = Path(f"{folder}.part")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(part)
    processor.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps (default: 3000)")
    parser.add_argument("--batch_size", type=int, default=128, help="pictures a step (default: 128)")
    parser.add_argument(
        "--learning_rate", type=float, default=8e-4, help="at 1e-3 and above it collapses to guessing (default: 8e-4)"
    )
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="processes that draw")
    parser.add_argument("--save_every", type=int, default=200, help="steps between two saves (default: 200)")
    parser.add_argument(
        "--evaluate", type=int, metavar="ROWS", help="only measure the model in --output_dir on this many rows"
    )
    parser.add_argument("--start_from", help="start from the weights in this folder")
    parser.add_argument("--seed", type=int, default=42, help="(default: 42)")
    parser.add_argument("--output_dir", default="checkpoints/tiny", help="(default: checkpoints/tiny)")
    return parser.parse_args()


def make_processor(seed: int) -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor with a small byte-level BPE, trained on synthetic questions."""
    rng = random.Random(seed)
    corpus = []
    for domain in itertools.islice(itertools.cycle((HOME, CONTEST)), 4000):
        row = draw_row(rng, domain)[1]
        corpus += ["You are a helpful assistant.", "system\n", "user\n", "assistant\n", row["choices"][row["answer"]]]
        corpus.append(build_messages(row, [])[0]["content"][0]["text"])

    qwen = Qwen2Tokenizer()._tokenizer  # its normaliser and its splitting into words
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = normalizers.NFC(), qwen.pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL,
        model_max_length=4096,
    )
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )


def make_model(processor) -> Qwen2_5_VLForConditionalGeneration:
    """The Qwen2.5-VL architecture with small widths and depths."""
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
    return batch_vision_windows(Qwen2_5_VLForConditionalGeneration(config))


class DrawnBatches(torch.utils.data.Dataset):
    """Item `i` is the i-th batch. It depends on seed and i only, so the number of workers changes nothing.

    All pictures of a batch have one size, so that the vision tower takes them as one stack of frames. Workers return
    them as bytes, with the positions of all tokens; the device only normalises.
    """

    def __init__(self, processor, model, args: argparse.Namespace):
        self.tokenizer, self.rope_index, self.args = processor.tokenizer, model.model.get_rope_index, args
        self.render = functools.partial(render_chat, processor)
        self.pad, self.image, self.newline = self.tokenizer.convert_tokens_to_ids(
            ["<|endoftext|>", "<|image_pad|>", "Ċ"]
        )
        self.letters = set(letter_ids(processor))

    def __len__(self) -> int:
        return self.args.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.args.seed} {index}")
        size = rng.choice(SIZES)
        width, height = target_size(*size, image_size=rng.randint(116, 150))
        scenes = [draw_scene(rng, HOME, size) for _ in range(self.args.batch_size)]
        chats = [self.chat(rng, scene, width * height // 28**2) for _, scene in scenes]
        longest = max(len(prompt + reply) for prompt, reply, _ in chats)
        ids = torch.full((len(chats), longest), self.pad)
        labels = torch.full_like(ids, -100)
        own_letter, right_choice = [], []
        for row, (prompt, reply, answer) in enumerate(chats):
            ids[row, longest - len(prompt + reply) :] = torch.tensor(prompt + reply)
            labels[row, longest - len(reply) :] = torch.tensor(reply)
            if answer is not None:
                start, last = longest - len(prompt + reply), longest - len(reply) - 1
                for choice, (at, end) in enumerate(self.choice_tokens(prompt)):
                    own_letter.append((row, start + end, start + at, prompt[at]))
                    if choice == answer:
                        right_choice.append((row, last, start + end, prompt[at + 2]))
        mask = (ids != self.pad).long()
        grids = torch.tensor([[1, height // 14, width // 14]] * len(chats))
        positions, _ = self.rope_index(ids, (ids == self.image).int(), image_grid_thw=grids, attention_mask=mask)
        images = torch.stack([pil_to_tensor(image.resize((width, height))) for image, _ in scenes])
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
        hints = {"own_letter": torch.tensor(own_letter), "right_choice": torch.tensor(right_choice)}
        hints["looks"] = torch.tensor(
            [
                (SHAPES.index(scene.shape), list(COLOURS).index(scene.colour), *(c in scene.corners for c in CORNERS))
                for _, scene in scenes
            ]
        )
        return batch | hints | {"images": images, "frames": grids[:1] * torch.tensor([len(chats), 1, 1])}

    def chat(self, rng: random.Random, scene, image_tokens: int) -> tuple[list[int], list[int], int | None]:
        """Tokens of the prompt and of the reply, and the right choice where the question offers some."""
        question, right, wrong = ask(rng, scene, HOME)
        text, answer = question, None
        if rng.random() < 0.7:  # the others are answered in a word, which teaches vision sooner
            choices, answer = four_choices(rng, right, wrong)
            text = build_messages({"question": question, "choices": choices}, [])[0]["content"][0]["text"]
            right = LETTERS[answer]
        prompt = self.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}])
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
        return *self.tokenizer([prompt, f"{right}<|im_end|>"]).input_ids, answer

    def choice_tokens(self, prompt: list[int]) -> list[tuple[int, int]]:
        """(index of the letter, index of the last token before the line break) of each choice in a prompt."""
        lines = [i for i in range(1, len(prompt)) if prompt[i] in self.letters and prompt[i - 1] != self.image]
        lines = [i for i in lines if self.tokenizer.decode(prompt[i + 1]) == "."]
        return [(i, prompt.index(self.newline, i) - 1) for i in lines]


def train(model, processor, args: argparse.Namespace) -> None:
    """AdamW with a cosine schedule to zero. The bar shows the loss and the accuracy of letters and of other tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = DrawnBatches(processor, make_model(processor), args)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=args.workers, pin_memory=device == "cuda"
    )
    model.to(device).train()
    model.model.language_model.set_attn_implementation("eager")  # the hints need to see the attention
    probed = [len(SHAPES), len(COLOURS), len(CORNERS)]
    probe = torch.nn.Linear(model.config.text_config.hidden_size, sum(probed)).to(device)
    parameters = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda"
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    letters, prepare = torch.tensor(letter_ids(processor), device=device), processor.image_processor
    bar = tqdm(loader, mininterval=5)
    for step, batch in enumerate(bar):
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        images, frames, labels = batch.pop("images"), batch.pop("frames"), batch.pop("labels")
        hints, looks = (batch.pop("own_letter"), batch.pop("right_choice")), batch.pop("looks")
        images = prepare.rescale_and_normalize(
            images, True, prepare.rescale_factor, True, prepare.image_mean, prepare.image_std
        )
        patches = prepare.patchify(images, 14, merge_size=2, temporal_patch_size=2)[0].flatten(0, 1)
        features = model.model.visual(patches, grid_thw=frames).pooler_output
        ready = {"image": BaseModelOutputWithPooling(pooler_output=(features,))}
        fade = max(0.0, 1 - step / (0.6 * args.steps))
        shown = model.model(
            **batch, mm_encoder_outputs=ready, output_attentions=fade > 0, output_hidden_states=fade > 0
        )
        logits = model.lm_head(shown.last_hidden_state[:, :-1][labels[:, 1:] != -100])
        target = labels[labels != -100]
        loss = torch.nn.functional.cross_entropy(logits, target)
        probed_loss = probe_loss(probe(features.unflatten(0, (len(images), -1)).mean(1)).split(probed, dim=1), looks)
        hint = hint_loss(model, shown, *hints) if fade else 0.0
        (loss + 0.3 * fade * hint + 0.5 * fade * probed_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        last = step == args.steps - 1
        if last or (step + 1) % args.save_every == 0:
            save(model, processor, args.output_dir)
        if last or step % 20 == 0:
            right, is_letter = (logits.argmax(-1) == target).float(), torch.isin(target, letters)
            parts = {"letters": right[is_letter], "others": right[~is_letter]}
            bar.set_postfix(loss=f"{loss.item():.3f}", **{k: f"{v.mean():.3f}" for k, v in parts.items()})


def probe_loss(logits: tuple[torch.Tensor, ...], looks: torch.Tensor) -> torch.Tensor:
    """Loss of linear probes on the vision tower's output: shape, colour, and which corners are taken.

    The tower learns faster with it. Probed for shapes alone it forgets colours; for both, places.
    """
    shape, colour, corners = logits
    one_of = torch.nn.functional.cross_entropy
    taken = torch.nn.functional.binary_cross_entropy_with_logits(corners, looks[:, 2:].float())
    return one_of(shape, looks[:, 0]) + one_of(colour, looks[:, 1]) + taken


def hint_loss(model, shown, own_letter: torch.Tensor, right_choice: torch.Tensor) -> torch.Tensor:
    """Auxiliary loss that teaches how to find the letter, which would otherwise take millions of rows.

    A hint is (row, query position, key position, token): the end of a choice attends to its own letter (layer 2), the
    end of the prompt attends to the right choice (layer 5), and the hidden states after layer 4 already predict the
    letter and the answer's first token. It fades out before training ends, so the last steps optimise the task alone.
    """
    loss = 0.0
    for (row, query, key, token), layer, heads in ((own_letter.T, 1, 1), (right_choice.T, 4, 2)):
        attention = shown.attentions[layer][row, :heads, query, key]
        spelled = model.lm_head(model.model.language_model.norm(shown.hidden_states[4][row, query]))
        loss = loss - (attention + 1e-6).log().mean() + torch.nn.functional.cross_entropy(spelled, token)
    return loss


if __name__ == "__main__":
    main()
