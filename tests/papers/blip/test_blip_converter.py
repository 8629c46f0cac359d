"""Published BLIP files, tiny: the names and shapes of salesforce/BLIP's models/vit.py and models/med.py, written out
here by themselves, go in and come back bit by bit; whatever does not fit is refused by name."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from papers.blip import config as configs
from papers.blip.config import VARIANTS, BlipConfig
from papers.blip.model import Blip, BlipPretraining
from papers.blip.tasks import BlipDialogue, BlipNlvr, BlipVqa
from papers.blip.weights import (
    FORMATS,
    RELEASED,
    card_of,
    config_of,
    convert,
    load_file,
    load_model,
    load_released,
)
from shared.core.errors import UserError
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights.formats import detect
from shared.weights.load import check_card, save_weights
from shared.weights.manifest import load_manifest
from shared.weights.safe_load import read_tensors

CONFIG = BlipConfig(
    image_size=30,
    patch=6,
    vision_width=48,
    vision_layers=3,
    vision_heads=3,
    text_width=40,
    text_layers=4,
    text_heads=4,
    mlp_width=72,
    vocabulary=97,
    positions=23,
    context=13,
    embed_width=28,
    queue=20,
    start_token=91,
    end_token=92,
    decode_token=95,
    encode_token=96,
)
T, V, W, LAYERS = CONFIG.text_width, CONFIG.vision_width, CONFIG.mlp_width, CONFIG.text_layers


def linear(name, inside, outside):
    return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vit(name, tokens=26):
    shapes = {f"{name}.cls_token": (1, 1, V), f"{name}.pos_embed": (1, tokens, V)}
    shapes |= {f"{name}.patch_embed.proj.weight": (V, 3, 6, 6), f"{name}.patch_embed.proj.bias": (V,)}
    for i in range(CONFIG.vision_layers):
        block = f"{name}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", V) | linear(f"{block}.attn.qkv", V, 3 * V) | linear(f"{block}.attn.proj", V, V)
        shapes |= (
            norm(f"{block}.norm2", V) | linear(f"{block}.mlp.fc1", V, 4 * V) | linear(f"{block}.mlp.fc2", 4 * V, V)
        )
    return shapes | norm(f"{name}.norm", V)


def med(name, context=V, twin=False):
    shapes = {
        f"{name}.embeddings.word_embeddings.weight": (97, T),
        f"{name}.embeddings.position_embeddings.weight": (23, T),
        f"{name}.embeddings.position_ids": (1, 23),
    } | norm(f"{name}.embeddings.LayerNorm", T)
    for i in range(LAYERS):
        layer = f"{name}.encoder.layer.{i}"
        for part, seen in (("attention", T), ("crossattention", context)):
            selves, denses = [f"{layer}.{part}.self"], [f"{layer}.{part}.output.dense"]
            if twin and part == "crossattention":
                selves, denses = ([f"{one[0]}{side}" for side in "01"] for one in (selves, denses))
                if i >= LAYERS // 2:
                    shapes |= linear(f"{layer}.{part}.output.merge_layer", 2 * T, T)
            for one in selves:
                shapes |= linear(f"{one}.query", T, T) | linear(f"{one}.key", seen, T) | linear(f"{one}.value", seen, T)
            for one in denses:
                shapes |= linear(one, T, T)
            shapes |= norm(f"{layer}.{part}.output.LayerNorm", T)
        shapes |= linear(f"{layer}.intermediate.dense", T, W) | linear(f"{layer}.output.dense", W, T)
        shapes |= norm(f"{layer}.output.LayerNorm", T)
    return shapes


def lm(name):
    shapes = linear(f"{name}.cls.predictions.transform.dense", T, T)
    shapes |= norm(f"{name}.cls.predictions.transform.LayerNorm", T)
    return shapes | {f"{name}.cls.predictions.bias": (97,)} | linear(f"{name}.cls.predictions.decoder", T, 97)


def heads(ending):
    return linear(f"vision_proj{ending}", V, 28) | linear(f"text_proj{ending}", T, 28)


def contrast(pointer):
    shapes = vit("visual_encoder_m") | med("text_encoder_m") | heads("_m") | heads("")
    shapes |= linear("itm_head", T, 2) | {"temp": ()}
    return shapes | {"image_queue": (28, 20), "text_queue": (28, 20), pointer: (1,)}


SHAPES = {
    "pretraining": vit("visual_encoder")
    | med("text_encoder")
    | contrast("queue_ptr")
    | med("text_decoder.bert")
    | lm("text_decoder"),
    "retrieval": vit("visual_encoder") | med("text_encoder") | contrast("ptr_queue") | {"idx_queue": (1, 20)},
    "captioning": vit("visual_encoder") | med("text_decoder.bert") | lm("text_decoder"),
    "vqa": vit("visual_encoder") | med("text_encoder") | med("text_decoder.bert", T) | lm("text_decoder"),
    "nlvr": vit("visual_encoder")
    | med("text_encoder", twin=True)
    | linear("cls_head.0", T, T)
    | linear("cls_head.2", T, 2),
}
KINDS = {
    "pretraining": BlipPretraining,
    "retrieval": BlipPretraining,
    "captioning": Blip,
    "vqa": BlipVqa,
    "nlvr": BlipNlvr,
}


def published(format):
    """Random numbers under the authors' names; what their code ties is the same tensor."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[format].items()}
    for name in state:
        if name.endswith("position_ids"):
            state[name] = torch.arange(23)[None]
    for pointer in ("queue_ptr", "ptr_queue"):
        if pointer in state:
            state[pointer] = torch.tensor([15])
    if "idx_queue" in state:
        state["idx_queue"] = torch.arange(20)[None] - 100
    if format == "pretraining":
        for name in state:
            if name.startswith("text_decoder.bert.") and "/attention" not in name.replace(".", "/"):
                state[name] = state[name.replace("text_decoder.bert.", "text_encoder.")]
    if "text_decoder.cls.predictions.bias" in state:
        word = state["text_decoder.bert.embeddings.word_embeddings.weight"]
        bias = state["text_decoder.cls.predictions.bias"]
        state |= {
            "text_decoder.cls.predictions.decoder.weight": word,
            "text_decoder.cls.predictions.decoder.bias": bias,
        }
    return state


