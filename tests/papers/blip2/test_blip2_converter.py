"""Published BLIP-2 files, tiny: the names and shapes of salesforce/LAVIS's blip2_models/, eva_vit.py and clip_vit.py,
written out here by themselves, go in and come back bit by bit; whatever does not fit is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from papers.blip2 import config as configs
from papers.blip2.config import VARIANTS, Blip2Config, LanguageConfig, VisionConfig
from papers.blip2.formats import FORMATS, VISION, published_of
from papers.blip2.frozen import (
    ENCODER_ENTRIES,
    ENCODERS,
    Silent,
    encoder_beside,
    encoder_of,
    load_encoder,
)
from papers.blip2.model import Blip2, Blip2Qformer, vision_encoder
from papers.blip2.weights import check_entry, config_of, convert, load_file
from shared.core.errors import UserError
from shared.weights.formats import detect
from shared.weights.load import INDEX, read_weights, save_weights
from shared.weights.manifest import load_manifest
from shared.weights.safe_load import read_tensors
from shared.weights.weight_map import to_published

EVA = VisionConfig("eva", 30, 6, width=48, layers=3, heads=3, mlp_ratio=4.4)
CLIP = VisionConfig(
    "clip", 30, 6, 48, 3, 3, activation="quick_gelu", eps=1e-5, input_norm=True, patch_bias=False
)  # fmt: skip
CONFIG = Blip2Config(
    vision=EVA, queries=7, width=40, layers=5, heads=4, mlp_width=72, embed_width=28, vocabulary=97, positions=23,
    context=13, start_token=91, end_token=92, decode_token=96,
)  # fmt: skip
OPT = LanguageConfig("opt-test", "opt", 36, 89, layers=2, heads=2, mlp_width=56, context=64)
T5 = LanguageConfig("t5-test", "t5", 44, 83, layers=2, heads=3, mlp_width=60, context=64, head_width=9)
T, V, W = CONFIG.width, EVA.width, CONFIG.mlp_width


def linear(name, inside, outside):
    return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def eva(name, tokens=26, layers=3):
    shapes = {f"{name}cls_token": (1, 1, V), f"{name}pos_embed": (1, tokens, V)}
    shapes |= {f"{name}patch_embed.proj.weight": (V, 3, 6, 6), f"{name}patch_embed.proj.bias": (V,)}
    for i in range(layers):
        block = f"{name}blocks.{i}"
        shapes |= norm(f"{block}.norm1", V) | norm(f"{block}.norm2", V) | linear(f"{block}.attn.proj", V, V)
        shapes |= {f"{block}.attn.q_bias": (V,), f"{block}.attn.v_bias": (V,)}
        shapes |= {f"{block}.attn.qkv.weight": (3 * V, V)}
        shapes |= linear(f"{block}.mlp.fc1", V, 211) | linear(f"{block}.mlp.fc2", 211, V)
    return shapes


def clip(name, tokens=26, layers=3):
    shapes = {f"{name}class_embedding": (V,), f"{name}positional_embedding": (tokens, V)}
    shapes |= {f"{name}conv1.weight": (V, 3, 6, 6)} | norm(f"{name}ln_pre", V)
    for i in range(layers):
        block = f"{name}transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * V, V), f"{block}.attn.in_proj_bias": (3 * V,)}
        shapes |= norm(f"{block}.ln_1", V) | norm(f"{block}.ln_2", V) | linear(f"{block}.attn.out_proj", V, V)
        shapes |= linear(f"{block}.mlp.c_fc", V, 4 * V) | linear(f"{block}.mlp.c_proj", 4 * V, V)
    return shapes


def qformer(text):
    shapes = {"query_tokens": (1, 7, T)} | norm("ln_vision", V) | norm("Qformer.bert.embeddings.LayerNorm", T)
    for i in range(CONFIG.layers):
        layer = f"Qformer.bert.encoder.layer.{i}"
        parts = [("attention", T)] + ([("crossattention", V)] if i % 2 == 0 else [])
        for part, seen in parts:
            shapes |= linear(f"{layer}.{part}.self.query", T, T)
            shapes |= linear(f"{layer}.{part}.self.key", seen, T) | linear(f"{layer}.{part}.self.value", seen, T)
            shapes |= linear(f"{layer}.{part}.output.dense", T, T) | norm(f"{layer}.{part}.output.LayerNorm", T)
        for ending in ("", "_query") if text else ("_query",):
            shapes |= linear(f"{layer}.intermediate{ending}.dense", T, W)
            shapes |= linear(f"{layer}.output{ending}.dense", W, T) | norm(f"{layer}.output{ending}.LayerNorm", T)
    return shapes


def stage1():
    shapes = qformer(text=True) | {
        "Qformer.bert.embeddings.word_embeddings.weight": (97, T),
        "Qformer.bert.embeddings.position_embeddings.weight": (23, T),
        "Qformer.cls.predictions.bias": (97,),
        "temp": (),
    }
    shapes |= linear("Qformer.cls.predictions.transform.dense", T, T) | linear("Qformer.cls.predictions.decoder", T, 97)
    shapes |= norm("Qformer.cls.predictions.transform.LayerNorm", T)
    return shapes | linear("vision_proj", T, 28) | linear("text_proj", T, 28) | linear("itm_head", T, 2)


FILES = {  # name: format, shapes, configuration, and what it holds that is none of the model's
    "stage 1": ("lavis-stage1", stage1(), CONFIG, ()),
    "stage 1, tuned": ("lavis-stage1", stage1() | eva("visual_encoder."), CONFIG, ()),
    "stage 1, CLIP tuned": ("lavis-stage1", stage1() | clip("visual_encoder."), replace(CONFIG, vision=CLIP), ()),
    "stage 2, OPT": (
        "lavis-opt",
        qformer(text=False) | linear("opt_proj", T, 36) | {"opt_model.lm_head.weight": (89, 36)},
        replace(CONFIG, language=OPT),
        ("opt_model.lm_head.weight",),
    ),
    "stage 2, T5": (
        "lavis-t5",
        qformer(text=False) | linear("t5_proj", T, 44) | {"t5_model.encoder.embed_tokens.weight": (83, 44)},
        replace(CONFIG, language=T5),
        ("t5_model.encoder.embed_tokens.weight",),
    ),
    "captioner, OPT": (
        "lavis-opt",
        qformer(text=False) | linear("opt_proj", T, 36) | eva("visual_encoder.", tokens=50),
        replace(CONFIG, language=OPT),
        (),
    ),
}


def random(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def published(name):
    """Random numbers under the authors' names; what their code ties is the same tensor; the numbered positions too."""
    state = random(FILES[name][1])
    if "temp" in state:
        state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
        state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]
    return state | {"Qformer.bert.embeddings.position_ids": torch.arange(23)[None]}


