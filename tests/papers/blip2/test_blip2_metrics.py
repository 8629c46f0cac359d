"""BLIP-2's metrics rung on tiny checkpoints and tiny sets in their published layouts: every kind of row, and what it
says where something is lacking."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from benchmark_rows import forget_scores, karpathy, nocaps, picture, read_files, written
from benchmark_rows import row_of as row_of_card
from tests_common import CATALOG

from papers.blip2.config import SPECIALS, Blip2Config, LanguageConfig, VisionConfig, with_tokenizer
from papers.blip2.encode import CAPTIONING, answer, caption, cosines, text_features
from papers.blip2.encode import encoded as encoded_pictures
from papers.blip2.evidence import benchmarks as metrics
from papers.blip2.formats import VISION, published_of
from papers.blip2.frozen import ENCODERS, Silent
from papers.blip2.model import Blip2, Blip2Qformer, vision_encoder
from papers.blip2.recipe import Blip2Recipe
from papers.blip2.text import load_prompt_tokenizer
from shared.backbones.lm import load_language_model
from shared.backbones.vision import vit_encoder
from shared.core.errors import UserError
from shared.data.vqa import gqa_questions, okvqa_questions
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights.load import save_weights
from shared.weights.manifest import load_manifest
from shared.weights.weight_map import to_published

transformers = pytest.importorskip("transformers")

CARD = CATALOG.card("blip2")
row_of = partial(row_of_card, CARD)
CAPTIONS = ["a red circle", "a blue square", "a green star", "two red circles"]
WORDS = ["a", "photo", "of", "the", "is", "it", "red", "yes", "no", "two", "what", "colour", "circle", "square", "?"]
EVA = VisionConfig("eva", 30, 6, width=48, layers=2, heads=3, mlp_ratio=4.4)
CLIP = VisionConfig("clip", 30, 6, 48, 2, 3, activation="quick_gelu", eps=1e-5, input_norm=True, patch_bias=False)
LANGUAGES = {
    "opt-2.7b": LanguageConfig("opt-2.7b", "opt", 36, 40, layers=2, heads=2, mlp_width=56, context=64),
    "flan-t5-xl": LanguageConfig("flan-t5-xl", "t5", 44, 40, layers=2, heads=3, mlp_width=60, context=64, head_width=9),
}


def tiny(id, words):
    base = Blip2Config(
        vision=CLIP if "vit-l" in id else EVA, queries=7, width=40, layers=3, heads=4, mlp_width=72, embed_width=28,
        vocabulary=310, positions=64, context=40, dropout=0.0,
    )  # fmt: skip
    language = next(
        (one for name, one in LANGUAGES.items() if name in id.replace("6.7b", "2.7b").replace("xxl", "xl")), None
    )
    return replace(with_tokenizer(base, words), language=language)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """data_root with weights/ for every row, networks of a tiny size, and the current folder for predictions."""
    words = SmallTokenizer.train(CAPTIONS * 3, 310, SPECIALS)
    monkeypatch.setattr(metrics, "config_of", lambda id: tiny(id, words))
    monkeypatch.setattr(metrics, "BertTokenizer", SimpleNamespace(uncased=lambda specials: words))
    forget_scores()
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    (root / "weights").mkdir(parents=True)
    torch.manual_seed(0)
    recipe = Blip2Recipe(
        paper="blip2", scale="paper", model="blip2-vit-g", data_root=str(root),
        manifest=str(CATALOG.root / "checkpoints_manifest.yaml"),
    )  # fmt: skip
    return SimpleNamespace(root=root, recipe=recipe, words=words)


def rough(module):
    """Weights far enough from zero for pictures to make a difference."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return module.eval()


