"""Worlds: the same bytes from the same arguments, disjoint splits, held-out pairs, labels and shift that agree."""

import json
import subprocess
import sys

import pytest
import torch
from published import emoji_package, encoded, entry, make_folder, make_karpathy, write_parquet

from shared.core.errors import UserError
from shared.data.dataset import make_dataset
from shared.data.synthetic.scenes import COLOURS, SceneOptions, held_out_colours
from shared.data.synthetic.sprites import load_pack

SMALL = {"pairs": 120, "test_pairs": 30, "image_size": 24, "classes": 10}
ALONE = SceneOptions(objects=(1, 1))


@pytest.fixture(scope="module")
def shapes():
    return make_dataset("shapes", **SMALL)


def parts(dataset):
    names = ("train", "val", "test", "class_val", "class_test", "compositions")
    return {name: getattr(dataset, name) for name in names}


def test_the_same_arguments_give_the_same_digest_and_others_another(shapes):
    assert make_dataset("shapes", **SMALL).digest == shapes.digest
    changed = [
        {"seed": 1},
        {"options": SceneOptions(noise=0.0)},
        {"classes": 9},
        {"caption_noise": 0.5},
        {"captions": 2},
    ]
    digests = [make_dataset("shapes", **(SMALL | change)).digest for change in changed]
    assert len({shapes.digest, *digests}) == len(changed) + 1


def test_a_world_of_more_pairs_begins_with_the_smaller_one(shapes):
    larger = make_dataset("shapes", **(SMALL | {"pairs": 150, "test_pairs": 40}))
    for name, split in parts(shapes).items():
        other = getattr(larger, name)
        assert torch.equal(other.images[: len(split)], split.images) and other.ids[: len(split)] == split.ids
    assert larger.train.captions[:120] == shapes.train.captions


def test_splits_are_disjoint_in_ids_and_in_pixels(shapes):
    ids = [id for split in parts(shapes).values() for id in split.ids]
    pixels = [image.numpy().tobytes() for split in parts(shapes).values() for image in split.images]
    assert len(set(ids)) == len(ids) and len(set(pixels)) == len(pixels)


def test_a_world_has_the_sizes_and_types_that_were_asked_for(shapes):
    for name, split in parts(shapes).items():
        assert len(split) == (120 if name == "train" else 30)
        assert split.images.shape[1:] == (3, 24, 24) and split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
    assert len(shapes.classes) == 10 and shapes.credits and shapes.coverage == []


def test_class_train_holds_the_training_pictures_of_one_thing_with_their_labels(shapes):
    rows = [i for i, label in enumerate(shapes.train.labels.tolist()) if label >= 0]
    assert 20 < len(rows) < 100 and shapes.class_train.ids == [shapes.train.ids[i] for i in rows]
    assert torch.equal(shapes.class_train.images, shapes.train.images[rows])
    assert torch.equal(shapes.class_train.labels, shapes.train.labels[rows])
    for label, (caption,) in zip(shapes.class_train.labels.tolist(), shapes.class_train.captions, strict=True):
        assert shapes.classes[label] in caption


def test_test_classes_are_balanced_and_named_by_their_captions(shapes):
    assert torch.bincount(shapes.class_test.labels).tolist() == [3] * 10
    for label, (caption,) in zip(shapes.class_test.labels.tolist(), shapes.class_test.captions, strict=True):
        assert shapes.classes[label] in caption


def test_the_shift_shows_the_same_scenes_by_the_other_hand(shapes):
    assert shapes.shift.ids == shapes.class_test.ids and torch.equal(shapes.shift.labels, shapes.class_test.labels)
    changed = (shapes.shift.images != shapes.class_test.images).flatten(1).any(1)
    assert changed.all()


def test_retrieval_captions_tell_the_pictures_apart(shapes):
    for split in (shapes.val, shapes.test):
        assert len({captions[0] for captions in split.captions}) == len(split)
    few = make_dataset("shapes", pairs=1, test_pairs=18, image_size=8, classes=3, options=ALONE)
    pairs = {(c, n) for c in COLOURS for n in few.classes for (said,) in few.test.captions if f"{c} {n}" in said}
    assert len(pairs) == 18  # of 21 that are not held out


def test_compositions_are_held_out_pairs_and_their_distractors_are_not(shapes):
    found = shapes.compositions
    assert len(found.texts) == 10 * len(COLOURS)
    pairs = [(name, colour) for name in shapes.classes for colour in COLOURS]
    for i, row in enumerate(found.choices.tolist()):
        name, colour = pairs[row[0]]
        assert found.labels[i] == row[0] and colour in held_out_colours(name)
        assert len(set(row)) == 4
        for wrong in row[1:]:
            assert pairs[wrong][1] not in held_out_colours(pairs[wrong][0])
        assert pairs[row[1]][0] == name and pairs[row[2]][1] == colour
    assert found.texts[pairs.index(("star", "red"))] == "a photo of a red star"
    assert f"a photo of an orange {shapes.classes[0]}" in found.texts


