"""BLIP-2 against transformers (Q-Former, retrieval heads, the whole model with OPT and with T5) and its first stage
against its equations written out: outputs, losses, gradients, the converter both ways.

No two sizes coincide, so that a transposed or swapped axis cannot pass by accident.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import texts
from faults import exchanged, in_each, largest, layers_in_reverse, planting, rolled
from language_models import text_config
from pairs import of_uint8_and_floats, pictures, retrieval_loss, state
from references.blip2_stage1 import Reference

from papers.blip2 import model as blip2_model
from papers.blip2.config import Blip2Config, LanguageConfig, VisionConfig
from papers.blip2.formats import (
    FORMATS,
    VISION,
    ours_of,
    published_of,
    transformers_qformer,
    with_language,
    without_language,
)
from papers.blip2.losses import stage1_losses, stage2_loss
from papers.blip2.model import Blip2, Blip2Qformer, Prompt, vision_encoder
from papers.blip2.weights import hf_config
from shared.backbones.hf_lm import CausalAdapter, Seq2SeqAdapter
from shared.losses.image_text import Negatives
from shared.nn import qformer as qformer_file
from shared.nn.qformer import QFormer
from shared.weights.weight_map import to_ours

transformers = pytest.importorskip("transformers")

VISION_CONFIG = VisionConfig("eva", 30, 6, width=48, layers=3, heads=3, mlp_ratio=4.4, eps=1e-5)
CONFIG = Blip2Config(
    vision=VISION_CONFIG,
    queries=7,
    width=40,
    layers=5,
    heads=4,
    mlp_width=72,
    embed_width=28,
    vocabulary=97,
    positions=23,
    context=13,
    dropout=0.0,
    start_token=91,
    end_token=92,
    decode_token=96,
)
OPT = LanguageConfig("opt-test", "opt", 36, 89, layers=2, heads=2, mlp_width=56, context=64)
T5 = LanguageConfig("t5-test", "t5", 44, 83, layers=2, heads=3, mlp_width=60, context=64, head_width=9)
BATCH = 6


# ---- theirs and ours with the same weights


def their_config(language=OPT, text_input=False):
    sizes = hf_config(replace(CONFIG, language=None if text_input else language))
    sizes["vision_config"]["initializer_range"] = 0.2
    image_token = None if text_input else language.vocabulary - 1
    return transformers.Blip2Config.from_dict(
        sizes | {"text_config": text_config(language), "image_token_index": image_token}
    )


def make(kind, perturb, **given):
    torch.manual_seed(0)
    reference = perturb(kind(their_config(**given)))
    with torch.no_grad():  # as published: none on the keys, where one would change nothing
        for layer in reference.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[48:96] = 0.0
    return reference


def filled(format, reference, config=CONFIG):
    """(image encoder, model) of ours with the reference's weights, through our converter."""
    published, language = without_language(state(reference))
    encoder = vision_encoder(config.vision)
    if FORMATS[format].build is Blip2Qformer:
        model = Blip2Qformer(config)
    else:
        copied = copy.deepcopy(reference.language_model)
        model = Blip2(config, (CausalAdapter if config.language.kind == "causal" else Seq2SeqAdapter)(copied))
        assert language.keys() == copied.state_dict().keys()
    expected = {**model.state_dict(), **{f"{VISION}{k}": v for k, v in encoder.state_dict().items()}}
    ours = ours_of(published, format, config.vision.kind, expected)
    encoder.load_state_dict({k.removeprefix(VISION): v for k, v in ours.items() if k.startswith(VISION)}, strict=True)
    lacking = {k: v for k, v in model.state_dict().items() if k.startswith(FORMATS[format].optional)}
    model.load_state_dict({k: v for k, v in ours.items() if not k.startswith(VISION)} | lacking, strict=True)
    return encoder.eval(), model.eval()


def gradients_agree(agree, key, what, encoder, model, reference, format):
    """Gradients of theirs under our names by the same map; of a language model, which is frozen, there are none."""
    mine = {f"{VISION}{name}": p.grad for name, p in encoder.named_parameters()}
    mine |= {name: p.grad for name, p in model.named_parameters() if not name.startswith(FORMATS[format].optional)}
    theirs, _ = without_language({name: p.grad for name, p in reference.named_parameters()})
    theirs = ours_of(theirs, format, "eva", mine)
    assert all(value is not None and value.abs().max() > 0 for value in mine.values()), "a zero compares nothing"
    agree_by_size(agree, key, what, mine, theirs)


