"""Exported BLIP folders: transformers loads them by itself, offline, and gives our logits from our pictures and ids."""

from dataclasses import replace

import pytest
import torch
from batches import texts
from pairs import levels_apart, loaded, pictures
from test_blip import CONFIG, WIDE, first

from papers.blip import config as configs
from papers.blip.config import with_tokenizer
from papers.blip.model import Blip, BlipPretraining
from papers.blip.tasks import BlipVqa
from papers.blip.weights import KINDS, convert, export
from shared.core.errors import UserError
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights.load import save_weights
from shared.weights.safe_load import read_tensors

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIALS = ("decode_start", "encode_start")
TEXTS = ["a cat", "  Some   grapes\n& a dog", "", "naïve café 🐼", "a [SEP] b", "cats " * 30]


@pytest.fixture
def made(tmp_path, perturb, monkeypatch):
    """made(kind, config): (our model, its file, its tokenizer) as a run here writes them."""

    def make(kind, config=CONFIG, words=None):
        words = words or SmallTokenizer.train(["a cat on a mat", "some grapes & a dog"] * 5, 300, SPECIALS)
        monkeypatch.setitem(configs.VARIANTS, "blip-test", lambda: replace(config, tokenizer="small-bpe"))
        torch.manual_seed(0)
        model = perturb(kind(with_tokenizer(config, words)))
        save_weights(model, tmp_path / "model.safetensors")
        words.save(tmp_path / "tokenizer.json")
        return model, tmp_path / "model.safetensors", words

    return make


@pytest.mark.parametrize("to", [kind for kind in KINDS if kind != "transformers-vqa"])
@pytest.mark.parametrize("kind", [BlipPretraining, Blip])
def test_transformers_loads_the_folder_and_gives_our_logits(to, kind, made, tmp_path, agree):
    model, source, _ = made(kind)
    export(source, tmp_path / "folder", "blip-test", to)
    theirs = loaded(KINDS[to].architecture, tmp_path / "folder")
    blip = getattr(model, "blip", model)
    tokens, images = texts(4, model.config), pictures(4)
    attention_mask = (tokens != 0).long()
    with torch.no_grad():
        image_tokens = blip.encode_image(images)
        if to == "transformers-captioning":
            ours = blip.caption_logits(tokens, image_tokens)
            given = first(model.config.decode_token, tokens)
            found = theirs(pixel_values=images, input_ids=given, attention_mask=attention_mask).logits
        else:
            ours = blip.match(tokens, image_tokens)
            given = first(model.config.encode_token, tokens)
            found = theirs(pixel_values=images, input_ids=given, attention_mask=attention_mask).itm_score
    assert found.std() > 0.02
    agree(f"blip.export.{to}", f"logits of an exported folder, {to}", ours, found)


def test_transformers_answers_as_ours_from_an_exported_folder(made, tmp_path, agree):
    model, source, _ = made(BlipVqa, WIDE)
    export(source, tmp_path / "folder", "blip-test", "transformers-vqa")
    theirs = loaded(KINDS["transformers-vqa"].architecture, tmp_path / "folder")
    question, answer = texts(1, model.config), texts(1, model.config, length=9, seed=3)
    question, answer = question[question != 0][None], answer[answer != 0][None]
    with torch.no_grad():
        ours = model(pictures(1), question, answer, torch.tensor([0])) / (answer.shape[1] - 1)
        given = first(model.config.decode_token, answer)
        found = theirs(
            input_ids=first(model.config.encode_token, question), pixel_values=pictures(1),
            attention_mask=torch.ones_like(question), decoder_input_ids=given, labels=given,
        ).loss  # fmt: skip
    agree("blip.export.transformers-vqa", "answer loss of an exported folder", ours, found)


def test_converting_the_folder_back_gives_the_very_tensors(made, tmp_path):
    model, source, _ = made(Blip, replace(CONFIG, sharing="all"))
    export(source, tmp_path / "folder", "blip-test", "transformers-retrieval")
    convert(tmp_path / "folder" / "model.safetensors", tmp_path / "back.safetensors", "blip-test", "ours")
    back, state = read_tensors(tmp_path / "back.safetensors"), model.state_dict()
    assert back and all(torch.equal(value, state[key]) for key, value in back.items())


def test_transformers_tokenizer_and_pictures_are_ours(made, tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "cat"]
    for words in (None, BertTokenizer(pieces, SPECIALS)):
        _, source, words = made(Blip, CONFIG, words)
        folder = tmp_path / words.kind
        export(source, folder, "blip-test", "transformers-captioning")
        processor = transformers.BlipProcessor.from_pretrained(folder)
        for text in TEXTS:
            if text == "a [SEP] b" and words.kind == "small-bpe":
                continue  # to ours these are letters, to a tokenizer of transformers its own token
            theirs = processor.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
            assert theirs.tolist() == words([text], CONFIG.context).tolist(), text
    assert levels_apart(processor.image_processor, CONFIG, tmp_path) < 1.01


def test_the_card_states_origin_licence_and_citation(made, tmp_path):
    _, source, _ = made(Blip)
    export(source, tmp_path / "folder", "blip-test", "transformers-captioning")
    text = (tmp_path / "folder" / "README.md").read_text()
    assert "license: other" in text and "not-a-release" in text and "li2022blip" in text
    assert "BlipForConditionalGeneration" in text


def test_what_cannot_be_exported_is_a_clear_line(made, tmp_path):
    _, source, _ = made(Blip)
    with pytest.raises(UserError, match="cannot ask"):
        export(source, tmp_path / "folder", "blip-test", "transformers-vqa")
    with pytest.raises(UserError, match="a folder of another name is for transformers-captioning"):
        export(source, tmp_path / "folder", "blip-test", "captioning")
    with pytest.raises(UserError, match="no such file"):
        export(tmp_path / "none", tmp_path / "folder", "blip-test", "transformers-captioning")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("")
    with pytest.raises(UserError, match="is there already"):
        export(source, tmp_path / "folder", "blip-test", "transformers-captioning")
    _, source, _ = made(BlipVqa)
    with pytest.raises(UserError, match="one width"):
        export(source, tmp_path / "other", "blip-test", "transformers-vqa")
    assert not (tmp_path / "other").exists()
