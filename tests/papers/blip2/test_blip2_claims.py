"""The data of BLIP-2's claims, what its arms measure, freezing, and effects on measurements whose answer is known."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import arms
import pytest
import torch
from torch import nn

from papers.blip2 import encode as evaluate
from papers.blip2.config import LANGUAGES, VARIANTS, LanguageConfig
from papers.blip2.data import QUESTION, Question, build_data
from papers.blip2.evidence import claims, headline, measuring, stages
from papers.blip2.evidence.stages import StagePipeline
from papers.blip2.frozen import LanguageModelBundle
from papers.blip2.model import Blip2, Blip2Qformer
from papers.blip2.module import (
    WITHOUT_ITG,
    FrozenWatch,
    Stage1Module,
    Stage2Module,
    example,
)
from papers.blip2.recipe import Blip2Recipe
from papers.blip2.text import PromptTokenizer, clean_caption, prompt_tokenizer_of
from shared.backbones.vision import vit_encoder
from shared.core.errors import UserError
from shared.data.synthetic.scenes import COLOURS
from shared.nn.causal_lm import SmallLanguageModel
from shared.nn.frozen import Frozen
from shared.nn.generation import RELEASED_BEAMS
from shared.nn.vit import VisionTransformer

SMALL = Blip2Recipe(
    paper="blip2", model="blip2-tiny", data="shapes", pairs=48, test_pairs=16, asked_pictures=12, classes=6, batch=8,
    steps=3, warmup_steps=1, encoder="strong", weak_encoder="weak", other_encoder="other", headline_model="",
    larger_width=48, lm_texts=60, lm_steps=3, lm_batch=8, stage2_steps=3, stage2_batch=8, headline_steps=2,
    headline_word_steps=4, headline_batch=8, headline_questions=8, compared_steps=2, beams=2, longest=4, candidates=4,
    shots=1, more=2, text_tokens=64, accelerator="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def encoders(monkeypatch):
    """Untrained ViTs in the place of what other papers trained."""

    def frozen_encoder(name, layer, scale, manifest, half):
        torch.manual_seed(len(name))
        vit = VisionTransformer(32, 16, 24, 2, 2, output_norm=False, mean=(0.5,) * 3, std=(0.25,) * 3)
        return vit_encoder(vit, layer, torch.bfloat16 if half else None)

    monkeypatch.setattr(stages, "frozen_encoder", frozen_encoder)


@pytest.fixture(scope="module")
def data():
    return build_data(SMALL, 3)


context, measured = partial(arms.context, recipe=SMALL), partial(arms.measured, claims, SMALL)


# ---- data


def test_questions_are_about_the_very_pictures_of_the_world(data):
    """A picture's caption, where it names a colour, names the one that its question has for an answer."""
    answers = {one.picture: one.answer for one in data.questions if one.kind == "colour"}
    named = [(row, text, [c for c in COLOURS if c in text.split()]) for row, text in data.captions]
    colours = [(row, found[0]) for row, _, found in named if found]
    assert len(colours) > 10 and all(answers[row] == colour for row, colour in colours)


def test_no_picture_that_is_asked_about_or_searched_is_trained_on(data):
    trained = {image.numpy().tobytes() for image in data.dataset.train.images}
    eval_set = [*data.eval_set.images, *data.eval_set.question_images]
    assert eval_set and not any(image.numpy().tobytes() in trained for image in eval_set)


def test_pope_asks_for_as_many_things_that_are_there_as_that_are_not(data):
    answers = [one.answer for one in data.eval_set.pope]
    assert answers.count("yes") == answers.count("no") == len(answers) / 2
    names = {one.picture: one.answer for one in data.eval_set.questions if one.kind == "what"}
    for one in data.eval_set.pope:
        assert (names[one.picture] in one.question) == (one.answer == "yes")


def test_the_texts_of_stage_2_hold_the_share_of_questions_that_the_recipe_asks_for(data):
    for share in (0.0, 0.5, 0.75, 1.0):
        texts = data.stage2_texts(share, 3)
        asked = sum(prompt.startswith("Question:") for _, prompt, _ in texts)
        assert asked / len(texts) == pytest.approx(share, abs=0.02)
    assert data.stage2_texts(0.5, 3) == data.stage2_texts(0.5, 3) != data.stage2_texts(0.5, 4)