def test_distractors_avoid_every_colour_that_a_thing_is_not_shown_in():
    found = make_dataset("shapes", **SMALL, options=SceneOptions(held_out=0.25))
    pairs = [(name, colour) for name in found.classes for colour in COLOURS]
    for row in found.compositions.choices.tolist():
        for wrong in row[1:]:
            name, colour = pairs[wrong]
            assert len(held_out_colours(name, 0, 0.25)) == 2 and colour not in held_out_colours(name, 0, 0.25)


def test_composition_pictures_show_the_held_out_colour():
    found = make_dataset("shapes", **SMALL, options=SceneOptions(noise=0.0, clutter=0.0)).compositions
    inks = torch.tensor(list(COLOURS.values()))
    for image, label in zip(found.images, found.labels.tolist(), strict=True):
        near = (image.flatten(1).T[:, None].int() - inks).abs().amax(-1) < 24  # (pixels, colours)
        assert near.sum(0).argmax() == label % len(COLOURS) and near.sum(0).max() > 8


def test_no_training_caption_names_a_held_out_pair(shapes):
    for captions in (*shapes.train.captions, *shapes.test.captions):
        for name in shapes.classes:
            for colour in held_out_colours(name):
                assert f"{colour} {name}" not in captions[0]


def test_no_compositions_where_nothing_is_held_out():
    assert make_dataset("shapes", **SMALL, options=SceneOptions(held_out=0.0)).compositions is None


def test_caption_noise_exchanges_the_stated_share_and_says_where(shapes):
    noisy = make_dataset("shapes", **(SMALL | {"pairs": 600}), caption_noise=0.3)
    share = noisy.train.noisy.float().mean().item()
    assert abs(share - 0.3) < 0.06 and not shapes.train.noisy.any()
    clean = make_dataset("shapes", **(SMALL | {"pairs": 600}))
    assert torch.equal(noisy.train.images, clean.train.images)
    for label, flag, (caption,), (before,) in zip(
        noisy.train.labels.tolist(), noisy.train.noisy, noisy.train.captions, clean.train.captions, strict=True
    ):
        if not flag:
            assert caption == before
        elif label >= 0:
            assert noisy.classes[label] not in caption.split()


def test_several_captions_of_a_picture_differ():
    dataset = make_dataset("shapes", **SMALL, captions=3)
    assert all(len(captions) == 3 for captions in dataset.train.captions)
    assert sum(len(set(captions)) > 1 for captions in dataset.train.captions) > 100


# --- emoji


def test_the_emoji_world_reads_both_packages_from_a_folder(tmp_path):
    paths = {vendor: emoji_package(tmp_path, vendor) for vendor in ("google", "twitter")}
    sizes = {"pairs": 20, "test_pairs": 8, "image_size": 16}
    dataset = make_dataset("emoji", root=tmp_path, **sizes)
    assert dataset.classes == ["cat", "owl", "red apple", "grapes", "scissors", "fox"]
    assert any("Apache" in line for line in dataset.credits) and any("Attribution" in line for line in dataset.credits)
    assert "a photo of some grapes on a red card" in dataset.compositions.texts
    paths["twitter"].unlink()
    with pytest.raises(UserError, match="no package emoji-datasource-twitter"):
        make_dataset("emoji", root=tmp_path, **sizes)


def test_without_a_root_the_emoji_come_through_the_manifest(tmp_path, monkeypatch):
    from shared.weights import fetch, manifest

    paths = {f"emoji-{vendor}": emoji_package(tmp_path, vendor) for vendor in ("google", "twitter")}
    monkeypatch.setattr(manifest, "load_manifest", lambda: {id: id for id in paths})
    monkeypatch.setattr(fetch, "fetch", lambda id: paths[id])
    dataset = make_dataset("emoji", pairs=6, test_pairs=6, image_size=16)
    assert len(dataset.classes) == 6


# --- published sets