def agree_by_size(agree, key, what, mine, theirs):
    """In units of the largest gradient, where 1e-5 of itself would be too kind to small ones."""
    size = min(1.0, max(float(value.abs().max()) for value in theirs.values()))
    mine, theirs = ({name: value / size for name, value in some.items()} for some in (mine, theirs))
    agree(f"blip2.parity.{key}.gradients", f"all gradients of {what} against transformers", mine, theirs)


def words(size, length, vocabulary, seed=3):
    """A language model's tokens (B, T) of different lengths, 4 and more, and where they are; padding is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    used = torch.tensor([4 + (row * 2) % (length - 3) for row in range(size)])
    attention_mask = torch.arange(length) < used[:, None]
    return torch.randint(3, vocabulary - 1, (size, length), generator=generator).masked_fill(
        ~attention_mask, 1
    ), attention_mask


def features(size=BATCH, seed=4):
    return torch.randn(size, 26, 48, generator=torch.Generator().manual_seed(seed))


# ---- the Q-Former alone


def test_queries_equal_transformers_qformer(agree, perturb):
    torch.manual_seed(0)
    reference = perturb(transformers.Blip2QFormerModel(their_config().qformer_config))
    ours = QFormer(7, 40, 5, 4, 72, 48, vocabulary=None, dropout=0.0).eval()
    names = transformers_qformer(text=False, theirs="", ours="")
    carried = to_ours(state(reference), names)
    ours.load_state_dict(carried | {"query_tokens": torch.randn(7, 40)}, strict=True)
    context = features()
    mine = ours.encode_queries(context)
    theirs = reference(ours.query_tokens.detach().expand(BATCH, -1, -1), encoder_hidden_states=context)[0]
    for one in (mine, theirs):
        one.square().mean().backward()
    agree("blip2.parity.qformer.queries", "the queries' states against transformers' Q-Former", mine, theirs)
    grads = {k: p.grad for k, p in ours.named_parameters() if k != "query_tokens"}
    wanted = to_ours({k: p.grad for k, p in reference.named_parameters()}, names)
    assert all(value.abs().max() > 0 for value in grads.values())
    agree_by_size(agree, "qformer", "the Q-Former", grads, wanted)


# ---- retrieval heads


def our_retrieval(encoder, model, tokens, images):
    """(cosines, match logits, a loss of both)."""
    seen = encoder.tokens(images)
    cosines = torch.einsum("b q e, t e -> b t q", model.image_features(seen)[1], model.text_features(tokens)).amax(-1)
    return retrieval_loss(cosines, model.match(seen, tokens), 0.5)


def their_retrieval(reference, tokens, images):
    given = {"pixel_values": images, "input_ids": tokens, "attention_mask": (tokens != 0).long()}
    itc = reference(**given, use_image_text_matching_head=False).logits_per_image
    itm = reference(**given, use_image_text_matching_head=True).logits_per_image
    return retrieval_loss(itc, itm, 0.5)


def test_retrieval_heads_equal_transformers(agree, perturb):
    reference = make(transformers.Blip2ForImageTextRetrieval, perturb, text_input=True)
    encoder, model = filled("transformers-retrieval", reference)
    tokens, images = texts(BATCH, CONFIG), pictures(BATCH)
    theirs = their_retrieval(reference, tokens, images)
    mine = our_retrieval(encoder, model, tokens, images)
    theirs[-1].backward()
    mine[-1].backward()
    agree("blip2.parity.retrieval.itc", "picture-text cosines, best query, against transformers", mine[0], theirs[0])
    agree("blip2.parity.retrieval.itm", "match logits, mean of the queries, against transformers", mine[1], theirs[1])
    agree("blip2.parity.retrieval.loss", "loss of both heads against transformers", mine[2], theirs[2])
    gradients_agree(agree, "retrieval", "both heads", encoder, model, reference, "transformers-retrieval")


# ---- through a language model

GENERATION = "transformers-generation"
PROMPT = 2


def our_causal(encoder, model, tokens, attention_mask, images):
    """(logits of the learned tokens, their loss)."""
    output = model(encoder.tokens(images), tokens, attention_mask, PROMPT)
    return output.logits, stage2_loss(output)


def their_causal(reference, tokens, attention_mask, images):
    rows, queries = len(tokens), CONFIG.queries
    ids = torch.cat([torch.full((rows, queries), OPT.vocabulary - 1), tokens], 1)
    labels = torch.cat(
        [torch.full((rows, queries + PROMPT), -100), tokens.masked_fill(~attention_mask, -100)[:, PROMPT:]], 1
    )
    seen = F.pad(attention_mask, (queries, 0), value=True).long()
    output = reference(pixel_values=images, input_ids=ids, attention_mask=seen, labels=labels)
    return output.logits[:, :-1][labels[:, 1:] != -100], output.loss


def test_the_whole_model_with_opt_equals_transformers(agree, perturb):
    config = replace(CONFIG, language=OPT)
    reference = make(transformers.Blip2ForConditionalGeneration, perturb)
    encoder, model = filled(GENERATION, reference, config)
    given = (*words(BATCH, 11, OPT.vocabulary), pictures(BATCH))
    their_logits, their_loss = their_causal(reference, *given)
    logits, loss = our_causal(encoder, model, *given)
    their_loss.backward()
    loss.backward()
    agree(
        "blip2.parity.opt.logits", "logits of the learned tokens, with OPT, against transformers", logits, their_logits
    )
    agree("blip2.parity.opt.loss", "caption loss with OPT against transformers", loss, their_loss)
    gradients_agree(agree, "opt", "the model with OPT", encoder, model, reference, GENERATION)


def our_seq2seq(encoder, model, prompt, asked, tokens, attention_mask, images):
    output = model(encoder.tokens(images), tokens, attention_mask, Prompt(prompt, asked))
    return output.logits, stage2_loss(output)


def their_seq2seq(reference, prompt, asked, tokens, attention_mask, images):
    rows, queries = len(tokens), CONFIG.queries
    ids = torch.cat([torch.full((rows, queries), T5.vocabulary - 1), prompt], 1)
    output = reference(
        pixel_values=images, input_ids=ids, attention_mask=F.pad(asked, (queries, 0), value=True).long(),
        labels=tokens.masked_fill(~attention_mask, -100),
    )  # fmt: skip
    return output.logits[attention_mask], output.loss


def test_the_whole_model_with_t5_equals_transformers(agree, perturb):
    config = replace(CONFIG, language=T5)
    reference = make(transformers.Blip2ForConditionalGeneration, perturb, language=T5)
    encoder, model = filled(GENERATION, reference, config)
    given = (*words(BATCH, 9, T5.vocabulary, seed=5), *words(BATCH, 8, T5.vocabulary), pictures(BATCH))
    their_logits, their_loss = their_seq2seq(reference, *given)
    logits, loss = our_seq2seq(encoder, model, *given)
    their_loss.backward()
    loss.backward()
    agree("blip2.parity.t5.logits", "logits of the answer, with T5, against transformers", logits, their_logits)
    agree("blip2.parity.t5.loss", "prefix language loss with T5 against transformers", loss, their_loss)
    gradients_agree(agree, "t5", "the model with T5", encoder, model, reference, GENERATION)


KINDS = {
    "retrieval": ("transformers-retrieval", "Blip2ForImageTextRetrieval", {"text_input": True}, CONFIG),
    "opt": (GENERATION, "Blip2ForConditionalGeneration", {}, replace(CONFIG, language=OPT)),
    "t5": (GENERATION, "Blip2ForConditionalGeneration", {"language": T5}, replace(CONFIG, language=T5)),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_converter_returns_every_tensor_of_transformers_exactly(name, agree, perturb):
    format, kind, given, config = KINDS[name]
    reference = make(getattr(transformers, kind), perturb, **given)
    encoder, model = filled(format, reference, config)
    ours = {**model.state_dict(), **{f"{VISION}{k}": v for k, v in encoder.state_dict().items()}}
    _, language = without_language(state(reference))
    back = with_language(published_of(ours, format, "eva"), language)
    what = f"{name}: transformers' weights, to ours and back"
    agree(f"blip2.parity.{name}.converter", what, back, state(reference), tolerance=0.0)
    make(getattr(transformers, kind), perturb, **given).load_state_dict(back, strict=True)


def test_uint8_pictures_give_what_normalised_floats_give(agree):
    torch.manual_seed(0)
    encoder, model = vision_encoder(VISION_CONFIG).eval(), Blip2Qformer(CONFIG).eval()
    ours, plain = of_uint8_and_floats(lambda images: model.image_features(encoder.tokens(images))[0], VISION_CONFIG)
    agree("blip2.parity.uint8", "the queries' states of uint8 pixels against normalised floats", ours, plain)


# ---- stage 1 against its equations

LAVIS = "lavis-stage1"
NEGATIVES = Negatives(images=torch.tensor([1, 0, 5, 2, 3, 4]), texts=torch.tensor([3, 4, 1, 0, 5, 1]))
IDS = torch.tensor([7, 3, 7, 1, 0, 5])
SMOOTHING = 0.1


class Asked:
    """What hard_negatives was asked, and answers that are known."""

    def __init__(self, monkeypatch):
        self.of = []
        monkeypatch.setattr(blip2_model, "hard_negatives", self)

    def __call__(self, batch, same=None, floor=0.0):
        self.of.append((batch, same, floor))
        return NEGATIVES


def stage1(perturb):
    torch.manual_seed(0)
    model = perturb(Blip2Qformer(CONFIG)).train()
    with torch.no_grad():
        model.temperature.fill_(0.11)
    return model


def reference_of(model):
    leaves = {k: v.requires_grad_() for k, v in published_of(state(model), LAVIS, "eva").items()}
    for twin, original in FORMATS[LAVIS].copies(leaves).items():
        leaves[twin] = leaves[original]
    sizes = {"layers": CONFIG.layers, "heads": CONFIG.heads, "cross_every": CONFIG.cross_every}
    return Reference(leaves, **sizes, pad=CONFIG.pad_token, decode=CONFIG.decode_token)


def their_losses(reference, context, tokens, ids):
    sides = reference.contrast(*reference.vectors(context, tokens))
    itc = reference.itc(sides, ids, SMOOTHING)
    itm = reference.itm(context, tokens, NEGATIVES.images.tolist(), NEGATIVES.texts.tolist())
    return sides, torch.stack([itc, itm, reference.itg(context, tokens, SMOOTHING)])


@pytest.mark.parametrize("by_picture", [False, True], ids=["own pair", "all texts of a picture"])
def test_the_first_stage_equals_its_equations(by_picture, agree, perturb, monkeypatch):
    model, asked = stage1(perturb), Asked(monkeypatch)
    reference = reference_of(model)
    context, tokens, ids = features(), texts(BATCH, CONFIG), IDS if by_picture else None
    losses = stage1_losses(model(context, tokens, ids), SMOOTHING)
    sides, theirs = their_losses(reference, context, tokens, ids.tolist() if by_picture else None)
    key = f"blip2.parity.stage1.{'by-picture' if by_picture else 'own-pair'}"
    agree(f"{key}.losses", "ITC, ITM and ITG against their equations", torch.stack([*losses]), theirs)
    [(batch, same, floor)] = asked.of
    for mine, side in zip((batch.text_to_image, batch.image_to_text), reversed(sides), strict=True):
        wanted = reference.negative_probabilities(side, ids.tolist() if by_picture else None)
        belong = torch.eye(BATCH, dtype=torch.bool) if same is None else same
        drawn = ((mine - mine.amax(1, keepdim=True)).exp() + floor).masked_fill(belong, 0)
        agree(f"{key}.negatives", "hard negatives' probabilities", drawn / drawn.sum(1, keepdim=True), wanted)
    losses.total().backward()
    theirs.sum().backward()
    weight_map = FORMATS[LAVIS].map
    grads = {k: v.grad for k, v in reference.p.items() if k not in FORMATS[LAVIS].copies(reference.p)}
    mine, wanted = {k: p.grad for k, p in model.named_parameters()}, to_ours(grads, weight_map)
    assert all(value is not None and value.abs().max() > 0 for value in mine.values()), "a zero compares nothing"
    agree(f"{key}.gradients", "all gradients of the first stage against its equations", mine, wanted)


# ---- faults that have to be told, in a model of either stage (or in shared/nn/qformer.py)


def layers_of(model):
    return model.qformer.layers


def _cross_attention_in_the_other_blocks(plant, model):
    layers = layers_of(model)
    for one, other in zip(layers[0::2], layers[1::2], strict=False):
        one.cross_attention, other.cross_attention = None, one.cross_attention
        one.cross_norm, other.cross_norm = None, one.cross_norm


def _keys_and_values_exchanged(layer):
    if layer.cross_attention is not None:
        rolled(layer.cross_attention.kv.weight, CONFIG.width)


def _queries_with_positions(plant, model):
    embeddings = model.qformer.embeddings
    table = embeddings.position.weight if hasattr(embeddings, "position") else torch.eye(CONFIG.queries, CONFIG.width)
    tokens = model.qformer.query_tokens + table[: CONFIG.queries]
    plant(model.qformer, "_queries", lambda real, rows: embeddings.norm(tokens).expand(rows, -1, -1))


def _text_sees_no_queries_in_matching(plant, model):
    """The uni-modal mask where the bi-directional one belongs."""

    def apart(real, x, queries, **given):
        if queries and x.shape[1] > queries:
            kind = torch.arange(x.shape[1]) < CONFIG.queries
            own = (kind[:, None] == kind[None])[None, None]
            given["mask"] = own if given.get("mask") is None else own & given["mask"]
        return real(x, queries, **given)

    plant(layers_of(model), "forward", apart)


BROKEN = {  # what the first layer saw is asked for
    "cross-attention in the other blocks": _cross_attention_in_the_other_blocks,
    "no cross-attention": in_each(layers_of, lambda layer: setattr(layer, "cross_attention", None)),
}
FOR_BOTH = BROKEN | {
    "keys and values exchanged": in_each(layers_of, _keys_and_values_exchanged),
    "one feed-forward for both": in_each(
        layers_of, lambda layer: setattr(layer, "query_mlp", layer.mlp or torch.nn.Identity())
    ),
    "feed-forwards exchanged": in_each(layers_of, lambda layer: exchanged(layer, "query_mlp", "mlp")),
    "norms of queries and text exchanged": in_each(
        layers_of, lambda layer: exchanged(layer, "query_mlp_norm", "mlp_norm")
    ),
    "queries not normalised": lambda plant, model: plant(
        model.qformer, "_queries", lambda real, rows: model.qformer.query_tokens.expand(rows, -1, -1)
    ),
    "queries with positions": _queries_with_positions,
    "queries causal": lambda plant, model: plant(
        layers_of(model), "forward", lambda real, x, queries, **given: real(x, queries, **given | {"causal": True})
    ),
    "no vision norm": lambda plant, model: plant(model.vision_norm, "forward", lambda real, x: x),
    "layers in reverse": lambda plant, model: layers_in_reverse(layers_of(model)),
}
FOR_TEXT = {
    "padding is seen": lambda plant, model: plant(qformer_file, "key_mask", lambda real, attention_mask: None),
    "positions behind the queries": lambda plant, model: plant(
        model.qformer.embeddings,
        "forward",
        lambda real, tokens, positions=None: real(tokens, CONFIG.queries + torch.arange(tokens.shape[1])),
    ),
    "text sees no queries in matching": _text_sees_no_queries_in_matching,
    "text looks at the picture": lambda plant, model: plant(
        layers_of(model),
        "forward",
        lambda real, x, queries, **given: real(x, x.shape[1] if queries else queries, **given),
    ),
    "match by query 0": lambda plant, model: plant(
        model.qformer, "match", lambda real, *given: real(*given)[:, :1].expand(-1, CONFIG.queries + 1, -1)
    ),
    "text from its second token": lambda plant, model: plant(
        model.qformer, "encode_text", lambda real, *given: real(*given)[:, 1:]
    ),
    "vectors not of unit length": lambda plant, model: plant(
        model, "image_vectors", lambda real, states: model.vision_proj(states).float()
    ),
}


# of the whole model


def _prefix_behind_the_text(plant, model):
    language = model.language_model

    def behind(real, prefix, tokens, attention_mask, **given):
        turned = torch.cat([language.embed(tokens), prefix], dim=1)
        return language.states(turned, F.pad(attention_mask, (0, prefix.shape[1]), value=True), **given)

    plant(model, "_read", behind)


def _one_token_more_given(plant, model):
    """The prefix split a token late: of what is to be said, the first token goes to the encoder."""

    def late(real, seen, tokens, attention_mask, prompt):
        if isinstance(prompt, Prompt):
            prompt = Prompt(
                torch.cat([prompt.tokens, tokens[:, :1]], 1),
                torch.cat([prompt.attention_mask, attention_mask[:, :1]], 1),
            )
            return real(seen, tokens[:, 1:], attention_mask[:, 1:], prompt)
        return real(seen, tokens, attention_mask, prompt + 1)

    plant(model, "forward", late)


def _labels_of_the_same_token(plant, model):
    """No shift: each state has to say the token that it has read."""

    def unshifted(real, prefix, tokens, attention_mask, prompt):
        states, learned = real(prefix, tokens, attention_mask, prompt)
        return torch.cat([states[:, 1:], states[:, :1]], 1), learned

    if model.language_model.kind == "causal":
        plant(model, "_continued", unshifted)
    else:
        plant(model, "_read", lambda real, *given, targets: real(*given, targets=targets.roll(-1, 1)))


OF_ONE_KIND = {  # T5's prompt is never learned; in OPT padding behind a text is unseen
    "prompt learned": lambda plant, model: plant(
        model, "forward", lambda real, seen, tokens, attention_mask, prompt: real(seen, tokens, attention_mask, 0)
    ),
    "padding read": lambda plant, model: plant(
        model, "_read", lambda real, prefix, tokens, mask, **given: real(prefix, tokens, torch.ones_like(mask), **given)
    ),
}
FOR_GENERATION = OF_ONE_KIND | {
    "prefix behind the text": _prefix_behind_the_text,
    "prefix not projected": lambda plant, model: setattr(
        model.projector.weight, "data", torch.eye(*model.projector.weight.shape)
    ),
    "projector without bias": lambda plant, model: model.projector.bias.data.zero_(),
    "one token more given": _one_token_more_given,
    "labels of the same token": _labels_of_the_same_token,
}


def test_every_mutant_is_told_from_transformers(count, perturb):
    causal = (*words(BATCH, 11, OPT.vocabulary), pictures(BATCH))
    seq2seq = (*words(BATCH, 9, T5.vocabulary, seed=5), *words(BATCH, 8, T5.vocabulary), pictures(BATCH))
    runs = {
        "retrieval": (our_retrieval, their_retrieval, (texts(BATCH, CONFIG), pictures(BATCH)), FOR_TEXT),
        "opt": (our_causal, their_causal, causal, FOR_GENERATION),
        "t5": (our_seq2seq, their_seq2seq, seq2seq, FOR_GENERATION),
    }
    caught = {}
    for name, (ours_runs, theirs_runs, given, own) in runs.items():
        format, kind, settings, config = KINDS[name]
        reference = make(getattr(transformers, kind), perturb, **settings)
        sound = filled(format, reference, config)
        with torch.no_grad():
            theirs = theirs_runs(reference, *given)
            assert largest(ours_runs(*sound, *given), theirs) <= 1e-5
            for fault, change in {**FOR_BOTH, **own}.items():
                encoder, model = copy.deepcopy(sound)
                with planting() as plant:
                    change(plant, model)
                    caught.setdefault(fault, []).append(largest(ours_runs(encoder, model, *given), theirs) > 1e-4)
    missed = {name for name, found in caught.items() if not (any if name in OF_ONE_KIND else all)(found)}
    assert len(caught) >= 20 and not missed, f"not caught: {missed}"
    count("blip2.parity.mutants", "faults planted in our model and caught", len(caught) - len(missed), len(caught))


# of the first stage's objectives

OWN = torch.arange(BATCH)


def _mean_over_the_queries(plant, model):
    def contrast(real, images, texts):
        sides = torch.einsum("bqe,me->bmq", images, texts.detach()), torch.einsum("be,mqe->bmq", texts, images.detach())
        return blip2_model.Similarities(*(side.mean(-1) / model.temperature for side in sides))

    plant(model, "contrast", contrast)


def _temperature_multiplies(plant, model):
    def multiplied(real, images, texts):
        return blip2_model.Similarities(*(side * model.temperature**2 for side in real(images, texts)))

    plant(model, "contrast", multiplied)


class Blind(list):
    """Caches as if the queries had said nothing."""

    def __init__(self, qformer, rows):
        caches = qformer.caches()
        heads, width = CONFIG.heads, CONFIG.width // CONFIG.heads
        nothing = torch.zeros(rows, heads, CONFIG.queries, width)
        for cache in caches:
            cache.append(nothing, nothing)
        super().__init__(caches)


def _text_behind_sees_no_queries(plant, model):
    def alone(real, tokens, attention_mask, caches):
        return real(tokens, attention_mask, Blind(model.qformer, len(tokens)))

    plant(model.qformer, "decode_text", alone)


def _no_gradient_through_the_cache(plant, model):
    def cut(real, tokens, attention_mask, caches):
        for cache in caches:
            cache.keys, cache.values = cache.keys.detach(), cache.values.detach()
        return real(tokens, attention_mask, caches)

    plant(model.qformer, "decode_text", cut)


FOR_STAGE1 = {
    "mean over the queries": _mean_over_the_queries,
    "query 0 alone": lambda plant, model: plant(
        model, "contrast", lambda real, images, texts: real(images[:, :1], texts)
    ),
    "temperature multiplies": _temperature_multiplies,
    "a picture that belongs is false": lambda plant, model: plant(
        model, "matching", lambda real, *given: real(*given[:-1], Negatives(OWN, OWN))
    ),
    "negatives exchanged": lambda plant, model: plant(
        model, "matching", lambda real, *given: real(*given[:-1], Negatives(NEGATIVES.texts, NEGATIVES.images))
    ),
    "true and false exchanged": lambda plant, model: plant(
        model, "matching", lambda real, *given: (real(*given)[1], real(*given)[0])
    ),
    "no label smoothing": lambda plant, model: setattr(model, "smoothing", 0.0),
    "written from [CLS]": lambda plant, model: plant(model, "with_start", lambda real, tokens: tokens),
    "text behind sees what follows": lambda plant, model: plant(
        layers_of(model), "forward", lambda real, x, queries, **given: real(x, queries, **given | {"causal": False})
    ),
    "text behind sees no queries": _text_behind_sees_no_queries,
    "no gradient through the cache": _no_gradient_through_the_cache,
    "keys of contrast with gradient": lambda plant, model: plant(blip2_model, "gathered", lambda real, tensor: tensor),
}


def test_every_fault_of_the_first_stage_is_told_from_its_equations(count, perturb):
    """By the losses, or where these stay as they are by the gradients."""
    context, tokens = features(), texts(BATCH, CONFIG)
    model = stage1(perturb)
    reference = reference_of(model)
    _, theirs = their_losses(reference, context, tokens, None)
    theirs.sum().backward()
    twins = FORMATS[LAVIS].copies(reference.p)
    wanted = to_ours({k: v.grad for k, v in reference.p.items() if k not in twins}, FORMATS[LAVIS].map)

    def difference(change=None):
        with pytest.MonkeyPatch.context() as patch, planting() as plant:
            Asked(patch)
            mutant = copy.deepcopy(model)
            mutant.smoothing = SMOOTHING
            if change:
                change(plant, mutant)
            losses = stage1_losses(mutant(context, tokens), mutant.smoothing)
            losses.total().backward()
            found = largest([torch.stack([*losses])], [theirs])
            pairs = [(p.grad, wanted[k]) for k, p in mutant.named_parameters() if p.grad is not None and k in wanted]
            return max(found, *(float((mine - one).abs().max()) for mine, one in pairs if mine.shape == one.shape))

    assert difference() <= 1e-5
    planted = {name: change for name, change in (FOR_STAGE1 | FOR_BOTH | FOR_TEXT).items() if name not in BROKEN}
    missed = {name for name, change in planted.items() if not difference(change) > 1e-4}
    assert not missed, f"not caught: {missed}"
    count("blip2.parity.stage1.mutants", "faults planted in the first stage and caught", len(planted), len(planted))
