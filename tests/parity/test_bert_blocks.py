"""BERT's blocks against transformers' BertModel and BLIP's text model: outputs, gradients, and mutants that must fail.

No two sizes coincide, so that a transposed or swapped axis cannot pass by accident.
"""

import copy

import pytest
import torch
from berts import Ours, from_theirs
from torch.nn import functional as F

from shared.nn.bert import BertDecoding, key_mask, positions_of

pytest.importorskip("transformers")

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY, POSITIONS, TYPES, CONTEXT = 3, 24, 3, 50, 61, 29, 2, 20
SIZES = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "mlp_width": HIDDEN, "vocabulary": VOCABULARY}
PRESENT = torch.arange(9) < torch.tensor([9, 5, 1, 7])[:, None]  # (B, T)
SEEN = {
    "decoder": torch.arange(11) < torch.tensor([11, 1, 6, 4])[:, None],  # (B, S)
    "blip": torch.ones(4, 11, dtype=torch.bool),  # transformers' BLIP reads padding of the context too: it has none
}


def theirs(kind: str):
    """transformers' BERT ("encoder", "decoder" with cross-attention of the same width) or BLIP's text decoder."""
    from transformers import BertConfig, BertLMHeadModel, BlipTextConfig
    from transformers.models.bert.modeling_bert import BertForMaskedLM
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.15,  # activations wide enough that the shape of GELU matters
        "attn_implementation": "eager",
    }
    torch.manual_seed(1)
    if kind == "blip":
        return BlipTextLMHeadModel(BlipTextConfig(**common, encoder_hidden_size=CONTEXT, is_decoder=True))
    if kind == "encoder":
        return BertForMaskedLM(BertConfig(**common, type_vocab_size=TYPES))
    return BertLMHeadModel(BertConfig(**common, type_vocab_size=TYPES, is_decoder=True, add_cross_attention=True))


def ours_like(model, kind: str) -> Ours:
    context = {"encoder": None, "decoder": WIDTH, "blip": CONTEXT}[kind]
    types = 0 if kind == "blip" else TYPES
    ours = Ours(**SIZES, positions=POSITIONS, token_types=types, context_width=context)
    ours.load_state_dict(from_theirs(model.state_dict(), LAYERS))
    return ours.eval()


def run(ours: Ours, kind, tokens, context=None):
    x = ours.embeddings(tokens)
    asked = {"mask": key_mask(PRESENT), "causal": context is not None}
    if context is not None:
        asked |= {"context": context, "context_mask": key_mask(SEEN[kind])}
    x = ours.layers(x, **asked)
    return ours.head(x, ours.embeddings.word.weight)


def run_theirs(model, kind, tokens, context=None):
    asked = {"attention_mask": PRESENT.long()}
    if context is not None:
        asked |= {"encoder_hidden_states": context, "encoder_attention_mask": SEEN[kind].long()}
    return model(input_ids=tokens, **asked).logits


def loss_of(logits, tokens):
    return F.cross_entropy(logits[PRESENT], tokens[PRESENT])


@pytest.fixture(params=["encoder", "decoder", "blip"])
def pair(request, perturb):
    """kind, transformers' model with every parameter moved, ours with the same numbers, tokens, context."""
    model = perturb(theirs(request.param))
    torch.manual_seed(2)
    tokens = torch.randint(VOCABULARY, PRESENT.shape)
    width = {"encoder": None, "decoder": WIDTH, "blip": CONTEXT}[request.param]
    context = torch.randn(4, 11, width) if width else None
    return request.param, model, ours_like(model, request.param), tokens, context


def test_blocks_give_the_outputs_and_gradients_of_transformers(pair, agree):
    kind, model, ours, tokens, context = pair
    inputs = [] if context is None else [context.clone().requires_grad_(), context.clone().requires_grad_()]
    mine, other = run(ours, kind, tokens, *inputs[:1]), run_theirs(model, kind, tokens, *inputs[1:])
    agree(f"shared.parity.bert.{kind}.outputs", f"BERT {kind}, logits at the tokens", mine[PRESENT], other[PRESENT])
    loss_of(mine, tokens).backward()
    loss_of(other, tokens).backward()
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    # A token type that never occurs has no gradient in theirs either: zeros there.
    expected = from_theirs({name: parameter.grad for name, parameter in model.named_parameters()}, LAYERS)
    agree(f"shared.parity.bert.{kind}.gradients", f"BERT {kind}, gradients of every parameter", found, expected)
    assert all(gradient.abs().max() > 1e-4 for name, gradient in found.items() if not name.endswith("bias"))
    if inputs:
        agree(f"shared.parity.bert.{kind}.context", f"BERT {kind}, gradient of the context", *(x.grad for x in inputs))


