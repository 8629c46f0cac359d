"""What `python -m papers train blip2` trains, on tiny published encoders and language models: how it starts, what
FlanT5 learns, and what it says where weights are missing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from papers.blip2.config import LANGUAGES, VARIANTS, VisionConfig
from papers.blip2.frozen import (
    ENCODER_ENTRIES,
    ENCODERS,
    PUBLISHED_ENCODERS,
    frozen_encoder,
    load_encoder,
)
from papers.blip2.model import Blip2Qformer, vision_encoder
from papers.blip2.recipe import Blip2Recipe
from papers.blip2.train import prepare
from papers.blip2.weights import from_bert
from shared.core.errors import UserError
from shared.weights.manifest import MANIFEST
from shared.weights.weight_map import to_published

transformers = pytest.importorskip("transformers")

TINY = VARIANTS["blip2-tiny"]()
EVA = VisionConfig("eva", 24, 8, width=26, layers=3, heads=2, mlp_ratio=4.4)
CLIP = VisionConfig("clip", 24, 8, 26, 3, 2, activation="quick_gelu", eps=1e-5, input_norm=True, patch_bias=False)
NAMES = {"eva-vit-g": EVA, "clip-vit-l": CLIP}
RECIPE = Blip2Recipe(
    paper="blip2", model="blip2-tiny", data="shapes", image_size=32, pairs=24, test_pairs=8, classes=5, batch=6,
    steps=3, warmup_steps=1, stage2_steps=2, lm_texts=40, asked=0.0, asked_pictures=4, cached=False, accelerator="cpu",
    manifest=str(MANIFEST),
)  # fmt: skip


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Tiny networks under the published names: {name: a file of it}, and an empty cache."""
    monkeypatch.setenv("PAPERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PAPERS_OFFLINE", "1")
    frozen_encoder.cache_clear()
    found = {}
    for name, vision in NAMES.items():
        monkeypatch.setitem(PUBLISHED_ENCODERS, name, vision)
        torch.manual_seed(len(name))
        vit = vision_encoder(vision)
        for parameter in vit.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        found[name] = tmp_path / f"{name}.pth"
        torch.save(to_published(vit.state_dict(), ENCODERS[vision.kind]), found[name])
    yield found
    frozen_encoder.cache_clear()


def quiet(module):
    module.log = lambda *args, **more: None
    return module.eval()


# ---- published encoders


@pytest.mark.parametrize("name", NAMES)
def test_a_published_encoder_is_read_whole_as_its_last_block_is_absent_already(files, name):
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    encoder = frozen_encoder(f"{name} 40 {files[name]}", "second-last", "paper", str(MANIFEST), False)
    wanted = load_encoder(files[name], replace(NAMES[name], image_size=40))
    assert torch.equal(encoder(pixels), wanted(pixels)) and encoder(pixels).shape == (2, 26, 26)
    assert len(encoder.module.blocks) == 3 and encoder.dtype is None
    with pytest.raises(UserError, match=f"{name}: published without its last block, .* take second-last"):
        frozen_encoder(f"{name} {files[name]}", "last", "paper", str(MANIFEST), False)


def test_in_half_precision_its_matrices_alone_are_so_on_a_gpu_and_all_of_it_on_a_cpu(files, monkeypatch):
    pixels = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    exact = load_encoder(files["eva-vit-g"], EVA)(pixels)
    named = (f"eva-vit-g {files['eva-vit-g']}", "second-last", "paper", str(MANIFEST), True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert frozen_encoder(*named)(pixels).dtype == torch.bfloat16
    frozen_encoder.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    encoder = frozen_encoder(*named)
    for key, tensor in encoder.module.state_dict().items():
        half = "blocks." in key and "norm" not in key
        assert tensor.dtype == (torch.float16 if half else torch.float32), key
    whole = load_encoder(files["eva-vit-g"], EVA, torch.bfloat16)
    assert {tensor.dtype for tensor in whole.module.state_dict().values()} == {torch.bfloat16}
    found = encoder(pixels)
    assert found.dtype == torch.float32
    whole.module.half()
    fp16 = (whole.module(pixels).float() - exact).square().mean()
    assert 0 < (found - exact).square().mean() < 2e-2 * exact.square().mean()
    assert (found - exact).square().mean() < fp16


@pytest.mark.parametrize("name", NAMES)
def test_stage_1_begins_with_a_published_encoder_in_each_step(files, name):
    recipe = replace(RECIPE, encoder=f"{name} 32 {files[name]}")
    trainable = prepare(recipe, 3)
    module, batch = quiet(trainable.module), trainable.batches(0, 1)[0]
    assert batch[0].dtype == torch.uint8 and module.model.vision_norm.weight.shape == (26,)
    loss = module.training_step(batch, 0)
    loss.backward()
    assert torch.isfinite(loss) and module.model.qformer.query_tokens.grad.abs().max() > 0
    assert all(p.grad is None for p in module.encoder.module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_encoder_is_one_line_before_any_picture_is_read(files, name, monkeypatch):
    monkeypatch.setattr("papers.blip2.train.build_data", lambda *_: pytest.fail("pictures were read"))
    known = f"the frozen image encoder is .*without its last block.*encoder='{name} PATH'"
    with pytest.raises(UserError, match=known) as said:
        prepare(replace(RECIPE, encoder=name), 3)
    assert "\n" not in str(said.value) and "storage.googleapis.com" in str(said.value)
    with pytest.raises(UserError, match=r"gone\.pth: no such file"):
        prepare(replace(RECIPE, encoder=f"{name} gone.pth"), 3)
    assert ENCODER_ENTRIES[NAMES[name].kind].endswith(name)


# ---- BERT


CONFIG = replace(TINY, vocabulary=41, decode_token=40, positions=17)


def bert(seed=0):
    torch.manual_seed(seed)
    made = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=40, hidden_size=CONFIG.width, intermediate_size=CONFIG.mlp_width,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads, max_position_embeddings=17,
        )
    ).eval()  # fmt: skip
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    made.bert.embeddings.token_type_embeddings.weight.data.zero_()  # which the Q-Former has not
    return made


