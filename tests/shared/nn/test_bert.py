"""BERT's blocks on their own: cross-attention on and off, padding, decoding state, what they refuse.

Their numbers are compared with transformers' in tests/parity/test_bert_blocks.py.
"""

import pytest
import torch
from torch.testing import assert_close

from shared.core.errors import UserError
from shared.nn.bert import BertDecoding, BertEmbeddings, BertLayers, TokenHead, initialise_bert, key_mask

WIDTH, HEADS, HIDDEN, CONTEXT = 24, 3, 50, 10


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return BertLayers.make(3, WIDTH, HEADS, HIDDEN, context_width=CONTEXT, cross=(1, 2)).eval()


def test_only_the_named_layers_attend_to_the_context(layers):
    assert [layer.cross_attention is not None for layer in layers] == [False, True, True]
    everywhere = BertLayers.make(2, WIDTH, HEADS, HIDDEN, context_width=CONTEXT)
    nowhere = BertLayers.make(2, WIDTH, HEADS, HIDDEN)
    assert all(layer.cross_attention is not None for layer in everywhere)
    assert all(layer.cross_attention is None and layer.cross_norm is None for layer in nowhere)


def test_without_a_context_cross_attention_is_passed_over(layers):
    plain = BertLayers.make(3, WIDTH, HEADS, HIDDEN).eval()
    plain.load_state_dict({name: value for name, value in layers.state_dict().items() if "cross" not in name})
    x, context = torch.randn(2, 5, WIDTH), torch.randn(2, 7, CONTEXT)
    assert_close(layers(x), plain(x), atol=0, rtol=0)
    assert (layers(x, context=context) - plain(x)).abs().max() > 1e-2


def test_padding_of_texts_and_contexts_changes_nothing(layers):
    x, context = torch.randn(1, 5, WIDTH), torch.randn(1, 7, CONTEXT)
    expected = layers(x, context=context)
    longer = torch.cat([x, torch.randn(1, 3, WIDTH)], 1)
    wider = torch.cat([torch.randn(1, 2, CONTEXT), context], 1)
    mask, context_mask = key_mask(torch.arange(8)[None] < 5), key_mask(torch.arange(9)[None] >= 2)
    found = layers(longer, mask=mask, context=wider, context_mask=context_mask)
    assert_close(found[:, :5], expected, atol=1e-5, rtol=0)
    assert key_mask(None) is None


def test_a_causal_stack_sees_nothing_that_comes_later(layers):
    x, context = torch.randn(2, 6, WIDTH), torch.randn(2, 7, CONTEXT)
    changed = x.clone()
    changed[:, 4:] = torch.randn(2, 2, WIDTH)
    before, after = (layers(y, causal=True, context=context) for y in (x, changed))
    assert_close(before[:, :4], after[:, :4], atol=1e-6, rtol=0)
    assert (layers(x, context=context) - layers(changed, context=context))[:, :4].abs().max() > 1e-3


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    layers = BertLayers.make(1, WIDTH, HEADS, HIDDEN, context_width=CONTEXT, dropout=0.3)
    x, context = torch.randn(2, 5, WIDTH), torch.randn(2, 7, CONTEXT)
    assert (layers(x, context=context) - layers(x, context=context)).abs().max() > 1e-2
    layers.eval()
    assert_close(layers(x, context=context), layers(x, context=context), atol=0, rtol=0)


def test_embeddings_add_words_positions_and_the_first_token_type():
    torch.manual_seed(0)
    embeddings = BertEmbeddings(11, WIDTH, 8, token_types=2, dropout=0.0)
    tokens, positions = torch.tensor([[4, 9, 4]]), torch.tensor([[5, 0, 7]])
    tables = embeddings.word.weight[tokens] + embeddings.token_type.weight[0]
    assert_close(embeddings(tokens), embeddings.norm(tables + embeddings.position.weight[:3]))
    assert_close(embeddings(tokens, positions), embeddings.norm(tables + embeddings.position.weight[positions]))
    assert BertEmbeddings(11, WIDTH, 8).token_type is None


def test_initialisation_is_berts():
    torch.manual_seed(0)
    embeddings, layers = BertEmbeddings(300, WIDTH, token_types=2), BertLayers.make(2, WIDTH, HEADS, HIDDEN)
    head = TokenHead(WIDTH, 300)
    for module in (embeddings, layers, head):
        initialise_bert(module)
    for module in (embeddings, layers, head):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name
            else:
                assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.2), name


def parts(layers):
    torch.manual_seed(1)
    embeddings, head = BertEmbeddings(31, WIDTH, 9).eval(), TokenHead(WIDTH, 31)
    head.bias.data.normal_()
    return embeddings, layers, head


@torch.no_grad()
def test_rows_of_one_context_decode_as_if_each_had_its_own(layers):
    """Beams: 2 contexts, then 3 rows each, then one context leaves and rows change places."""
    contexts, prompts = torch.randn(2, 7, CONTEXT), torch.randint(31, (2, 3))
    seen = torch.arange(7) < torch.tensor([[7], [4]])
    shared = BertDecoding(*parts(layers), contexts, seen)
    shared.prefill(prompts, torch.ones(2, 3, dtype=torch.bool))
    shared.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    first, second = torch.randint(31, (6,)), torch.randint(31, (3,))
    shared.step(first)
    shared.select(torch.tensor([5, 3, 3]), torch.tensor([1]))
    found = shared.step(second)
    texts = torch.cat([prompts[1].expand(3, -1), first[[5, 3, 3]][:, None], second[:, None]], 1)
    alone = BertDecoding(*parts(layers), contexts[1:, :4].expand(3, -1, -1))
    expected = alone.prefill(texts, torch.ones(3, 5, dtype=torch.bool))
    assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_decoder_without_context_reads_its_text_alone():
    torch.manual_seed(0)
    plain = BertLayers.make(2, WIDTH, HEADS, HIDDEN).eval()
    tokens = torch.randint(31, (2, 5))
    decoding, whole = BertDecoding(*parts(plain)), BertDecoding(*parts(plain))
    decoding.prefill(tokens[:, :3], torch.ones(2, 3, dtype=torch.bool))
    decoding.step(tokens[:, 3])
    expected = whole.prefill(tokens, torch.ones(2, 5, dtype=torch.bool))
    assert_close(decoding.step(tokens[:, 4]), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_text_longer_than_the_positions_is_refused_and_padding_does_not_count(layers):
    attention_mask = torch.arange(20)[None] >= 12  # 8 tokens behind 12 of padding; there are 9 positions
    decoding = BertDecoding(*parts(layers), torch.randn(1, 7, CONTEXT))
    decoding.prefill(torch.randint(31, (1, 20)), attention_mask)
    decoding.step(torch.tensor([3]))
    with pytest.raises(UserError, match="a text of 10 tokens, but it has 9 positions; shorten the prompt"):
        decoding.step(torch.tensor([3]))
