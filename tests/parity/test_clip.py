"""CLIP against transformers' CLIPModel and open_clip's CLIP: outputs, loss, gradients, the converter both ways.

No two sizes coincide, so that a transposed or swapped axis cannot pass by accident.
"""

import copy
from dataclasses import replace

import pytest
import torch
from faults import largest, patches_in_column_order, planting, rolled, wrong_eps
from pairs import of_uint8_and_floats, state

from papers.clip.config import ClipConfig
from papers.clip.losses import clip_loss
from papers.clip.model import Clip
from papers.clip.weights import OPENAI_RESNET, OPENAI_VIT, TRANSFORMERS, hf_config, open_clip_config
from shared.weights.weight_map import to_ours, to_published

pytest.importorskip("transformers")
open_clip_model = pytest.importorskip("open_clip.model")

VIT = ClipConfig(
    image_size=30,
    vision_width=48,
    vision_layers=3,
    vision_heads=3,
    patch=6,
    embed_width=28,
    text_width=40,
    text_layers=2,
    text_heads=4,
    context=13,
    vocabulary=97,
    end_token=96,
)
RESNET = replace(VIT, image_size=96, vision_width=8, vision_layers=(1, 2, 1, 1), vision_heads=4, patch=None)


def make_transformers(config: ClipConfig):
    from transformers import CLIPConfig, CLIPModel

    sizes, eager = hf_config(config), {"attn_implementation": "eager"}  # another product than ours
    return CLIPModel(CLIPConfig(text_config=sizes.pop("text_config") | eager,
                                vision_config=sizes.pop("vision_config") | eager, **sizes))  # fmt: skip


def make_open_clip(config: ClipConfig):
    return open_clip_model.CLIP(**open_clip_config(config), output_dict=True)