def test_the_small_language_model_reads_the_same_texts_whatever_the_seed(data):
    other = build_data(SMALL, 4)
    assert other.documents == data.documents and other.tokenizer.digest == data.tokenizer.digest
    assert other.captions != data.captions


@pytest.mark.parametrize(
    "changed",
    [
        {"stage": 3},
        {"layer": "first"},
        {"kinds": ["why"]},
        {"kinds": []},
        {"asked": 1.5},
        {"shots": 0},
        {"queries": -1},
        {"small_width": 0},
        {"larger_layers": 0},
        {"dropout": 1.0},
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changed):
    with pytest.raises(UserError, match="recipe:"):
        replace(SMALL, **changed)


# ---- words


def words(context=12):
    return PromptTokenizer(
        encode=lambda text: [10 + len(word) for word in text.split()], decode=str, start=(1,), stop=(2, 3), pad=0,
        context=context,
    )  # fmt: skip


def test_a_prompt_is_given_and_its_answer_learned_up_to_the_stop_and_a_text_alone_from_its_start_on():
    texts = words().training_texts([("one three", "four"), ("", "a bb")], 9)
    assert texts.tokens.tolist() == [[1, 13, 15, 14, 2], [1, 11, 12, 2, 0]]
    assert texts.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert texts.prompt_length.tolist() == [3, 0]


def test_prompts_are_padded_on_the_left():
    tokens, attention_mask = words().prompts(["a", "a bb"])
    assert tokens.tolist() == [[0, 1, 11], [1, 11, 12]] and attention_mask.tolist() == [[False, True, True], [True] * 3]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused():
    for some in (words(), seq2seq()):
        with pytest.raises(UserError, match="no room for an answer"):
            some.training_texts([("one three", "four")], 3 if some.start else 2)


def test_texts_are_cut_and_what_overflows_the_context_beside_the_queries_is_refused():
    long = [("", "a bb ccc dddd")]
    assert words(context=9).training_texts(long, 4, queries=5).tokens.tolist() == [[1, 11, 12, 13]]  # it does not end
    with pytest.raises(UserError, match=r"texts of 4 tokens behind 6 queries, .* context is 9: shorten"):
        words(context=9).training_texts(long, 4, queries=6)
    cut = seq2seq(context=9).training_texts([("", "a bb ccc dddd eeeee ffffff")] * 8, 3, queries=6)
    assert cut.tokens.shape[1] <= 3 and cut.prompts.shape[1] <= 3
    for answer, asked in zip(cut.tokens.tolist(), cut.prompts.tolist(), strict=True):
        assert 2 in answer and 7 in asked  # both keep their ends
    with pytest.raises(UserError, match="texts of 3 tokens behind 7 queries"):
        seq2seq(context=9).training_texts([("bb ccc", "a")], 3, queries=7)


def seq2seq(context=12):
    """T5's: no start token, an end behind what its encoder reads."""
    return replace(words(context), start=(), behind=(7,))


def test_a_seq2seq_model_is_asked_the_prompt_and_learns_the_answer():
    texts = seq2seq().training_texts([("one three", "four"), ("a", "bb a")], 9)
    assert texts.prompts.tolist() == [[13, 15, 7], [11, 7, 0]] and texts.tokens.tolist() == [[14, 2, 0], [12, 11, 2]]
    assert texts.prompt_mask.tolist() == [[True] * 3, [True, True, False]]
    assert texts.attention_mask.tolist() == [[True, True, False], [True] * 3]


def test_a_text_without_a_prompt_is_split_at_random_for_a_seq2seq_model_by_the_seed():
    text = ("", "a bb ccc dddd eeeee")
    ids = [11, 12, 13, 14, 15]

    def splits(seed):
        texts = seq2seq().training_texts([text] * 40, 9, seed=seed)
        places = []
        for asked, said in zip(texts.prompts.tolist(), texts.tokens.tolist(), strict=True):
            before, behind = asked[: asked.index(7)], said[: said.index(2)]
            assert before + behind == ids
            places.append(len(before))
        return places

    assert set(splits(3)) == {1, 2, 3, 4}  # neither part is ever empty
    assert splits(3) == splits(3) != splits(4)
    alone = seq2seq().training_texts([("", "ccc")], 9)
    assert alone.prompts.tolist() == [[7]] and alone.tokens.tolist() == [[13, 2]]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A man (left): two-tone hats!", "a man left two-tone hats"),
        ('Say "hello"; #1 * ~ what?', "say hello 1 what?"),
        ("a.b,  c\n", "a b, c"),
        ("word " * 60, " ".join(["word"] * 50)),
    ],
)
def test_captions_of_published_sets_are_cleaned_as_the_release_cleans_them(text, cleaned):
    assert clean_caption(text) == cleaned