def place(home, row):
    """Put everything that a row needs but its data in the published form; (model, encoder, language model's words)."""
    config = metrics.variant_of(row)
    vit = rough(vision_encoder(config.vision))
    entries = load_manifest(home.recipe.manifest)
    weights = metrics.needs(row, entries, home.root)[0].place
    if config.language is None:
        model, format = rough(Blip2Qformer(config)), "lavis-stage1"
    else:
        model, format = rough(Blip2(config, Silent(config))), f"lavis-{config.language.family}"
    state, tuned = dict(model.state_dict()), weights.name.endswith(".safetensors") or "coco" in weights.name
    if tuned:  # as fine-tuning leaves it: with the image encoder
        state |= {f"{VISION}{key}": tensor for key, tensor in vit.state_dict().items()}
    else:
        entry = entries[metrics.ENCODER_ENTRIES[config.vision.kind]]
        torch.save(to_published(vit.state_dict(), ENCODERS[config.vision.kind]), home.root / "weights" / entry.file)
    published = published_of(state, format, config.vision.kind)
    if weights.suffix == ".pth":
        torch.save({"model": published}, weights)
    else:
        save_weights(published, weights)
    told = None
    if config.language is not None:
        folder = home.root / "weights" / config.language.name
        lm(folder, config.language)
        language, pieces = load_language_model(config.language.name, folder=folder, dtype=torch.float32)
        told = load_prompt_tokenizer(pieces, language.context)
        state, model = model.state_dict(), Blip2(config, language).eval()
        model.load_state_dict(state)
    return SimpleNamespace(weights=weights, model=model, encoder=vit_encoder(vit, "last"), words=told)