@pytest.fixture
def file(tmp_path):
    def write(state, name="model.pth"):
        torch.save({"model": state, "epoch": 3}, tmp_path / name)
        return tmp_path / name

    return write


def whole(loaded):
    """Our state dict, with the image encoder's."""
    seen = {} if loaded.encoder is None else loaded.encoder.module.state_dict()
    return {**loaded.model.state_dict(), **{f"{VISION}{key}": tensor for key, tensor in seen.items()}}


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_goes_in_and_comes_back_bit_by_bit(name, file):
    format, _, config, foreign = FILES[name]
    state = published(name)
    assert detect(state, FORMATS, "BLIP-2") == format
    loaded = load_file(file(state), config)
    assert type(loaded.model) is (Blip2Qformer if "stage 1" in name else Blip2) and not loaded.model.training
    assert (loaded.encoder is not None) == any(key.startswith("visual_encoder.") for key in state)
    back = published_of(whole(loaded), format, config.vision.kind)
    wanted = {k: v for k, v in state.items() if k not in foreign and not k.endswith("position_ids")}
    assert back.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(back[key], wanted[key])] == []


@pytest.mark.parametrize("name", FILES)
def test_a_missing_a_foreign_and_a_misshapen_tensor_are_refused_by_name(name, file):
    config = FILES[name][2]
    for lost, named in (
        ("Qformer.bert.encoder.layer.2.crossattention.self.key.bias", r"layer\.2\.crossattention\.self\.key\.bias"),
        ("Qformer.bert.encoder.layer.1.output_query.dense.weight", r"layers\.1\.query_mlp\.down\.weight"),
        ("Qformer.bert.encoder.layer.3.intermediate.dense.bias", r"layers\.3\.mlp\.up\.bias"),
        ("ln_vision.weight", r"ln_vision\.weight"),
        ("visual_encoder.blocks.1.attn.q_bias", r"blocks\.1\.attn\.q_bias"),
    ):
        state = published(name)
        if state.pop(lost, None) is not None:
            with pytest.raises(UserError, match=named):
                load_file(file(state), config)
    with pytest.raises(UserError, match="stranger"):
        load_file(file(published(name) | {"stranger": torch.zeros(1)}), config)
    with pytest.raises(UserError, match=r"vision_norm\.weight \(49,\) for \(48,\)"):
        load_file(file(published(name) | {"ln_vision.weight": torch.zeros(V + 1)}), config)


