"""BLIP's metrics rung on tiny checkpoints and tiny sets in their published layouts: every kind of row, and what it says
where something is lacking."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from benchmark_rows import forget_scores, karpathy, nocaps, picture, read_files, read_pictures, written
from benchmark_rows import row_of as row_of_card
from tests_common import CATALOG

from papers.blip.config import SPECIALS, VARIANTS, with_tokenizer
from papers.blip.encode import GenerationConfig, reranked, text_features, tokens_of, write
from papers.blip.encode import encoded as encoded_pictures
from papers.blip.evidence import benchmarks as metrics
from papers.blip.model import Blip, BlipPretraining
from papers.blip.recipe import BlipRecipe
from papers.blip.tasks import BlipDialogue, BlipNlvr, BlipVqa
from shared.core.errors import UserError
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights.load import save_weights
from shared.weights.manifest import load_manifest

CARD = CATALOG.card("blip")
row_of = partial(row_of_card, CARD)
CAPTIONS = ["a red circle", "a blue square", "a green star", "two red circles"]
WORDS = [*CAPTIONS, "a picture of", "is it red? yes no", "what colour is it?"] * 3


@pytest.fixture
def home(tmp_path, monkeypatch):
    """data_root with weights/ for every row, networks of the tiny variant, and the current folder for predictions."""
    words = SmallTokenizer.train(WORDS, 310, SPECIALS)
    tiny = with_tokenizer(VARIANTS["blip-tiny"](), words)
    tiny = replace(tiny, context=40, positions=64)
    large = replace(tiny, vision_layers=tiny.vision_layers + 1)  # weights of one size do not load into the other
    monkeypatch.setattr(metrics, "VARIANTS", {"blip-base": lambda: tiny, "blip-large": lambda: large})
    monkeypatch.setattr(metrics, "SIZES", dict.fromkeys(metrics.SIZES, lambda config: config))
    monkeypatch.setattr(metrics, "tokenizer_of", lambda config: words)
    forget_scores()
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    (root / "weights").mkdir(parents=True)
    torch.manual_seed(0)
    recipe = BlipRecipe(
        paper="blip", scale="paper", model="blip-base", data_root=str(root), manifest=str(metrics_manifest()),
    )  # fmt: skip
    return SimpleNamespace(root=root, recipe=recipe, words=words, config=tiny, large=large)


def metrics_manifest():
    return CATALOG.root / "checkpoints_manifest.yaml"


def place(home, row, model):
    """Put a model where the row looks for its weights."""
    [weights] = metrics.needs(row, load_manifest(home.recipe.manifest), home.root)
    path = weights.place
    save_weights(model, path)
    return path


# ---- each kind of row


@pytest.mark.parametrize("tuned", [True, False], ids=["released", "to be fine-tuned"])
def test_retrieval_ranks_by_match_and_cosine_among_all_captions(home, tuned):
    row = next(
        row for row in CARD.metrics
        if row.metric == "retrieval/t2i_r1@itc-top128-itm+itc" and ("retrieval" in row.need.weights) == tuned
    )  # fmt: skip
    captions = [["A red circle!", "two red circles"], ["a blue square"], ["a green star", "a green star: a star"]]
    karpathy(home.root / "flickr30k", captions)
    model = BlipPretraining(home.config, decoder=False)
    place(home, row, model)
    found = metrics.measure(row, home.recipe)
    images = read_files(home.root / "flickr30k" / f"{i}.jpg" for i in range(3))
    blip = model.blip.eval()
    texts = ["a red circle", "two red circles", "a blue square", "a green star", "a green star a star"]
    tokens = tokens_of(home.words, texts, home.config)
    seen = encoded_pictures(blip, images)
    with torch.inference_mode():
        scores = [
            [float(blip.match(t[None], v[None])[0, 1] + f @ g) for v, f in zip(seen.tokens, seen.features, strict=True)]
            for t, g in zip(tokens, text_features(blip, tokens), strict=True)
        ]
    owner = [0, 0, 1, 2, 2]
    right = sum(max(range(3), key=line.__getitem__) == own for line, own in zip(scores, owner, strict=True))
    assert found == pytest.approx(100 * right / 5)


def test_zero_shot_retrieval_takes_the_weights_tuned_on_coco(home):
    row = row_of("retrieval/i2t_r5@zeroshot-itc-top128-itm+itc", variant="blip-base-14m")
    karpathy(home.root / "flickr30k", [[text] for text in CAPTIONS])
    assert place(home, row, Blip(home.config)).name == "blip-base-14m-retrieval-mscoco.safetensors"
    assert metrics.measure(row, home.recipe) == 100.0, "four pictures: each among the five best"


def test_only_the_best_by_contrast_are_matched(home):
    model = Blip(home.config).eval()
    asked = []
    model.match = lambda tokens, seen, original=model.match: asked.append(len(tokens)) or original(tokens, seen)
    images = torch.randint(0, 256, (5, 3, 32, 32)).byte()
    i2t, t2i = reranked(model, encoded_pictures(model, images), tokens_of(home.words, CAPTIONS, home.config), 2)
    assert asked == [2] * 9 and i2t.shape == (5, 4) and t2i.shape == (4, 5)
    assert ((i2t > -99).sum(1) == 2).all() and ((t2i > -99).sum(1) == 2).all()


@pytest.mark.parametrize("metric", ["caption/cider@ptb", "caption/bleu4@ptb"])
def test_captions_of_coco(home, metric):
    row = row_of(metric, variant="blip-base-capfilt-l")
    model = Blip(home.config, encoder=False).eval()
    place(home, row, model)
    karpathy(home.root / "coco", [["placeholder"]] * 4)
    said = write(model, home.words, read_files(home.root / "coco" / f"{i}.jpg" for i in range(4)), GenerationConfig())
    karpathy(home.root / "coco", [[text or "nothing", "a red circle"] for text in said])
    own = metrics.measure(row, home.recipe)
    forget_scores()
    karpathy(home.root / "coco", [["some other words that nobody said"]] * 4)
    assert own > metrics.measure(row, home.recipe), "its own words score higher than a stranger's"


def test_nocaps_is_written_for_its_server(home):
    row = row_of("caption/cider@nocaps-server", variant="blip-large")
    place(home, row, Blip(home.large, encoder=False))
    nocaps(home.root / "nocaps")
    with pytest.raises(UserError, match=r"written to (\S+); the server of NoCaps") as told:
        metrics.measure(row, home.recipe)
    rows = written(told)
    assert [one["image_id"] for one in rows] == [7, 8] and all(isinstance(one["caption"], str) for one in rows)


def test_vqa_answers_are_written_for_the_server(home):
    row = row_of("vqa/accuracy@official", variant="blip-base-129m", split="test-dev")
    place(home, row, BlipVqa(replace(home.config, sharing="none")))
    folder = home.root / "vqav2"
    picture(folder / "test2015" / "COCO_test2015_000000000005.jpg", 1)
    questions = [{"question_id": 50 + i, "image_id": 5, "question": "Is it red?"} for i in range(2)]
    (folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps({"questions": questions}))
    with pytest.raises(UserError, match=r"answer_list\.json: cannot be read"):
        metrics.measure(row, home.recipe)
    (folder / "answer_list.json").write_text('["yes", "no"]')
    with pytest.raises(UserError, match="the official server scores them") as told:
        metrics.measure(row, home.recipe)
    rows = written(told)
    assert [one["question_id"] for one in rows] == [50, 51] and {one["answer"] for one in rows} <= {"yes", "no"}


def test_nlvr2_counts_pairs_judged_rightly(home):
    row = row_of("nlvr2/accuracy@pair", variant="blip-base-129m", split="dev")
    place(home, row, BlipNlvr(home.config))
    folder = home.root / "nlvr2"
    lines = []
    for index in range(4):
        for side in (0, 1):
            picture(folder / "dev" / f"dev-{index}-0-img{side}.png", index + side)
        lines.append({"identifier": f"dev-{index}-0-0", "sentence": "one is red", "label": "True"})
    (folder / "dev.json").write_text("\n".join(json.dumps(line) for line in lines))
    found = metrics.measure(row, home.recipe)
    forget_scores()
    (folder / "dev.json").write_text("\n".join(json.dumps(line | {"label": "False"}) for line in lines))
    assert found + metrics.measure(row, home.recipe) == 100.0 and found in (0, 25, 50, 75, 100)


def talk(answers, right):
    rounds = [
        {"question": i, "answer": right, "answer_options": list(range(answers)), "gt_index": right} for i in (0, 1)
    ]
    return {"image_id": 9, "caption": "a red circle", "dialog": rounds}


def test_dialogue_ranks_the_humans_answer_among_the_candidates(home):
    row = row_of("dialog/r1@discriminative")
    place(home, row, BlipDialogue(home.config))
    folder = home.root / "visdial"
    picture(folder / "VisualDialog_val2018" / "VisualDialog_val2018_000000000009.jpg", 3)
    answers = ["yes", "no", "red"]
    shares = []
    for right in range(3):
        data = {"questions": ["is it red", "what colour"], "answers": answers, "dialogs": [talk(3, right)]}
        (folder / "visdial_1.0_val.json").write_text(json.dumps({"version": "1.0", "data": data}))
        forget_scores()
        shares.append(metrics.measure(row, home.recipe))
        assert metrics.measure(row_of("dialog/r5@discriminative"), home.recipe) == 100.0
    assert all(share in (0.0, 50.0, 100.0) for share in shares) and 0 < sum(shares) < 300, shares


def test_videos_are_the_mean_and_the_row_of_their_frames(home):
    row = row_of("video-retrieval/t2v_r1@zeroshot-8frames-itc-top128-itm+itc")
    place(home, row, Blip(home.config))
    folder = home.root / "msrvtt"
    for clip in range(3):
        for frame in range(4 + 6 * clip):
            picture(folder / "frames" / f"video{clip}" / f"{frame:03}.jpg", clip + frame)
    lines = [{"clip_name": f"video{i}", "caption": text} for i, text in enumerate(CAPTIONS[:3])]
    (folder / "msrvtt_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert metrics.measure(row, home.recipe) in (0.0, pytest.approx(100 / 3), pytest.approx(200 / 3), 100.0)
    ten = row_of("video-retrieval/t2v_r10@zeroshot-8frames-itc-top128-itm+itc")
    assert metrics.measure(ten, home.recipe) == 100.0


def test_videos_are_asked_with_sixteen_frames(home):
    row = row_of("video-qa/top1@zeroshot-16frames")
    model = BlipVqa(replace(home.config, sharing="none")).eval()
    place(home, row, model)
    folder = home.root / "msrvtt"
    for frame in range(20):
        picture(folder / "frames" / "video7" / f"{frame:03}.jpg", frame)
    asked = [{"question": "what colour is it?", "answer": "zzz", "video_id": 7}]
    (folder / "test_qa.json").write_text(json.dumps(asked))
    assert metrics.measure(row, home.recipe) == 0.0
    records = metrics.frames(SimpleNamespace(protocol="zeroshot-16frames"), metrics.msrvtt_questions(folder)[0])
    assert len(records) == 16
    assert [record.id for record in records][:3] == ["video7/000.jpg", "video7/001.jpg", "video7/002.jpg"]
    frames = read_pictures(one.read() for one in records)[None]
    said = metrics.write_answers(model, home.words, metrics.see(model, frames), ["what colour is it?"])
    forget_scores()
    (folder / "test_qa.json").write_text(json.dumps([asked[0] | {"answer": said[0] or " "}]))
    assert metrics.measure(row, home.recipe) == (100.0 if said[0] else 0.0)


# ---- what is lacking


def test_weights_that_were_never_released_are_asked_for_by_task_and_set(home):
    row = row_of("vqa/accuracy@official", variant="blip-base-14m", split="test-std")
    with pytest.raises(UserError, match=r"blip-base-14m-vqa-vqav2\.safetensors, fine-tuned from model_base_14M\.pth"):
        metrics.measure(row, home.recipe)
    row = row_of("caption/cider@nocaps-server", variant="blip-base-14m")
    with pytest.raises(UserError, match=r"blip-base-14m-caption-mscoco\.safetensors"):
        metrics.measure(row, home.recipe)


def test_a_picture_without_a_caption_is_named(home):
    row = row_of("retrieval/i2t_r5@zeroshot-itc-top128-itm+itc", variant="blip-base-14m")
    place(home, row, Blip(home.config))
    karpathy(home.root / "flickr30k", [["a red circle"], ["  "], ["a blue square"]])
    with pytest.raises(UserError, match=r"1.jpg \(it has no caption"):
        metrics.measure(row, home.recipe)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nocaps_val.json", '{"images": [{"id": 1}]}', "row 1: no file_name"),
        ("nocaps_val.json", '{"images": [{"id": 1, "file_name": "../a.jpg"}]}', "leads out"),
        (
            "visdial_1.0_val.json",
            '{"data": {"questions": ["a"], "answers": ["b"], "dialogs": [{}]}}',
            "row 1: KeyError",
        ),
        ("msrvtt_test.jsonl", '{"clip_name": "v", "caption": ""}', "no frames of this clip"),
        ("msrvtt_test.jsonl", "{", "line 1: not JSON"),
        ("test_qa.json", "[]", "no list of questions"),
    ],
)
def test_a_file_that_is_not_the_benchmarks_is_named(tmp_path, name, content, message):
    from shared.data.benchmarks import msrvtt_clips, msrvtt_questions, nocaps_records, visdial_talks

    (tmp_path / name).write_text(content)
    read = {
        "nocaps_val.json": nocaps_records, "visdial_1.0_val.json": visdial_talks,
        "msrvtt_test.jsonl": msrvtt_clips, "test_qa.json": msrvtt_questions,
    }[name]  # fmt: skip
    with pytest.raises(UserError, match=message):
        read(tmp_path)