@pytest.fixture
def file(tmp_path):
    def write(state, name="model.pth"):
        torch.save({"model": state, "epoch": 3}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("format", SHAPES)
def test_a_published_file_goes_in_and_comes_back_bit_by_bit(format, file):
    state = published(format)
    assert detect(state, FORMATS, "BLIP") == format
    model = load_file(file(state), CONFIG)
    assert type(model) is KINDS[format] and not model.training
    back = FORMATS[format].to_published(model.state_dict())
    assert back.keys() == state.keys()
    assert [name for name in state if not torch.equal(back[name], state[name])] == []


@pytest.mark.parametrize("format", SHAPES)
def test_a_missing_a_foreign_and_a_misshapen_tensor_are_refused_by_name(format, file):
    for lost, named in (
        ("visual_encoder.blocks.1.attn.qkv.weight", r"blocks\.1\.attention\.qkv\.weight"),
        ("visual_encoder.pos_embed", r"visual_encoder\.pos_embed"),
        ("text_encoder.encoder.layer.2.attention.self.key.bias", r"layer\.2\.attention\.self\.key\.bias"),
        ("text_decoder.cls.predictions.transform.dense.bias", r"predictions\.transform\.dense\.bias"),
        ("image_queue", "image_queue"),
    ):
        state = published(format)
        if state.pop(lost, None) is not None:
            with pytest.raises(UserError, match=named):
                load_file(file(state), CONFIG)
    with pytest.raises(UserError, match="stranger"):
        load_file(file(published(format) | {"stranger": torch.zeros(1)}), CONFIG)
    shape = published(format) | {"visual_encoder.norm.weight": torch.zeros(V + 1)}
    with pytest.raises(UserError, match=r"output_norm\.weight \(49,\) for \(48,\)"):
        load_file(file(shape), CONFIG)


def test_the_decoder_of_a_published_file_has_its_own_self_attention_alone(file):
    model = load_file(file(published("pretraining")), CONFIG).blip
    ours, theirs = model.text_decoder.layers[1], model.text_encoder.layers[1]
    assert ours.mlp is theirs.mlp and ours.cross_attention is theirs.cross_attention
    assert not torch.equal(ours.attention.qkv.weight, theirs.attention.qkv.weight)


def test_a_file_of_another_picture_size_brings_its_own_and_positions_are_carried_as_the_official_code_does(file):
    state = published("captioning") | {"visual_encoder.pos_embed": torch.randn(1, 50, V)}
    model = load_file(file(state), CONFIG)
    assert model.config.image_size == 42
    table = state["visual_encoder.pos_embed"]
    wanted = F.interpolate(table[:, 1:].view(1, 7, 7, V).permute(0, 3, 1, 2), (5, 5), mode="bicubic")
    wanted = torch.cat([table[0, :1], wanted.permute(0, 2, 3, 1).view(25, V)])
    smaller = Blip(CONFIG, encoder=False)
    carried = FORMATS["captioning"].to_ours(state, smaller.state_dict())["vision_encoder.positions.position"]
    torch.testing.assert_close(carried, wanted, atol=1e-6, rtol=0)


OWN = {
    "pre-training": lambda: BlipPretraining(CONFIG),
    "matcher in training": lambda: BlipPretraining(CONFIG, decoder=False),
    "all shared": lambda: Blip(replace(CONFIG, sharing="all")),
    "all but cross-attention": lambda: Blip(replace(CONFIG, sharing="all_but_ca")),
    "nothing shared": lambda: Blip(replace(CONFIG, sharing="none")),
    "captioner": lambda: Blip(CONFIG, encoder=False),
    "matcher": lambda: Blip(CONFIG, decoder=False),
    "vqa": lambda: BlipVqa(CONFIG),
    "nlvr": lambda: BlipNlvr(CONFIG),
}


@pytest.mark.parametrize("name", [*OWN, "dialogue"])
def test_a_file_of_ours_tells_which_model_it_is(name, tmp_path):
    torch.manual_seed(0)
    config = replace(CONFIG, text_width=48) if name == "dialogue" else CONFIG
    model = BlipDialogue(config) if name == "dialogue" else OWN[name]()
    save_weights(model, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors", replace(config, queue=7))
    assert type(found) is type(model)
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())


def test_a_file_of_ours_that_lacks_parts_says_which(tmp_path):
    state = Blip(CONFIG).state_dict()
    lost = [key for key in state if key.startswith("text_decoder.layers.0.attention.")]
    save_weights({key: tensor for key, tensor in state.items() if key not in lost}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w\.safetensors: .*text_decoder\.layers\.0\.attention\.qkv\.weight"):
        load_file(tmp_path / "w.safetensors", CONFIG)


def test_convert_writes_every_kind_that_the_weights_fit(file, tmp_path, monkeypatch):
    monkeypatch.setitem(configs.VARIANTS, "blip-test", lambda: CONFIG)
    source, ours, back = file(published("vqa")), tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    convert(source, ours, "blip-test", "ours")
    convert(ours, back, "blip-test", "vqa")
    again, state = read_tensors(back), published("vqa")
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    convert(ours, back, "blip-test", "transformers-vqa")
    assert detect(read_tensors(back), FORMATS, "BLIP") == "transformers-vqa"
    with pytest.raises(UserError, match="as captioning: weights do not fit the map"):
        convert(ours, back, "blip-test", "captioning")


def test_every_released_entry_agrees_with_the_model_it_becomes():
    entries = {id: entry for id, entry in load_manifest().items() if id.startswith("blip-")}
    assert len(entries) >= 12 and set(RELEASED.values()) <= set(entries)
    for id, entry in entries.items():
        check_card(entry, card_of(config_of(id)))
    assert {variant for variant, _ in RELEASED} <= set(VARIANTS)
    assert (
        config_of("blip-large-caption-coco").vision_layers == 24 and config_of("blip-base-129m-vqa").image_size == 480
    )


def test_a_released_file_that_is_not_there_says_what_to_do():
    with pytest.raises(UserError, match="blip-base-129m-vqa"):
        load_released(load_manifest()["blip-base-129m-vqa"])


def test_weights_trained_here_load_with_their_tokenizer_and_say_what_they_cannot(tmp_path, monkeypatch):
    words = SmallTokenizer.train(["a cat", "a dog"], 280, ("decode_start", "encode_start"))
    from papers.blip.config import with_tokenizer

    small = with_tokenizer(replace(CONFIG, tokenizer="small-bpe"), words)
    monkeypatch.setitem(configs.VARIANTS, "blip-test", lambda: replace(CONFIG, tokenizer="small-bpe"))
    path = tmp_path / "model.safetensors"
    save_weights(BlipPretraining(small), path)
    nowhere = tmp_path / "manifest.yaml"
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load_model("blip-test", path, None, nowhere, "caption")
    words.save(tmp_path / "tokenizer.json")
    model, found = load_model("blip-test", path, None, nowhere, "caption")
    assert type(model) is Blip and found.digest == words.digest
    assert model.config.decode_token == words.decode_start
    with pytest.raises(UserError, match="cannot ask, they are for: caption, retrieval"):
        load_model("blip-test", path, None, nowhere, "ask")
    with pytest.raises(UserError, match="no released weights to ask with; choose blip-base"):
        load_model("blip-test", None, None, nowhere, "ask")


def test_every_format_is_tested_here_or_against_transformers():
    assert {name for name in FORMATS if not name.startswith("transformers")} == set(SHAPES)