def test_published_captions_are_cleaned_before_both_stages_and_generated_ones_are_left(data, monkeypatch):
    shouted = [(f"A {text}! (shown)",) for [text] in data.dataset.train.captions]
    train = replace(data.dataset.train, captions=shouted, noisy=None)
    test = replace(data.dataset.test, captions=shouted[: len(data.dataset.test.captions)])
    monkeypatch.setattr(
        "papers.blip2.data.load_dataset", lambda recipe, seed: replace(data.dataset, train=train, test=test)
    )
    found = build_data(SMALL, 3)
    assert not found.generated
    assert found.captions[5] == (5, clean_caption(shouted[5][0])) and found.captions[5][1].startswith("a ")
    for text in (*(text for _, text in found.captions), *found.eval_set.texts, *found.documents):
        assert text == clean_caption(text) and text.endswith(" shown")
    assert data.captions == [(row, text) for row, several in enumerate(data.dataset.train.captions) for text in several]


def test_the_recipe_says_how_large_the_small_language_models_are_whatever_the_variant_speaks_to(tmp_path):
    """And how much the Q-Former drops out, unless its variant is to."""
    recipe = replace(SMALL, model="blip2-mini-smollm2", small_width=24, small_layers=1, lm_steps=1, dropout=0.25)
    work = StagePipeline.of(context(tmp_path, "base", recipe=recipe))
    small, larger = work.bundle().config, work.bundle("larger").config
    assert (small.family, small.width, small.layers) == ("small", 24, 1)
    assert (larger.family, larger.width, larger.layers) == ("small", 48, SMALL.larger_layers)
    assert work.config().dropout == 0.25 and build_data(replace(recipe, dropout=-1.0), 3).config.dropout == 0


def test_a_period_ends_what_a_small_language_model_says(data):
    found = prompt_tokenizer_of(data.tokenizer, 64)
    assert data.tokenizer.encode("red.")[-1] == found.stop[0] and found.stop[1] == data.tokenizer.end


# ---- training


def test_the_learning_rate_ends_at_its_minimum_and_the_warm_up_is_linear():
    recipe = replace(SMALL, steps=20, warmup_steps=4, learning_rate=1e-2, min_learning_rate=5e-3)
    module = Stage1Module(Blip2Qformer(VARIANTS["blip2-tiny"]()), recipe)
    share = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    shares = [share(step) for step in range(21)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0] and shares[-1] == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(shares[4:]))


def stage2(pictures=5):
    config = replace(VARIANTS["blip2-tiny-small"](), dropout=0.0)
    language = config.language
    torch.manual_seed(0)
    bundle = SmallLanguageModel(language.vocabulary, language.context, language.width, 2, language.heads)
    model = Blip2(config, Frozen(bundle, through=True))
    features = torch.randn(pictures, config.vision.tokens, config.vision.width)
    tokens = torch.randint(1, 200, (pictures, 6))
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    attention_mask[0, 4:] = False
    given = torch.tensor([3, 2, 1, 3, 0][:pictures])
    return Stage2Module(model, SMALL), bundle, (features, tokens, attention_mask, given)


