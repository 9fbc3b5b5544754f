"""Make checkpoints/bench, the base model of the bench: checkpoints/tiny, trained further on pictures like the bench's.

    python benchmarks/bench_base.py                                                     # seven minutes on an H100
    python benchmarks/bench_base.py --steps 4 --batch_size 8 --output_dir /tmp/base     # a quick try
    python benchmarks/bench_base.py --evaluate 1000                                     # accuracy by kind of question

It learns the `HOME` domain of bench_scenes.py at budgets of 126 to 252 px. The bench contest has other words,
questions and looks, so that the base answers a part of it and fine-tuning improves it.
"""

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import pil_to_tensor
from transformers import Qwen2_5_VLForConditionalGeneration, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "checkpoints")]  # so that it runs from anywhere, uninstalled

from bench_contest import DrawnRow  # noqa: E402
from bench_scenes import (  # noqa: E402
    ALPHABET,
    COLOURS,
    CONTEST,
    HOME,
    KINDS,
    MAX_COUNT,
    SHAPES,
    SIDES,
    SIZES,
    Domain,
    Question,
    Scene,
    ask,
    draw,
    make_scene,
)
from make_tiny import DrawnBatches, hint_loss, save  # noqa: E402

from vqa.core.cli import make_parser  # noqa: E402
from vqa.core.errors import UserError, preview, run_main  # noqa: E402
from vqa.data.collator import Collator  # noqa: E402
from vqa.data.images import target_size  # noqa: E402
from vqa.data.prompt import LETTERS, build_messages, letter_ids  # noqa: E402
from vqa.inference.scoring import score_rows  # noqa: E402
from vqa.modeling.families.qwen2_5_vl import batch_vision_windows  # noqa: E402
from vqa.modeling.loading import load_base, load_processor  # noqa: E402

BUDGETS = (126, 182, 252, 252)  # of the training pictures; half of them at the native size
HARD = ("text", "small")  # kinds that are drawn twice as often
TOKEN = 28  # pixels of an image token's side
NOTHING = -100  # no target, for cross_entropy
# What linear probes read from an image token of the vision tower: the thing whose middle lies in it, the shape and
# colour of a figure, the code of a tag, and the shapes of a figure's neighbours.
PROBES = {
    "thing": 4,  # none, figure, disc, tag
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    **{f"character {place}": len(ALPHABET) + 1 for place in range(3)},
    **{side: len(SHAPES) + 1 for side in SIDES},
}


