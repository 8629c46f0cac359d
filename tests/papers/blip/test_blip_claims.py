"""The data of BLIP's claims, what its arms measure, and effects on measurements whose answer is known."""

from dataclasses import replace
from functools import partial

import arms
import pytest
import torch
from published import entry, make_karpathy

from papers.blip.data import Text, build_data, parted, plain_titles, scenes_parted
from papers.blip.evidence import claims
from papers.blip.evidence.capfilt import CapFilt, kept_of
from papers.blip.evidence.capfilt_page import Decision
from papers.blip.recipe import BlipRecipe
from shared.core.errors import UserError
from shared.data.dataset import DatasetBundle, Split
from shared.experiments import effects

SMALL = BlipRecipe(
    paper="blip", model="blip-tiny", data="shapes", pairs=96, clean=32, test_pairs=24, classes=6, batch=8, steps=4,
    warmup_steps=1, finetune_steps=2, queue=16, momentum=0.9, longest=16, candidates=4, vision_steps=3,
    accelerator="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return build_data(SMALL, 3)


context, measured = partial(arms.context, recipe=SMALL), partial(arms.measured, claims, SMALL)


# ---- data


def test_clean_pairs_are_right_and_the_web_has_the_declared_share_of_wrong_ones():
    data = build_data(replace(SMALL, pairs=600, clean=100), 3)
    assert len(data.clean) == 100 and all(text.true for text in data.clean)
    assert len(data.web) == 500 and {t.picture for t in data.web}.isdisjoint(t.picture for t in data.clean)
    wrong = sum(not text.true for text in data.web) / len(data.web)
    assert wrong == pytest.approx(0.25, abs=0.06)


def test_held_out_captions_have_near_misses_and_no_picture_is_trained_on(data):
    assert len(set(data.eval_set.texts)) == len(data.eval_set.texts) == len(data.eval_set.images)
    trained = {image.numpy().tobytes() for image in data.dataset.train.images}
    assert not any(image.numpy().tobytes() in trained for image in data.eval_set.images)


def test_a_title_is_plain_if_its_words_are_and_no_other_picture_bears_it():
    captions = [
        ["A Christmas tree"], ["gramastar"], ["Gramastar"], ["icon 12", "anchor"], ["mail@example.org"], ["pêche"],
        ["one two three four five six seven eight nine"], ["fire-ball", "w_cloud"],
    ]  # fmt: skip
    assert plain_titles(captions) == {"A Christmas tree", "anchor", "pêche", "fire-ball"}


def published(*titles):
    images = torch.zeros(len(titles), 3, 8, 8, dtype=torch.uint8)
    train = Split([f"{i}" for i in range(len(titles))], images, [list(several) for several in titles])
    other = Split(["v"], images[:1], [["a house"]])
    return DatasetBundle(name="toy", train=train, val=other, test=other)


def test_of_a_published_set_plain_titles_are_clean_and_all_others_the_web():
    dataset = published(["a cat", "cat_01"], ["theme"], ["theme"], ["a dog"], ["a bird"])
    clean, web = parted(dataset, replace(SMALL, clean=2, clean_by="titles"))
    assert clean == [Text(0, "a cat"), Text(3, "a dog")]
    assert web == [Text(1, "theme"), Text(2, "theme"), Text(4, "a bird")], "no more than asked for are clean"


def test_sentences_are_clean_by_their_place_or_by_a_file_of_ids(tmp_path):
    dataset = published(["A cat sits on 2 mats."], ["A dog, running."], ["A bird."])
    clean, web = parted(dataset, replace(SMALL, clean=2))
    assert [text.picture for text in clean] == [0, 1] and web == [Text(2, "A bird.")]
    (tmp_path / "ids.txt").write_text("\ufeff2\n0\n", encoding="utf-8")
    clean, web = parted(dataset, replace(SMALL, clean=2, clean_by=str(tmp_path / "ids.txt")))
    assert [text.picture for text in clean] == [0, 2] and [text.picture for text in web] == [1]
    with pytest.raises(UserError, match=r"clean_by=.*cannot be read .*give first, titles, or a file"):
        parted(dataset, replace(SMALL, clean_by=str(tmp_path / "none.txt")))


def test_a_plain_set_of_sentences_fills_batches(tmp_path):
    rows = [entry(i, "test" if i % 5 == 0 else "val" if i % 5 == 1 else "train") for i in range(200)]
    for i, row in enumerate(rows):
        row["sentences"] = [{"raw": f"A man rides horse {i}, slowly."}, {"raw": "Somebody on a horse."}]
    root = make_karpathy(tmp_path / "set", rows, tar=True)
    data = build_data(replace(SMALL, data="karpathy", data_root=str(root), pairs=96, clean=40, test_pairs=20), 3)
    assert len(data.clean) == 40 and len(data.web) == 2 * 96 - 40
    assert len(data.eval_set.images) == 20 and len(data.eval_set.texts) == 40


def test_scenes_give_clean_pairs_in_order():
    train = Split(list("abc"), torch.zeros(3, 3, 8, 8), [["x"], ["y"], ["z"]], noisy=torch.tensor([True, False, False]))
    assert scenes_parted(train, 1) == ([Text(1, "y", True)], [Text(0, "x", False), Text(2, "z", True)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clean": 96}, "leaves none to the web"),
        ({"clean": 4}, "do not fill a batch"),
        ({"model": "blip-base"}, "BERT"),
    ],
)
def test_data_that_cannot_be_parted_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        build_data(replace(SMALL, **changed), 3)


@pytest.mark.parametrize(
    "changed", [{"top_p": 0.0}, {"shortest": 30}, {"longer": 0.5}, {"momentum": 1.0}, {"alpha": 2}]
)
def test_a_recipe_that_cannot_be_is_refused(changed):
    with pytest.raises(UserError, match="recipe:"):
        replace(SMALL, **changed)


# ---- arms


def test_the_order_in_which_arms_ask_for_stages_changes_no_number(tmp_path):
    names = ("noisy", "filter_only", "both")
    one, other = measured(tmp_path / "one", *names), measured(tmp_path / "other", *reversed(names))
    for name in names:
        assert {k: v for k, v in one[name].items() if k != "waited"} == {
            k: v for k, v in other[name].items() if k != "waited"
        }
    assert {path.name.split("-")[0] for path in (tmp_path / "one" / "arms" / "stages").iterdir()} == {"3"}


def test_arms_begin_alike_with_the_vision_encoder_that_learned_to_classify(tmp_path):
    work = CapFilt.of(context(tmp_path, "noisy"))
    torch.manual_seed(99)
    first = work.new_model()
    second = work.new_model()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    fresh = CapFilt.of(context(tmp_path / "fresh", "noisy", recipe=replace(SMALL, vision_steps=0))).new_model()
    key = "blip.vision_encoder.blocks.0.mlp.up.weight"
    assert not torch.equal(first.state_dict()[key], fresh.state_dict()[key])
    assert torch.equal(first.state_dict()[key], first.state_dict()[key.replace("blip.", "momentum.")])


def test_in_fine_tuning_the_momentum_copies_and_the_queue_move_too(tmp_path):
    work = CapFilt.of(context(tmp_path, "filter"))
    before, after = (model.state_dict() for model in (work.pretrained()[0], work.tuned("filter")[0]))
    for key in ("momentum.vision_proj.weight", "queue.images", "blip.itm_head.weight"):
        assert not torch.equal(before[key], after[key]), key
    assert torch.equal(before["blip.text_decoder.head.bias"], after["blip.text_decoder.head.bias"]), "LM is off"


def test_the_filter_alone_takes_all_texts_of_a_picture_for_its_partners(tmp_path, monkeypatch):
    seen = {}

    def fit(module, batches, recipe, folder, callbacks, identity):
        seen[identity["arm"]] = module.recipe.by_picture
        return 0.0

    monkeypatch.setattr(effects, "fit", fit)
    work = CapFilt.of(context(tmp_path, "both"))
    for name in ("captioner", "filter", "coupled"):
        work.tuned(name)
    assert seen == {"pretrained": False, "captioner": False, "filter": True, "coupled": False}


def test_what_each_arm_trains_on(tmp_path, monkeypatch):
    seen = {}

    def train(self, model, texts, folder, name, *rest, **more):
        seen[name] = [(text.picture, text.text) for text in texts], more.get("steps")
        return {"curves": {}, "waited": 0.0}

    monkeypatch.setattr(CapFilt, "train", train)
    monkeypatch.setattr(claims, "measure", lambda *_: {"r1": 0.0})
    measured(tmp_path, "noisy", "filter_only", "captioner_only", "both", "longer", "continued", "share_all")
    work = CapFilt.of(context(tmp_path, "again"))
    web, clean = ([(t.picture, t.text) for t in part] for part in (work.data.web, work.data.clean))
    written = [(t.picture, t.text) for t in work.written("captioner", "nucleus")]
    decisions = work.bootstrapped()
    kept = {
        o: [(t.picture, t.text) for t in kept_of([d for d in decisions if d.origin == o])] for o in ("web", "written")
    }
    assert seen["pretrained"][0] == [*web, *clean] and seen["captioner"][0] == seen["filter"][0] == clean
    assert seen["filter_only"][0] == [*kept["web"], *clean]
    assert seen["captioner_only"][0] == [*web, *written, *clean]
    assert seen["both"][0] == seen["continued"][0] == [*kept["web"], *kept["written"], *clean]
    assert seen["longer"] == ([*web, *clean], round(1.6 * SMALL.steps)) and seen["share_all"][0] == [*web, *clean]


def test_a_captioner_learns_its_texts_behind_the_prompt_and_not_the_prompt_itself(tmp_path, monkeypatch):
    from papers.blip.evidence import capfilt

    modules = {}

    class Module(capfilt.BlipModule):
        def __init__(self, model, recipe, objectives, prompt):
            super().__init__(model, recipe, objectives, prompt)
            modules[objectives] = prompt

    monkeypatch.setattr(capfilt, "BlipModule", Module)
    monkeypatch.setattr(effects, "fit", lambda module, batches, *_: modules.update(tokens=batches.tensors[1]) or 0.0)
    work = CapFilt.of(context(tmp_path, "captioner"))
    work.tuned("captioner")
    words = work.data.tokenizer
    prompt = words.encode("a picture of")
    assert modules[capfilt.CAPTIONER] == 1 + len(prompt)
    assert modules["tokens"][:, 1 : 1 + len(prompt)].tolist() == [prompt] * len(work.data.clean)
    work.tuned("captioner-bare")
    assert modules[capfilt.CAPTIONER] == 0


# ---- effects


def test_effects_are_treatment_minus_baseline():
    found = {arm: {"r1": 10.0 * i, "cider": i} for i, arm in enumerate(claims.ARMS)}
    for id, claim in claims.CLAIMS.items():
        treatment, baseline = claim.arms[:2]
        name = "cider" if id == "blip.caption_prompt" else "r1"
        assert claim.effect(found) == found[treatment][name] - found[baseline][name], id


def test_shares_of_what_the_filter_did():
    def decision(origin, match, true):
        return Decision(0, "a", origin, "text", match, true)

    decisions = [
        decision("web", 0.9, True), decision("web", 0.2, True), decision("web", 0.1, False),
        decision("web", 0.8, False), decision("written", 0.9, None),
    ]  # fmt: skip
    found = claims.filtered(decisions)
    assert found["removed"] == pytest.approx(40) and found["web_removed"] == 50 and found["written_removed"] == 0
    assert found["web_false"] == 50 and found["web_precision"] == 50 and found["web_recall"] == 50
    assert "written_precision" not in found, "nobody knows what is true of the written ones"