def steps(module, batch, watch, count=1):
    module.log = lambda *args, **more: None
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for step in range(count):
        loss = module.training_step(batch, step)
        loss.backward()
        watch.on_before_optimizer_step(None, module, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_a_step_of_stage_2_moves_the_bridge_and_leaves_the_language_model_as_it_was():
    module, bundle, batch = stage2()
    before, start = ([p.detach().clone() for p in part.parameters()] for part in (bundle, module.model))
    watch = FrozenWatch([module.model.language_model])
    losses = steps(module, batch, watch, 8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, bundle.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(start, module.model.parameters(), strict=True))
    assert watch.measured == {
        "frozen_parameters": sum(p.numel() for p in bundle.parameters()), "frozen_gradient_bytes": 0,
        "frozen_state_bytes": 0,
    }  # fmt: skip


def test_a_gradient_in_a_frozen_part_is_seen_and_refused():
    module, bundle, batch = stage2()
    bundle.requires_grad_(True)
    with pytest.raises(ValueError, match="ask for gradients"):
        steps(module, batch, FrozenWatch([bundle]))


def test_a_frozen_parameter_is_given_to_no_optimizer():
    module, bundle, _ = stage2()
    module.beside.append(bundle)  # frozen, though it stands among what is trained
    groups = module.configure_optimizers()["optimizer"].param_groups
    given = {id(p) for group in groups for p in group["params"]}
    assert given.isdisjoint(id(p) for p in bundle.parameters()) and given


def test_without_itg_the_head_of_words_is_not_trained():
    module, batch = example(4)
    module = Stage1Module(module.model, module.recipe, objectives=WITHOUT_ITG)
    module.log = lambda *args, **more: None
    module.training_step(batch, 0).backward()
    untrained = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert untrained and all(name.startswith("model.head.") for name in untrained)
    assert [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


def test_accumulation_which_would_leave_fewer_negatives_is_refused():
    model = Blip2Qformer(VARIANTS["blip2-tiny"]())
    with pytest.raises(UserError, match="accumulate"):
        Stage1Module(model, replace(SMALL, accumulate=2))


def test_trained_whole_the_encoder_and_the_language_model_move_too(tmp_path):
    work = StagePipeline.of(context(tmp_path, "train_all"))
    bundle, encoder = work.small_language_model(), work.encoder()
    model = work.new_bridge(bundle)
    parts = [encoder.module, bundle.model.module]
    before = [[p.detach().clone() for p in part.parameters()] for part in parts]
    stats = claims.train_end_to_end(work, model, bundle, encoder)
    for part, was in zip(parts, before, strict=True):
        moved = [not torch.equal(a, b) for a, b in zip(was, part.parameters(), strict=True)]
        assert sum(moved) > 0.8 * len(moved) and not any(p.requires_grad for p in part.parameters())
    assert stats["trained_parameters"] > sum(p.numel() for part in parts for p in part.parameters())


# ---- arms


def test_the_order_in_which_arms_ask_for_stages_changes_no_number(tmp_path):
    names = ("base", "few_shot", "no_itg", "larger_language_model")
    one, other = measured(tmp_path / "one", *names), measured(tmp_path / "other", *reversed(names))
    for name in names:
        assert {k: v for k, v in one[name].items() if k != "waited"} == {
            k: v for k, v in other[name].items() if k != "waited"
        }, name


def test_every_arm_measures_what_its_claims_read(tmp_path):
    found = measured(tmp_path, *claims.ARMS)
    effects = {id: claim.effect(found) for id, claim in claims.CLAIMS.items()}
    assert all(isinstance(effect, float) for effect in effects.values()), effects
    assert found["base"]["frozen_gradient_bytes"] == found["headline"]["frozen_state_bytes"] == 0
    assert (
        found["base"]["queries"] * SMALL.more == found["queries_many"]["queries"]
        and found["queries_one"]["queries"] == 1
    )
    assert found["base"]["trained_parameters"] < found["train_all"]["trained_parameters"]
    assert found["each_step"]["furthest"] < 0.05
    for claim in claims.CLAIMS.values():
        assert claim.shown([found])


def test_arms_of_a_seed_begin_alike(tmp_path):
    work = StagePipeline.of(context(tmp_path, "base"))
    torch.manual_seed(99)
    first, second_ = work.new_qformer().state_dict(), work.new_qformer().state_dict()
    assert all(torch.equal(first[key], second_[key]) for key in first)
    bundle = work.bundle()
    one, other = work.new_bridge(bundle).state_dict(), work.new_bridge(bundle, fresh=True).state_dict()
    assert torch.equal(one["projector.weight"], other["projector.weight"])
    assert not torch.equal(one["qformer.query_tokens"], other["qformer.query_tokens"]), "one has been through stage 1"


# ---- visual words that begin as words


def test_the_projector_begins_as_the_linear_map_that_was_asked_for():
    module, _, (features, *_) = stage2(pictures=5)
    features = torch.randn(140, *features.shape[1:], generator=torch.Generator().manual_seed(1))
    model = module.model.eval()
    with torch.no_grad():
        targets = model.prefix(features)  # so there is a linear map, and one alone
        model.projector.reset_parameters()
        assert (model.prefix(features) - targets).abs().max() > 0.1 * targets.abs().max()
        headline.fit_projector(model, features, targets, ridge=1e-10)
        assert (model.prefix(features) - targets).abs().max() < 1e-4 * targets.abs().max()
    headline.fit_projector(model, features, targets, ridge=1e10)
    assert model.projector.weight.abs().max() < 1e-3, "the ridge draws towards nothing"


def test_a_query_says_a_word_of_the_picture_in_turn_and_one_of_several_tokens_by_their_mean(data):
    words = prompt_tokenizer_of(data.tokenizer, 64)
    bundle = LanguageModelBundle(Frozen(SmallLanguageModel(data.tokenizer.vocab_size, 64, 32, 1, 2)), words, None)
    table = bundle.model.embed(torch.arange(data.tokenizer.vocab_size))
    targets = headline.word_targets(bundle, [["zzz", "red"], ["red"]], 3)  # unknown to its vocabulary: in pieces
    assert len(words.encode("zzz")) > 1
    first, red = table[torch.tensor(words.encode("zzz"))].mean(0), table[torch.tensor(words.encode("red"))].mean(0)
    for query, word in enumerate((first, red, first)):
        assert torch.allclose(targets[0, query], word) and torch.allclose(targets[1, query], red)


def test_what_a_picture_shows_is_what_its_open_questions_are_answered_with(data):
    shown = data.open_answers()
    assert len(shown) == SMALL.pairs
    for row, answers in enumerate(shown):
        assert answers == [one.answer for kind in ("what", "colour") for one in data.questions
                           if (one.picture, one.kind) == (row, kind)]  # fmt: skip


def test_the_headline_begins_with_words_and_without_word_steps_with_a_random_projector(tmp_path):
    recipe = replace(SMALL, headline_word_steps=2, stage2_rate=1e-5, dropout=0.0)
    work = StagePipeline.of(context(tmp_path, "headline", recipe=recipe))
    bundle = work.bundle("headline")
    targets = headline.word_targets(bundle, work.data.open_answers(), work.data.config.queries)

    def unexplained(model):
        with torch.no_grad():
            return float((model.eval().prefix(work.features("train")) - targets).square().mean() / targets.var())

    random, fitted, start = work.new_bridge(bundle), work.new_bridge(bundle), headline.headline_start(work, bundle)
    headline.fit_projector(fitted, work.features("train"), targets)
    assert unexplained(fitted) < 0.6 < 1 < unexplained(random)
    assert unexplained(start) == pytest.approx(unexplained(fitted), rel=0.01), "two steps of a low rate behind it"
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), fitted.parameters(), strict=True)]
    assert all(moved), "the whole bridge trains"
    none = StagePipeline.of(context(tmp_path, "headline", recipe=replace(recipe, headline_word_steps=0)))
    begun, random = headline.headline_start(none, bundle).state_dict(), none.new_bridge(bundle).state_dict()
    assert all(torch.equal(begun[key], random[key]) for key in random)


