"""What the comparisons of several papers give to both sides: pictures, weights; and how exports are read."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from shared.data.images import fitted_image


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items() if k != "attn_mask"}


def pictures(size, seed=2):
    """Normalised, (size, 3, 30, 30)."""
    return torch.randn(size, 3, 30, 30, generator=torch.Generator().manual_seed(seed))


def normalised(pixels, config):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return (pixels / 255 - mean) / std


def of_uint8_and_floats(encode, config, side=30):
    """What `encode` makes of the same pictures as uint8 and as normalised floats."""
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        return encode(pixels), encode(normalised(pixels, config))


def retrieval_loss(cosines, matches, temperature):
    """(cosines, match logits, a loss of both)"""
    labels = torch.arange(len(matches)) % 2
    loss = F.cross_entropy(cosines / temperature, torch.arange(len(cosines))) + F.cross_entropy(matches, labels)
    return cosines, matches, loss


def loaded(architecture, folder):
    """transformers' model of an exported folder, which lacks nothing and has nothing too much."""
    import transformers

    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def levels_apart(processor, config, folder):
    """By how many of a channel's 256 levels their picture processor and ours differ at most."""
    rough = np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8)
    image = Image.fromarray(rough).resize((85, 55), Image.Resampling.BICUBIC)
    image.save(folder / "picture.png")
    ours = torch.tensor(fitted_image((folder / "picture.png").read_bytes(), 30, whole=True))
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return float(((theirs * std + mean) * 255 - ours).abs().max())
