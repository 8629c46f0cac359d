"""BLIP-2's wiring: what each objective compares and trains, two ranks, the bridge to a frozen language model, sizes."""

from dataclasses import replace

import blip2_ranks
import pytest
import torch
import torch.nn.functional as F
from language_models import text_config
from ranks import on_two_ranks
from torch import nn

from papers.blip2 import model as blip2
from papers.blip2.config import LANGUAGES, VARIANTS, Blip2Config, VisionConfig, at, with_tokenizer
from papers.blip2.evidence.structure import language_parameters, measure
from papers.blip2.losses import stage1_losses, stage2_loss
from papers.blip2.model import Blip2, Blip2Qformer, Objectives, Prompt, vision_encoder
from shared.core.errors import UserError
from shared.losses.image_text import Negatives
from shared.nn.bert import initialise_bert
from shared.nn.blocks import Block
from shared.nn.causal_lm import SmallLanguageModel
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.tools.footprint import count_parameters

TINY = VARIANTS["blip2-tiny"]()
SPEAKING = VARIANTS["blip2-tiny-small"]()
B, T = 5, 9
S, C = TINY.vision.tokens, TINY.vision.width
WIDTH, WORDS = 20, 70  # of the language models here


def moved(module, seed=0, by=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module


def stage1(config=TINY):
    torch.manual_seed(0)
    return moved(Blip2Qformer(config))


def batch(rows=B, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TINY.start_token, (rows, T), generator=generator)
    tokens[:, 0] = TINY.start_token
    for row in range(rows):
        end = 3 + (5 * row) % (T - 3)
        tokens[row, end], tokens[row, end + 1 :] = TINY.end_token, TINY.pad_token
    return torch.randn(rows, S, C, generator=generator), tokens


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# ---- contrast


def test_the_query_most_like_the_text_counts_before_the_temperature_divides():
    model, (features, tokens) = stage1(), batch()
    with torch.no_grad():
        _, images = model.image_features(features)
        texts = model.text_features(tokens)
        similar = model(features, tokens, None, Objectives(itm=False, itg=False)).similarities
        assert images.shape == (B, TINY.queries, TINY.embed_width)
        close(images.norm(dim=-1), torch.ones(B, TINY.queries))
        for picture in range(B):
            for text in range(B):
                best = max(float(query @ texts[text]) for query in images[picture]) / float(model.temperature)
                assert float(similar.image_to_text[picture, text]) == pytest.approx(best, abs=1e-4)
                assert float(similar.text_to_image[text, picture]) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("value", [3.0, 0.0004])
def test_the_temperature_is_learned_and_kept_within_no_bounds(value):
    model, (features, tokens) = stage1(), batch()
    assert float(Blip2Qformer(TINY).temperature.detach()) == pytest.approx(0.07)
    with torch.no_grad():
        model.temperature.fill_(0.07)
        before = model(features, tokens).similarities
        model.temperature.fill_(value)
    output = model(features, tokens)
    for found, old in zip(output.similarities, before, strict=True):
        torch.testing.assert_close(found, old * 0.07 / value, rtol=1e-3, atol=1e-4)
    stage1_losses(output).total().backward()
    assert float(model.temperature.detach()) == pytest.approx(value) and model.temperature.grad != 0


def test_what_is_compared_with_is_constant():
    model = stage1()
    images = F.normalize(torch.randn(B, TINY.queries, TINY.embed_width), dim=-1).requires_grad_()
    texts = F.normalize(torch.randn(B, TINY.embed_width), dim=-1).requires_grad_()
    similar = model.contrast(images, texts)
    by_images = torch.autograd.grad(similar.image_to_text.sum(), (images, texts), allow_unused=True)
    by_texts = torch.autograd.grad(similar.text_to_image.sum(), (images, texts), allow_unused=True)
    assert by_images[1] is None and by_images[0].abs().max() > 0
    assert by_texts[0] is None and by_texts[1].abs().max() > 0


def test_each_pair_on_its_own_gives_smoothed_cross_entropy_to_the_diagonal():
    model, (features, tokens) = stage1(), batch()
    output = model(features, tokens)
    own = torch.arange(B)
    wanted = sum(F.cross_entropy(side, own, label_smoothing=0.1) for side in output.similarities) / 2
    close(stage1_losses(output).itc, wanted)
    assert not torch.allclose(stage1_losses(output, smoothing=0.0).itc, wanted)


def test_texts_of_one_picture_share_its_target_and_are_no_negatives(monkeypatch):
    model, (features, tokens) = stage1(), batch()
    ids, given = torch.tensor([7, 3, 7, 4, 3]), []
    monkeypatch.setattr(blip2, "hard_negatives", lambda similar, same: given.append(same) or chosen())
    output = model(features, tokens, ids)
    same = ids[:, None] == ids[None]
    assert torch.equal(given[0], same)
    targets = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / B
    wanted = -sum((targets * side.log_softmax(1)).sum(1).mean() for side in output.similarities) / 2
    close(stage1_losses(output).itc, wanted)


# ---- matching


def chosen():
    return Negatives(images=torch.tensor([2, 0, 4, 1, 3]), texts=torch.tensor([1, 3, 0, 2, 2]))


def test_matching_sees_true_pairs_then_false_pictures_then_false_texts(monkeypatch):
    model, (features, tokens) = stage1().eval(), batch()
    monkeypatch.setattr(blip2, "hard_negatives", lambda similar, same: chosen())
    with torch.no_grad():
        output = model(features, tokens)
        close(output.matches, model.match(features, tokens))
        assert output.mismatches.shape == (2 * B, 2)
        close(output.mismatches[:B], model.match(features[chosen().images], tokens))
        close(output.mismatches[B:], model.match(features, tokens[chosen().texts]))
        logits = torch.cat([output.matches, output.mismatches])
        labels = torch.tensor([1] * B + [0] * 2 * B)
        close(stage1_losses(output, smoothing=0.5).itm, F.cross_entropy(logits, labels))  # and no smoothing


def test_negatives_are_never_a_pairs_own_partner():
    model, (features, tokens) = stage1(), batch()
    given = []
    model.matching = lambda context, seen, tokens, negatives: given.append(negatives) or (None, None)
    with torch.no_grad():
        for _ in range(30):
            model(features, tokens, None, Objectives(itg=False))
    own = torch.arange(B)
    assert all((one.images != own).all() and (one.texts != own).all() for one in given)
    assert len({tuple(one.images.tolist()) for one in given}) > 1


def test_every_query_votes_and_the_mean_of_their_logits_decides():
    model, (features, tokens) = stage1().eval(), batch()
    with torch.no_grad():
        attention_mask = model.attention_mask(tokens)
        states = model.qformer.match(tokens, attention_mask, model.vision_norm(features))
        votes = [model.itm_head(states[:, query]) for query in range(TINY.queries)]
        close(model.match(features, tokens), sum(votes) / TINY.queries)
        assert model.match(features[:1], tokens).shape == (B, 2)  # texts in succession share a picture
        close(model.match(features[:1], tokens)[3:], model.match(features[:1], tokens[3:]))


def test_texts_are_matched_and_read_as_the_tokenizer_gives_them(monkeypatch):
    """[CLS] stays first: BLIP's [ENC] has no place here, and [DEC] is for generation alone."""
    model, (features, tokens) = stage1(), batch()
    seen = {}
    for name in ("encode_text", "match", "decode_text"):
        method = getattr(model.qformer, name)
        monkeypatch.setattr(
            model.qformer, name, lambda t, *rest, name=name, method=method: seen.update({name: t}) or method(t, *rest)
        )
    before = tokens.clone()
    model(features, tokens)
    assert torch.equal(tokens, before) and torch.equal(seen["encode_text"], tokens)
    assert (seen["match"][:, 0] == TINY.start_token).all() and torch.equal(seen["match"][:B], tokens)
    assert (seen["decode_text"][:, 0] == TINY.decode_token).all() and torch.equal(
        seen["decode_text"][:, 1:], tokens[:, 1:]
    )


# ---- generation


def test_the_queries_of_contrast_are_cached_for_generation_and_not_run_again():
    model, (features, tokens) = stage1(), batch()
    passes = []
    model.qformer.layers[0].register_forward_pre_hook(lambda layer, args: passes.append((args[1], args[0].shape)))
    model(features, tokens)
    Q, D = TINY.queries, TINY.width
    assert passes == [(Q, (B, Q, D)), (0, (B, T, D)), (Q, (3 * B, Q + T, D)), (0, (B, T, D))]


def test_generation_is_learned_where_there_is_a_next_token_and_nowhere_else():
    model, (features, tokens) = stage1().eval(), batch()
    rows = []
    model.head.register_forward_pre_hook(lambda head, args: rows.append(args[0].shape))
    output = model(features, tokens)
    attention_mask = tokens != TINY.pad_token
    labels = tokens[:, 1:][attention_mask[:, 1:]]
    assert torch.equal(output.next_tokens, labels) and rows == [(len(labels), TINY.width)]
    whole = model.caption_logits(features, tokens)[:, :-1]
    close(output.logits, whole[attention_mask[:, 1:]])
    wanted = F.cross_entropy(
        whole.mT, tokens[:, 1:].masked_fill(~attention_mask[:, 1:], -100), ignore_index=-100, label_smoothing=0.1
    )
    close(stage1_losses(output).itg, wanted)


def test_generation_trains_the_queries_through_their_cache():
    model, (features, tokens) = stage1(), batch()
    stage1_losses(model(features, tokens, None, Objectives(itc=False, itm=False))).total().backward()
    first = model.qformer.layers[0]
    for parameter in (model.qformer.query_tokens, first.cross_attention.kv.weight, first.query_mlp.up.weight,
                      model.vision_norm.weight):  # fmt: skip
        assert parameter.grad.abs().max() > 1e-6


def test_decoding_writes_what_the_training_pass_would_say():
    model, (features, _) = stage1().eval(), batch()
    tokens = torch.randint(1, TINY.start_token, (B, T))
    tokens[:, 0] = TINY.decode_token
    with torch.no_grad():
        wanted = model.caption_logits(features, tokens)
        decoding = model.decoding(features)
        found = [decoding.prefill(tokens[:, :3], torch.ones(B, 3, dtype=torch.bool))]
        found += [decoding.step(tokens[:, i]) for i in range(3, T)]
    close(torch.stack(found, 1), wanted[:, 2:])


# ---- the whole of stage 1


@pytest.mark.parametrize(
    "objectives",
    [
        Objectives(),
        Objectives(itg=False),
        Objectives(itm=False),
        Objectives(itm=False, itg=False),
        Objectives(itc=False, itm=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", [3, 4])  # the last with and without cross-attention
def test_exactly_what_an_objective_trains_gets_a_gradient(objectives, layers):
    model, (features, tokens) = stage1(replace(TINY, layers=layers)), batch()
    losses = stage1_losses(model(features, tokens, None, objectives))
    assert [loss is not None for loss in losses] == list(objectives)
    losses.total().backward()
    trained = {name for name, p in model.named_parameters() if p in model.trained_by(objectives)}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert [name for name, p in model.named_parameters() if name in trained and not p.grad.abs().max() > 0] == []


def test_matching_without_contrast_is_refused():
    with pytest.raises(ValueError, match="train both, or neither"):
        stage1()(*batch(), None, Objectives(itc=False))


@pytest.mark.parametrize("ids", [None, torch.tensor([4])], ids=["pair", "picture"])
def test_a_pair_alone_is_refused_where_it_would_be_matched(ids):
    with pytest.raises(UserError, match="one pair has no negatives"):
        stage1()(*batch(1), ids)
    losses = stage1_losses(stage1()(*batch(1), ids, Objectives(itm=False)))
    assert all(loss.isfinite() for loss in (losses.itc, losses.itg))


def test_half_precision_and_features_kept_in_it_give_the_same_losses_and_train(monkeypatch):
    monkeypatch.setattr(blip2, "hard_negatives", lambda similar, same: chosen())
    features, tokens = batch()
    plain, half = stage1(), stage1()
    wanted = torch.stack(stage1_losses(plain(features, tokens)))
    with torch.autocast("cpu", torch.bfloat16):
        normed = half.vision_norm(features.bfloat16())
        losses = stage1_losses(half(features.bfloat16(), tokens))
    assert normed.dtype == torch.float32
    torch.testing.assert_close(torch.stack(losses), wanted, rtol=0.05, atol=0.02)
    losses.total().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_columns_of_padding_and_the_order_of_the_batch_change_no_loss(monkeypatch):
    model, (features, tokens) = stage1().eval(), batch()
    monkeypatch.setattr(blip2, "hard_negatives", lambda similar, same: chosen())
    wide = torch.cat([tokens, torch.full((B, 4), TINY.pad_token)], dim=1)
    with torch.no_grad():
        wanted = torch.stack(stage1_losses(model(features, tokens)))
        close(torch.stack(stage1_losses(model(features, wide))), wanted)
        turned = stage1_losses(model(features.roll(1, 0), tokens.roll(1, 0), None, Objectives(itm=False)))
    close(torch.stack([turned.itc, turned.itg]), wanted[[0, 2]])


def test_stage_1_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, (features, tokens) = Blip2Qformer(TINY), batch(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(45):
        losses = stage1_losses(model(features, tokens), smoothing=0.0)
        if not step:
            first = losses
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
    for name, share in (("itc", 0.2), ("itm", 0.2), ("itg", 0.3)):
        assert getattr(losses, name) < share * getattr(first, name), name


def test_the_stages_norm_and_projections_begin_as_published():
    model = Blip2Qformer(TINY)
    assert model.vision_norm.eps == 1e-5 and torch.equal(model.vision_norm.weight, torch.ones(C))
    assert float(Blip2Qformer(replace(TINY, width=768, heads=12)).qformer.query_tokens.detach().std()) == pytest.approx(
        0.02, rel=0.1
    )


# ---- two ranks


def test_two_ranks_contrast_and_match_with_all_and_train_as_one_rank_with_the_whole_batch():
    found = on_two_ranks(blip2_ranks.on_rank)
    rows = blip2_ranks.ROWS
    for with_ids in (False, True):
        whole = blip2_ranks.step(0, slice(None), with_ids)
        for rank in (0, 1):
            one, own = found[rank][with_ids], slice(rank * rows, (rank + 1) * rows)
            for ours, alone in zip(one["similar"], whole["similar"], strict=True):
                close(torch.tensor(ours), torch.tensor(alone)[own])  # (B, M)
            assert one["targets"] == whole["targets"][own] and one["same"] == whole["same"][own]
        losses = [torch.tensor(found[rank][with_ids]["losses"]) for rank in (0, 1)]
        close(sum(losses) / 2, torch.tensor(whole["losses"]))
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(
                torch.tensor(found[0][with_ids]["gradients"][name]), gradient, atol=2e-5, rtol=1e-3, msg=name
            )


def test_texts_longer_than_the_context_cannot_be_exchanged_between_ranks():
    with pytest.raises(ValueError, match="20 tokens, the configured context has 16"):
        stage1()._of_full_length(torch.ones(2, 20, dtype=torch.long))


# ---- the language models of stage 2


class Causal(nn.Module):
    """A language model of the causal kind, as small as they come; `asked` is how many states it made logits of."""

    kind, width, vocabulary, context = "causal", WIDTH, WORDS, 64

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 2) for _ in range(2))
        self.norm, self.out, self.dropout = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS), nn.Dropout(0.5)
        self.asked = []

    def embed(self, tokens):
        return self.words(tokens)

    def states(self, embeddings, attention_mask, targets=None):
        x = self.dropout(embeddings + self.places.weight[: embeddings.shape[1]])
        for block in self.blocks:
            x = block(x, mask=attention_mask[:, None, None], causal=True)
        return self.norm(x)

    def logits(self, states):
        self.asked.append(len(states))
        return self.out(states)


class Seq2Seq(Causal):
    """The other kind: a decoder over a start token and the targets, which sees the mean of what the encoder read."""

    kind = "seq2seq"

    def states(self, embeddings, attention_mask, targets=None):
        for block in self.blocks:
            embeddings = block(embeddings, mask=attention_mask[:, None, None])
        read = (embeddings * attention_mask[..., None]).sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        before = F.pad(targets[:, :-1], (1, 0), value=0)
        return self.norm(self.embed(before).cumsum(1) + read)


def speaking(kind=Causal):
    torch.manual_seed(0)
    return moved(Blip2(SPEAKING, moved(initialised(kind()))))


def initialised(module):
    initialise_bert(module, 0.3)
    return module


def said(rows=B, seed=3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, WORDS, (rows, 7), generator=generator)
    attention_mask = torch.arange(7) < torch.tensor([7, 4, 5, 2, 6][:rows])[:, None]
    return tokens.masked_fill(~attention_mask, 0), attention_mask


@pytest.mark.parametrize("prompt", [0, 2, torch.tensor([1, 3, 0, 2, 4])], ids=["none", "of all", "of each"])
def test_a_causal_model_speaks_behind_the_prefix_and_makes_logits_where_there_is_a_label_alone(prompt):
    model, (features, _), (tokens, attention_mask) = speaking(), batch(), said()
    output = model(features, tokens, attention_mask, prompt)
    learned = attention_mask & (torch.arange(7) >= torch.as_tensor(prompt).view(-1, 1))
    language, Q = model.language_model, SPEAKING.queries
    assert torch.equal(output.next_tokens, tokens[learned]) and language.asked == [int(learned.sum())]
    words = torch.cat([model.prefix(features), language.embed(tokens)], dim=1)
    states = language.states(words, F.pad(attention_mask, (Q, 0), value=True))
    wanted = language.logits(states)[:, Q - 1 : -1]  # each token is said by what stands before it
    close(output.logits, wanted[learned])
    close(stage2_loss(output), F.cross_entropy(wanted[learned], tokens[learned]))  # not smoothed


def test_a_seq2seq_model_reads_the_prefix_and_the_prompt_and_says_the_targets():
    model, (features, _), (tokens, attention_mask) = speaking(Seq2Seq), batch(), said()
    prompt = Prompt(torch.randint(1, WORDS, (B, 3)), torch.tensor([[True] * 3] * 4 + [[True, True, False]]))
    language, Q = model.language_model, SPEAKING.queries
    for given in (prompt, 0):
        language.asked.clear()
        output = model(features, tokens, attention_mask, given)
        assert torch.equal(output.next_tokens, tokens[attention_mask]) and language.asked == [int(attention_mask.sum())]
        read, real = (given.tokens, given.attention_mask) if given else (tokens[:, :0], attention_mask[:, :0])
        words = torch.cat([model.prefix(features), language.embed(read)], dim=1)
        states = language.states(words, F.pad(real, (Q, 0), value=True), targets=tokens)
        close(output.logits, language.logits(states[attention_mask]))
    with pytest.raises(ValueError, match="reads a Prompt"):
        model(features, tokens, attention_mask, 2)


def test_what_is_prompted_changes_what_is_said_and_what_is_padded_does_not():
    model, (features, _), (tokens, attention_mask) = speaking(Seq2Seq), batch(), said()
    words, real = torch.randint(1, WORDS, (B, 3)), torch.tensor([[True, True, False]] * B)
    one, two, other = (
        model(features, tokens, attention_mask, Prompt(torch.where(place, (words + 1) % WORDS, words), real)).logits
        for place in (torch.zeros(3).bool(), torch.tensor([False, False, True]), torch.tensor([True, False, False]))
    )
    assert torch.equal(one, two) and not torch.allclose(one, other)


@pytest.mark.parametrize("kind", [Causal, Seq2Seq])
def test_the_bridge_alone_is_trained_through_a_language_model_that_stays_as_it_was(kind):
    language = initialised(kind())
    before = {key: value.clone() for key, value in language.state_dict().items()}
    torch.manual_seed(0)
    model, (features, _), (tokens, attention_mask) = moved(Blip2(SPEAKING, language)), batch(), said()
    stage2_loss(model.train()(features, tokens, attention_mask)).backward()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"vision_norm", "qformer", "projector"} == {key.split(".")[0] for key in model.state_dict()}
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    assert all(p.grad is None and not p.requires_grad for p in language.parameters())
    assert not any(module.training for module in language.modules())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(value, before[key]) for key, value in language.state_dict().items())