def test_queries_and_text_have_a_feed_forward_each_and_cross_attention_is_in_every_other_layer(file):
    state = published("stage 1")
    layers = load_file(file(state), CONFIG).model.qformer.layers
    at = "Qformer.bert.encoder.layer.3."
    assert torch.equal(layers[3].query_mlp.up.weight, state[f"{at}intermediate_query.dense.weight"])
    assert torch.equal(layers[3].mlp.up.weight, state[f"{at}intermediate.dense.weight"])
    assert [layer.cross_attention is not None for layer in layers] == [True, False, True, False, True]


def test_a_file_brings_its_own_number_of_queries_and_picture_size(file):
    state = published("captioner, OPT") | {"query_tokens": torch.randn(1, 5, T)}
    loaded = load_file(file(state), replace(CONFIG, language=OPT))
    assert loaded.model.config.vision.image_size == 42 and loaded.model.config.queries == 5
    assert loaded.encoder(torch.zeros(2, 3, 42, 42, dtype=torch.uint8)).shape == (2, 50, V)


def test_weights_for_another_language_model_are_refused(file):
    with pytest.raises(UserError, match="a lavis-opt file, but t5-test is seq2seq"):
        load_file(file(published("stage 2, OPT")), replace(CONFIG, language=T5))
    other = replace(CONFIG, language=replace(OPT, width=52))
    with pytest.raises(UserError, match=r"projector\.weight \(36, 40\) for \(52, 40\)"):
        load_file(file(published("stage 2, OPT")), other)
    with pytest.raises(UserError, match="the variant has no language model"):
        load_file(file(published("stage 2, OPT")), CONFIG)


# ---- frozen image encoders


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_frozen_encoders_file_goes_in_without_the_blocks_that_are_left_out_and_comes_back(kind, file, tmp_path):
    vision, shapes = (EVA, eva("", layers=4)) if kind == "eva" else (CLIP, clip("", layers=4))
    more = norm("norm", V) | linear("head", V, 9) if kind == "eva" else norm("ln_post", V) | {"proj": (V, 28)}
    state = random(shapes | more)
    encoder = load_encoder(file(state), vision)
    back = to_published(encoder.module.state_dict(), ENCODERS[kind])
    built = {key for key in shapes if "blocks.3." not in key}
    assert back.keys() == built and all(torch.equal(back[key], state[key]) for key in built)
    pixels = torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8)
    vit = vision_encoder(vision).eval()
    vit.load_state_dict(encoder_of(state, kind, vit.state_dict()))
    assert encoder(pixels).shape == (2, 26, V) and torch.equal(encoder(pixels), vit.tokens(pixels))
    with pytest.raises(UserError, match="stranger"):
        load_encoder(file(state | {"stranger": torch.zeros(1)}), vision)


@pytest.mark.parametrize(("kind", "corners"), [("eva", False), ("clip", True)])
def test_positions_are_carried_to_another_picture_size_as_the_official_code_does(kind, corners):
    vision, shapes = (EVA, eva("", tokens=50)) if kind == "eva" else (CLIP, clip("", tokens=50))
    state = random(shapes)
    vit = vision_encoder(vision)
    carried = encoder_of(state, kind, vit.state_dict())["positions.position"]
    table = state.get("pos_embed", state.get("positional_embedding")).view(50, V)
    wanted = F.interpolate(
        table[1:].view(1, 7, 7, V).permute(0, 3, 1, 2), (5, 5), mode="bicubic", align_corners=corners
    )
    wanted = torch.cat([table[:1], wanted.permute(0, 2, 3, 1).reshape(25, V)])
    torch.testing.assert_close(carried, wanted, atol=1e-6, rtol=0)


def test_a_missing_encoder_says_where_it_has_to_lie(tmp_path):
    from shared.weights.manifest import MANIFEST

    with pytest.raises(UserError, match=r"eva_vit_g\.pth: no such file; .*EVA-CLIP ViT-g/14"):
        encoder_beside(tmp_path / "w.pth", CONFIG, MANIFEST)
    (tmp_path / "eva_vit_g.pth").write_bytes(b"x")
    assert encoder_beside(tmp_path / "w.pth", CONFIG, MANIFEST) == tmp_path / "eva_vit_g.pth"


# ---- our files, folders, convert


