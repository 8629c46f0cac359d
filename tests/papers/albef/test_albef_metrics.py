"""ALBEF's metrics rung end to end: tiny checkpoints, small sets in the published layouts, and what is said where one
lacks."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from benchmark_rows import forget_scores, karpathy, made_row, manifest_entry, read_files, read_pictures
from PIL import Image

from papers.albef import config as albef_config
from papers.albef.evidence import benchmarks as metrics
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import AlbefRetrieval, AlbefVqa, Distilled, Entailment, Nlvr2, PairEncoder, QuestionAnswering
from papers.albef.weights import FORMATS, published_of
from shared.core.errors import UserError
from shared.data import vqa as vqa_sets
from shared.experiments.benchmarks import candidates_of
from shared.tokenizers.bert import BertTokenizer
from shared.weights.load import save_weights

WORDS = "a the cat red is there two yes no left both what on of picture caption"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *[str(n) for n in range(10)]]
TOKENIZER = BertTokenizer(PIECES)
TINY = replace(
    albef_config.tiny(), vocabulary=len(PIECES), pad=0, start=2, end=3, mask=4, tokenizer="bert-wordpiece", context=30,
    fusion_layers=3,
)  # fmt: skip


def picture(seed, size=(40, 32)):
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def model_of(kind):
    torch.manual_seed(0)
    albef = Albef(TINY)
    return {
        "pretraining": lambda: AlbefPretraining(albef),
        "retrieval": lambda: AlbefRetrieval(albef),
        "vqa": lambda: AlbefVqa(QuestionAnswering(albef)),
        "nlvr2": lambda: Distilled(Nlvr2(PairEncoder(albef))),
        "entailment": lambda: Distilled(Entailment(albef)),
    }[kind]().eval()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A place with a manifest of tiny weights under published names; the variants stand for the tiny one."""
    for name in ("albef-4m", "albef-14m"):
        monkeypatch.setitem(albef_config.VARIANTS, name, lambda: TINY)
    monkeypatch.setattr(metrics, "tokenizer_of", lambda: TOKENIZER)
    monkeypatch.chdir(tmp_path)
    forget_scores()
    (tmp_path / "weights").mkdir()
    return tmp_path


def entry(file, **tokenizer):
    return manifest_entry(TINY, file, {"type": "url", "urls": ["https://example.org/" + file]}, **tokenizer)


def recipe(world, id, kind=None, scale="paper", file="tiny.safetensors", card=None):
    """The recipe of a run whose weights `id` are of this kind, under their published names; none where kind is None."""
    (world / "manifest.yaml").write_text(yaml.safe_dump({id: card or entry(file, closed=False)}))
    if kind:
        model = model_of(kind)
        assert set(FORMATS) > {kind}
        save_weights(published_of(model.state_dict(), kind, TINY, model), world / "weights" / file)
    return AlbefRecipe(
        paper="albef", model="albef-tiny", scale=scale, data_root=str(world), manifest=str(world / "manifest.yaml")
    )


def row(dataset, split, metric, weights):
    return made_row("albef", dataset, split, metric, weights, "albef-14m")


# ---- retrieval


def flickr(world):
    karpathy(world / "flickr30k", [[f"A caption {n} of picture {i}." for n in range(3)] for i in range(5)])


def test_retrieval_is_re_ranked_by_the_match_logit_and_reads_all_captions(world):
    flickr(world)
    given_id = "albef-14m-retrieval-flickr30k"
    given = recipe(world, given_id, "retrieval")
    found = {
        way: metrics.measure(row("Flickr30k", "1k test", f"retrieval/{way}_r1@itc-top128-itm", given_id), given)
        for way in ("i2t", "t2i")
    }
    model = model_of("retrieval").student
    images = read_files(world / "flickr30k" / f"{i}.jpg" for i in range(5))
    texts = [f"a caption {n} of picture {i}" for i in range(5) for n in range(3)]
    tokens = torch.tensor([[TINY.start, *TOKENIZER.encode(text)] for text in texts])  # no [SEP]
    with torch.no_grad():
        seen, states = model.encode_image(images), model.encode_text(tokens)
        attention_mask = tokens != TINY.pad
        logits = torch.stack(
            [model.match(states, attention_mask, one.expand(15, -1, -1))[:, 1] for one in seen]
        )  # (5, 15)
    owner = torch.arange(15) // 3
    assert found["i2t"] == pytest.approx(100 * float((owner[logits.argmax(1)] == torch.arange(5)).float().mean()))
    assert found["t2i"] == pytest.approx(100 * float((logits.argmax(0) == owner).float().mean()))


