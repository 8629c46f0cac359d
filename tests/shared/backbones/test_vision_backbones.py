"""Frozen picture encoders: EVA's ViT against timm's, what of a network is read, names of EfficientNet-Lite."""

import copy
import functools

import pytest
import timm
import torch
from timm.models.eva import Eva
from torch import nn

from shared.backbones.vision import LITE, STAGES, Encoder, LiteTokens, efficientnet_encoder, lite_names, vit_encoder
from shared.core.errors import UserError
from shared.nn.vit import VisionTransformer
from shared.weights.fetch import fetch
from shared.weights.manifest import load_manifest
from shared.weights.weight_map import to_ours, to_published

MEAN, STD = (0.25, 0.5, 0.375), (0.5, 0.75, 0.625)  # exact in float32, times 255 too


def perturbed(module):
    """Every parameter and running statistic away from where it began."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(0.5 * torch.rand(tensor.shape, generator=generator) - 0.25)
    return module.eval()


def pictures(count, size):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).byte()


# ---- EVA


def ours(**options):
    return VisionTransformer(
        42, 14, 40, 3, 2, mlp_ratio=4.3637, eps=1e-6, output_norm=False, key_bias=False, mean=MEAN, std=STD, **options
    )  # fmt: skip


def eva(width=40, depth=3, heads=2, size=42):
    return Eva(
        img_size=size, patch_size=14, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=4.3637, qkv_bias=True,
        qkv_fused=True, use_rot_pos_emb=False, use_abs_pos_emb=True, num_classes=0, global_pool="",
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip


def test_evas_tokens_and_gradients_equal_those_of_timm():
    reference, model = perturbed(eva()), ours()
    theirs = dict(reference.named_parameters())
    names = {
        "patch_embedding.weight": "patch_embed.proj.weight",
        "patch_embedding.bias": "patch_embed.proj.bias",
        "positions.class_token": "cls_token",
        "positions.position": "pos_embed",
    }
    parts = {"attention_norm": "norm1", "attention.out": "attn.proj", "mlp_norm": "norm2", "mlp.up": "mlp.fc1",
             "mlp.down": "mlp.fc2"}  # fmt: skip
    for i in range(3):
        names[f"blocks.{i}.attention.qkv.weight"] = f"blocks.{i}.attn.qkv.weight"
        for part, other in parts.items():
            names |= {f"blocks.{i}.{part}.{end}": f"blocks.{i}.{other}.{end}" for end in ("weight", "bias")}
    state = {name: theirs[other].detach().reshape(model.get_parameter(name).shape) for name, other in names.items()}
    for i in range(3):
        biases = [theirs[f"blocks.{i}.attn.{one}_bias"].detach() for one in "qv"]
        state[f"blocks.{i}.attention.qkv.bias"] = torch.cat(biases)
    model.load_state_dict(state, strict=True)
    images = pictures(5, 42)
    normalised = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    # timm's last norm is what BLIP-2 leaves out
    reference.norm = nn.Identity()
    found, expected = model.tokens(images), reference.forward_features(normalised)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    found.square().mean().backward()
    expected.square().mean().backward()
    for i in range(3):
        bias = model.blocks[i].attention.qkv.bias.grad
        wanted = torch.cat([theirs[f"blocks.{i}.attn.{one}_bias"].grad for one in "qv"])
        torch.testing.assert_close(bias, wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            model.blocks[i].mlp.up.weight.grad, theirs[f"blocks.{i}.mlp.fc1.weight"].grad, rtol=1e-4, atol=1e-6
        )


def test_evas_vit_g_of_39_blocks_has_the_parameters_of_timms():
    with torch.device("meta"):
        model = VisionTransformer(
            224, 14, 1408, 39, 16, mlp_ratio=4.3637, eps=1e-6, output_norm=False, key_bias=False, mean=MEAN, std=STD
        )
        reference = eva(1408, 39, 16, 224)
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in reference.parameters()) - 2 * 1408  # its last norm
    assert count == 985_894_528
    assert len(model.positions.position) == 257


# ---- a ViT as an encoder


def small_vit():
    return perturbed(VisionTransformer(24, 8, 40, 3, 2, input_norm=True, mean=MEAN, std=STD))


@pytest.mark.parametrize(("layer", "skip_last_blocks"), [("last", 0), ("second-last", 1)])
def test_a_vit_is_read_after_its_last_block_or_the_one_before(layer, skip_last_blocks):
    vit, images = small_vit(), pictures(5, 24)
    encoder = vit_encoder(vit, layer)
    found = encoder(images)
    assert found.shape == (5, encoder.tokens, encoder.width) == (5, 10, 40)
    torch.testing.assert_close(found, vit.tokens(images, skip_last_blocks=skip_last_blocks))
    assert len(encoder.module.blocks) == 3 - skip_last_blocks  # what is not read is not held
    assert not found.requires_grad and encoder.device == torch.device("cpu")


def test_encoders_that_differ_in_weights_layer_or_precision_have_other_digests():
    vit = small_vit()
    changed = copy.deepcopy(vit)
    changed.blocks[0].mlp.up.bias.data[3] += 1e-3
    encoders = [vit_encoder(vit), vit_encoder(vit, "last"), vit_encoder(changed)]
    encoders.append(vit_encoder(copy.deepcopy(vit), dtype=torch.bfloat16))
    assert len({encoder.digest for encoder in encoders}) == 4
    assert vit_encoder(copy.deepcopy(vit)).digest == encoders[0].digest


def test_the_digest_tells_how_large_a_picture_the_same_weights_see():
    network = perturbed(timm.create_model("tf_efficientnet_lite0"))
    digests = {
        Encoder(LiteTokens(network, 5, size, MEAN, STD), 112, (size // 16) ** 2, f"last {size} px").digest
        for size in (64, 96)
    }
    assert len(digests) == 2


def test_a_layer_that_is_none_is_refused():
    with pytest.raises(UserError, match="no layer 'first': choose last, second-last"):
        vit_encoder(small_vit(), "first")


# ---- EfficientNet-Lite


@pytest.mark.parametrize("name", LITE)
def test_the_published_names_of_efficientnet_lite_are_total_both_ways(name):
    with torch.device("meta"):
        network = timm.create_model("tf_" + name.replace("-", "_"))
    names = lite_names(network)
    state = network.state_dict()
    assert sorted(names.values()) == sorted(state)
    # in order of the published file every shape is where the network has it
    back = to_ours(to_published(state, names), names, {key: tensor.shape for key, tensor in state.items()})
    assert set(back) == set(state)
    blocks = sum(len(stage) for stage in network.blocks)
    assert (
        f"_blocks.{blocks - 1}._project_conv.weight" in names and f"_blocks.{blocks}._project_conv.weight" not in names
    )
    assert "_blocks.0._expand_conv.weight" not in names and "_blocks.0._bn0.weight" not in names


@pytest.mark.parametrize("layer", STAGES)
def test_tokens_are_the_rows_of_timms_map_of_that_stage(layer):
    # double: random weights make this depth chaotic
    network = perturbed(timm.create_model("tf_efficientnet_lite0").double())
    stages, stride = STAGES[layer]
    images = pictures(3, 64)
    found = LiteTokens(network, stages, 64, MEAN, STD).double().eval()(images)
    normalised = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    maps = network.forward_intermediates(normalised, intermediates_only=True)
    expected = next(one for one in maps if one.shape[-1] == 64 // stride and one.shape[1] == found.shape[-1])
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_pictures_of_another_size_are_resized():
    network = perturbed(timm.create_model("tf_efficientnet_lite0"))
    module = LiteTokens(network, 5, 64, MEAN, STD).eval()
    assert module(pictures(3, 40)).shape == module(pictures(3, 64)).shape == (3, 16, 112)


def test_an_unknown_encoder_and_a_size_that_does_not_divide_are_refused():
    with pytest.raises(UserError, match="no encoder 'efficientnet-lite9': choose efficientnet-lite0"):
        efficientnet_encoder("efficientnet-lite9")
    with pytest.raises(UserError, match="a picture of 100 px does not divide by its stride of 32"):
        efficientnet_encoder("efficientnet-lite0", image_size=100)


@pytest.mark.network
@pytest.mark.parametrize("name", LITE)
def test_the_published_weights_load_and_tell_a_picture_that_they_know(name):
    fetch(load_manifest()[name])
    encoder = efficientnet_encoder(name, "last", image_size=96)
    assert isinstance(encoder, Encoder) and encoder(pictures(2, 96)).shape == (2, encoder.tokens, encoder.width)
