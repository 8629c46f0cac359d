"""`caption`, `ask` and `chat` with BLIP-2: what a run kept speaks as in memory; dialogues; all that can be wrong."""

import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tests_common import CATALOG

from papers.blip2 import bundle as kept
from papers.blip2 import inference as ask
from papers.blip2.config import VARIANTS
from papers.blip2.encode import ANSWERING, answer
from papers.blip2.model import Blip2, Blip2Qformer, vision_encoder
from papers.blip2.text import prompt_tokenizer_of
from shared.backbones.vision import vit_encoder
from shared.cli import main
from shared.core.errors import UserError
from shared.inference.predict import Reply, Talk, ask_task, caption_task, chat_task, talk
from shared.nn.causal_lm import SmallLanguageModel
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights.load import save_weights

TEXTS = ["Question: what colour is it? Answer: red", "Question: is there a cat? Answer: no", "a photo of a blue dog"]
CONTEXT = 48


def loud(module, scale=0.4):
    """Weights that make texts depend on what is seen: default ones hardly do."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


class Kept:
    """A bridge in memory, and the folder that a run of its would leave."""

    def __init__(self, folder):
        torch.manual_seed(3)
        self.folder, self.weights = folder, folder / "model.safetensors"
        self.pieces = SmallTokenizer.train(TEXTS * 3, 300, ("decode_start",))
        language = replace(VARIANTS["blip2-tiny-small"]().language, vocabulary=self.pieces.vocab_size, context=CONTEXT)
        vision = replace(VARIANTS["blip2-tiny"]().vision, layers=1, width=56)
        self.config = replace(VARIANTS["blip2-tiny-small"](), language=language, vision=vision, queries=5)
        self.encoder = vit_encoder(loud(vision_encoder(vision)), "last")
        small = SmallLanguageModel(
            language.vocabulary, language.context, language.width, language.layers, language.heads
        )  # fmt: skip
        self.model = loud(Blip2(self.config, loud(small)))
        self.words = prompt_tokenizer_of(self.pieces, CONTEXT)
        save_weights(self.model, self.weights)
        kept.keep_frozen(
            folder, self.config, "blip2-tiny-small", self.encoder, "clip:vision", "second-last",
            self.model.language_model, self.pieces, True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Kept(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def talker(trained):
    return kept.load_inference_model("blip2-tiny-small", trained.weights, None, "none.yaml")


def picture(path, colour=(200, 30, 30), size=(32, 32)):
    Image.new("RGB", size, colour).save(path)
    return path


def images(count=4, seed=0):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main(CATALOG.folder, "papers", [str(word) for word in words])
    return ended.value.code


# ---- what was kept is what was trained


def test_what_a_run_kept_answers_as_the_model_in_memory_does(trained, talker):
    seen = images(12)
    assert talker.trained_here and talker.language.chat is None
    torch.testing.assert_close(talker.encoder(seen), trained.encoder(seen), rtol=1e-4, atol=1e-4)
    wanted = answer(trained.model, trained.words, trained.encoder(seen), ["what colour is it?"] * 12)
    task = ask_task(ask.load_for_inference("blip2-tiny-small", trained.weights), "what colour is it?", None, None)
    assert list(task.answer(seen)) == wanted and len(set(wanted)) > 1
    assert task.size == 32


def test_a_prompt_that_is_written_out_is_not_put_into_another(talker):
    prompt_of = ask.Blip2Inference(talker, "ask").prompt
    asked = prompt_of("what is it?")
    assert asked == "Question: what is it? Answer:"
    assert prompt_of(f" {asked}\n") == asked
    assert prompt_of("Question: a? Short answer: ") == "Question: a? Short answer:"
    assert [ask.bare(text) for text in (asked, "Question: a? Short answer:", " a? ")] == ["what is it?", "a?", "a?"]


def test_an_answer_is_as_likely_among_others_as_by_itself(talker):
    answers = ["red", "a blue dog", "no", "cat"]
    model, prompt = ask.Blip2Inference(talker, "ask"), "Question: what is it? Answer:"
    asked, prefix = model.tokens(prompt), model.encode(images(6))
    language, words = talker.model.language_model, talker.language.tokenizer
    scores = torch.zeros(6, 4)
    for row in range(6):
        for place, text in enumerate(answers):
            told = [*words.encode(f" {text}"), words.stop[0]]
            x = torch.cat([prefix[row : row + 1], language.embed(torch.tensor([asked + told]))], 1)
            logits = language.logits(language.states(x, None))[0].log_softmax(-1)
            before = len(prefix[row]) + len(asked) - 1
            scores[row, place] = sum(logits[before + i, token] for i, token in enumerate(told))
    torch.testing.assert_close(model.score(prefix, [prompt] * 6, answers), scores, rtol=1e-4, atol=1e-4)
    assert (scores.std(0) > 0.01).all()


# ---- dialogues


def recorded(monkeypatch, told):
    """Which prompts (tokens) the language model is given; it answers `told` in turn."""
    prompts, answers = [], iter(told)

    def written(model, tokenizer, prefix, tokens, mask, settings, generator):
        prompts.extend(row[real].tolist() for row, real in zip(tokens, mask, strict=True))
        return [next(answers)]

    monkeypatch.setattr(ask, "write_behind", written)
    return prompts


def begin(talker, **changed):
    return chat_task(ask.Blip2Inference(replace(talker, **changed), "chat"), None).begin(images(1))


def test_a_dialogue_stands_before_the_next_question(monkeypatch, trained, talker):
    language = SmallLanguageModel(talker.model.language_model.vocabulary, 400, 40, 2, 2)
    talker = replace(talker, model=Blip2(talker.model.config, language))
    prompts = recorded(monkeypatch, ["red.", "yes\nno", "x"])
    reply = begin(talker)
    assert reply("what colour is it?") == Reply("red", 0)
    assert reply("Question: is it a cat? Answer:") == Reply("yes", 0)
    assert reply("why?") == Reply("x", 0)
    whole = "Question: what colour is it? Answer: red. Question: is it a cat? Answer: yes. Question: why? Answer:"
    assert prompts[-1] == [trained.pieces.start, *trained.pieces.encode(whole)]


def test_of_weights_that_learned_single_answers_a_second_one_behind_the_first_is_not_said(monkeypatch, talker):
    recorded(monkeypatch, ["no. The answer is no. The answer", "red"])
    language = SmallLanguageModel(talker.model.language_model.vocabulary, 400, 40, 2, 2)
    reply = begin(talker, model=Blip2(talker.model.config, language))
    assert (reply("is there a frog?").text, reply("what colour is it?").text) == ("no", "red")
    recorded(monkeypatch, ["It is a cat. It sits."])
    released = begin(talker, model=Blip2(talker.model.config, language), trained_here=False)
    assert released("what is it?").text == "It is a cat. It sits"


def test_weights_that_learned_no_captions_write_none_and_a_folder_is_not_taken_for_weights(trained, tmp_path):
    import shutil

    copied = tmp_path / "run"
    shutil.copytree(trained.folder, copied)
    card = json.loads((copied / kept.CARD).read_text())
    (copied / kept.CARD).write_text(json.dumps(card | {"captions": False}))
    weights = copied / "model.safetensors"
    with pytest.raises(UserError, match="answers to questions and no captions"):
        ask.load_for_inference("blip2-tiny-small", weights, use="caption")
    assert ask_task(ask.load_for_inference("blip2-tiny-small", weights), "what is it?", None, None).answer(images(1))
    (copied / kept.CARD).write_text(json.dumps({key: value for key, value in card.items() if key != "captions"}))
    model = ask.load_for_inference("blip2-tiny-small", weights, use="caption")
    assert caption_task(model, None, None, None, 0).answer(images(1)), "of a card from before it said so"
    with pytest.raises(UserError, match=r"a folder; give the model\.safetensors"):
        ask.load_for_inference("blip2-tiny-small", copied)


def test_a_chat_template_writes_the_dialogue_out_where_there_is_one(monkeypatch, trained, talker):
    language = SmallLanguageModel(talker.model.language_model.vocabulary, 400, 40, 2, 2)
    prompts = recorded(monkeypatch, ["red", "yes"])
    template = replace(
        talker.language, chat=lambda messages: " ".join(f"<{one['role']}> {one['content']}" for one in messages)
    )
    reply = begin(talker, model=Blip2(talker.model.config, language), trained_here=False, language=template)
    reply("what?")
    reply("why?")
    assert prompts[-1] == trained.pieces.encode("<user> what? <assistant> red <user> why?")


def test_a_full_context_forgets_the_oldest_turns_and_says_so_once(monkeypatch, talker, tmp_path, capsys):
    language = SmallLanguageModel(talker.model.language_model.vocabulary, 70, 40, 2, 2)
    prompts = recorded(monkeypatch, ["red"] * 9)
    talker = replace(talker, model=Blip2(talker.model.config, language))
    model = ask.Blip2Inference(talker, "chat")
    lines = io.StringIO("what colour is it?\n" * 4 + f"{'why? ' * 60}\n" + "is there a cat?\n" * 3)
    assert talk(picture(tmp_path / "p.png"), chat_task(model, None), lines) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["red"] * 7
    first, second = said.err.splitlines()
    assert "from here on the oldest turns are forgotten" in first and "shorten it" in second
    assert all(len(prompt) <= model.room for prompt in prompts)
    assert model.room == 70 - 5 - 10 and len(prompts[2]) == len(prompts[3]) > len(prompts[0])
    last = talker.language.tokenizer.decode(prompts[-1])
    assert "cat" in last and "colour" not in last


def test_a_dialogue_ends_at_an_empty_line_and_a_terminal_is_told_whose_turn_it_is(tmp_path, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def parrot(image):
        assert tuple(image.shape) == (1, 3, 8, 8)
        return lambda question: Reply(f"\x1b{question}", 0)

    path, task = picture(tmp_path / "p.png"), Talk(parrot, 8)
    assert talk(path, task, io.StringIO("one\n two \n\nthree\n")) == 0
    assert capsys.readouterr() == ("\\x1bone\n\\x1btwo\n", "")
    assert talk(path, task, Terminal("one")) == 0
    assert capsys.readouterr() == ("\\x1bone\n", "? ? \n")
    (tmp_path / "p.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture"):
        talk(path, task, io.StringIO("one"))


# ---- the command line


def test_the_verbs_speak_with_weights_trained_here(trained, tmp_path, capsys, monkeypatch):
    for i in range(3):
        picture(tmp_path / f"{i}.png", (0, 80 * i, 0))
    common = ["--model", "blip2-tiny-small", "--weights", trained.weights]
    assert run("caption", tmp_path, *common) == 0
    captions = capsys.readouterr().out
    assert run("caption", tmp_path, *common, "--batch", 2, "--beams", 5) == 0
    assert capsys.readouterr().out == captions
    sampled = []
    for seed in (1, 1, 2):
        assert run("caption", tmp_path, *common, "--nucleus", "0.9", "--seed", seed, "--prompt", "a photo of") == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]
    assert run("ask", tmp_path / "0.png", "is it red?", *common) == 0
    told = capsys.readouterr().out
    assert run("ask", tmp_path / "0.png", "Question: is it red? Answer:", *common) == 0
    assert capsys.readouterr().out == told
    (tmp_path / "answers.json").write_text('["red", "no"]')
    assert run("ask", tmp_path / "0.png", "is it red?", *common, "--answers", tmp_path / "answers.json") == 0
    assert capsys.readouterr().out.split(": ")[-1].strip() in ("red", "no")
    monkeypatch.setattr("sys.stdin", io.StringIO("cat?\n"))
    assert run("chat", tmp_path / "0.png", *common) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def changed(folder, target, **card):
    """A copy of what a run kept, its card changed."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    found = json.loads((target / "bridge.json").read_text())
    for key, value in card.items():
        found[key] = {**found[key], **value} if isinstance(value, dict) else value
    (target / "bridge.json").write_text(json.dumps(found))
    return target