def test_a_language_model_that_is_none_is_refused_by_its_name():
    for name in ("language_model", "headline_model"):
        with pytest.raises(UserError, match=f"{name} is one of .*smollm2-135m"):
            replace(SMALL, **{name: "foo"})
    with pytest.raises(UserError, match="language_model"):
        replace(SMALL, language_model="")


def test_word_steps_below_none_or_without_open_questions_are_refused():
    for wrong in ({"headline_word_steps": -1}, {"headline_word_steps": 1, "kinds": ["yes/no"]}):
        with pytest.raises(UserError, match="headline_word_steps"):
            replace(SMALL, **wrong)


@pytest.fixture
def smollm2(monkeypatch, data):
    """A language model by name, in 16 bit and of another family than the small one, in SmolLM2's place."""
    torch.manual_seed(5)
    model = Frozen(SmallLanguageModel(data.tokenizer.vocab_size, 128, 40, 2, 2), torch.bfloat16, through=True)
    language = replace(LANGUAGES["smollm2-135m"], width=40, vocabulary=data.tokenizer.vocab_size, context=128)
    bundle = LanguageModelBundle(model, prompt_tokenizer_of(data.tokenizer, 128), language)
    monkeypatch.setattr(stages, "frozen_language_model", lambda config, manifest: bundle)
    return replace(SMALL, headline_model="smollm2-135m", headline_seeds=9, headline_word_steps=30, stage2_rate=3e-3)


