"""Blocks and encoders against torch's own layers, and what they save: recomputed activations, untouched padding."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shared.nn.blocks import Block, Blocks, QuickGELU, set_recompute
from shared.nn.positions import resample_grid
from shared.nn.text_transformer import CausalTextTransformer, longest
from shared.nn.vit import VisionTransformer


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_equals_torchs_encoder_layer(norm):
    torch.manual_seed(0)
    ours = Block(24, 3, norm=norm)
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=norm == "pre")
    for p in ours.parameters():
        p.data += 0.1 * torch.randn_like(p)
    names = {
        "self_attn.in_proj_weight": ours.attention.qkv.weight,
        "self_attn.in_proj_bias": ours.attention.qkv.bias,
        "self_attn.out_proj.weight": ours.attention.out.weight,
        "self_attn.out_proj.bias": ours.attention.out.bias,
        "linear1.weight": ours.mlp.up.weight,
        "linear1.bias": ours.mlp.up.bias,
        "linear2.weight": ours.mlp.down.weight,
        "linear2.bias": ours.mlp.down.bias,
        "norm1.weight": ours.attention_norm.weight,
        "norm1.bias": ours.attention_norm.bias,
        "norm2.weight": ours.mlp_norm.weight,
        "norm2.bias": ours.mlp_norm.bias,
    }
    theirs.load_state_dict(names)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="pre"):
        Block(24, 3, norm="sandwich")


def test_quick_gelu_and_its_gradient_are_those_of_the_formula():
    x = torch.linspace(-6, 6, 101, dtype=torch.double, requires_grad=True)
    y = QuickGELU()(x)
    torch.testing.assert_close(y, x * torch.sigmoid(1.702 * x))
    assert torch.autograd.gradcheck(QuickGELU(), x)


def test_a_compiled_block_has_the_values_and_gradients_of_the_block():
    torch.manual_seed(0)
    plain = Block(24, 3, activation="quick_gelu")
    compiled, x = copy.deepcopy(plain), torch.randn(2, 5, 24)
    compiled.compile(backend="aot_eager")
    found = []
    for block in (plain, compiled):
        y = block(x)
        y.square().sum().backward()
        found.append({"y": y.detach()} | {name: p.grad for name, p in block.named_parameters()})
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_block_named_quick_gelu_has_it():
    block = Block(8, 2, activation="quick_gelu")
    x = torch.randn(2, 3, 8)
    mlp_width = block.mlp.up(x)
    torch.testing.assert_close(block.mlp(x), block.mlp.down(mlp_width * torch.sigmoid(1.702 * mlp_width)))


def test_recomputed_activations_change_no_gradient():
    torch.manual_seed(0)
    blocks = Blocks(Block(24, 3) for _ in range(3)).train()
    again = copy.deepcopy(blocks)
    set_recompute(again, True)
    x = torch.randn(2, 7, 24)
    for stack in (blocks, again):
        stack(x, causal=True).square().mean().backward()
    for ours, theirs in zip(blocks.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=0, rtol=0)


@pytest.mark.parametrize(("recompute", "training", "times"), [(True, True, 2), (False, True, 1), (True, False, 1)])
def test_a_block_runs_twice_only_where_a_training_recomputes_it(recompute, training, times):
    blocks = Blocks([Block(24, 3)]).train(training)
    set_recompute(blocks, recompute)
    runs = []
    blocks[0].attention.register_forward_pre_hook(lambda *_: runs.append(1))
    blocks(torch.randn(1, 4, 24, requires_grad=True)).sum().backward()
    assert len(runs) == times


def test_stochastic_depth_leaves_out_whole_samples_and_scales_the_others_up():
    torch.manual_seed(0)
    block, y = Block(24, 3, drop_path=0.25), torch.randn(4000, 2, 24)
    found = block.train().kept(y)
    gone = (found == 0).all(2).all(1)
    torch.testing.assert_close(found, torch.where(gone[:, None, None], 0.0, y / 0.75))
    assert float(gone.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert block.eval().kept(y) is y


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_dropped_sample_passes_by_attention_and_mlp(norm):
    block, x = Block(24, 3, norm=norm, drop_path=1 - 1e-9).train(), torch.randn(2, 5, 24)
    torch.testing.assert_close(block(x), x if norm == "pre" else block.mlp_norm(block.attention_norm(x)))


def text_tower():
    torch.manual_seed(0)
    tower = CausalTextTransformer(50, 16, 24, 2, 3, end_token=49)
    nn.init.normal_(tower.position)
    return tower.eval()


def captions(lengths, width=16):
    tokens = torch.randint(1, 48, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = 49
        tokens[row, length:] = 0
    return tokens


def test_computing_only_the_longest_caption_is_exact():
    tower, tokens = text_tower(), captions([3, 9, 5])
    seen = []
    tower.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    short = tower(tokens)
    full = tokens.clone()
    full[:, 9:] = 7  # what stands behind the end must not matter
    long = torch.cat([full, captions([16])])  # and a long neighbour makes the batch compute all of it
    torch.testing.assert_close(tower(long)[:3], short, atol=1e-6, rtol=0)
    assert seen == [9, 16]


def test_the_first_end_token_is_the_end():
    tower, tokens = text_tower(), captions([5])
    again = tokens.clone()
    again[0, 10] = 49
    torch.testing.assert_close(tower(again), tower(tokens))


def test_a_token_enters_with_its_position_added_and_leaves_through_the_norm():
    torch.manual_seed(0)
    tower = CausalTextTransformer(50, 16, 24, 0, 3, end_token=49)
    nn.init.normal_(tower.position)
    expected = tower.output_norm(tower.token_embedding.weight[49] + tower.position[[2, 8]])
    torch.testing.assert_close(tower(captions([3, 9])), expected)


def test_a_gpu_computes_a_multiple_of_eight_tokens_but_never_more_than_there_are():
    end = SimpleNamespace(is_meta=False, is_cuda=True, max=lambda: 8)  # the ninth token is the last
    assert (longest(end, 24), longest(end, 12)) == (16, 12)
    assert longest(torch.tensor([3, 8]), 24) == 9 and longest(torch.tensor([3, 8], device="meta"), 24) == 24


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="context of 16"):
        text_tower()(torch.zeros(1, 17, dtype=torch.long))


def vit(size=16, patch=4, layers=1, **options):
    return VisionTransformer(size, patch, 24, layers, 3, mean=(0.5,) * 3, std=(0.2,) * 3, **options)


def test_a_picture_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        VisionTransformer(30, 7, 24, 1, 3)


def test_a_vit_reads_pictures_of_another_size_by_resampling_its_positions():
    assert vit(32, 8).eval().tokens(torch.zeros(2, 3, 48, 40, dtype=torch.uint8)).shape == (2, 1 + 6 * 5, 24)


def test_rows_and_columns_of_an_oblong_picture_get_their_own_positions():
    torch.manual_seed(0)
    model = vit()
    images = torch.randint(0, 256, (2, 3, 8, 24), dtype=torch.uint8)  # 2 rows of 6 patches
    position = model.positions.position
    expected = resample_grid(position, (4, 4), (2, 6), 1)[1:] + model.patch_embedding(images)
    torch.testing.assert_close(model.embed(images)[:, 1:], expected)


def test_leaving_out_the_last_block_is_the_second_last_layer():
    model = vit(32, 8, layers=3).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = []
    model.blocks[2].register_forward_pre_hook(lambda _, args: before.append(args[0]))
    model.tokens(images)
    torch.testing.assert_close(model.tokens(images, skip_last_blocks=1), before[0])


def test_stochastic_depth_rises_from_nothing_to_the_last_block():
    drops = [[block.drop_path for block in vit(layers=layers, drop_path=0.3).blocks] for layers in (4, 1)]
    assert drops == [pytest.approx([0.0, 0.1, 0.2, 0.3]), [0.0]]


def test_without_a_key_bias_queries_and_values_have_theirs():
    qkv, x = vit(key_bias=False).blocks[0].attention.qkv, torch.randn(2, 5, 24)
    nn.init.normal_(qkv.bias)
    assert qkv.bias.shape == (48,)
    of_q, of_v = qkv.bias.split(24)
    expected = x @ qkv.weight.T + torch.cat([of_q, torch.zeros(24), of_v])
    torch.testing.assert_close(qkv(x), expected)
