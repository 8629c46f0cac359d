"""CLIP's ResNet against its formula, written out in torch's functions."""

import pytest
import torch
from torch.nn import functional as F

from shared.nn.resnet import AttentionPool, Bottleneck, ModifiedResNet

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


def moved(module):
    """In evaluation, every weight and running statistic off its first value."""
    torch.manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and name not in ("scale", "shift"):
            tensor.data.add_(0.1 * torch.rand_like(tensor))
    return module.eval()


def normed(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def by_formula(block, x, stride):
    y = F.relu(normed(F.conv2d(x, block.conv1.weight), block.bn1))
    y = F.relu(normed(F.conv2d(y, block.conv2.weight, padding=1), block.bn2))
    y = normed(F.conv2d(F.avg_pool2d(y, stride), block.conv3.weight), block.bn3)
    if x.shape[1] != y.shape[1] or stride > 1:
        x = normed(F.conv2d(F.avg_pool2d(x, stride), block.shortcut_conv.weight), block.shortcut_bn)
    return F.relu(x + y)


@pytest.mark.parametrize(("channels_in", "stride"), [(6, 1), (20, 1), (20, 2), (6, 3)])
def test_a_bottleneck_is_three_convolutions_and_strides_are_average_pools(channels_in, stride):
    block, x = moved(Bottleneck(channels_in, 5, stride)), torch.randn(2, channels_in, 12, 12)
    torch.testing.assert_close(block(x), by_formula(block, x, stride), atol=1e-5, rtol=1e-5)
    assert isinstance(block.shortcut_conv, torch.nn.Identity) == (channels_in == 20 and stride == 1)


def test_the_pool_asks_with_the_mean_of_the_map():
    pool, x = moved(AttentionPool(3, 24, 4, 7)), torch.randn(2, 24, 3, 3)
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.position
    part = pool.attention
    q, (k, v) = part.q(tokens[:, :1]), part.kv(tokens).chunk(2, -1)
    heads = (y.unflatten(-1, (4, 6)).transpose(1, 2) for y in (q, k, v))
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(pool(x), part.out(mixed)[:, 0], atol=1e-5, rtol=1e-5)
    assert pool(x).shape == (2, 7)
    assert float(AttentionPool(9, 64, 4, 7).position.detach().std()) == pytest.approx(1 / 8, rel=0.1)


def test_the_whole_is_a_stem_stages_and_the_pool():
    model = moved(ModifiedResNet(64, (1, 2, 1, 1), 8, 4, 7, mean=MEAN, std=STD))
    assert [len(part.weight) for part in (model.conv1, model.conv2, model.conv3)] == [4, 4, 8]
    assert model.width == 8 * 2**3 * Bottleneck.expansion == model.pool.position.shape[1]
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    x = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    plain = model(x)
    for stride, number in ((2, 1), (1, 2), (1, 3)):
        conv, norm = getattr(model, f"conv{number}"), getattr(model, f"bn{number}")
        x = F.relu(normed(F.conv2d(x, conv.weight, stride=stride, padding=1), norm))
    x = F.avg_pool2d(x, 2)
    assert x.shape == (2, 8, 16, 16)
    for index, stage in enumerate(model.stages):
        for place, block in enumerate(stage):
            x = by_formula(block, x, 2 if index and not place else 1)
    assert x.shape == (2, model.width, 2, 2) and [len(stage) for stage in model.stages] == [1, 2, 1, 1]
    torch.testing.assert_close(model.feature_map(pixels), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(pixels), model.pool(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, model(pixels), atol=1e-4, rtol=1e-4)


def test_a_picture_that_does_not_divide_by_the_stride_is_refused():
    with pytest.raises(ValueError, match="48 px does not divide by the ResNet's stride of 32"):
        ModifiedResNet(48, (1, 1, 1, 1), 8, 4, 7, mean=MEAN, std=STD)