def lm(folder, language):
    """A tiny language model in transformers' form, with a tokenizer that knows "\\n"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if (folder / "config.json").is_file():
        return
    seq2seq = language.kind == "seq2seq"
    if seq2seq:
        made = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=40, d_model=44, d_kv=9, d_ff=60, num_layers=2, num_heads=3, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        ))  # fmt: skip
    else:
        made = transformers.OPTForCausalLM(transformers.OPTConfig(
            vocab_size=40, hidden_size=36, ffn_dim=56, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=36, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        ))  # fmt: skip
    rough(made).save_pretrained(folder)
    special = ["<pad>", "</s>", "<s>", "<unk>"] if seq2seq else ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [*special, "\n", *dict.fromkeys(WORDS)]
    pieces = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    pieces.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", bos_token=None if seq2seq else "</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip


def seen(here, paths):
    """The frozen features of picture files."""
    return here.encoder(read_files(paths, here.model.config.vision.image_size))


# ---- each kind of row


@pytest.mark.parametrize("variant", ["blip2-vit-g", "blip2-vit-l"], ids=["released", "to be fine-tuned"])
def test_retrieval_ranks_by_match_and_cosine_among_all_captions(home, variant):
    row = row_of("retrieval/t2i_r1@itc-top128-itm+itc", variant=variant)
    captions = [["A red circle!", "two red circles"], ["a blue square"], ["a green star", "a green star: a star"]]
    karpathy(home.root / "coco", captions)
    here = place(home, row)
    found = metrics.measure(row, home.recipe)
    texts = [metrics.clean_caption(text) for several in captions for text in several]
    assert texts[0] == "a red circle" and texts[4] == "a green star a star"
    owner = torch.tensor([0, 0, 1, 2, 2])
    tokens = home.words(texts, here.model.config.context)
    features = seen(here, [home.root / "coco" / f"{i}.jpg" for i in range(3)])
    with torch.no_grad():
        near = cosines(encoded_pictures(here.model, features), text_features(here.model, tokens))
        match = torch.stack([here.model.match(one[None], tokens)[:, 1] for one in features])
    right = ((near + match).argmax(0) == owner).float().mean()
    assert found == pytest.approx(100 * float(right))
    every = row_of("retrieval/i2t_r5@itc-top128-itm+itc", variant=variant)
    assert metrics.measure(every, home.recipe) == 100.0, "five texts: each among the five best"


def test_zero_shot_retrieval_takes_the_weights_tuned_on_coco(home):
    row = row_of("retrieval/i2t_r5@zeroshot-itc-top128-itm+itc", variant="blip2-vit-g")
    karpathy(home.root / "flickr30k", [[text] for text in CAPTIONS])
    assert place(home, row).weights.name == "blip2_finetune_coco.pth"
    assert metrics.measure(row, home.recipe) == 100.0, "four pictures: each among the five best"


@pytest.mark.parametrize("variant", ["blip2-vit-g-opt-2.7b", "blip2-vit-g-flan-t5-xl"])
@pytest.mark.parametrize("metric", ["caption/cider@ptb", "caption/bleu4@ptb"])
def test_captions_of_coco(home, metric, variant):
    row = row_of(metric, variant=variant)
    here = place(home, row)
    karpathy(home.root / "coco", [["placeholder"]] * 4)
    features = seen(here, [home.root / "coco" / f"{i}.jpg" for i in range(4)])
    said = caption(here.model, here.words, features, CAPTIONING)
    assert len(set(said)) > 1 and all(said)
    karpathy(home.root / "coco", [[text, "a red circle"] for text in said])
    own = metrics.measure(row, home.recipe)
    forget_scores()
    karpathy(home.root / "coco", [["some other words that nobody said"]] * 4)
    assert own > metrics.measure(row, home.recipe), "its own words score higher than a stranger's"


def test_nocaps_is_written_for_its_server(home):
    row = row_of("caption/cider@nocaps-server", variant="blip2-vit-g-opt-2.7b")
    place(home, row)
    nocaps(home.root / "nocaps")
    with pytest.raises(UserError, match=r"written to (\S+); the server of NoCaps") as told:
        metrics.measure(row, home.recipe)
    rows = written(told)
    assert [one["image_id"] for one in rows] == [7, 8] and all(isinstance(one["caption"], str) for one in rows)


def vqa(folder, split, part, questions, answers=None):
    for index in range(len(questions)):
        picture(folder / part / f"COCO_{part}_{index:012d}.jpg", index)
    rows = [{"question_id": 50 + i, "image_id": i, "question": text} for i, text in enumerate(questions)]
    prefix = "" if folder.name == "okvqa" else "v2_"
    (folder / f"{prefix}OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({"questions": rows}))
    if answers:
        rows = [{"question_id": 50 + i, "answers": [{"answer": text} for text in ten]} for i, ten in enumerate(answers)]
        (folder / f"{prefix}mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": rows}))


ASKED = ["Is it red?", "what colour is the circle?", "is it a square? (yes)"]


@pytest.mark.parametrize("variant", ["blip2-vit-g-opt-2.7b", "blip2-vit-l-flan-t5-xl", "blip2-vit-l-opt-2.7b"])
def test_zero_shot_answers_to_vqav2_are_scored_by_the_official_rule(home, variant):
    prompt = "short-answer" if "t5" in variant else "answer"
    row = row_of(f"vqa/accuracy@zeroshot-{prompt}-beam5-lp-1-official", variant=variant, split="val")
    here = place(home, row)
    folder = home.root / "vqav2"
    vqa(folder, "val2014", "val2014", ASKED, [["nobody"] * 10] * 3)
    features = seen(here, [folder / "val2014" / f"COCO_val2014_{i:012d}.jpg" for i in range(3)])
    said = answer(here.model, here.words, features, [metrics.clean_question(one) for one in ASKED])
    assert metrics.clean_question(ASKED[2]) == "is it a square? yes"
    assert metrics.measure(row, home.recipe) == 0.0
    forget_scores()
    vqa(folder, "val2014", "val2014", ASKED, [[said[0]] * 10, [said[1]] * 2 + ["else"] * 8, ["else"] * 10])
    assert metrics.measure(row, home.recipe) == pytest.approx(100 * (1 + 0.6) / 3)


def test_answers_to_a_test_split_are_written_for_the_server(home):
    row = row_of(
        "vqa/accuracy@zeroshot-answer-beam5-lp-1-official", variant="blip2-vit-g-opt-2.7b", split="test-dev"
    )  # fmt: skip
    place(home, row)
    vqa(home.root / "vqav2", "test-dev2015", "test2015", ASKED)
    with pytest.raises(UserError, match="the official server scores them") as told:
        metrics.measure(row, home.recipe)
    assert [one["question_id"] for one in written(told)] == [50, 51, 52]


def test_gqa_compares_both_sides_cleaned_up(home, monkeypatch):
    row = row_of("vqa/accuracy@zeroshot-short-answer-beam5-lp-1-exact", variant="blip2-vit-g-flan-t5-xl")
    place(home, row)
    folder = home.root / "gqa"
    for index in range(2):
        picture(folder / "images" / f"n{index}.jpg", index)
    rows = {str(7 + i): {"question": "Is it red?", "imageId": f"n{i}", "answer": "two circles"} for i in range(2)}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    said = ["The 2 circles.", "three"]
    monkeypatch.setattr(metrics, "answer", lambda *given: said)
    assert metrics.measure(row, home.recipe) == 50.0
    assert [one.id for one in gqa_questions(folder, "test-dev")] == [7, 8]


def test_okvqa_is_scored_by_lemmas_and_says_who_makes_them(home, monkeypatch):
    row = row_of("vqa/accuracy@zeroshot-short-answer-beam5-lp-1-lemmas", variant="blip2-vit-g-flan-t5-xl")
    place(home, row)
    vqa(home.root / "okvqa", "val2014", "val2014", ASKED, [["circle"] * 10] * 3)
    if metrics.spacy_need(row).state == "missing":
        with pytest.raises(UserError, match=r"spaCy and its model en_core_web_sm .*: missing"):
            metrics.measure(row, home.recipe)
    monkeypatch.setattr(metrics, "spacy_need", lambda row: metrics.NOTHING)
    monkeypatch.setattr(metrics, "answer", lambda *given: ["circles", "squares", "circle"])
    monkeypatch.setattr(metrics, "lemmas", lambda texts: [text.removesuffix("s") for text in texts])
    assert metrics.measure(row, home.recipe) == pytest.approx(200 / 3)
    assert okvqa_questions(home.root / "okvqa", "test")[0].answers == ("circle",) * 10


# ---- what is lacking


def test_every_row_that_cannot_run_names_encoder_and_language_model_or_why_it_never_can(home):
    for row in CARD.metrics:
        if "spice" in row.metric:
            continue
        with pytest.raises(UserError) as error:
            metrics.measure(row, home.recipe)
        message = str(error.value)
        if "generate-official" in row.metric:
            assert "no weights fine-tuned for VQA were released" in message
        else:
            assert message.count(": missing") >= 3, row.id
            language = metrics.variant_of(row).language
            source = "google" if language and language.family == "t5" else "facebook"
            assert language is None or f"hf download {source}/" in message


def test_weights_that_were_never_released_are_asked_for_by_what_they_are_trained_for(home):
    for metric, variant, name in (
        ("retrieval/i2t_r1@itc-top128-itm+itc", "blip2-vit-l", "blip2-vit-l-retrieval-coco"),
        (
            "retrieval/i2t_r1@itc-top128-itm+itc-tuned-without-itg",
            "blip2-vit-g",
            "blip2-vit-g-retrieval-coco-without-itg",
        ),
        ("vqa/accuracy@zeroshot-answer-beam5-lp-1-exact", "blip2-vit-l-opt-2.7b", "blip2-vit-l-opt-2.7b"),
    ):
        with pytest.raises(UserError, match=rf"weights \S+/{name}\.safetensors, trained further from blip2_pretrained"):
            metrics.measure(row_of(metric, variant=variant), home.recipe)


def test_what_is_there_is_told_from_what_is_missing(home):
    row = row_of("vqa/accuracy@zeroshot-answer-beam5-lp-1-official", variant="blip2-vit-g-opt-2.7b", split="val")
    place(home, row)
    with pytest.raises(UserError) as told:
        metrics.measure(row, home.recipe)
    assert str(told.value).count(": here") == 3 and str(told.value).count(": missing") == 1
    (home.root / "weights" / "eva_vit_g.pth").unlink()
    with pytest.raises(UserError, match=r"image encoder \S+eva_vit_g\.pth \(.*\): missing"):
        metrics.measure(row, home.recipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no mapping of questions"),
        ('{"x1": {"question": "a", "imageId": "b", "answer": "c"}}', "question number 'x1'"),
        ('{"1": {"question": "a", "imageId": "../b", "answer": "c"}}', "leads out"),
        ('{"1": {"question": "a", "imageId": "b"}}', "no answer"),
    ],
)
def test_a_file_that_is_not_gqas_is_named(tmp_path, content, message):
    (tmp_path / "testdev_balanced_questions.json").write_text(content)
    with pytest.raises(UserError, match=message):
        gqa_questions(tmp_path, "test-dev")
