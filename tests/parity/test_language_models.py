"""OPT, Llama and T5 behind a prefix of embeddings against transformers: states, texts and scores, on tiny random models
written out as they are published; and a GGUF against the model that it was made from."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.backbones.gguf import load_gguf
from shared.backbones.hf_lm import CausalAdapter, Published, Seq2SeqAdapter, load_folder
from shared.core.errors import UserError
from shared.nn.causal_lm import SmallLanguageModel
from shared.nn.generation import GenerationSettings, generate
from shared.weights.manifest import Entry

transformers = pytest.importorskip("transformers")

V, PICTURES, Q, NEW = 83, 8, 5, 9
START = 2
STOPS = (3, *range(60, 68))  # enough for some texts to end early
LENGTHS = [4, 1, 6, 2, 3, 6, 1, 5]


def opt(**changed):
    sizes = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 3, "ffn_dim": 44, "num_attention_heads": 3,
             "max_position_embeddings": 40, "word_embed_proj_dim": 24}  # fmt: skip
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes | SPECIAL | changed))


def opt_projected():
    """OPT-350m's form: narrow embeddings, norms behind."""
    return opt(word_embed_proj_dim=14, do_layer_norm_before=False)


def llama():
    sizes = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 44,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 40,
             "tie_word_embeddings": True, "rope_theta": 5000.0}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | SPECIAL))


def t5(**changed):
    sizes = {"vocab_size": V, "d_model": 24, "d_kv": 7, "d_ff": 44, "num_layers": 3, "num_decoder_layers": 2,
             "num_heads": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
             "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "dropout_rate": 0.1}  # fmt: skip
    made = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes | SPECIAL | changed))
    if not made.config.scale_decoder_outputs:
        made.lm_head.weight.data.mul_(0.3)
    return made


SPECIAL = {"bos_token_id": START, "eos_token_id": 3, "pad_token_id": 0}
MODELS = {
    "opt": opt,
    "opt-350m": opt_projected,
    "llama": llama,
    "ours": llama,  # SmallLanguageModel with the same weights
    "t5": t5,
    "flan-t5": lambda: t5(tie_word_embeddings=False),
}