@pytest.mark.parametrize("stage", [1, 2])
def test_a_file_of_ours_tells_which_model_it_is(stage, tmp_path):
    torch.manual_seed(0)
    config = replace(CONFIG, language=OPT)
    model = Blip2Qformer(CONFIG) if stage == 1 else Blip2(config, Silent(config))
    save_weights(model, tmp_path / "m.safetensors")
    found, encoder = load_file(tmp_path / "m.safetensors", config)
    assert type(found) is type(model) and encoder is None
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    lost = {key: tensor for key, tensor in state.items() if not key.startswith("qformer.layers.4.cross_norm.")}
    save_weights(lost, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors: .*layers\.4\.cross_norm\.weight"):
        load_file(tmp_path / "m.safetensors", config)


def test_shards_are_read_as_one_and_what_they_lack_is_named(tmp_path):
    state = random(stage1())
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_weights({key: state[key] for key in keys}, tmp_path / shard)
    index = {key: shard for shard, keys in shards.items() for key in keys}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    found = read_weights(tmp_path)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index | {"more": "a.safetensors"}}))
    with pytest.raises(UserError, match="its index promises more"):
        read_weights(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index | {"more": "../c.safetensors"}}))
    save_weights({"more": torch.zeros(1)}, tmp_path.parent / "c.safetensors")  # there, but outside of the folder
    with pytest.raises(UserError, match=r"shards missing: \.\./c\.safetensors"):
        read_weights(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(UserError, match="no index of shards"):
        read_weights(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(UserError, match="no such file, nor a folder"):
        read_weights(tmp_path)


def test_convert_writes_every_kind_that_the_weights_fit(file, tmp_path, monkeypatch):
    monkeypatch.setitem(configs.VARIANTS, "blip2-test", lambda: CONFIG)
    state = published("stage 1, tuned")
    source, ours, back = file(state), tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    convert(source, ours, "blip2-test", "ours")
    convert(ours, back, "blip2-test", "lavis-stage1")
    again = read_tensors(back)
    wanted = {key for key in state if not key.endswith("position_ids")}
    assert again.keys() == wanted and all(torch.equal(again[key], state[key]) for key in wanted)
    convert(ours, back, "blip2-test", "transformers-retrieval")
    assert detect(read_tensors(back), FORMATS, "BLIP-2") == "transformers-retrieval"
    with pytest.raises(UserError, match="as lavis-opt: weights do not fit the map"):
        convert(ours, back, "blip2-test", "lavis-opt")
    with pytest.raises(UserError, match="name a folder, not a file"):
        convert(ours, back, "blip2-test", "transformers-generation")
    convert(file(published("stage 1")), ours, "blip2-test", "ours")
    with pytest.raises(UserError, match=r"our keys missing: vision_encoder\."):
        convert(ours, back, "blip2-test", "transformers-retrieval")


def test_a_file_of_transformers_heads_has_no_words_to_write_with(file, tmp_path, monkeypatch):
    monkeypatch.setitem(configs.VARIANTS, "blip2-test", lambda: CONFIG)
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    convert(file(published("stage 1, tuned")), theirs, "blip2-test", "transformers-retrieval")
    model, encoder = load_file(theirs, CONFIG)
    assert model.head is None and encoder is not None
    convert(theirs, ours, "blip2-test", "ours")
    assert not any(key.startswith(("head.", "temperature")) for key in read_tensors(ours))
    assert load_file(ours, CONFIG).model.head is None


def test_clip_has_no_place_in_transformers_files(file, tmp_path, monkeypatch):
    monkeypatch.setitem(configs.VARIANTS, "blip2-test", lambda: replace(CONFIG, vision=CLIP))
    with pytest.raises(UserError, match="no place for an image encoder of kind clip"):
        convert(
            file(published("stage 1, CLIP tuned")), tmp_path / "t.safetensors", "blip2-test", "transformers-retrieval"
        )


def test_every_released_entry_agrees_with_the_model_it_becomes():
    entries = {id: entry for id, entry in load_manifest().items() if id.startswith("blip2-vit-")}
    assert len(entries) >= 11
    for id, entry in entries.items():
        check_entry(entry)
        assert config_of(id).vision.image_size == (364 if id.endswith("-coco") else 224)
    assert config_of("blip2-vit-g-retrieval-coco").context == 35
    assert {id for id in entries if not id.endswith("-coco")} <= set(VARIANTS)
    assert set(ENCODER_ENTRIES.values()) <= set(load_manifest())


def test_every_format_is_tested_here_or_against_transformers():
    assert {name for name in FORMATS if not name.startswith("transformers")} == {one[0] for one in FILES.values()}