def batch(config: ClipConfig, size: int = 5):
    """Normalised pictures, and texts of different lengths padded with zeros behind the end token."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, config.image_size, config.image_size, generator=generator)
    tokens = torch.zeros(size, config.context, dtype=torch.long)
    for row in range(size):
        length = 3 + (row * 4) % (config.context - 2)
        tokens[row, :length] = torch.randint(1, config.end_token - 1, (length,), generator=generator)
        tokens[row, length - 1] = config.end_token
    return images, tokens


REFERENCES = {
    "transformers": (make_transformers, VIT, TRANSFORMERS),
    "open_clip ViT": (make_open_clip, VIT, OPENAI_VIT),
    "open_clip ResNet": (make_open_clip, RESNET, OPENAI_RESNET),
}


def reference_loss(reference, images, tokens):
    """(picture features, text features, loss), features L2-normalised, from either library."""
    if hasattr(reference, "vision_model"):
        output = reference(pixel_values=images, input_ids=tokens, return_loss=True)
        return output.image_embeds, output.text_embeds, output.loss
    from open_clip.loss import ClipLoss

    output = reference(images, tokens)
    features = output["image_features"], output["text_features"]
    return *features, ClipLoss()(*features, output["logit_scale"])


def loaded(config: ClipConfig, published: dict, weight_map: dict) -> Clip:
    ours = Clip(config).eval()
    ours.load_state_dict(to_ours(published, weight_map), strict=True)
    return ours


@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_loss_and_gradients_equal_the_reference(name, agree, perturb):
    make, config, weight_map = REFERENCES[name]
    torch.manual_seed(0)
    reference = perturb(make(config))
    images, tokens = batch(config)
    their_images, their_texts, their_loss = reference_loss(reference, images, tokens)
    their_loss.backward()
    ours = loaded(config, state(reference), weight_map)
    output = ours(images, tokens)
    loss = clip_loss(output)
    loss.backward()

    key = name.replace(" ", "-").lower()
    agree(f"clip.parity.{key}.image", f"image features against {name}", output.image_features, their_images)
    agree(f"clip.parity.{key}.text", f"text features against {name}", output.text_features, their_texts)
    agree(f"clip.parity.{key}.loss", f"contrastive loss against {name}", loss, their_loss)
    gradients = {k: p.grad for k, p in ours.named_parameters()}
    theirs = {k: p.grad for k, p in reference.named_parameters()}
    if not config.patch:  # running statistics have no gradient, but the map is total
        theirs |= {k: torch.zeros_like(v) for k, v in state(reference).items() if k not in theirs}
    theirs = {k: v for k, v in to_ours(theirs, weight_map).items() if k in gradients}
    assert all(value.abs().max() > 0 for value in gradients.values()), "a gradient that is zero compares nothing"
    agree(f"clip.parity.{key}.gradients", f"all gradients against {name}", gradients, theirs)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_converter_returns_every_published_tensor_exactly(name, agree, perturb):
    make, config, weight_map = REFERENCES[name]
    published = state(perturb(make(config)))
    ours = loaded(config, published, weight_map)
    back = to_published(ours.state_dict(), weight_map)
    key = name.replace(" ", "-").lower()
    what = f"{name} weights, to ours and back"
    agree(f"clip.parity.{key}.converter", what, back, {k: published[k] for k in back}, tolerance=0.0)
    assert {k for k in published if k not in back} <= {k for k in weight_map if weight_map[k] is None}
    make(config).load_state_dict(back, strict=False)


def test_uint8_pictures_give_what_normalised_floats_give(agree):
    torch.manual_seed(0)
    ours, plain = of_uint8_and_floats(Clip(VIT).eval().encode_image, VIT)
    agree("clip.parity.uint8", "image features of uint8 pixels against normalised floats", ours, plain)


def encoders(model):
    return model.vision_encoder, model.text_encoder


def _swap_key_and_value(plant, model):
    for block in model.text_encoder.blocks:
        rolled(block.attention.qkv.weight[VIT.text_width :], VIT.text_width)


def _exact_gelu(plant, model):
    for encoder in encoders(model):
        for block in encoder.blocks:
            block.mlp.activation = torch.nn.GELU()


def _read_last_position(plant, model):
    model.text_encoder.end_token = 0  # the first padding token instead of the end of the text


def _mean_instead_of_class_token(plant, model):
    encoder = model.vision_encoder
    plant(encoder, "forward", lambda real, images: encoder.output_norm(encoder.blocks(encoder.embed(images)).mean(1)))


FAULTS = {
    "keys and values swapped": _swap_key_and_value,
    "exact GELU": _exact_gelu,
    "no causal mask": lambda plant, model: plant(model.text_encoder.blocks, "forward", lambda real, x, causal: real(x)),
    "read at the last position": _read_last_position,
    "no input norm": lambda plant, model: setattr(model.vision_encoder, "input_norm", torch.nn.Identity()),
    "wrong eps": wrong_eps,
    "no output norm": lambda plant, model: setattr(model.vision_encoder, "output_norm", torch.nn.Identity()),
    "mean instead of class token": _mean_instead_of_class_token,
    "scale not exponentiated": lambda plant, model: setattr(model.logit_scale, "data", model.logit_scale.data.log()),
    "a block skipped": lambda plant, model: model.vision_encoder.blocks.__delitem__(1),
    "positions shifted": lambda plant, model: rolled(model.text_encoder.position, 1),
    "patches in column order": patches_in_column_order,
}


def test_every_mutant_is_told_from_the_reference(count, perturb):
    torch.manual_seed(0)
    reference = perturb(make_open_clip(VIT))
    images, tokens = batch(VIT)
    with torch.no_grad():
        theirs = reference_loss(reference, images, tokens)
        sound, caught = loaded(VIT, state(reference), OPENAI_VIT), []
        for name, fault in FAULTS.items():
            mutant = copy.deepcopy(sound)
            with planting() as plant:
                fault(plant, mutant)
                output = mutant(images, tokens)
            if largest((output.image_features, output.text_features, clip_loss(output)), theirs) > 1e-5:
                caught.append(name)
    assert len(FAULTS) >= 12 and len(caught) == len(FAULTS), f"not caught: {FAULTS.keys() - set(caught)}"
    count("clip.parity.mutants", "faults planted in our model and caught", len(caught), len(FAULTS))
