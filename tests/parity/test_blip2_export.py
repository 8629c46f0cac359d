"""Exported BLIP-2 folders: transformers loads them by itself, offline, and gives our logits, pictures and ids."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import texts
from pairs import levels_apart, loaded, pictures
from PIL import Image
from test_blip2 import CONFIG, OPT, T5, their_config, words

from papers.blip2 import config as configs
from papers.blip2.config import SPECIALS, with_tokenizer
from papers.blip2.formats import VISION
from papers.blip2.frozen import Silent
from papers.blip2.model import Blip2, Blip2Qformer, Prompt, vision_encoder
from papers.blip2.weights import KINDS, convert, export, gathered, hf_spec, load_file
from shared.backbones.hf_lm import ADAPTERS, PUBLISHED, Published
from shared.core.errors import UserError
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights.export import export_hf
from shared.weights.load import save_weights
from shared.weights.manifest import MANIFEST
from shared.weights.safe_load import read_tensors

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ["a cat", "  Some   grapes\n& a dog", "", "naïve café 🐼", "cats " * 30]


@pytest.fixture
def made(tmp_path, perturb, monkeypatch):
    """made(config, words): (our model, its image encoder, the file of both, its tokenizer)."""

    def make(config=CONFIG, words=None):
        torch.manual_seed(0)
        if config.language is None:
            words = words or SmallTokenizer.train(["a cat on a mat", "some grapes & a dog"] * 5, 300, SPECIALS)
            words.save(tmp_path / "tokenizer.json")
            config = with_tokenizer(config, words)
            model = Blip2Qformer(config)
        else:
            model = Blip2(config, Silent(config))
        perturb(model)
        encoder = perturb(vision_encoder(config.vision))
        monkeypatch.setitem(configs.VARIANTS, "blip2-test", lambda: config)
        seen = {f"{VISION}{key}": tensor for key, tensor in encoder.state_dict().items()}
        save_weights({**model.state_dict(), **seen}, tmp_path / "model.safetensors")
        return model, encoder, tmp_path / "model.safetensors", words

    return make


def lm(folder, language, perturb, pieces=None):
    """A tiny language model in transformers' form, its tokenizer as large as its vocabulary or of `pieces` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(1)
    config = their_config(language).text_config
    kind = transformers.AutoModelForCausalLM if language is OPT else transformers.AutoModelForSeq2SeqLM
    perturb(kind.from_config(config)).save_pretrained(folder)
    special = ["<pad>", "</s>", "<s>"] if language is T5 else ["<s>", "<pad>", "</s>"]
    vocabulary = [*special, "<unk>", *(f"w{i}" for i in range((pieces or language.vocabulary) - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token=None if language is T5 else "</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_transformers_loads_the_retrieval_folder_and_gives_our_scores(made, tmp_path, agree):
    model, encoder, source, _ = made(replace(CONFIG, tokenizer="small-bpe"))
    export(source, tmp_path / "folder", "blip2-test", "transformers-retrieval")
    theirs = loaded(KINDS["transformers-retrieval"].architecture, tmp_path / "folder")
    tokens, images = texts(4, CONFIG), pictures(4)
    given = {"pixel_values": images, "input_ids": tokens, "attention_mask": (tokens != 0).long()}
    with torch.no_grad():
        seen = encoder.tokens(images)
        cosines = torch.einsum("b q e, t e -> b t q", model.image_features(seen)[1], model.text_features(tokens))
        found = [theirs(**given, use_image_text_matching_head=head).logits_per_image for head in (False, True)]
        matches = model.match(seen, tokens)
    assert min(one.std() for one in found) > 0.01
    agree("blip2.export.itc", "cosines of an exported folder", cosines.amax(-1), found[0])
    agree("blip2.export.itm", "match logits of an exported folder", matches, found[1])


@pytest.mark.parametrize("pieces", [None, 50], ids=["vocabulary full", "room left"])
@pytest.mark.parametrize("language", [OPT, T5], ids=["opt", "t5"])
def test_transformers_loads_the_generation_folder_and_gives_our_logits(
    language, pieces, made, tmp_path, perturb, agree, monkeypatch
):
    if language is T5:  # as FlanT5: BLIP-2 reads it with the exact GELU
        monkeypatch.setitem(PUBLISHED, T5.name, Published("t5-test", {"dense_act_fn": "gelu"}))
    place = lm(tmp_path / language.name, language, perturb, pieces)
    model, encoder, source, _ = made(replace(CONFIG, language=language))
    export(source, tmp_path / "folder", "blip2-test", "transformers-generation")
    theirs = loaded(KINDS["transformers-generation"].architecture, tmp_path / "folder")
    assert theirs.config.image_token_index == (pieces or language.vocabulary)
    if language is T5:
        activation, x = theirs.language_model.encoder.block[0].layer[-1].DenseReluDense.act, torch.linspace(-3, 3, 9)
        assert torch.allclose(activation(x), torch.nn.functional.gelu(x), atol=1e-6), "the tanh form differs by 4e-4"
    kind = transformers.AutoModelForCausalLM if language is OPT else transformers.AutoModelForSeq2SeqLM
    config = transformers.AutoConfig.from_pretrained(place)
    if language is T5:
        config.dense_act_fn = "gelu"
    speaks = ADAPTERS[config.model_type](kind.from_pretrained(place, config=config))
    ours = Blip2(model.config, speaks).eval()
    ours.load_state_dict(model.state_dict())
    tokens, attention_mask = words(3, 9, 50)
    asked, seen = words(3, 7, 50, seed=8)
    images, queries = pictures(3), CONFIG.queries
    slots = torch.full((3, queries), theirs.config.image_token_index)
    with torch.no_grad():
        if language is OPT:
            mine = ours(encoder.tokens(images), tokens, attention_mask).logits
            found = theirs(
                images, torch.cat([slots, tokens], 1), torch.nn.functional.pad(attention_mask, (queries, 0), value=1)
            )
            found = found.logits[:, queries - 1 : -1][attention_mask]
        else:
            mine = ours(encoder.tokens(images), tokens, attention_mask, Prompt(asked, seen)).logits
            mask = torch.nn.functional.pad(seen, (queries, 0), value=1)
            found = theirs(images, torch.cat([slots, asked], 1), mask, labels=tokens.masked_fill(~attention_mask, -100))
            found = found.logits[attention_mask]
    agree(f"blip2.export.{language.family}", "logits of an exported folder", mine, found[:, : language.vocabulary])
    back, _ = load_file(tmp_path / "folder", model.config)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())


def test_transformers_asks_with_the_exported_processor_as_ours_would(made, tmp_path, perturb):
    lm(tmp_path / OPT.name, OPT, perturb, 50)
    made(replace(CONFIG, language=OPT))
    export(tmp_path / "model.safetensors", tmp_path / "folder", "blip2-test", "transformers-generation")
    processor = transformers.Blip2Processor.from_pretrained(tmp_path / "folder")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 55, 3), dtype=np.uint8))
    inputs = processor(images=image, text="w3 w7 w1", return_tensors="pt")
    theirs = loaded(KINDS["transformers-generation"].architecture, tmp_path / "folder")
    ids = inputs["input_ids"][0].tolist()
    assert ids[: CONFIG.queries] == [50] * CONFIG.queries and ids[-3:] == [7, 11, 5]
    told = theirs.generate(**inputs, max_new_tokens=4, num_beams=2)
    assert told.shape[0] == 1


