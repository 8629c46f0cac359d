"""Scenes, sprites and what is said of them: determinism, agreement with the graph, held-out pairs, emoji packages."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
from published import EMOJI, EMOJI_NOUNS, emoji_package, sprite_png

from shared.core.errors import UserError
from shared.data.seeded import SeededRandom, choose_by_hash, split_of
from shared.data.synthetic import tasks
from shared.data.synthetic.captions import (
    KINDS,
    ask,
    caption,
    claim,
    claim_of_two,
    class_prompt,
    number_of,
    relations,
    with_article,
)
from shared.data.synthetic.scenes import (
    COLOURS,
    Scene,
    SceneOptions,
    Thing,
    held_out_colours,
    render,
    render_many,
    sample_scene,
)
from shared.data.synthetic.sprites import EMOJI_CREDITS, Sprite, SpritePack, choose, load_pack, noun_of

SHAPES = load_pack("shapes")
MANY = SceneOptions(objects=(1, 4))


def scenes(count, options=MANY, split="train", pack=SHAPES):
    return [sample_scene(pack, split, i, options=options) for i in range(count)]


# --- emoji


def test_emoji_names_are_natural_nouns_of_things_that_both_vendors_draw(tmp_path):
    pack = load_pack("emoji", "google", source=emoji_package(tmp_path, "google"))
    assert pack.names == EMOJI_NOUNS
    assert load_pack("emoji", "twitter", source=emoji_package(tmp_path, "twitter")).names == EMOJI_NOUNS
    assert noun_of("BLACK CAT", "animal-mammal") == "black cat"
    assert noun_of("WOMANS HAT", "clothing") == "woman's hat"


def test_the_two_vendors_give_different_pictures_and_the_licences_of_their_packages(tmp_path):
    google, twitter = (load_pack("emoji", v, source=emoji_package(tmp_path, v)) for v in ("google", "twitter"))
    assert not np.array_equal(google.sprites[0].rgba, twitter.sprites[0].rgba)
    assert google.sprites[2].rgba[32, 32].tolist() == [60, 195, 30, 255]  # red apple is row 6
    assert google.credits == EMOJI_CREDITS["google"] and "Apache" in google.credits[0]
    assert "Attribution 4.0" in twitter.credits[0] and "MIT" in twitter.credits[1]


def test_a_package_is_decoded_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    from shared.data.synthetic import sprites

    calls = []
    whole = sprites._read_package
    monkeypatch.setattr(sprites, "_read_package", lambda *args: calls.append(args) or whole(*args))
    path = emoji_package(tmp_path, "google")
    first = load_pack("emoji", "google", source=path)
    again = load_pack("emoji", "google", source=path)
    assert len(calls) == 1 and again.names == first.names
    assert all(np.array_equal(a.rgba, b.rgba) for a, b in zip(first.sprites, again.sprites, strict=True))
    emoji_package(tmp_path, "google", EMOJI[:5])
    os.utime(path, (time.time(), time.time() + 5))
    assert load_pack("emoji", "google", source=path).names == ["cat", "owl", "fox"] and len(calls) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_a_broken_cache_is_read_anew(tmp_path):
    path = emoji_package(tmp_path, "google")
    load_pack("emoji", "google", source=path)
    (cache,) = tmp_path.glob("*.npz")
    cache.write_bytes(cache.read_bytes()[:1000])
    assert load_pack("emoji", "google", source=path).names == EMOJI_NOUNS


def test_an_unpacked_package_serves_as_well(tmp_path):
    with tarfile.open(emoji_package(tmp_path, "google")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert load_pack("emoji", "google", source=tmp_path / "unpacked").names == EMOJI_NOUNS
    assert load_pack("emoji", "google", source=tmp_path / "unpacked" / "package").names == EMOJI_NOUNS


def test_links_in_a_package_are_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(sprite_png(1))
    path = tmp_path / "google.tgz"
    with tarfile.open(path, "w:gz") as archive:
        content = json.dumps(EMOJI[4:5]).encode()
        member = tarfile.TarInfo("package/emoji.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/img/google/64/0005.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        archive.addfile(link)
    with pytest.raises(UserError, match=r"lacks 'img/google/64/0005\.png'"):
        load_pack("emoji", "google", source=path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.tgz", r"no .*none\.tgz \(looked for the package emoji-datasource-google"),
        (lambda folder: (folder / "x.tgz").write_bytes(b"no archive") and folder / "x.tgz", "no readable .tgz"),
        (lambda folder: folder, "no emoji.json"),
        (lambda folder: emoji_package(folder, "google", leave_out={"package/img/google/64/0002.png"}), "lacks .*0002"),
        (lambda folder: emoji_package(folder, "twitter"), "lacks 'img/google"),
        (lambda folder: emoji_package(folder, "google", [EMOJI[9]]), "names no emoji"),
        (lambda folder: None, "needs the package emoji-datasource-google"),
    ],
)
def test_an_unusable_emoji_package_is_named_with_the_way_out(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        load_pack("emoji", "google", source=make(tmp_path))


def test_a_cut_package_is_refused(tmp_path):
    path = emoji_package(tmp_path, "google")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match="emoji: "):
        load_pack("emoji", "google", source=path)


def test_unknown_packs_and_vendors_are_named():
    with pytest.raises(UserError, match="there are emoji, shapes"):
        load_pack("icons")
    with pytest.raises(UserError, match="no vendor 'google': there are filled, outline"):
        load_pack("shapes", "google")


def test_choosing_prefers_older_emoji_and_drops_varieties():
    assert [entry["noun"] for entry in choose(EMOJI)] == EMOJI_NOUNS


# --- packs


def test_there_are_enough_shapes_and_both_hands_draw_every_one_differently():
    outline = load_pack("shapes", "outline")
    assert len(SHAPES.sprites) >= 16 and outline.names == SHAPES.names
    for a, b in zip(SHAPES.sprites, outline.sprites, strict=True):
        assert a.rgba.shape == b.rgba.shape and a.rgba.dtype == np.uint8
        assert not np.array_equal(a.rgba[..., 3], b.rgba[..., 3])
        soft = (a.rgba[..., 3] > 0) & (a.rgba[..., 3] < 255)
        assert soft.any()  # anti-aliased


def test_all_shapes_are_distinct():
    alphas = [sprite.rgba[::4, ::4, 3].astype(int) for sprite in SHAPES.sprites]
    for i, a in enumerate(alphas):
        for b in alphas[:i]:
            assert np.abs(a - b).mean() > 4


def test_a_subset_is_nested_and_spread_over_the_categories():
    ten, six = SHAPES.subset(10), SHAPES.subset(6)
    assert set(six.names) <= set(ten.names) and len(six.sprites) == 6
    categories = {sprite.category for sprite in SHAPES.sprites}
    assert {sprite.category for sprite in SHAPES.subset(len(categories)).sprites} == categories
    assert load_pack("shapes", "outline").subset(6).names == six.names
    with pytest.raises(UserError, match="choose 1 to"):
        SHAPES.subset(500)


# --- hashing


def test_splits_by_hash_are_stable_and_have_their_shares():
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    places = [split_of(f"id-{i}", shares) for i in range(5000)]
    assert abs(places.count("train") / 5000 - 0.8) < 0.02 and abs(places.count("val") / 5000 - 0.1) < 0.02
    assert [split_of(f"cat-{i}", {"a": 0.5, "b": 0.5}) for i in range(8)] == list("baaabbbb")
    assert all(split_of(f"id-{i}", {"train": 1.0, "val": 0.0}) == "train" for i in range(99))
    with pytest.raises(UserError, match="sum to 1"):
        split_of("x", {"train": 0.9})


def test_a_draw_gives_the_same_numbers_for_the_same_key_alone():
    assert [SeededRandom("a", 1).below(100) for _ in range(2)] == [SeededRandom("a", 1).below(100)] * 2
    assert [SeededRandom("a", i).below(1000) for i in range(5)] == [883, 876, 756, 231, 793]
    assert sorted(SeededRandom(7).shuffled(range(9))) == list(range(9))


def test_a_smaller_choice_by_hash_is_part_of_a_larger_one():
    ids = [f"id-{i}" for i in range(50)]
    assert set(choose_by_hash(ids, 10)) < set(choose_by_hash(ids, 20))
    assert choose_by_hash(ids, 99) == list(range(50)) and choose_by_hash(ids, 10) != choose_by_hash(ids, 10, seed=1)


# --- scenes


def test_a_scene_does_not_depend_on_how_many_are_drawn():
    alone = sample_scene(SHAPES, "train", 7, options=MANY)
    assert alone == scenes(8)[7] == scenes(80)[7]
    assert alone != sample_scene(SHAPES, "val", 7, options=MANY)
    assert alone != sample_scene(SHAPES, "train", 7, options=MANY, seed=1)
    image = render(alone, SHAPES, 48)
    assert np.array_equal(render_many(scenes(9), SHAPES, 48)[7], image.transpose(2, 0, 1))


PINNED_SCENE = [
    ("hexagon", "pink", "large", (1, 0)),
    ("cross", "orange", "large", (0, 0)),
    ("heart", "orange", "large", (1, 1)),
]
PINNED_PIXELS = 10148


def test_the_second_scene_is_the_one_it_was_when_this_was_written():
    """A change here changes every published number: raise the versions of whatever was measured on scenes."""
    scene = sample_scene(SHAPES, "train", 1, options=MANY)
    assert [(t.name, t.colour, t.size, t.cell) for t in scene.things] == PINNED_SCENE
    plain = replace(scene, noise=0.0)
    assert render(plain, SHAPES, 32)[::8, ::8].sum() == PINNED_PIXELS


def test_another_process_with_another_hash_seed_gives_the_same_pictures_and_words():
    code = """