def test_the_candidates_are_named_by_the_protocol():
    assert candidates_of("zeroshot-itc-top128-itm") == 128 and candidates_of("itc-top256-itm") == 256


@pytest.mark.parametrize(
    ("dataset", "metric", "weights", "tuned"),
    [
        ("MSCOCO", "retrieval/i2t_r1@zeroshot-itc-top256-itm", "albef-4m", ""),
        ("Flickr30k", "retrieval/i2t_r1@zeroshot-itc-top128-itm", "albef-4m", "retrieval-coco"),
        ("Flickr30k", "retrieval/i2t_r1@itc-top128-itm", "albef-4m", "retrieval-flickr30k"),
        ("VQAv2", "vqa/accuracy@official", "albef-4m", "vqav2"),
        ("Flickr30k", "retrieval/i2t_r1@zeroshot-itc-top128-itm", "albef-14m-retrieval-coco", ""),
    ],
)
def test_what_was_released_pre_trained_only_is_tuned_first(dataset, metric, weights, tuned):
    assert metrics.fine_tuned_for(row(dataset, "test", metric, weights)) == tuned


# ---- VQA


def vqav2(world, answers=("yes", "no", "two cat")):
    folder = world / "vqav2"
    (folder / "test2015").mkdir(parents=True)
    questions = []
    for i in range(3):
        (folder / "test2015" / f"COCO_test2015_{i:012d}.jpg").write_bytes(picture(i))
        questions.append({"image_id": i, "question": "What is on the left?", "question_id": 10 * i + 1})
    path = folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    path.write_text(json.dumps({"questions": questions}))
    (folder / "answer_list.json").write_text(json.dumps(list(answers)))
    return folder


def test_answers_to_test_questions_are_written_for_the_server_and_not_scored(world):
    vqav2(world)
    given = recipe(world, "albef-14m-vqa", "vqa")
    wanted = row("VQAv2", "test-dev", "vqa/accuracy@official", "albef-14m-vqa")
    with pytest.raises(UserError, match=r"answers to test-dev are written to .*the official server scores them"):
        metrics.measure(wanted, given)
    written = json.loads((world / "runs" / "albef" / "predictions" / "vqav2-test-dev-tiny.json").read_text())
    assert [one["question_id"] for one in written] == [1, 11, 21]
    assert {one["answer"] for one in written} <= {"yes", "no", "two cat"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("{}", "no list of answers"),
        ("[]", "no list of answers"),
        ('["yes", 3]', "answer 2 is 3"),
        ('["yes", "  "]', "answer 2"),
        ('["yes", "yes"]', "'yes' stands there twice"),
        ("[", "not JSON"),
    ],
)
def test_an_unknown_answer_list_is_named_before_any_question_is_asked(world, content, told):
    folder = vqav2(world)
    (folder / "answer_list.json").unlink()
    if content is not None:
        (folder / "answer_list.json").write_text(content)
    given = recipe(world, "albef-14m-vqa", "vqa")
    with pytest.raises(UserError, match=told):
        metrics.measure(row("VQAv2", "test-dev", "vqa/accuracy@official", "albef-14m-vqa"), given)
    assert not (world / "runs").exists()