def test_converting_the_folder_back_gives_the_very_tensors(made, tmp_path):
    model, encoder, source, _ = made(replace(CONFIG, tokenizer="small-bpe"))
    export(source, tmp_path / "folder", "blip2-test", "transformers-retrieval")
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "blip2-test", "ours")
    back = read_tensors(tmp_path / "back.safetensors")
    state = {**model.state_dict(), **{f"{VISION}{key}": tensor for key, tensor in encoder.state_dict().items()}}
    assert {k for k in state if k not in back} == {"temperature", *(k for k in state if k.startswith("head."))}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_transformers_tokenizer_and_pictures_are_ours(made, tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "cat"]
    for own in (None, BertTokenizer(pieces, SPECIALS)):
        _, _, source, own = made(replace(CONFIG, tokenizer="small-bpe"), own)
        folder = tmp_path / own.kind
        if own.kind == "bert-wordpiece":  # no released vocabulary is needed: the parts are put together here
            parts = gathered(source, replace(CONFIG, tokenizer="small-bpe", vocabulary=own.vocab_size),
                             "transformers-retrieval", tmp_path / "tokenizer.json", MANIFEST, None)  # fmt: skip
            assert parts.tokenizer.digest == own.digest
            export_hf(folder, hf_spec(parts, "transformers-retrieval"), "")
        else:
            export(source, folder, "blip2-test", "transformers-retrieval")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            ids = theirs(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
            assert ids.tolist() == own([text], CONFIG.context).tolist(), text
    assert levels_apart(transformers.BlipImageProcessor.from_pretrained(folder), CONFIG.vision, tmp_path) < 1.01


def test_the_card_states_origin_licence_and_citation(made, tmp_path):
    _, _, source, _ = made(replace(CONFIG, tokenizer="small-bpe"))
    export(source, tmp_path / "folder", "blip2-test", "transformers-retrieval")
    text = (tmp_path / "folder" / "README.md").read_text()
    assert "license: other" in text and "not-a-release" in text and "li2023blip2" in text
    assert "Blip2ForImageTextRetrieval" in text and "The image encoder, which stands in this folder too" in text


def test_what_cannot_be_exported_is_a_clear_line(made, tmp_path, monkeypatch, perturb):
    _, _, source, _ = made(replace(CONFIG, tokenizer="small-bpe"))
    target = tmp_path / "folder"
    with pytest.raises(UserError, match="weights of another stage than transformers-generation needs"):
        export(source, target, "blip2-test", "transformers-generation")
    with pytest.raises(UserError, match="a folder of another name is for transformers-retrieval"):
        export(source, target, "blip2-test", "lavis-opt")
    with pytest.raises(UserError, match="no such file"):
        export(tmp_path / "none", target, "blip2-test", "transformers-retrieval")
    state = {k: v for k, v in read_tensors(source).items() if not k.startswith(VISION)}
    save_weights(state, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"eva_vit_g\.pth: no such file"):
        export(tmp_path / "bare.safetensors", target, "blip2-test", "transformers-retrieval")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        export(source, target, "blip2-test", "transformers-retrieval")
    made(replace(CONFIG, language=OPT))
    with pytest.raises(UserError, match=r"opt-test has no config\.json; get it with: hf download"):
        export(source, target, "blip2-test", "transformers-generation")
    narrow = replace(OPT, width=52)
    made(replace(CONFIG, language=narrow))
    place = lm(tmp_path / "other", OPT, perturb)
    with pytest.raises(UserError, match="of width 36, but the weights speak to one of 52"):
        export(source, target, "blip2-test", "transformers-generation", language=place)
    clip = replace(CONFIG, vision=replace(CONFIG.vision, kind="clip"))
    monkeypatch.setitem(configs.VARIANTS, "blip2-test", lambda: clip)
    with pytest.raises(UserError, match="EVA's image encoder alone"):
        export(source, target, "blip2-test", "transformers-retrieval")
    assert not target.exists()
    target.mkdir()
    (target / "a").write_text("")
    with pytest.raises(UserError, match="is there already"):
        export(source, target, "blip2-test", "transformers-retrieval")