def main() -> None:
    args = parse_args()
    if args.evaluate:
        evaluate(args.output_dir, args.evaluate)
        return
    if folds := sorted(map(str, Path(args.output_dir).glob("fold*"))):
        raise UserError(f"{args.output_dir} holds trained folds: {preview(folds)}. Move or delete them first.")
    set_seed(args.seed)
    processor = load_processor(args.start_from)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.start_from, dtype=torch.float32)
    train(batch_vision_windows(model), processor, args)
    evaluate(args.output_dir, args.rows)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--max_minutes", type=float, default=6, help="of training; the learning rate follows the clock (default: 6)"
    )
    parser.add_argument("--steps", type=int, default=100_000, help="end after this many steps, for quick tries")
    parser.add_argument("--batch_size", type=int, default=256, help="pictures a step (default: 256)")
    parser.add_argument("--learning_rate", type=float, default=8e-4, help="(default: 8e-4)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw (default: all cores)")
    parser.add_argument("--log_every", type=int, default=100, help="steps between two lines (default: 100)")
    parser.add_argument("--rows", type=int, default=500, help="rows of each domain to score at the end (default: 500)")
    parser.add_argument(
        "--evaluate", type=int, metavar="ROWS", help="only measure the model in --output_dir on this many rows"
    )
    parser.add_argument("--start_from", default=str(ROOT / "checkpoints/tiny"), help="(default: checkpoints/tiny)")
    parser.add_argument(
        "--contest_share",
        type=float,
        default=0.0,
        help="share of rows in the contest's words and looks, so that the base knows a part of them (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=42, help="(default: 42)")
    parser.add_argument("--output_dir", default="checkpoints/bench", help="(default: checkpoints/bench)")
    return parser.parse_args()


def evaluate(folder: str, count: int) -> None:
    """Print the accuracy of the model in `folder` on `count` new rows of each domain and budget, by kind of question.

    It is scored as in the scripts: the collator's prompt, the logits of the letters.
    """
    processor, model = load_processor(folder), load_base(folder, load_in_4bit=False, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for name, domain in (("home", HOME), ("contest", CONTEST)):
        with tempfile.TemporaryDirectory() as pictures:
            rows, kinds = [], []
            for number in range(1, count + 1):
                drawn = DrawnRow("test", number, 1, domain)
                row_id, path, question, *choices = drawn.cells
                if path and drawn.image:
                    path = f"{pictures}/{number}.jpg"
                    drawn.image.save(path, quality=85)
                elif path:
                    continue  # the picture of an earlier row
                images = [path] if path else []
                rows.append(dict(id=row_id, question=question, choices=choices, answer=drawn.answer, images=images))
                kinds.append(drawn.kind)
            for size in (126, 252):
                probs = score_rows(model, rows, Collator(processor, size), letter_ids(processor), 64, label=None)
                right = probs.argmax(1) == [row["answer"] for row in rows]
                by_kind = {kind: right[[k == kind for k in kinds]].mean() for kind in KINDS if kind in kinds}
                parts = ", ".join(f"{kind} {value:.0%}" for kind, value in by_kind.items())
                print(f"{name} at {size} px: {right.mean():.1%} of {len(rows)}; {parts}", flush=True)


class BenchBatches(DrawnBatches):
    """Batches of HOME pictures: like those of the tiny model, with what the probes of each image token should find."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.args.seed} bench {index}")
        size = rng.choice(SIZES)
        width, height = target_size(*size, image_size=rng.choice(BUDGETS))
        grid = (height // TOKEN, width // TOKEN)
        kinds = [rng.choice([*KINDS, *HARD]) for _ in range(self.args.batch_size)]
        domains = [CONTEST if rng.random() < self.args.contest_share else HOME for _ in kinds]
        scenes = [self.scene(rng, domain, kind, size) for domain, kind in zip(domains, kinds)]
        asked = [ask(rng, *of_row) for of_row in zip(scenes, domains, kinds)]
        pictured = [kind != "no_image" or rng.random() < 0.5 for kind in kinds]
        chats = [
            self.prompt_and_reply(rng, question, grid[0] * grid[1] * has) for question, has in zip(asked, pictured)
        ]
        longest = max(len(prompt + reply) for prompt, reply, _ in chats)
        ids = torch.full((len(chats), longest), self.pad)
        labels = torch.full_like(ids, NOTHING)
        own_letter, right_choice, looks_at = [], [], []
        for row, ((prompt, reply, answer), question) in enumerate(zip(chats, asked)):
            start, last = longest - len(prompt + reply), longest - len(reply) - 1
            ids[row, start:] = torch.tensor(prompt + reply)
            labels[row, last + 1 :] = torch.tensor(reply)
            if question.looks_at:
                image = prompt.index(self.image)
                looks_at.append((row, last, start + image + token_at(question.looks_at, size, grid)))
            if answer is not None:
                for choice, (at, end) in enumerate(self.choice_tokens(prompt)):
                    own_letter.append((row, start + end, start + at, prompt[at]))
                    if choice == answer:
                        right_choice.append((row, last, start + end, prompt[at + 2]))
        mask = (ids != self.pad).long()
        seen = [scene for scene, has in zip(scenes, pictured) if has]
        looks = [domain for domain, has in zip(domains, pictured) if has]
        grids = torch.tensor([[1, height // 14, width // 14]] * len(seen))
        positions, _ = self.rope_index(ids, (ids == self.image).int(), image_grid_thw=grids, attention_mask=mask)
        pictures = [draw(rng, *of_row).resize((width, height)) for of_row in zip(seen, looks)]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "labels": labels,
            "own_letter": torch.tensor(own_letter).reshape(-1, 4),
            "right_choice": torch.tensor(right_choice).reshape(-1, 4),
            "looks_at": torch.tensor(looks_at).reshape(-1, 3),
            "probed": torch.stack([probe_targets(scene, grid) for scene in seen]),
            "counts": torch.tensor([len(scene.figures) - 1 for scene in seen]),
            "kinds": torch.tensor([KINDS.index(kind) for kind in kinds]),
            "images": torch.stack([pil_to_tensor(picture) for picture in pictures]),
            "frames": grids[:1] * torch.tensor([len(seen), 1, 1]),
        }

    def scene(self, rng: random.Random, domain: Domain, kind: str, size: tuple[int, int]) -> Scene:
        while (scene := make_scene(rng, domain, kind)).size != size:  # one size a batch: the pictures are one stack
            pass
        return scene

    def prompt_and_reply(
        self, rng: random.Random, question: Question, image_tokens: int
    ) -> tuple[list[int], list[int], int | None]:
        """Tokens of the prompt and of the reply, and the right choice where the question offers some."""
        text, reply, answer = question.text, question.choices[question.answer], None
        if rng.random() < 0.7:  # the others are answered in words, which teaches vision sooner
            answer = question.answer
            row = {"question": question.text, "choices": question.choices}
            text, reply = build_messages(row, [])[0]["content"][0]["text"], LETTERS[answer]
        items = [{"type": "image"}] if image_tokens else []
        prompt = self.render([{"role": "user", "content": [*items, {"type": "text", "text": text}]}])
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
        return *self.tokenizer([prompt, f"{reply}<|im_end|>"]).input_ids, answer


def token_at(at: tuple[float, float], size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Index of the image token that covers a point of the picture; grid: rows and columns of tokens."""
    column, row = (int(value / side * tokens) for value, side, tokens in zip(at, size, grid[::-1]))
    return row * grid[1] + column


def probe_targets(scene: Scene, grid: tuple[int, int]) -> torch.Tensor:
    """int64 (image tokens, PROBES): what each probe should find in each token, NOTHING where it is not asked."""
    names = list(PROBES)
    targets = torch.full((grid[0] * grid[1], len(names)), NOTHING)
    targets[:, 0] = 0

    def put(at: tuple[float, float], **found: int) -> None:
        token = targets[token_at(at, scene.size, grid)]
        token[:] = NOTHING  # two things in one token: the last is asked for
        for name, value in found.items():
            token[names.index(name)] = value

    for figure in scene.figures:
        near = {side: scene.neighbour(figure, side) for side in SIDES}
        shapes = {side: 1 + SHAPES.index(other.shape) if other else 0 for side, other in near.items()}
        put(figure.at, thing=1, shape=SHAPES.index(figure.shape), colour=COLOURS.index(figure.colour), **shapes)
    if scene.badge:
        put(scene.badge.at, thing=2, shape=SHAPES.index(scene.badge.shape), colour=COLOURS.index(scene.badge.colour))
    if scene.code:
        characters = [ALPHABET.index(c) + 1 for c in scene.code] + [0]
        put(scene.tag_at, thing=3, **{f"character {place}": characters[place] for place in range(3)})
    return targets


def train(model, processor, args: argparse.Namespace) -> None:
    """AdamW; the learning rate follows a cosine to zero over --max_minutes or --steps, whichever ends first.

    Prints loss, accuracy of letters by kind of question and of the probes, and saves, also when interrupted.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    batches = BenchBatches(processor, model, args)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=args.workers, pin_memory=device == "cuda", prefetch_factor=2
    )
    model.to(device).train()
    model.model.language_model.set_attn_implementation("eager")  # the hints need to see the attention
    width = model.config.text_config.hidden_size
    probe = torch.nn.Linear(width, sum(PROBES.values())).to(device)
    counter = torch.nn.Linear(width, MAX_COUNT).to(device)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *probe.parameters(), *counter.parameters()],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=device == "cuda",
    )
    letters, log = torch.tensor(letter_ids(processor), device=device), Log()
    start = time.monotonic()
    try:
        for step, batch in enumerate(loader):
            if step == 0:
                print(f"first batch after {time.monotonic() - start:.0f} s", flush=True)
                start = time.monotonic()
            done = max(step / args.steps, (time.monotonic() - start) / (60 * args.max_minutes))
            if done >= 1:
                break
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / 100)
                group["lr"] = args.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            losses, logits, target = forward(model, processor, batch, probe, counter)
            fade = max(0.0, 1 - done / 0.7)
            loss = losses["answer"] + 0.3 * fade * losses["hint"] + (0.1 + 0.9 * fade) * losses["probe"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.add(losses, logits, target, letters, batch)
            if (step + 1) % args.log_every == 0:
                print(f"step {step + 1}, {done:.0%}, {time.monotonic() - start:.0f} s: {log.line()}", flush=True)
            if (step + 1) % 500 == 0:
                save(model, processor, args.output_dir)
    finally:
        save(model, processor, args.output_dir)
        print(f"saved {args.output_dir} after {time.monotonic() - start:.0f} s", flush=True)


def forward(
    model, processor, batch: dict, probe, counter
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """(the losses of answers, hints and probes; logits and tokens of all replies)."""
    prepare, images, labels = processor.image_processor, batch["images"], batch["labels"]
    images = prepare.rescale_and_normalize(
        images, True, prepare.rescale_factor, True, prepare.image_mean, prepare.image_std
    )
    patches = prepare.patchify(images, 14, merge_size=2, temporal_patch_size=2)[0].flatten(0, 1)
    features = model.model.visual(patches, grid_thw=batch["frames"]).pooler_output
    shown = model.model(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")},
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=(features,))},
        output_attentions=True,
        output_hidden_states=True,
    )
    logits = model.lm_head(shown.last_hidden_state[:, :-1][labels[:, 1:] != NOTHING])
    target = labels[labels != NOTHING]

    of_picture = features.unflatten(0, (len(images), -1))
    probed_loss = cross_entropy(counter(of_picture.mean(1)), batch["counts"])
    for found, wanted in zip(probe(of_picture).split(list(PROBES.values()), -1), batch["probed"].unbind(-1)):
        found, wanted = found.flatten(0, 1), wanted.flatten()
        asked = (wanted != NOTHING).sum().clamp(min=1)
        probed_loss = probed_loss + cross_entropy(found, wanted, ignore_index=NOTHING, reduction="sum") / asked / 3
    row, query, key = batch["looks_at"].T
    hint = hint_loss(model, shown, batch["own_letter"], batch["right_choice"])
    hint = hint - (shown.attentions[3][row, :2, query, key] + 1e-6).log().mean()  # the end of the prompt looks there
    return {"answer": cross_entropy(logits, target), "hint": hint, "probe": probed_loss}, logits, target


class Log:
    """Means since the last line: losses, and letters right by kind of question. The GPU is read once a line."""

    def __init__(self) -> None:
        self.losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.right: list[torch.Tensor] = []
        self.kinds: list[torch.Tensor] = []

    def add(
        self, losses: dict, logits: torch.Tensor, target: torch.Tensor, letters: torch.Tensor, batch: dict
    ) -> None:
        for name, loss in losses.items():
            self.losses[name].append(loss.detach())
        with torch.no_grad():
            kinds = batch["kinds"][(batch["labels"] != NOTHING).nonzero()[:, 0]]
            is_letter = torch.isin(target, letters)
            self.right.append(torch.where(is_letter, (logits.argmax(-1) == target).float(), math.nan))
            self.kinds.append(kinds)

    def line(self) -> str:
        right, kinds = torch.cat(self.right), torch.cat(self.kinds)
        parts = [f"{name} {torch.stack(values).mean():.3f}" for name, values in self.losses.items()]
        parts += [f"letters {right.nanmean():.1%}"]
        parts += [f"{kind} {right[kinds == number].nanmean():.0%}" for number, kind in enumerate(KINDS)]
        for kept in (self.losses, self.right, self.kinds):
            kept.clear()
        return ", ".join(parts)


if __name__ == "__main__":
    run_main(main)