def as_ours(theirs):
    """Llama's weights in SmallLanguageModel."""
    config, given, named = theirs.config, theirs.state_dict(), {}
    ours = SmallLanguageModel(V, 40, 24, 3, 6, kv_heads=2, mlp_width=44, rotary_base=5000.0, eps=config.rms_norm_eps)
    named["word.weight"], named["norm.weight"] = given["model.embed_tokens.weight"], given["model.norm.weight"]
    for i in range(3):
        there, here = f"model.layers.{i}.", f"blocks.{i}."
        parts = [given[f"{there}self_attn.{part}_proj.weight"] for part in "qkv"]
        named[f"{here}attention.qkv.weight"] = torch.cat(parts)
        named[f"{here}attention.out.weight"] = given[f"{there}self_attn.o_proj.weight"]
        named[f"{here}mlp.gate_up.weight"] = torch.cat(
            [given[f"{there}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        )
        named[f"{here}mlp.down.weight"] = given[f"{there}mlp.down_proj.weight"]
        named[f"{here}attention_norm.weight"] = given[f"{there}input_layernorm.weight"]
        named[f"{here}mlp_norm.weight"] = given[f"{there}post_attention_layernorm.weight"]
    ours.load_state_dict(named)
    return ours.eval()


def perturbed(theirs):
    for name, parameter in theirs.named_parameters():
        parameter.data += (0.5 if "relative" in name else 0.1) * torch.randn_like(parameter)
    return theirs.eval()


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    """transformers' model and ours with the same weights, and embeddings of what they are to go on with."""
    torch.manual_seed({"opt-350m": 5, "t5": 1}.get(request.param, 0))
    theirs = perturbed(MODELS[request.param]())
    if request.param == "ours":
        ours = as_ours(theirs)
    else:
        ours = (Seq2SeqAdapter if request.param.endswith("t5") else CausalAdapter)(theirs)
    prefix = torch.randn(PICTURES, Q, ours.width)
    prompts = torch.randint(5, V, (PICTURES, 3))
    return theirs, ours, prefix, prompts


def by_theirs(models, **asked):
    """The new tokens up to the stop token, and the beam scores where there are any."""
    theirs, _, prefix, prompts = models
    x = torch.cat([prefix, theirs.get_input_embeddings()(prompts)], dim=1).detach()
    asked = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": list(STOPS), "pad_token_id": 0} | asked
    out = theirs.generate(
        inputs_embeds=x,
        attention_mask=torch.ones(x.shape[:2], dtype=torch.long),
        return_dict_in_generate=True,
        output_scores=True,
        **asked,
    )
    rows = out.sequences[:, 1:] if theirs.config.is_encoder_decoder else out.sequences
    texts = [list(itertools.takewhile(lambda token: token not in STOPS, row)) for row in rows.tolist()]
    return texts, out.sequences_scores.tolist() if asked.get("num_beams", 1) > 1 else None


def by_ours(models, **asked):
    _, ours, prefix, prompts = models
    settings = GenerationSettings(**({"stop": STOPS, "max_new_tokens": NEW} | asked))
    return generate(ours.decoding(prefix), prompts, settings)


def varied(found):
    return len({tuple(text) for text in found.tokens}) > 3 and len({len(text) for text in found.tokens}) > 1


def test_states_and_logits_are_those_of_transformers_and_so_are_gradients(models):
    theirs, ours, prefix, prompts = models
    seq2seq = theirs.config.is_encoder_decoder
    targets = torch.randint(5, V, (PICTURES, 4))
    found = {}
    for who in ("theirs", "ours"):
        x = torch.cat([prefix, ours.embed(prompts)], dim=1).detach().requires_grad_()
        attention_mask = torch.arange(x.shape[1]) < torch.tensor([8, 6, 7, 8, 5, 8, 7, 6])[:, None]
        given = {"labels": targets} if seq2seq else {}
        if who == "theirs":
            logits = theirs(inputs_embeds=x, attention_mask=attention_mask.long(), **given).logits
        else:
            logits = ours.logits(ours.states(x, attention_mask, *([targets] if seq2seq else [])))
        logits = logits if seq2seq else logits[attention_mask]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * weights).sum().backward()
        found[who] = logits.detach(), x.grad
    torch.testing.assert_close(found["ours"], found["theirs"], atol=2e-5, rtol=1e-4)
    assert found["ours"][0].std() > 0.1 and found["ours"][1][:, :Q].abs().max() > 1e-3


LENGTH_SETTINGS = {
    "free": ({}, {}),
    "at least 4": ({"min_new_tokens": 4}, {"min_new_tokens": 4}),
    "at most 3": ({"max_new_tokens": 3}, {"max_new_tokens": 3}),
    "from 3 to 6": ({"min_new_tokens": 3, "max_new_tokens": 6},) * 2,
}


@pytest.mark.parametrize("lengths", LENGTH_SETTINGS)
def test_greedy_says_what_transformers_says(models, lengths):
    theirs, ours = LENGTH_SETTINGS[lengths]
    assert by_ours(models, **ours).tokens == by_theirs(models, **theirs)[0]


@pytest.mark.parametrize("lengths", LENGTH_SETTINGS)
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_beams_find_what_transformers_finds(models, length_penalty, lengths):
    theirs, ours = LENGTH_SETTINGS[lengths]
    beams = 3 if lengths == "at most 3" else 5
    texts, scores = by_theirs(models, num_beams=beams, length_penalty=length_penalty, **theirs)
    found = by_ours(models, beams=beams, length_penalty=length_penalty, **ours)
    assert found.tokens == texts
    assert found.scores == pytest.approx(scores, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("models", [name for name in MODELS if "t5" in name], indirect=True)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("asked", [{"repetition_penalty": 1.9}, {"no_repeat_ngram": 1}], ids=str)
def test_penalties_of_an_encoder_decoder_count_what_it_said_and_not_what_it_was_asked(models, asked, beams):
    named = {key.replace("_ngram", "_ngram_size"): value for key, value in asked.items()}
    texts, _ = by_theirs(models, num_beams=beams, **named)
    assert by_ours(models, beams=beams, **asked).tokens == texts
    assert texts != by_theirs(models, num_beams=beams)[0]


def test_what_is_compared_says_different_things(models):
    told = [by_ours(models), by_ours(models, beams=3), by_ours(models, beams=5, length_penalty=0.0)]
    told += [by_ours(models, beams=5, length_penalty=-1.0), by_ours(models, beams=5, min_new_tokens=4)]
    assert len({str(found.tokens) for found in told}) > 2
    assert any(varied(found) for found in told) and len({tuple(text) for text in told[0].tokens}) > 3


@pytest.mark.parametrize("asked", [{}, {"beams": 3, "min_new_tokens": 3}], ids=str)
def test_no_batch_and_no_padding_changes_a_text(models, asked):
    """Prompts of 1 to 6 tokens in batches of 1, 2 and 8, padded left or right with anything: 0 of 8 texts flip."""
    _, ours, prefix, _ = models
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(5, V, (length,), generator=generator) for length in LENGTHS]
    settings = GenerationSettings(STOPS, NEW, **asked)
    found = {}
    for size in (1, 2, 8):
        for side in ("left", "right"):
            told = []
            for first in range(0, 8, size):
                rows = slice(first, first + size)
                longest = max(map(len, prompts[rows]))
                tokens, attention_mask = torch.full((size, longest), 17), torch.zeros(size, longest, dtype=torch.bool)
                for row, text in enumerate(prompts[rows]):
                    place = slice(-len(text), None) if side == "left" else slice(len(text))
                    tokens[row, place], attention_mask[row, place] = text, True
                told.append(generate(ours.decoding(prefix[rows]), tokens, settings, attention_mask=attention_mask))
            found[size, side] = [t for part in told for t in part.tokens], [s for part in told for s in part.scores]
    expected, scores = found[1, "left"]
    for tokens, others in found.values():
        assert sum(a != b for a, b in zip(tokens, expected, strict=True)) == 0
        assert others == pytest.approx(scores, abs=1e-4)
    assert len({tuple(text) for text in expected}) > 3


def test_prompts_of_a_batch_are_read_once_a_picture_not_once_a_beam(models):
    ours, seen = models[1], []
    read = ours.encode if ours.kind == "seq2seq" else ours.run
    watched = lambda x, *rest: (seen.append(tuple(x.shape[:2])), read(x, *rest))[1]  # noqa: E731
    setattr(ours, "encode" if ours.kind == "seq2seq" else "run", watched)
    try:
        by_ours(models, beams=4, min_new_tokens=3)
    finally:
        delattr(ours, "encode" if ours.kind == "seq2seq" else "run")
    assert [shape for shape in seen if shape[1] > 1] == [(PICTURES, Q + 3)]
    assert all(shape == (4 * PICTURES, 1) for shape in seen[1:4])


def test_beams_may_come_while_pictures_leave_and_as_many_rows_stay(models):
    _, ours, prefix, prompts = models
    new = torch.tensor([7, 8, 9, 10])
    with torch.no_grad():
        decoding = ours.decoding(prefix[:4])
        decoding.prefill(prompts[:4], torch.ones(4, 3).bool())
        decoding.select(torch.tensor([1, 1, 2, 2]), torch.tensor([1, 2]))
        found = decoding.step(new)
        for row, picture in enumerate([1, 1, 2, 2]):
            alone = ours.decoding(prefix[picture : picture + 1])
            alone.prefill(prompts[picture : picture + 1], torch.ones(1, 3).bool())
            torch.testing.assert_close(found[row], alone.step(new[row : row + 1])[0], atol=1e-4, rtol=1e-4)


# ---- folders as they are published


def words():
    """A tokenizer of V words, one of them a line's end."""
    import tokenizers

    names = ["<pad>", "<unk>", "<s>", "</s>", "\n", *(f"w{i}" for i in range(V - 5))]
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    return pieces


def written(theirs, folder, pad="<pad>"):
    theirs.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words(), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["opt", "llama", "flan-t5"])
def test_a_published_folder_is_read_whole(tmp_path, name):
    torch.manual_seed(6)
    theirs = perturbed(MODELS[name]())
    folder = written(theirs, tmp_path / name)
    ours, tokenizer = load_folder(folder, torch.float32, Published("x", stop="\n" if name == "opt" else None))
    prefix, (tokens, attention_mask) = torch.randn(2, Q, 24), tokenizer.prompts(["w1 w2", "w7 w8"], 20)
    assert attention_mask.all() and tokens.tolist()[0] == ([6, 7, 3] if name == "flan-t5" else [2, 6, 7])
    assert tokenizer.stops == ((4,) if name == "opt" else (3,)) and tokenizer.pad == 0
    x = torch.cat([prefix, theirs.get_input_embeddings()(tokens)], dim=1).detach()
    expected = theirs.generate(inputs_embeds=x, max_new_tokens=5, do_sample=False, eos_token_id=list(tokenizer.stops))
    expected = expected[:, 1:] if name == "flan-t5" else expected
    found = generate(ours.decoding(prefix), tokens, GenerationSettings(tokenizer.stops, 5))
    for text, row in zip(found.tokens, expected.tolist(), strict=True):
        assert text == row[: len(text)] and (len(text) == 5 or row[len(text)] in tokenizer.stops)
    half, _ = load_folder(folder)
    assert half.embed(tokens).dtype == torch.bfloat16
    states = half.states(x.requires_grad_(), torch.ones(x.shape[:2]).bool(), *([tokens] if name == "flan-t5" else []))
    half.logits(states).square().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad[:, :Q].abs().max() > 0
    assert all(not parameter.requires_grad for parameter in half.parameters())
    assert not half.train().training and not half.theirs.training


def test_flan_t5_is_read_with_the_gelu_that_blip2_read_it_with(tmp_path):
    torch.manual_seed(7)
    folder = written(perturbed(MODELS["flan-t5"]()), tmp_path)
    x, targets = torch.randn(2, 4, 24), torch.randint(5, V, (2, 3))
    exact, _ = load_folder(folder, torch.float32, Published("x", {"dense_act_fn": "gelu"}))
    as_written, _ = load_folder(folder, torch.float32)
    with torch.no_grad():
        difference = (exact.states(x, None, targets) - as_written.states(x, None, targets)).abs().max()
    assert 1e-6 < difference < 1e-1
    gates = [module.act for module in exact.modules() if hasattr(module, "wi_1")]
    torch.testing.assert_close(gates[0](x), torch.nn.functional.gelu(x), atol=1e-6, rtol=1e-6)


def test_folders_that_do_not_do_are_told_the_way_out(tmp_path):
    torch.manual_seed(8)
    folder = written(opt(), tmp_path / "opt", pad=None)
    _, tokenizer = load_folder(folder)
    assert tokenizer.prompts(["w1 w2", "w3 w4"], 20)[1].all()  # nothing to fill up
    with pytest.raises(UserError, match=r"has no pad token: set one first, as in tokenizer\.pad = 3"):
        tokenizer.prompts(["w1", "w2 w3"], 20)
    tokenizer.pad = 3
    assert tokenizer.prompts(["w1", "w2 w3"], 20)[0].tolist() == [[3, 2, 6], [2, 7, 8]]
    weights = load_file(folder / "model.safetensors")
    del weights["model.decoder.layers.1.fc1.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights missing .*layers\.1\.fc1\.bias"):
        load_folder(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a language model"):
        load_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="type 'gpt2', known: opt, llama, t5"):
        load_folder(folder)


# ---- GGUF


def as_gguf(theirs, path, quantised=True):
    """What llama.cpp's converter writes: channels of a turn as neighbours, matrices in 4 or 8 bits."""
    gguf = pytest.importorskip("gguf")
    config = theirs.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(97 + i) for i in range(26)]
    tokens = ["<pad>", "<unk>", "<s>", "</s>", *letters, "Ġ", "1", "2", "ab", "abc"]
    tokens += [f"[{i}]" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    }  # fmt: skip
    for key, value in theirs.model.state_dict().items():
        key, i = f"model.{key}".removesuffix(".weight"), None
        if key.startswith("model.layers."):
            _, _, i, key = key.split(".", 3)
        name = names[key]
        if name in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        name, kind = (f"{name}.weight" if i is None else f"blk.{i}.{name}.weight"), gguf.GGMLQuantizationType.F32
        if quantised and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if i is None else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Entry("tiny", "a tiny one", "checkpoint", {"type": "path", "path": str(path)}, path.name, None)