def test_through_another_language_model_it_goes_on_from_the_plain_arm_and_says_what_the_words_are_worth(
    tmp_path, smollm2
):
    found = claims.ARMS["headline"](context(tmp_path, "headline", recipe=smollm2))
    assert set(found) >= {"accuracy", "words_right", "before_stage2", "blind"} and found["trained_parameters"]
    work = StagePipeline.of(context(tmp_path, "headline", recipe=smollm2))
    start, base = headline.headline_start(work, work.bundle("headline")), work.stage2("base", work.bundle())[0]
    assert start.projector.out_features == 40 != base.projector.out_features
    assert start.qformer.query_tokens.shape == base.qformer.query_tokens.shape
    kinds, features, names = work.data.open_kinds, work.features("asked"), work.data.answers
    said = headline.nearest_words(start.eval(), work.bundle("headline"), features, names)
    right = [
        said[one.picture][kinds.index(one.kind)] == one.answer
        for one in headline.first_pairs(work.data.eval_set.questions, 8)
    ]
    assert found["words_right"] == pytest.approx(100 * sum(right) / len(right))


def test_stopped_between_its_words_and_its_second_stage_the_headline_goes_on_to_the_same_numbers(
    tmp_path, smollm2, monkeypatch
):
    whole = claims.ARMS["headline"](context(tmp_path / "whole", "headline", recipe=smollm2))
    with monkeypatch.context() as patch:
        patch.setattr(stages, "Stage2Module", lambda *args: 1 / 0)
        for stage in ("base", "headline"):  # the first is trained before the words, the second after them
            with pytest.raises(ZeroDivisionError):
                claims.ARMS["headline"](context(tmp_path / "cut", "headline", recipe=smollm2))
            if stage == "base":
                patch.undo()
                work = StagePipeline.of(context(tmp_path / "cut", "headline", recipe=smollm2))
                work.stage2("base", work.bundle())
                patch.setattr(stages, "Stage2Module", lambda *args: 1 / 0)
    assert list((tmp_path / "cut").glob("arms/stages/*/headline-words"))
    again = claims.ARMS["headline"](context(tmp_path / "cut", "headline", recipe=smollm2))
    assert {k: v for k, v in again.items() if k != "waited"} == {k: v for k, v in whole.items() if k != "waited"}


# ---- evaluation


class Spoken(nn.Module):
    """A language model that says the token which its last prefix vector points at, then stops. Width = vocabulary."""

    kind, width, context = "causal", 20, 64

    def embed(self, tokens):
        return nn.functional.one_hot(tokens, self.width).float() * 0.1

    def decoding(self, prefix, attention_mask=None):
        return Telling(prefix)


class Telling:
    def __init__(self, prefix):
        self.prefix = prefix

    def prefill(self, tokens, attention_mask):
        self.tokens, self.attention_mask = tokens, attention_mask
        return 50 * self.prefix[:, -1] if self.prefix.shape[1] else torch.eye(20)[tokens.new_full((len(tokens),), 5)]

    def step(self, tokens):
        return 50 * torch.eye(20)[torch.full_like(tokens, 2)]

    def select(self, rows, contexts=None):
        pass