@pytest.mark.parametrize("old", [False, True])
def test_the_q_former_starts_from_bert_and_its_queries_and_cross_attention_do_not(old):
    theirs, model = bert(), Blip2Qformer(CONFIG).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = theirs.state_dict()
    if old:
        state = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in state.items()}
    from_bert(model, state)
    tokens = torch.randint(1, 40, (3, 7))
    attention_mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    with torch.no_grad():
        out = theirs(tokens, attention_mask=attention_mask.long(), output_hidden_states=True)
        states = model.qformer.encode_text(tokens, attention_mask)
        torch.testing.assert_close(states[attention_mask], out.hidden_states[-1][attention_mask], atol=1e-5, rtol=1e-4)
        words = model._logits(states[attention_mask])
        torch.testing.assert_close(words[:, :40], out.prediction_logits[attention_mask], atol=1e-5, rtol=1e-4)
    now = model.state_dict()
    fresh = [
        k for k in now if ".cross_" in k or "query_tokens" in k or k.startswith(("vision", "text_", "itm", "temp"))
    ]
    assert fresh and all(torch.equal(now[key], before[key]) for key in fresh)
    assert torch.equal(now["qformer.embeddings.word.weight"][40], before["qformer.embeddings.word.weight"][40])
    for layer in model.qformer.layers:
        assert torch.equal(layer.query_mlp.up.weight, layer.mlp.up.weight)
        assert torch.equal(layer.query_mlp_norm.bias, layer.mlp_norm.bias)


def test_a_bert_that_lacks_something_or_has_more_is_refused_by_name():
    model, state = Blip2Qformer(CONFIG), bert().state_dict()
    with pytest.raises(UserError, match=r"stranger"):
        from_bert(model, state | {"stranger": torch.zeros(1)})
    lacking = {key: tensor for key, tensor in state.items() if "layer.1.output.dense.bias" not in key}
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down\.bias"):
        from_bert(model, lacking)
    with pytest.raises(UserError, match=r"word"):
        from_bert(Blip2Qformer(TINY), state)


def test_stage_1_of_a_recipe_starts_from_its_bert_file(files, tmp_path):
    recipe = replace(RECIPE, encoder=f"eva-vit-g 32 {files['eva-vit-g']}", bert_weights=str(tmp_path / "bert.pth"))
    with pytest.raises(
        UserError, match=r"bert\.pth: no such file; .*hf download google-bert/bert-base-uncased bert\.pth"
    ):
        prepare(recipe, 3)
    config = prepare(replace(recipe, bert_weights=""), 3).module.model.config
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=config.decode_token, hidden_size=config.width, intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=config.positions,
        )
    )  # fmt: skip
    torch.save(theirs.state_dict(), tmp_path / "bert.pth")
    model = prepare(recipe, 3).module.model
    assert torch.equal(
        model.qformer.layers[1].query_mlp.up.weight, theirs.bert.encoder.layer[1].intermediate.dense.weight
    )


# ---- FlanT5 in stage 2


def speaking_t5(folder):
    """A tiny T5 in the published form; its words are whole words of scenes."""
    import tokenizers

    torch.manual_seed(0)
    texts = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    said = (
        "a an of the photo picture red green blue yellow square circle star triangle heart there is one thing in with"
    )
    for word in said.split():
        texts.setdefault(word, len(texts))
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel(texts, "<unk>"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(texts), d_model=22, d_kv=5, d_ff=37, num_layers=2, num_decoder_layers=2, num_heads=3,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
            eos_token_id=1, dropout_rate=0.3,
        )
    )  # fmt: skip
    theirs.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return theirs


def test_flan_t5_reads_the_first_words_of_each_text_and_learns_the_rest(files, tmp_path, monkeypatch):
    speaking_t5(tmp_path / "cache" / "flan-t5-xl")
    monkeypatch.setitem(LANGUAGES, "flan-t5-xl", replace(LANGUAGES["flan-t5-xl"], width=22))
    recipe = replace(
        RECIPE, stage=2, language_model="flan-t5-xl", encoder=f"clip-vit-l 32 {files['clip-vit-l']}", text_tokens=32
    )
    trainable = prepare(recipe, 3)
    module, batches = quiet(trainable.module), trainable.batches(0, 1)
    model = module.model
    seen, tokens, attention_mask, asked, question_mask = batch = batches[0]
    assert len(seen) == 6 and question_mask.sum(1).min() >= 2 and attention_mask.sum(1).min() >= 2  # a word and the end
    loss = module.training_step(batch, 0)
    loss.backward()
    assert torch.isfinite(loss) and model.projector.weight.grad.abs().max() > 0

    theirs = model.language_model.module.theirs  # by transformers, as blip2_t5.py computes it
    features = module.encoder(seen)
    with torch.no_grad():
        words = theirs.encoder.embed_tokens(asked)
        x = torch.cat([model.prefix(features).to(words.dtype), words], dim=1)
        mask = F.pad(question_mask.long(), (model.config.queries, 0), value=1)
        out = theirs(inputs_embeds=x, attention_mask=mask, labels=tokens.masked_fill(~attention_mask, -100))
        wanted = F.cross_entropy(out.logits[attention_mask].float(), tokens[attention_mask])
    torch.testing.assert_close(loss.detach(), wanted, atol=2e-2, rtol=1e-2)  # in bfloat16
    again = prepare(recipe, 3).batches(0, 1)[0]
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
