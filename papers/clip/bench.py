"""One training step of ViT-B/32, ours against transformers and open_clip: same weights, same batch, one run."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from papers.clip.config import VARIANTS, ClipConfig
from papers.clip.converter import OPENAI_VIT
from papers.clip.losses import clip_loss
from papers.clip.model import Clip
from shared.checkpoints import to_ours
from shared.errors import UserError
from shared.training import decay_groups

# Mean length of COCO captions is 11 to 13 tokens of this vocabulary, with both end marks; these are of that kind.
CAPTIONS = (
    "a man riding a wave on top of a surfboard",
    "two dogs are playing with a red ball on the grass near the house",
    "a plate of food with rice, vegetables and a slice of lemon",
    "a street sign in front of an old brick building",
    "the kitchen has a wooden table and four white chairs",
    "a train pulling into a station while people wait on the platform",
    "a black cat sleeping on a laptop keyboard",
    "several kites flying over a beach on a windy afternoon with children watching",
)
DEFAULTS = {"variant": "clip-vit-b-32", "batch": 16, "repeats": 7, "precisions": "fp32,bf16"}


def run(root: Path, overrides: list[str]) -> None:
    """Print the table and write results/bench/clip-step-<device>.json."""
    from shared.tracking import machine_description

    settings = dict(DEFAULTS)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or key not in settings:
            raise UserError(f"bench: '{override}' is not one of {', '.join(f'{k}=' for k in settings)}")
        settings[key] = int(value) if isinstance(settings[key], int) else value
    config = VARIANTS[settings["variant"]]()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for precision in settings["precisions"].split(","):
        if precision == "bf16":
            slowdown = product_seconds(device, torch.bfloat16) / product_seconds(device, torch.float32)
            if slowdown > 2:
                print(
                    f"bf16 left out: a bf16 product takes {slowdown:.0f} times as long as an fp32 one on this machine"
                )
                continue
        rows += compare(config, settings, precision, device)
    print(
        f"{settings['variant']}, batch {settings['batch']}, {device}, optimizer steps, median of {settings['repeats']}"
    )
    print(f"{'':14} {'precision':10} {'images/s':>9} {'ours is':>9}")
    for row in rows:
        print(f"{row['name']:14} {row['precision']:10} {row['images_per_second']:9.2f} {row['ours_is']:8.2f}x")
    target = root / "results" / "bench" / f"clip-step-{device}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    result = {"settings": settings, "machine": machine_description(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target)


def product_seconds(device: str, dtype: torch.dtype) -> float:
    """Of one small matrix product: a CPU without bf16 instructions is a hundred times slower in bf16."""
    a, b = torch.randn(256, 256, device=device, dtype=dtype), torch.randn(256, 256, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        float((a @ b).sum())
        times.append(time.perf_counter() - started)
    return min(times)


def compare(config: ClipConfig, settings: dict, precision: str, device: str) -> list[dict]:
    """Alternate the three for `repeats` rounds; the ratio is the median over rounds of theirs / ours."""
    from shared.tokenizers import ClipTokenizer

    batch = settings["batch"]
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    tokens = ClipTokenizer()(captions, config.context).to(device)
    pixels = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8, device=device)
    steps = {name: step for name, step in contestants(config, device, pixels, tokens, precision)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: step() for name, step in steps.items()}  # warm-up, and the proof that all compute the same
    spread = max(losses.values()) - min(losses.values())
    if spread > (1e-3 if precision == "fp32" else 5e-2):
        raise UserError(f"bench: the losses differ by {spread:.2g} before the first step: {losses}")
    for _ in range(settings["repeats"]):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds["ours"], strict=True)]
        rows.append(
            {
                "name": name,
                "precision": precision,
                "images_per_second": round(batch / statistics.median(times), 2),
                "ours_is": round(statistics.median(ratios), 2),
                "seconds": [round(t, 4) for t in times],
            }
        )
    return rows


def contestants(config: ClipConfig, device: str, pixels: Tensor, tokens: Tensor, precision: str):
    """(name, a function that takes one optimizer step and returns the loss) of ours, open_clip and transformers.

    Every contestant starts from the same uint8 pixels: what normalising them costs belongs to the step.
    """
    import open_clip.model
    from open_clip.loss import ClipLoss
    from transformers import CLIPConfig, CLIPModel

    from papers.clip.converter import TRANSFORMERS
    from shared.checkpoints import to_published

    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(
        config.embed_width,
        {"image_size": config.image_size, "layers": config.vision_layers, "width": config.vision_width,
         "patch_size": config.patch},
        {"context_length": config.context, "vocab_size": config.vocabulary, "width": config.text_width,
         "heads": config.text_heads, "layers": config.text_layers},
        quick_gelu=True,
    ).to(device)  # fmt: skip
    ours = Clip(config).to(device)
    published = {k: v for k, v in theirs.state_dict().items() if k != "attn_mask"}
    ours.load_state_dict(to_ours(published, OPENAI_VIT))
    hugging = CLIPModel(
        CLIPConfig(
            text_config={"hidden_size": config.text_width, "intermediate_size": 4 * config.text_width,
                         "num_hidden_layers": config.text_layers, "num_attention_heads": config.text_heads,
                         "projection_dim": config.embed_width, "eos_token_id": config.end_token},
            vision_config={"hidden_size": config.vision_width, "intermediate_size": 4 * config.vision_width,
                           "num_hidden_layers": config.vision_layers, "num_attention_heads": config.vision_heads,
                           "image_size": config.image_size, "patch_size": config.patch,
                           "projection_dim": config.embed_width},
            projection_dim=config.embed_width,
        )
    ).to(device)  # fmt: skip
    hugging.load_state_dict(to_published(ours.state_dict(), TRANSFORMERS), strict=False)
    mean = torch.tensor(config.mean, device=device).view(3, 1, 1)
    std = torch.tensor(config.std, device=device).view(3, 1, 1)

    def normalised() -> Tensor:
        return (pixels / 255 - mean) / std

    losses = {
        "ours": (ours, lambda: clip_loss(ours(pixels, tokens))),
        "open_clip": (theirs, lambda: ClipLoss()(*theirs(normalised(), tokens))),
        "transformers": (
            hugging,
            lambda: hugging(pixel_values=normalised(), input_ids=tokens, return_loss=True).loss,
        ),
    }
    for name, (model, loss) in losses.items():
        model.train()
        optimizer = torch.optim.AdamW(decay_groups(model, 0.2), lr=1e-5, fused=True)
        yield name, stepper(loss, optimizer, device, precision)


def stepper(loss, optimizer: torch.optim.Optimizer, device: str, precision: str):
    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step