class Seer(nn.Module):
    """Its prefix is the features themselves."""

    def __init__(self):
        super().__init__()
        self.language_model, self.weight = Spoken(), nn.Parameter(torch.zeros(1))

    def prefix(self, features):
        return features

    def decoding(self, features):
        return self.language_model.decoding(features)


SAID = PromptTokenizer(encode=lambda t: [9] * len(t.split()), decode=lambda ids: " ".join(map(str, ids)), start=(),
             stop=(2,), pad=0, context=64)  # fmt: skip


def seen(*tokens):
    return nn.functional.one_hot(torch.tensor(tokens), 20).float()[:, None]


def test_answers_follow_the_picture_and_a_blind_model_has_none():
    how = evaluate.GenerationConfig(beams=1, length_penalty=-1.0, longest=3, shortest=1)
    assert evaluate.answer(Seer(), SAID, seen(7, 11), ["a b?", "c?"], how) == ["7", "11"]
    assert evaluate.answer(Seer(), SAID, None, ["a b?", "c?"], how) == ["5", "5"]


def test_in_context_the_asked_picture_stands_last_behind_the_examples(monkeypatch):
    prefixes = []
    telling = Telling.__init__
    monkeypatch.setattr(Telling, "__init__", lambda self, prefix: (prefixes.append(prefix), telling(self, prefix))[1])
    how = evaluate.GenerationConfig(beams=1, longest=3)
    examples = [(seen(4)[0], "what?", "cat"), (seen(6)[0], "what?", "dog")]
    assert evaluate.answer_in_context(Seer(), SAID, seen(7, 11), ["a?", "b?"], examples, how) == ["7", "11"]
    [prefix] = prefixes
    length = len(SAID.begun(QUESTION.format("what?") + " cat"))
    assert prefix.shape[1] == 2 * (1 + length) + 1
    assert prefix[:, 0].argmax(1).tolist() == [4, 4] and prefix[:, 1 + length].argmax(1).tolist() == [6, 6]


@pytest.mark.parametrize(("kind", "shortest"), [("causal", 4), ("seq2seq", 3)])
def test_the_shortest_text_is_that_of_the_language_models_kind(monkeypatch, kind, shortest):
    asked, generate = [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda *args, **more: (asked.append(args[2]), generate(*args, **more))[1])
    model, how = Seer(), evaluate.GenerationConfig(beams=1, longest=6, shortest=4)
    monkeypatch.setattr(type(model.language_model), "kind", kind, raising=False)
    evaluate.answer(model, SAID, seen(7), ["a?"], how)
    evaluate.answer_in_context(model, SAID, seen(7), ["a?"], [(seen(4)[0], "what?", "cat")], how)
    assert [settings.min_new_tokens for settings in asked] == [shortest] * 2


def test_the_questions_are_put_as_in_the_paper():
    assert evaluate.PROMPTS["causal"] == QUESTION == "Question: {} Answer:"
    assert evaluate.PROMPTS["seq2seq"] == "Question: {} Short answer:"
    assert evaluate.ANSWERING.settings((2,)).length_penalty == -1 and evaluate.ANSWERING.beams == 5
    assert evaluate.CAPTIONING.settings((2,)) == replace(evaluate.CAPTIONING.settings((2,)), **RELEASED_BEAMS)
    assert evaluate.CAPTIONING.settings((2,)).min_new_tokens == 8  # of the decoder's start token too, where it has one
    assert evaluate.CAPTIONING.settings((2,), "seq2seq").min_new_tokens == 7
    assert replace(evaluate.CAPTIONING, shortest=0).settings((2,), "seq2seq").min_new_tokens == 0


@pytest.mark.parametrize(("said", "tidied"), [(" cat.\nQuestion: dog", "cat"), ("red", "red"), ("\n", ""), ("", "")])
def test_of_what_is_said_the_first_line_counts(said, tidied):
    assert evaluate.tidy(said) == tidied