def test_stage_2_in_half_precision_and_of_one_row():
    torch.manual_seed(0)
    language = initialised(Causal()).bfloat16()
    model, (features, _), (tokens, attention_mask) = moved(Blip2(SPEAKING, language)), batch(), said()
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage2_loss(model(features.bfloat16(), tokens, attention_mask))
        alone = stage2_loss(model(features[:1].bfloat16(), tokens[:1], attention_mask[:1]))
    (loss + alone).backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
    whole = speaking()
    assert float(loss.detach()) == pytest.approx(
        float(stage2_loss(whole(features, tokens, attention_mask)).detach()), rel=0.2
    )


def test_stage_2_teaches_a_frozen_model_to_name_what_the_features_hold():
    torch.manual_seed(0)
    model = Blip2(SPEAKING, initialised(Causal()))
    features, (tokens, attention_mask) = batch()[0], said()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = stage2_loss(model(features, tokens[:, :2], attention_mask[:, :2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_decoding_behind_the_prefix_says_what_the_training_pass_does():
    torch.manual_seed(0)
    language = initialised(SmallLanguageModel(WORDS, 48, WIDTH, 2, 2))
    model, (features, _), (tokens, _) = moved(Blip2(SPEAKING, language)), batch(), said()
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        wanted = model(features, tokens, attention_mask, prompt=3).logits.view(B, 4, WORDS)
        decoding = model.decoding(features)
        found = [decoding.prefill(tokens[:, :3], attention_mask[:, :3])]
        found += [decoding.step(tokens[:, i]) for i in range(3, 6)]
    close(torch.stack(found, 1), wanted)


def test_stage_2_starts_from_stage_1_without_its_text():
    first, (features, _) = stage1().eval(), batch()
    for source in (first, first.state_dict()):
        second = Blip2.started_from(source, SPEAKING, Causal()).eval()
        with torch.no_grad():
            states = second.qformer.encode_queries(second.vision_norm(features))
            assert torch.equal(states, first.image_features(features)[0])
            close(second.prefix(features), second.projector(states))
    assert not any(".mlp" in key or "word" in key or "position" in key for key in second.state_dict())


@pytest.mark.parametrize("kind", [Causal, Seq2Seq])
def test_a_question_may_meet_the_queries_in_the_q_former(kind):
    start, (features, tokens), (said_tokens, attention_mask) = stage1(), batch(), said()
    language = initialised(kind())
    model = Blip2.started_from(start, SPEAKING, language, question=True).eval()
    question = Prompt(tokens, start.attention_mask(tokens))
    with torch.no_grad():
        states = start.eval().qformer.match(tokens, question.attention_mask, start.vision_norm(features))
        close(model.prefix(features, question), model.projector(states[:, : TINY.queries]))
        plain = Blip2.started_from(start, SPEAKING, language).eval()
        plain.projector.load_state_dict(model.projector.state_dict())
        close(model.prefix(features), plain.prefix(features))  # nothing is asked
        assert not torch.allclose(model.prefix(features, question), plain.prefix(features), atol=1e-3)
        padded = Prompt(tokens.masked_fill(~question.attention_mask, 5), question.attention_mask)
        close(model.prefix(features, padded), model.prefix(features, question))
    stage2_loss(model(features, said_tokens, attention_mask, question=question)).backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert silent == {name for name, p in model.named_parameters() if not p.requires_grad}
    unread = ("qformer.layers.2.mlp.", "qformer.layers.2.mlp_norm.")
    assert len(silent) == 6 and all(name.startswith(unread) for name in silent)
    with pytest.raises(ValueError, match="no text branch to read a question"):
        plain.prefix(features, question)


def test_a_question_is_heard_where_an_answer_is_written():
    torch.manual_seed(0)
    language = SPEAKING.language
    lm = SmallLanguageModel(language.vocabulary, language.context, language.width, 2, language.heads)
    model, (features, tokens) = moved(Blip2(SPEAKING, lm, question=True)).eval(), batch()
    question = Prompt(tokens, tokens != TINY.pad_token)
    with torch.no_grad():
        close(model.decoding(features, question).prefix, model.prefix(features, question))
        assert not torch.allclose(model.decoding(features).prefix, model.prefix(features, question))


def test_fine_tuning_for_vqa_trains_the_text_branch_too():
    measured = measure("blip2-vit-g-opt-2.7b")
    text = measured["vqa"] - measured["captioner"]
    with torch.device("meta"):
        stage1 = Blip2Qformer(VARIANTS["blip2-vit-g"]())
    assert text == measured["qformer_stage1"] - count_parameters(stage1.head) - measured["qformer_stage2"] > 80e6


def test_stage_2_starts_from_nothing_but_its_own_stage_1():
    state = stage1().state_dict()
    missing = {key: value for key, value in state.items() if "query_mlp.up" not in key}
    for weights, message in (
        (missing, r"missing: qformer\.layers\.0\.query_mlp\.up\.bias"),
        (state | {"vision_encoder.x": torch.zeros(2)}, r"unknown: vision_encoder\.x"),
        (state | {"vision_norm.weight": torch.zeros(3)}, r"another shape: vision_norm\.weight"),
        (stage1(replace(TINY, queries=6)), r"another shape: qformer\.query_tokens"),
    ):
        with pytest.raises(UserError, match=message):
            Blip2.started_from(weights, SPEAKING, Causal())


# ---- configurations and counts


def test_a_tokenizers_ids_become_the_configurations():
    tokenizer = SmallTokenizer.train(["a cat", "a dog"], 300, ("decode_start",))
    config = with_tokenizer(TINY, tokenizer)
    assert config.vocabulary == tokenizer.vocab_size and config.decode_token == tokenizer.decode_start
    assert (config.pad_token, config.start_token, config.end_token, config.tokenizer) == (
        tokenizer.pad,
        tokenizer.start,
        tokenizer.end,
        "small-bpe",
    )


def test_the_published_configurations_are_those_of_the_official_code():
    for name in ("blip2-vit-l", "blip2-vit-g"):
        config = VARIANTS[name]()
        assert config.vision.tokens == 257 and config.language is None
        assert at(364, config).vision.tokens == 677 and at(490, config, 35).context == 35
        assert (config.decode_token, config.start_token, config.end_token) == (30522, 101, 102)
    assert VARIANTS["blip2-vit-g-opt-6.7b"]().language.kind == "causal"
    assert VARIANTS["blip2-vit-l-flan-t5-xl"]().language.kind == "seq2seq"
    map_of = VisionConfig("efficientnet", 96, 16, width=192, layers=5, heads=0)
    assert map_of.tokens == 36
    for make, message in (
        (lambda: replace(map_of, kind="resnet"), "kind is one of clip"),
        (lambda: replace(LANGUAGES["small"], family="rnn"), "family is one of opt"),
        (lambda: vision_encoder(map_of), "no ViT"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert isinstance(config, Blip2Config)


def test_a_frozen_encoder_is_built_without_its_last_norm_and_eva_without_a_bias_on_keys():
    vit = vision_encoder(TINY.vision).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert vit.tokens(pixels).shape == (2, S, C) and isinstance(vit.output_norm, nn.Identity)
    assert len(vit.blocks) == TINY.vision.layers and isinstance(vit.input_norm, nn.LayerNorm)
    eva = vision_encoder(VisionConfig("eva", 28, 14, width=22, layers=2, heads=2, mlp_ratio=4.3637))
    assert eva.blocks[0].attention.qkv.bias.shape == (44,) and eva.blocks[0].mlp.up.out_features == 96


# Table 2: trained and all parameters, in millions and in billions. The totals are sums with what the language models
# are called, 3B where FlanT5-XL has 2.85.
TABLE_2 = {
    "blip2-vit-l-opt-2.7b": (104, 3.1),
    "blip2-vit-g-opt-2.7b": (107, 3.8),
    "blip2-vit-g-opt-6.7b": (108, 7.8),
    "blip2-vit-l-flan-t5-xl": (103, 3.4),
    "blip2-vit-g-flan-t5-xl": (107, 4.1),
    "blip2-vit-g-flan-t5-xxl": (108, 12.1),
}


@pytest.mark.parametrize("variant", TABLE_2)
def test_the_published_counts_of_table_2_are_met(variant):
    measured, (trained, total) = measure(variant), TABLE_2[variant]
    assert round(measured["trained_stage2"] / 1e6) == trained
    assert round(measured["total_by_name"] / 1e9, 1) == total
    assert measured["total"] == pytest.approx(total * 1e9, rel=0.05)
    assert (measured["queries"], measured["query_width"], measured["image_tokens"]) == (32, 768, 257)
    assert (measured["output_tokens"], measured["cross_attention_layers"]) == (32, 6)


def test_what_stage_1_trains_is_of_the_class_of_188_million():
    assert measure("blip2-vit-g")["trained_stage1"] == pytest.approx(188e6, rel=0.01)
    assert measure("blip2-vit-l")["trained_stage1"] == pytest.approx(188e6, rel=0.03)


def test_the_houses_language_model_is_counted_as_it_is_built():
    config = LANGUAGES["small"]
    sizes = config.vocabulary, config.context, config.width, config.layers, config.heads
    assert language_parameters(config) == count_parameters(SmallLanguageModel(*sizes, mlp_width=config.mlp_width))
    uneven = replace(config, kv_heads=1, mlp_width=72)
    assert language_parameters(uneven) == count_parameters(SmallLanguageModel(*sizes, kv_heads=1, mlp_width=72))


@pytest.mark.parametrize("name", [name for name, one in LANGUAGES.items() if one.family != "small"])
def test_language_models_are_counted_as_transformers_builds_them(name):
    import transformers

    config = LANGUAGES[name]
    kinds = {"opt": "OPTForCausalLM", "t5": "T5Model", "llama": "LlamaForCausalLM"}
    with torch.device("meta"):
        given = text_config(config)
        published = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
        model = getattr(transformers, kinds[config.family])(published)
        model.tie_weights()
    output = config.vocabulary * config.width if config.family == "t5" else 0  # FlanT5's is not the word table
    assert language_parameters(config) == count_parameters(model) + output