def test_validation_questions_bring_their_ten_answers(tmp_path):
    question = {"image_id": 7, "question": "is it?", "question_id": 1}
    answers = [{"answer": "yes", "answer_id": i} for i in range(10)]
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": [question]}))
    marked = tmp_path / "v2_mscoco_val2014_annotations.json"
    marked.write_text(json.dumps({"annotations": [{"question_id": 1, "answers": answers}]}))
    (one,) = vqa_sets.vqa_questions(tmp_path, "val")
    assert one.answers == ("yes",) * 10 and one.picture.id == "COCO_val2014_000000000007.jpg"
    marked.write_text(json.dumps({"annotations": [{"question_id": 2, "answers": answers}]}))
    with pytest.raises(UserError, match="row 1: question 1 has no answers"):
        vqa_sets.vqa_questions(tmp_path, "val")
    with pytest.raises(UserError, match="no split 'dev': choose train, val, test-dev, test-std"):
        vqa_sets.vqa_questions(tmp_path, "dev")


# ---- NLVR2, SNLI-VE


def test_nlvr2_pairs_are_read_left_and_right_and_judged(world):
    folder = world / "nlvr2"
    (folder / "dev").mkdir(parents=True)
    lines = []
    for i in range(4):
        for side in (0, 1):
            (folder / "dev" / f"dev-{i}-0-img{side}.png").write_bytes(picture(2 * i + side))
        lines.append({"identifier": f"dev-{i}-0-1", "sentence": "both is red", "label": str(i % 2 == 0)})
    (folder / "dev.json").write_text("\n".join(map(json.dumps, lines)))
    given = recipe(world, "albef-14m-nlvr2", "nlvr2")
    found = metrics.measure(row("NLVR2", "dev", "nlvr2/accuracy@pair", "albef-14m-nlvr2"), given)
    pairs = vqa_sets.nlvr2_pairs(folder, "dev")
    images = torch.stack([read_pictures(record.read() for record in pair.pictures) for pair in pairs])
    tokens = torch.tensor([[TINY.start, *TOKENIZER.encode("both is red")]] * 4)
    said = model_of("nlvr2").predict(images, tokens)
    assert found == 100 * float((said == torch.tensor([1, 0, 1, 0])).float().mean())
    assert [pair.pictures[1].id for pair in pairs] == [f"dev-{i}-0-img1.png" for i in range(4)]