def test_training_mode_recomputes_to_the_same_gradients(pair):
    kind, _, ours, tokens, context = pair
    ours.train()  # its dropout is zero
    found = []
    for recompute in (False, True):
        ours.layers.recompute = recompute
        ours.zero_grad()
        loss_of(run(ours, kind, tokens, context), tokens).backward()
        found.append({name: parameter.grad.clone() for name, parameter in ours.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=0)


MUTANTS = {
    "no cross-attention": lambda ours, index: setattr(ours.layers[index], "cross_attention", None),
    "keys and values of the context swapped": lambda ours, index: swap_halves(ours.layers[index].cross_attention.kv),
    "queries and keys swapped": lambda ours, index: swap_halves(ours.layers[index].attention.qkv, 2 * WIDTH),
    "norms of attention and cross-attention swapped": lambda ours, index: swap_norms(ours.layers[index]),
    "torch's usual epsilon": lambda ours, index: setattr(ours.embeddings.norm, "eps", 1e-5),
    "GELU by tanh": lambda ours, index: setattr(ours.layers[index].mlp, "activation", torch.nn.GELU("tanh")),
}


def swap_halves(linear, rows=None):
    for tensor in (linear.weight, linear.bias):
        part = tensor.data[:rows]
        part.copy_(part.roll(len(part) // 2, 0))


def swap_norms(layer):
    layer.attention_norm, layer.cross_norm = layer.cross_norm, layer.attention_norm


def test_mutants_of_the_decoder_are_caught(perturb, count):
    model = perturb(theirs("blip"))
    ours = ours_like(model, "blip")
    torch.manual_seed(2)
    tokens, context = torch.randint(VOCABULARY, PRESENT.shape), torch.randn(4, 11, CONTEXT)
    expected = run_theirs(model, "blip", tokens, context)[PRESENT]
    caught = {}
    for name, change in MUTANTS.items():
        mutant = copy.deepcopy(ours)
        change(mutant, 1)
        caught[name] = bool((run(mutant, "blip", tokens, context)[PRESENT] - expected).abs().max() > 1e-5)
    blind = ours.layers(ours.embeddings(tokens), mask=key_mask(PRESENT), causal=False, context=context)
    caught["not causal"] = bool((ours.head(blind, ours.embeddings.word.weight)[PRESENT] - expected).abs().max() > 1e-5)
    assert all(caught.values()), caught
    count("shared.parity.bert.mutants", "mutants of the BERT decoder caught", sum(caught.values()), len(MUTANTS) + 1)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pair", ["decoder", "blip"], indirect=True)
def test_decoding_step_by_step_gives_the_logits_of_the_whole_text(pair, side):
    kind, model, ours, tokens, context = pair
    lengths = PRESENT.sum(1)
    following = torch.randint(VOCABULARY, (len(tokens), 4))
    prompt, attention_mask = tokens, PRESENT
    if side == "left":
        attention_mask = PRESENT.flip(1)
        prompt = torch.stack([row.roll(int(9 - n)) for row, n in zip(tokens, lengths, strict=True)])
    decoding = BertDecoding(ours.embeddings, ours.layers, ours.head, context, SEEN[kind])
    found = [decoding.prefill(prompt, attention_mask)]
    found += [decoding.step(following[:, i]) for i in range(4)]
    for row, length in enumerate(lengths.tolist()):
        whole = torch.cat([tokens[row, :length], following[row]])[None]
        expected = model(
            input_ids=whole, encoder_hidden_states=context[row : row + 1, SEEN[kind][row]],
        ).logits[0, length - 1 :]  # fmt: skip
        torch.testing.assert_close(torch.stack([step[row] for step in found]), expected, atol=1e-5, rtol=0)


def test_positions_count_tokens_and_no_padding():
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert positions_of(attention_mask)[attention_mask].tolist() == [0, 1, 2, 0, 1]