def test_a_parquet_world_has_label_captions_and_a_validation_part_by_hash(tmp_path):
    (tmp_path / "cifar10").mkdir()
    rows = [(encoded((i, 90, 90)), ("airplane", "dog")[i % 2]) for i in range(60)]
    write_parquet(tmp_path / "cifar10" / "train.parquet", rows)
    write_parquet(tmp_path / "cifar10" / "test.parquet", rows[:10])
    dataset = make_dataset("cifar10", root=tmp_path, pairs=40, test_pairs=5, image_size=16)
    assert dataset.classes == ["airplane", "dog"] and dataset.shift is None and dataset.compositions is None
    assert len(dataset.train) == 40 and len(dataset.test) == 5 and 1 <= len(dataset.val) <= 5
    assert not set(dataset.train.ids) & set(dataset.val.ids) and "tenth of train" in dataset.note
    assert dataset.class_train is dataset.train and dataset.class_test is dataset.test
    for label, (caption,) in zip(dataset.train.labels.tolist(), dataset.train.captions, strict=True):
        assert caption.endswith(("an airplane", "a dog")[label])
    assert [account.share for account in dataset.coverage] == [1.0] * 3
    same = make_dataset("parquet/cifar10", root=tmp_path, pairs=40, test_pairs=5, image_size=16)
    assert torch.equal(same.train.images, dataset.train.images)
    fewer = make_dataset("cifar10", root=tmp_path, pairs=20, test_pairs=5, image_size=16)
    assert set(fewer.train.ids) < set(dataset.train.ids)


def test_an_image_folder_world_uses_its_own_validation_part(tmp_path):
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        make_folder(tmp_path, split, ["cat", "ice_cream"], count)
    dataset = make_dataset("imagefolder", root=tmp_path, pairs=99, test_pairs=99, image_size=8)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (12, 4, 6) and dataset.note is None
    assert dataset.classes == ["cat", "ice cream"]


def test_a_class_that_training_lacks_is_named(tmp_path):
    make_folder(tmp_path, "train", ["cat"], 3)
    make_folder(tmp_path, "test", ["cat", "dog"], 1)
    with pytest.raises(UserError, match="that train has not: dog"):
        make_dataset("imagefolder", root=tmp_path, pairs=9, test_pairs=9, image_size=8)


def test_a_karpathy_world_has_the_files_captions_and_its_large_categories(tmp_path):
    rows = [entry(i, "test" if i % 5 == 0 else "val" if i % 5 == 1 else "train") for i in range(130)]
    for i, row in enumerate(rows):
        row["category"] = ("food_items", "rare")[i % 2] if i < 120 else "odd"
    rows[2]["category"] = None
    root = make_karpathy(tmp_path / "set", rows, tar=True)
    dataset = make_dataset("karpathy/set", root=tmp_path, pairs=50, test_pairs=20, image_size=8)
    assert dataset.classes == ["food items", "rare"] and (len(dataset.train), len(dataset.val), len(dataset.test)) == (
        50,
        20,
        20,
    )
    assert dataset.train.captions[0][1] == "two lines"
    assert len(dataset.class_test) == int((dataset.test.labels >= 0).sum()) and (dataset.class_test.labels >= 0).all()
    (root / "dataset.json").write_text(json.dumps({"images": [row | {"category": None} for row in rows]}))
    plain = make_dataset("karpathy", root=root, pairs=50, test_pairs=20, image_size=8)
    assert plain.classes is None and plain.class_test is None and plain.train.labels is None


def test_a_category_may_be_the_number_zero_and_a_file_begin_with_a_byte_order_mark(tmp_path):
    rows = [entry(i, ("test", "val", "train")[i % 3]) | {"category": i // 60} for i in range(120)]
    root = make_karpathy(tmp_path / "set", rows, tar=True)
    (root / "dataset.json").write_text("\ufeff" + json.dumps({"images": rows}), encoding="utf-8")
    dataset = make_dataset("karpathy", root=root, pairs=50, test_pairs=40, image_size=8)
    assert dataset.classes == ["0", "1"] and set(dataset.test.labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("coco", None, "no data 'coco': choose emoji, shapes, cifar10"),
        ("cifar10", None, "set data_root to its folder .train.parquet"),
        ("karpathy", None, "set data_root to its folder .dataset.json"),
        ("imagefolder/cats", ".", "no .*cats: set data_root"),
        ("parquet", ".", "has no test or val part"),
    ],
)
def test_a_world_that_cannot_be_loaded_says_what_is_missing(tmp_path, name, root, message):
    with pytest.raises(UserError, match=message):
        make_dataset(name, root=root and tmp_path, pairs=9, test_pairs=9, image_size=8)


@pytest.mark.parametrize(
    "wrong", [{"pairs": 0}, {"image_size": 4}, {"caption_noise": 2.0}, {"captions": 0}, {"classes": 500}]
)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(UserError):
        make_dataset("shapes", **(SMALL | wrong))


def test_importing_the_data_layer_is_light():
    code = (
        "import shared.data.dataset, sys; print([m for m in ('torch', 'numpy', 'PIL', 'pyarrow') if m in sys.modules])"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[]"


def test_both_hands_of_a_pack_share_its_subset():
    assert load_pack("shapes", "filled").subset(10).names == load_pack("shapes", "outline").subset(10).names