def test_a_part_that_is_missing_wrong_or_of_another_model_is_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERS_CACHE", str(tmp_path / "cache"))

    def refused(weights, message, variant="blip2-tiny-small"):
        with pytest.raises(UserError) as error:
            kept.load_inference_model(variant, weights, None, manifest)
        assert message in str(error.value) and len(str(error.value).splitlines()) == 1

    manifest = CATALOG.root / "checkpoints_manifest.yaml"
    refused(trained.weights, "weights of blip2-tiny-small, not of blip2-mini; give --model", "blip2-mini")
    name = {"name": "opt-2.7b", "family": "opt"}
    refused(changed(trained.folder, tmp_path / "a", language=name) / "model.safetensors", "get it with: hf download")
    other = changed(trained.folder, tmp_path / "b")
    (other / "language_model.safetensors").write_bytes(b"other")
    refused(other / "model.safetensors", "language_model.safetensors: sha256")
    (other / "language_model.safetensors").unlink()
    refused(other / "model.safetensors", "language_model.safetensors: no such file")
    (other / "bridge.json").write_text("{}")
    refused(other / "model.safetensors", "bridge.json: does not describe a bridge")
    (other / "bridge.json").unlink()
    refused(other / "model.safetensors", "bridge.json: no such file")
    queries = changed(trained.folder, tmp_path / "c", sizes={"width": 48}) / "model.safetensors"
    refused(queries, "model.safetensors: ")
    stage1 = changed(trained.folder, tmp_path / "d") / "model.safetensors"
    save_weights(Blip2Qformer(replace(trained.config, vocabulary=300, tokenizer="small-bpe")), stage1)
    refused(stage1, "weights of stage 1")
    refused(None, "blip2-vit-l: stage 1 speaks through no language model", "blip2-vit-l")
    refused(None, "no released weights to ask with; choose blip2-vit-g-opt-2.7b")
    refused(None, "sha256 is null", "blip2-vit-g-opt-2.7b")
    refused(trained.weights.with_name("none.pth"), "no such file; --weights takes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "PICTURE", " "], "the question is empty"),
        (["ask", "PICTURE", "what? " * 30], "has room for 33: shorten it"),
        (["caption", "PICTURE", "--prompt", "what? " * 30], "has room for 13: shorten it"),
        (["ask", "PICTURE", "what?", "--beams", "0"], "--beams 0: give at least 1"),
        (["chat", "nowhere.png"], "nowhere.png: no such file; give one picture"),
        (["chat", "PICTURE", "--model", "blip-tiny"], "papers/blip holds no dialogue"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(trained, tmp_path, capsys, words, message):
    places = {"PICTURE": picture(tmp_path / "p.png")}
    model = [] if "--model" in words else ["--model", "blip2-tiny-small", "--weights", trained.weights]
    assert run(*(places.get(word, word) for word in words), *model) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_answers_of_the_paper_are_short_and_of_five_beams():
    assert (ANSWERING.beams, ANSWERING.length_penalty, ANSWERING.longest) == (5, -1.0, 10)