from hashlib import sha256
from shared.data.seeded import SeededRandom
from shared.data.synthetic.captions import caption
from shared.data.synthetic.scenes import render_many, sample_scene
from shared.data.synthetic.sprites import load_pack
pack = load_pack("shapes")
scenes = [sample_scene(pack, "train", i) for i in range(50)]
words = [caption(scene, SeededRandom(i)) for i, scene in enumerate(scenes)]
print(sha256(repr((scenes, words)).encode() + render_many(scenes, pack, 32).tobytes()).hexdigest())
"""
    digests = set()
    for seed in ("0", "77"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


def test_rendering_twice_or_in_another_order_gives_the_same_bytes():
    several = scenes(30)
    first = render_many(several, SHAPES, 40)
    fresh = load_pack("shapes").subset(len(SHAPES.sprites))
    assert np.array_equal(render_many(several[::-1], fresh, 40)[::-1], first)
    assert first.shape == (30, 3, 40, 40) and first.dtype == np.uint8


def test_held_out_colours_never_occur_in_ordinary_scenes():
    for scene in scenes(1500):
        for thing in scene.things:
            assert thing.colour not in held_out_colours(thing.name)
    shown = {thing.colour for scene in scenes(1500) for thing in scene.things}
    assert shown == set(COLOURS)
    pinned = sample_scene(SHAPES, "train", 0, first="star", colour=min(held_out_colours("star")))
    assert pinned.things[0].colour in held_out_colours("star")


def test_things_lie_within_the_picture_and_within_their_cells_order():
    for scene in scenes(400):
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        assert len({thing.cell for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            half = thing.side / 2
            assert half - 1e-9 <= thing.x <= 1 - half + 1e-9 and half - 1e-9 <= thing.y <= 1 - half + 1e-9
        for a in scene.things:
            for b in scene.things:
                if "to the left of" in relations(a, b):
                    assert a.x < b.x
                if "above" in relations(a, b):
                    assert a.y < b.y


def test_the_picture_shows_the_colour_at_the_things_place():
    for colour, (red, green, blue) in COLOURS.items():
        scene = Scene("x", (Thing("square", colour, "large", (0, 0), 0.5, 0.5, 0.8),), (1, 1), cards=False)
        assert np.abs(render(scene, SHAPES, 48)[24, 24].astype(int) - (red, green, blue)).max() < 12


def test_a_small_thing_covers_less_than_a_large_one():
    sides = {size: [t.side for s in scenes(300) for t in s.things if t.size == size] for size in ("small", "large")}
    by_grid = {}
    for scene in scenes(300):
        for thing in scene.things:
            by_grid.setdefault(len(scene.things), {}).setdefault(thing.size, []).append(thing.side)
    assert sides["small"] and all(max(found["small"]) < min(found["large"]) for found in by_grid.values())


def test_noise_and_clutter_change_pixels_but_not_the_graph():
    quiet, loud = SceneOptions(clutter=0, noise=0), SceneOptions(clutter=1, noise=30)
    a, b = (sample_scene(SHAPES, "train", 3, options=o) for o in (quiet, loud))
    assert a.things == b.things and not a.clutter and b.clutter
    flat = replace(a, things=(), background=(0, 0))
    assert render(flat, SHAPES, 64).std() == 0
    noisy = render(replace(flat, background=(5, 0), noise=20.0, grain=5), SHAPES, 64).astype(float)
    assert abs(noisy.std(axis=(0, 1)).mean() - 20) < 2


def test_the_filters_overshoot_does_not_wrap_around():
    rgba = np.full((64, 64, 4), 128, np.uint8)
    rgba[:, :32, :3], rgba[:, 32:, :3] = 0, 255  # a sharp edge in a half transparent sprite
    pack = SpritePack("edge", "test", (Sprite("edge", "test", rgba),), ())
    scene = Scene("x", (Thing("edge", "yellow", "large", (0, 0), 0.5, 0.5, 0.8),), (1, 1), cards=True)
    assert render(scene, pack, 400)[120:280, 120:280, 0].min() > 100


def test_jitter_zero_puts_things_at_fixed_places():
    fixed = [sample_scene(SHAPES, "t", i, options=SceneOptions(objects=(1, 1), jitter=0, small=0)) for i in range(20)]
    assert {(s.things[0].x, s.things[0].y, s.things[0].side) for s in fixed} == {(0.5, 0.5, 0.84)}


@pytest.mark.parametrize(
    "wrong", [{"objects": (0, 2)}, {"objects": (3, 2)}, {"clutter": 2.0}, {"noise": -1.0}, {"held_out": 0.9}]
)
def test_wrong_scene_options_are_named(wrong):
    with pytest.raises(UserError, match=f"scene option {next(iter(wrong))}="):
        SceneOptions(**wrong)


def test_more_things_than_classes_and_a_foreign_pack_are_refused():
    with pytest.raises(UserError, match="raise classes or lower objects"):
        [sample_scene(SHAPES.subset(2), "t", i, options=SceneOptions(objects=(3, 3))) for i in range(2)]
    with pytest.raises(UserError, match="has no 'cat'"):
        render(Scene("x", (Thing("cat", "red", "large", (0, 0), 0.5, 0.5, 0.8),), (1, 1), False), SHAPES, 32)


# --- words


@pytest.mark.parametrize(
    ("noun", "prompt"),
    [
        ("cat", "a photo of a cat"),
        ("ant", "a photo of an ant"),
        ("unicorn", "a photo of a unicorn"),
        ("hourglass", "a photo of an hourglass"),
        ("x-ray", "a photo of an x-ray"),
        ("umbrella", "a photo of an umbrella"),
        ("grapes", "a photo of some grapes"),
        ("bread", "a photo of some bread"),
        ("slice of pizza", "a photo of a slice of pizza"),
        ("cactus", "a photo of a cactus"),
        ("wine glass", "a photo of a wine glass"),
        ("pair of headphones", "a photo of a pair of headphones"),
    ],
)
def test_articles_and_numbers_are_those_of_english(noun, prompt):
    assert class_prompt(noun) == prompt


def test_an_orange_card_has_an():
    assert with_article("orange card") == "an orange card" and number_of("scissors") == "many"


def mentions(text):
    """Every '[article] [size] [colour] shape' of a text: (size, colour, shape)."""
    shape = "|".join(sorted(SHAPES.names, key=len, reverse=True))
    pattern = rf"\b(?:an?|the) (?:(small|large) )?(?:({'|'.join(COLOURS)}) )?({shape})\b"
    return re.findall(pattern, text)


def test_captions_say_only_what_the_graph_holds():
    described = set()
    for i, scene in enumerate(scenes(1200)):
        by_name = {thing.name: thing for thing in scene.things}
        text = caption(scene, SeededRandom("c", i))
        found = mentions(text)
        assert found, text
        for size, colour, name in found:
            assert name in by_name, text
            assert size in ("", by_name[name].size) and colour in ("", by_name[name].colour), text
        for relation in ("to the left of", "to the right of", "above", "below"):
            if relation in text:
                a, b = by_name[found[0][2]], by_name[found[1][2]]
                assert relation in relations(a, b), text
        described.add(re.sub("|".join(SHAPES.names), "X", text))
    assert len(described) > 300  # a grammar, not a template


def test_a_full_caption_names_every_thing_with_size_and_colour():
    for i, scene in enumerate(scenes(300)):
        found = mentions(caption(scene, SeededRandom("c", i), full=True))
        assert sorted(found) == sorted((t.size, t.colour, t.name) for t in scene.things)


def test_a_bare_label_is_never_the_caption():
    bare = {f"{with_article(name)}" for name in SHAPES.names} | set(SHAPES.names)
    texts = [caption(scene, SeededRandom("c", i)) for i, scene in enumerate(scenes(1500, SceneOptions(objects=(1, 1))))]
    assert not bare & set(texts)


def test_captions_of_cards_name_the_card():
    thing = Thing("orange book", "orange", "small", (0, 0), 0.5, 0.5, 0.8)
    said = caption(Scene("x", (thing,), (1, 1), cards=True), SeededRandom(1), full=True)
    assert "a small orange book on an orange card" in said


def answer_by_hand(scene, question):
    """An independent reader of the graph."""
    things = {thing.name: thing for thing in scene.things}
    if found := re.fullmatch(r"how many (?:(\w+) )?shapes are there\?", question):
        return str(sum(found[1] in (None, t.colour) for t in scene.things))
    if found := re.fullmatch(r"what colour is the (.+)\?", question):
        return things[found[1]].colour
    if found := re.fullmatch(r"which shape is (\w+)\?", question):
        (only,) = [t.name for t in scene.things if t.colour == found[1]]
        return only
    if found := re.fullmatch(r"is there an? (.+)\?", question):
        return "yes" if found[1] in things else "no"
    if found := re.fullmatch(r"is the (.+) (to the left of|to the right of|above|below) the (.+)\?", question):
        return "yes" if found[2] in relations(things[found[1]], things[found[3]]) else "no"
    if found := re.fullmatch(r"is the (.+) (\w+)\?", question):
        return "yes" if found[2] in (things[found[1]].colour, things[found[1]].size) else "no"
    return None


def test_answers_agree_with_an_independent_reading_of_the_graph():
    checked = 0
    for i, scene in enumerate(scenes(800)):
        asked = ask(scene, SHAPES.names, SeededRandom("q", i))
        assert asked.answer in asked.choices and len(set(asked.choices)) == len(asked.choices), asked
        if (expected := answer_by_hand(scene, asked.question)) is not None:
            checked += 1
            assert asked.answer == expected, (scene, asked)
    assert checked > 400


def test_every_kind_of_question_is_asked_and_where_is_right():
    kinds = set()
    for i, scene in enumerate(scenes(300)):
        kinds.add(ask(scene, SHAPES.names, SeededRandom("q", i)).kind)
        asked = ask(scene, SHAPES.names, SeededRandom("w", i), "where")
        if asked.kind == "where":
            thing = next(t for t in scene.things if f"the {t.name}?" in asked.question)
            assert ("left" in asked.answer) == (thing.x < 0.5 and scene.grid[1] == 2)
            assert ("top" in asked.answer) == (thing.y < 0.5 and scene.grid[0] == 2)
    assert kinds == set(KINDS)


def test_yes_and_no_are_equally_likely():
    answers = [ask(scene, SHAPES.names, SeededRandom("q", i), "yes/no").answer for i, scene in enumerate(scenes(1000))]
    assert 430 < answers.count("yes") < 570


def test_statements_are_true_or_false_as_drawn():
    for i, scene in enumerate(scenes(500)):
        for truth in (True, False):
            question = claim(scene, SHAPES.names, SeededRandom("s", i, truth), truth).question
            assert answer_by_hand(scene, question) == ("yes" if truth else "no"), question


def test_statements_of_two_pictures_are_true_or_false_of_them():
    several = scenes(400)
    for i, (left, right) in enumerate(zip(several[::2], several[1::2], strict=True)):
        for truth in (True, False):
            text = claim_of_two(left, right, SHAPES.names, SeededRandom(i), truth, "each")
            (_, c1, n1), (_, c2, n2) = mentions(text)
            holds = (n1, c1) in {(t.name, t.colour) for t in left.things}
            assert (holds and (n2, c2) in {(t.name, t.colour) for t in right.things}) == truth, text


# --- tasks


def test_every_task_gives_the_same_sample_twice_and_an_id():
    for make in (tasks.question, tasks.hypothesis, tasks.statement, tasks.episode):
        a, b, other = (make(SHAPES, "train", i, size=32) for i in (4, 4, 5))
        assert a.id == b.id == "train-000004" != other.id
        for name in a.__dataclass_fields__:
            assert repr(getattr(a, name)) == repr(getattr(b, name))


def test_episodes_by_name_never_show_the_answer_and_nonce_words_are_bound_by_the_shots():
    for i in range(60):
        named = tasks.episode(SHAPES, "t", i, size=16, shots=4, kind="name")
        assert len(named.shots) == 4 and not any(text.endswith(f" {named.answer}") for _, text in named.shots)
        nonce = tasks.episode(SHAPES, "t", i, size=16, shots=4, kind="nonce")
        words = [text.removeprefix("this is a ") for _, text in nonce.shots]
        assert len(set(words)) == 2 and words.count(nonce.answer) == 2
    with pytest.raises(UserError, match="choose name, colour, nonce"):
        tasks.episode(SHAPES, "t", 0, size=16, kind="size")


def test_two_picture_statements_are_balanced_and_their_forms_do_not_tell():
    made = [tasks.statement(SHAPES, "t", i, size=8) for i in range(600)]
    assert 250 < sum(s.label for s in made) < 350 and all(len(s.images) == 2 for s in made)
    for form in ("both pictures", "there are more", "the left picture"):
        labels = [s.label for s in made if s.text.startswith(form)]
        assert len(labels) > 60 and 0.35 < sum(labels) / len(labels) < 0.65