def test_contrast_takes_the_nearest_query():
    unit = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [1.0, 0.0]]])
    found = evaluate.cosines(evaluate.Encoded(unit, unit), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert found.tolist() == [[1.0, 1.0], [pytest.approx(0.8), 1.0]]


def test_re_ranking_scores_the_pair_that_it_names():
    """Match logits that only the right picture and text get put them first, whatever contrast said."""

    class Matching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def text_features(self, tokens):
            return torch.ones(len(tokens), 2) / 2**0.5

        def match(self, features, tokens):
            right = features[:, 0, 0] == tokens[:, 0]
            return torch.stack([torch.zeros(len(tokens)), 10.0 * right], 1)

    pictures = evaluate.Encoded(torch.ones(3, 1, 2) / 2**0.5, torch.arange(3.0)[:, None, None])
    i2t, t2i = evaluate.reranked(Matching(), pictures, torch.tensor([[2], [0], [1]]), 3)
    assert i2t.argmax(1).tolist() == [1, 2, 0] and t2i.argmax(1).tolist() == [2, 0, 1]


# ---- effects


def test_effects_are_treatment_minus_baseline():
    names = ("accuracy", "r1", "blind", "other_picture", "cached", "each_step", "saved")
    found = {arm: {name: 100.0 * i + j for j, name in enumerate(names)} for i, arm in enumerate(claims.ARMS)}
    controls = {
        "blip2.answers.vs_blind": ("headline", "accuracy", "blind"),
        "blip2.answers.vs_other_picture": ("headline", "accuracy", "other_picture"),
        "blip2.cached_features": ("each_step", "cached", "each_step"),
    }
    for id, claim in claims.CLAIMS.items():
        if id == "blip2.queries.cost":
            wanted = found["visual_tokens"]["saved"]
        elif id in controls:
            arm, ours, theirs = controls[id]
            wanted = found[arm][ours] - found[arm][theirs]
        else:
            name = "r1" if "retrieval" in id else "accuracy"
            wanted = found[claim.arms[0]][name] - found[claim.arms[1]][name]
        assert claim.effect(found) == wanted, id


def test_data_without_questions_gives_no_effect_and_says_what_would():
    found = {arm: {"r1": 1.0} for arm in claims.ARMS}
    claim = claims.CLAIMS["blip2.llm.size_opt"]
    assert claim.effect(found) is None and "data=emoji" in claim.need
    assert claims.CLAIMS["blip2.itg_helps_retrieval"].effect(found) == 0


def test_what_is_shown_of_losses_has_three_digits_and_of_counts_none():
    seeds = [{"each_step": {"cached": 0.5, "cached_ms": 2.0}, "train_all": {"trained_parameters": 1234}}] * 2
    assert claims.CLAIMS["blip2.cached_features"].shown(seeds) == "each_step cached 0.500, each_step cached_ms 2.0"
    assert claims.CLAIMS["blip2.bridge_alone"].shown(seeds) == "train_all trained_parameters 1,234"


def test_another_picture_is_never_the_own_one_and_may_show_the_same_thing():
    asked = [Question(row, f"{kind} {row}?", "", kind) for row in range(10) for kind in ("what", "colour")]
    strangers, own = headline.other_pictures(asked, 10), measuring.rows_of(asked)
    assert not (strangers == own).any() and len(set(((strangers - own) % 10).tolist())) > 4
    assert torch.equal(strangers, headline.other_pictures(asked, 10)), "the same in every arm and figure"


def test_chosen_questions_keep_their_kinds_and_ask_about_all_things(data):
    some = headline.first_pairs(data.eval_set.questions, 13)
    assert [one.kind for one in some] == ["what", "colour"] * 6
    assert {one.answer for one in some if one.kind == "what"} == {
        one.answer for one in data.questions if one.kind == "what"
    }
    assert len(headline.first_pairs(data.eval_set.questions, 1)) == 2


def test_a_language_model_is_built_by_its_configuration():
    language = LanguageConfig("small", "small", 24, 50, layers=2, heads=2, mlp_width=96, context=20)
    model = stages.new_language_model(language)
    assert (model.width, model.vocabulary, model.context, len(model.blocks)) == (24, 50, 20, 2)
    assert all(torch.equal(a, b) for a, b in zip(
        model.parameters(), stages.new_language_model(language).parameters(), strict=True
    ))  # fmt: skip