def test_hypotheses_are_judged_in_the_official_order_of_classes(world):
    folder = world / "snli-ve"
    (folder / "flickr30k_images").mkdir(parents=True)
    lines = []
    for i in range(3):
        (folder / "flickr30k_images" / f"{i}.jpg").write_bytes(picture(i))
        label = vqa_sets.VERDICTS[i]
        lines.append({"Flickr30K_ID": str(i), "gold_label": label, "sentence2": "there is a cat", "pairID": f"{i}#0"})
    (folder / "snli_ve_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = recipe(world, "albef-14m-snli-ve", "entailment")
    found = metrics.measure(row("SNLI-VE", "test", "entailment/accuracy@three-way", "albef-14m-snli-ve"), given)
    assert vqa_sets.VERDICTS == ("contradiction", "neutral", "entailment")
    images = read_pictures(picture(i) for i in range(3))
    tokens = torch.tensor([[TINY.start, *TOKENIZER.encode("there is a cat")]] * 3)
    said = model_of("entailment").predict(images, tokens)
    assert found == pytest.approx(100 * float((said == torch.arange(3)).float().mean()))


@pytest.mark.parametrize("label", ["-", "maybe"])
def test_a_hypothesis_without_a_verdict_is_named(tmp_path, label):
    line = {"Flickr30K_ID": "1", "gold_label": label, "sentence2": "x", "pairID": "1"}
    (tmp_path / "snli_ve_test.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"snli_ve_test.jsonl: row 1: gold_label is"):
        vqa_sets.entailment_rows(tmp_path, "test")


# ---- RefCOCO+


def refcoco(folder):
    (folder / "train2014").mkdir(parents=True)
    (folder / "train2014" / "one.jpg").write_bytes(picture(0, (40, 60)))
    image = {"id": 5, "file_name": "one.jpg", "width": 60, "height": 40}
    thing = {"id": 9, "bbox": [0, 0, 20, 20]}
    (folder / "instances.json").write_text(json.dumps({"images": [image], "annotations": [thing]}))
    (folder / "dets.json").write_text(json.dumps({"5": [[0, 0, 20, 20], [40, 20, 20, 20]]}))
    ref = {"ref_id": 1, "ann_id": 9, "image_id": 5, "split": "val", "sentences": [{"sent": "the red cat"}]}
    (folder / "refs.json").write_text(json.dumps([ref]))


def test_the_proposal_with_the_most_heat_for_its_area_is_chosen(world):
    refcoco(world / "refcoco+")
    given = recipe(world, "albef-refcoco", "retrieval")
    wanted = row("RefCOCO+", "val", "grounding/accuracy@gradcam-ranked-proposals", "albef-refcoco")
    image = read_pictures([picture(0, (40, 60))])
    tokens = torch.tensor([[TINY.start, *TOKENIZER.encode("the red cat")]])
    seen = metrics.heat_map(model_of("retrieval").student, image, tokens, 2)[0]
    right = metrics.best_proposal(seen, [(0, 0, 20, 20), (40, 20, 20, 20)], (60, 40)) == (0, 0, 20, 20)
    assert metrics.measure(wanted, given) == 100.0 * right
    heat = torch.zeros(4, 4)
    heat[3, 3] = 1.0
    assert metrics.best_proposal(heat, [(0, 0, 20, 20), (40, 20, 20, 20)], (60, 40)) == (40, 20, 20, 20)


def test_overlap_is_intersection_over_union():
    assert metrics.overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert metrics.overlap((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(50 / 150)
    assert metrics.overlap((0, 0, 10, 10), (20, 20, 10, 10)) == 0.0


def test_a_pickle_of_references_is_not_opened(world):
    folder = world / "refcoco+"
    refcoco(folder)
    (folder / "refs.json").rename(folder / "refs(unc).p")
    with pytest.raises(UserError, match="a pickle may run code"):
        vqa_sets.referred_things(folder, "val")


# ---- what lacks


RETRIEVAL = ("Flickr30k", "1k test", "retrieval/i2t_r1@itc-top128-itm", "albef-14m-retrieval-flickr30k")


def test_what_cannot_be_run_says_the_exact_need(world):
    given = recipe(world, RETRIEVAL[3], file="flickr30k.pth")
    told = r"SCALE=paper .*flickr30k \(as published\): missing; weights .*weights/flickr30k.pth .*: missing"
    with pytest.raises(UserError, match=told):
        metrics.measure(row(*RETRIEVAL), given)
    flickr(world)
    with pytest.raises(UserError, match=r"\(as published\): here; weights \S+flickr30k.pth \(.*\): missing"):
        metrics.measure(row(*RETRIEVAL), given)
    with pytest.raises(UserError, match="SCALE=paper"):
        metrics.measure(row(*RETRIEVAL), recipe(world, RETRIEVAL[3], "retrieval", scale="mini"))


def test_weights_of_another_task_are_refused_by_name(world):
    flickr(world)
    given = recipe(world, RETRIEVAL[3], "entailment")
    with pytest.raises(UserError, match=r"tiny.safetensors: holds Distilled, but retrieval takes Albef"):
        metrics.measure(row(*RETRIEVAL), given)


def test_a_card_that_the_model_contradicts_is_refused_before_loading(world):
    flickr(world)
    card = entry("tiny.safetensors")
    card["preprocess"]["mean"] = [0.5, 0.5, 0.5]
    given = recipe(world, RETRIEVAL[3], "retrieval", card=card)
    with pytest.raises(UserError, match=r"preprocess\.mean is"):
        metrics.measure(row(*RETRIEVAL), given)
