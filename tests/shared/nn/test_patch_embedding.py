"""Patch embedding against torch's own convolutions over normalised pictures, class token and positions by hand."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.testing import assert_close

from shared.core.errors import UserError
from shared.nn.patch_embedding import ClassTokenAndPositions, PatchEmbedding
from shared.nn.positions import resample_grid

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def pixels(*shape):
    torch.manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def normalised(images, dtype=torch.float32):
    per_channel = (-1, *(1,) * (images.ndim - 2))
    mean, std = (torch.tensor(x, dtype=dtype).view(per_channel) for x in (MEAN, STD))
    return (images.to(dtype) / 255 - mean) / std


def convolved(module, images, dtype=torch.float32):
    """What the published convolution makes of normalised pictures, (B, N, D)."""
    convolution = F.conv2d if images.ndim == 4 else F.conv3d
    weight, bias = module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)
    return convolution(images.to(dtype), weight, bias, stride=weight.shape[2:]).flatten(2).mT


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tubelet", "shape"), [(1, (2, 3, 12, 20)), (1, (1, 3, 4, 4)), (2, (2, 3, 6, 8, 12))])
@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "float"])
def test_it_equals_the_published_convolution_in_outputs_and_gradients(raw, tubelet, shape, bias):
    images = pixels(*shape)
    module = PatchEmbedding(4, 7, tubelet=tubelet, bias=bias, mean=MEAN, std=STD)
    expected = convolved(module, normalised(images))
    ours = module(images if raw else normalised(images))
    assert_close(ours, expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(expected) / expected.numel() ** 0.5
    parameters = list(module.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters, upstream)
    for ours_gradient, gradient in zip(
        torch.autograd.grad(ours, parameters, upstream), expected_gradients, strict=True
    ):
        assert_close(ours_gradient, gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_at_least_as_close_to_the_truth_as_a_normalised_picture_would_be(dtype):
    images = pixels(4, 3, 64, 64)
    module = PatchEmbedding(16, 48, bias=True, mean=MEAN, std=STD)
    truth = convolved(module, normalised(images, torch.float64), torch.float64)
    naive = convolved(module, normalised(images).to(dtype), dtype)
    with torch.autocast("cpu", dtype=dtype):
        ours = module(images)
    assert ours.dtype == dtype
    ours_error, naive_error = ((x.double() - truth).square().mean().sqrt() for x in (ours, naive))
    assert ours_error <= naive_error
    ours.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32 and module.weight.grad.isfinite().all()


def test_no_float32_patches_are_written_under_autocast(monkeypatch):
    product, seen = F.linear, []
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or product(x, *rest))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        PatchEmbedding(4, 5, mean=MEAN, std=STD)(pixels(1, 3, 8, 8))
    assert seen == [torch.bfloat16]


def test_a_module_cast_to_half_precision_keeps_the_exact_mean():
    images, module = pixels(2, 3, 32, 32), PatchEmbedding(16, 24, mean=MEAN, std=STD)
    module.bfloat16()
    truth = convolved(module, normalised(images, torch.float64), torch.float64)
    error = (module(images).double() - truth).abs().max() / truth.abs().max()
    assert module(images).dtype == torch.bfloat16 and error < 2**-8


def test_the_convolutions_weights_go_in_and_out_unchanged():
    convolution = torch.nn.Conv2d(3, 7, 4, stride=4)
    module = PatchEmbedding(4, 7, bias=True, mean=MEAN, std=STD)
    module.load_state_dict(convolution.state_dict())  # strict: the very same names and shapes
    module(pixels(1, 3, 8, 8)).sum().backward()
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module.state_dict()["weight"], convolution.weight)
    assert PatchEmbedding(4, 7, tubelet=2).weight.shape == torch.nn.Conv3d(3, 7, (2, 4, 4)).weight.shape


def test_patches_come_in_row_major_order():
    module = PatchEmbedding(2, 1, channels=1)
    torch.nn.init.constant_(module.weight, 0.25)
    picture = torch.arange(6.0).reshape(1, 1, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert module(picture).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_the_callers_pixels_are_left_alone():
    images = pixels(1, 3, 4, 4)  # one patch: the rearranged picture may share its memory
    before = images.clone()
    PatchEmbedding(4, 5, mean=MEAN, std=STD)(images)
    assert torch.equal(images, before)


def test_initial_weights_spread_as_a_convolutions_do():
    module, convolution = PatchEmbedding(8, 256, bias=True), torch.nn.Conv2d(3, 256, 8)
    for ours, theirs in ((module.weight, convolution.weight), (module.bias, convolution.bias)):
        assert_close(ours.std(), theirs.std(), atol=0, rtol=0.15)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (pixels(1, 3, 9, 8), UserError, "9 x 8 picture does not divide into 4 x 4 patches"),
        (pixels(1, 3, 8, 9), UserError, "8 x 9 picture does not divide"),
        (pixels(1, 1, 8, 8), UserError, "1 channels, expected 3"),
        (pixels(3, 8, 8), ValueError, r"\(3, 8, 8\), expected \(B, C, H, W\)"),
        (pixels(1, 3, 8, 8).int(), ValueError, "int32, expected uint8 pixels or normalised floats"),
        (pixels(1, 3, 8, 8), ValueError, "uint8 pixels need mean and std"),
    ],
)
def test_a_picture_that_does_not_fit_is_named(images, error, message):
    with pytest.raises(error, match=message):
        PatchEmbedding(4, 5)(images)


def test_frames_and_statistics_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="3 frames do not divide into tubelets of 2"):
        PatchEmbedding(4, 5, tubelet=2)(torch.zeros(1, 3, 3, 8, 8))
    with pytest.raises(UserError, match="mean has 3 values for 1 channels"):
        PatchEmbedding(4, 5, channels=1, mean=MEAN, std=(1.0,))


def test_shapes_are_known_on_the_meta_device():
    with torch.device("meta"):
        module, positions = PatchEmbedding(4, 5, mean=MEAN, std=STD), ClassTokenAndPositions(5, (2, 3))
        images = torch.empty(2, 3, 8, 12, dtype=torch.uint8)
    assert positions(module(images)).shape == (2, 7, 5)


def test_the_uint8_path_compiles_without_a_graph_break():
    torch._dynamo.reset()
    module, images = PatchEmbedding(4, 5, mean=MEAN, std=STD), pixels(2, 3, 8, 8)
    assert_close(torch.compile(module, backend="eager", fullgraph=True)(images), module(images))


@pytest.mark.parametrize("class_token", [True, False])
def test_class_token_and_positions_are_added_by_hand_to_the_same(class_token):
    torch.manual_seed(0)
    module, patches = ClassTokenAndPositions(5, (2, 3), class_token=class_token), torch.randn(4, 6, 5)
    tokens = module(patches)
    prefix = int(class_token)
    assert tokens.shape == (4, prefix + 6, 5) and module.position.shape == (prefix + 6, 5)
    assert_close(tokens[:, prefix:], patches + module.position[prefix:])
    if class_token:
        assert_close(tokens[3, 0], module.class_token + module.position[0])
    assert set(module.state_dict()) == ({"class_token", "position"} if class_token else {"position"})


def test_another_grid_resamples_the_table_and_a_wrong_one_is_named():
    torch.manual_seed(0)
    module, patches = ClassTokenAndPositions(5, (2, 3)), torch.randn(2, 20, 5)
    tokens = module(patches, grid=(4, 5))
    table = resample_grid(module.position, (2, 3), (4, 5))
    assert_close(tokens[:, 1:], patches + table[1:])
    assert_close(tokens[1, 0], module.class_token + module.position[0])
    with pytest.raises(UserError, match="20 patches on a 2 x 3 grid"):
        module(patches)


def test_the_grid_of_a_picture_is_rows_by_columns():
    """Patches and table must agree on which axis runs first, on a picture that is not square."""
    module = ClassTokenAndPositions(1, (2, 3), class_token=False)
    module.position.data = torch.arange(6.0)[:, None]
    patches = rearrange(torch.arange(6.0).reshape(2, 3), "h w -> 1 (h w) 1")
    assert_close(module(patches), 2 * patches)