@pytest.fixture(scope="module")
def gguf_llama():
    torch.manual_seed(9)
    sizes = {"vocab_size": V, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 160,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 40,
             "tie_word_embeddings": True, "rope_theta": 5000.0}  # fmt: skip
    return perturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | SPECIAL)))


@pytest.mark.parametrize(("quantised", "tolerance"), [(False, 1e-4), (True, 0.25)])
def test_a_gguf_computes_what_it_was_made_from(gguf_llama, tmp_path, quantised, tolerance):
    path = tmp_path / "tiny.gguf"
    ours, tokenizer = load_gguf(path, as_gguf(gguf_llama, path, quantised), torch.float32)
    tokens = torch.randint(5, V, (3, 7))
    with torch.no_grad():
        expected = gguf_llama(tokens).logits
        found = ours.logits(ours.states(ours.embed(tokens), None))
    assert float((found - expected).norm() / expected.norm()) < tolerance
    assert tokenizer.encode("abc 12 ab") == [34, 30, 31, 32, 30, 33] and tokenizer.encode("</s>a") == [3, 4]
    assert tokenizer.decode([2, 34, 30, 31, 3]) == "abc 1"
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (2, 3, 0)
    assert tokenizer.chat([{"role": "user", "content": "a b"}]) == "<s>user: a b"


def test_a_gguf_is_converted_once_and_again_where_that_file_was_hurt(gguf_llama, tmp_path, monkeypatch):
    from shared.backbones import gguf

    made, real = [], gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda *paths: (made.append(1), real(*paths)))
    path = tmp_path / "tiny.gguf"
    entry = as_gguf(gguf_llama, path)
    first, _ = load_gguf(path, entry)
    load_gguf(path, entry)
    assert len(made) == 1
    (converted,) = tmp_path.glob("*.safetensors")
    converted.write_bytes(converted.read_bytes()[:-100])
    again, _ = load_gguf(path, entry)
    assert len(made) == 2 and all(map(torch.equal, first.parameters(), again.parameters()))
    assert not list(tmp_path.glob(".*.part"))
    path.write_bytes(b"GGUF" + bytes(60))
    converted.unlink()
    with pytest.raises(UserError, match="not the GGUF of a Llama"):
        load_gguf(path, entry)
