"""BLIP against transformers (captioning, retrieval, VQA), timm (image encoder) and its equations written out
(pre-training): outputs, losses, gradients, the converter both ways.

No two sizes coincide, so that a transposed or swapped axis cannot pass by accident; only where transformers' VQA
wants pictures and texts equally wide, they are.
"""

import copy
from dataclasses import replace

import pytest
import torch
from batches import texts
from faults import in_each, largest, layers_in_reverse, patches_in_column_order, planting, rolled, wrong_eps
from pairs import of_uint8_and_floats, pictures, retrieval_loss, state
from references import blip_pretraining as naive

from papers.blip import model as blip_model
from papers.blip.config import BlipConfig
from papers.blip.losses import blip_losses
from papers.blip.model import Blip, BlipPretraining, Objectives
from papers.blip.tasks import BlipVqa
from papers.blip.weights import FORMATS, hf_config
from shared.nn.blocks import QuickGELU, set_recompute
from shared.weights.weight_map import to_ours

transformers = pytest.importorskip("transformers")

CONFIG = BlipConfig(
    image_size=30,
    patch=6,
    vision_width=48,
    vision_layers=3,
    vision_heads=3,
    text_width=40,
    text_layers=2,
    text_heads=4,
    mlp_width=72,
    vocabulary=97,
    positions=23,
    context=13,
    embed_width=28,
    queue=20,
    dropout=0.0,
    start_token=91,
    end_token=92,
    decode_token=95,
    encode_token=96,
)
WIDE = replace(CONFIG, text_width=48)
PROMPT = 3


def make(kind, config=CONFIG):
    return kind(transformers.BlipConfig.from_dict(hf_config(config)))


def first(token, tokens):
    tokens = tokens.clone()
    tokens[:, 0] = token
    return tokens


def targets_of(tokens, prompt=0):
    """transformers' labels: it shifts them by itself."""
    labels = tokens.masked_fill(tokens == CONFIG.pad_token, -100)
    labels[:, :prompt] = -100
    return labels


def filled(format, published, config=CONFIG):
    ours = FORMATS[format].build(config).eval()
    ours.load_state_dict(FORMATS[format].to_ours(published, ours.state_dict()), strict=True)
    return ours


def gradients_agree(agree, key, what, ours, reference, format):
    mine = {name: p.grad for name, p in ours.named_parameters()}
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    theirs = to_ours(theirs, FORMATS[format].map)
    assert all(value is not None and value.abs().max() > 0 for value in mine.values()), "a zero compares nothing"
    agree(f"blip.parity.{key}.gradients", f"all gradients of {what} against transformers", mine, theirs)


# ---- against transformers


def captions(model, tokens, images):
    """(logits, loss) of a captioner of ours."""
    image_tokens = model.encode_image(images)
    return model.caption_logits(tokens, image_tokens), model.caption_loss(tokens, image_tokens, PROMPT)


def their_captions(reference, tokens, images):
    tokens = first(CONFIG.decode_token, tokens)
    attention_mask = (tokens != CONFIG.pad_token).long()
    output = reference(
        pixel_values=images, input_ids=tokens, attention_mask=attention_mask, labels=targets_of(tokens, PROMPT)
    )
    return output.logits, output.loss


def retrieval(model, tokens, images):
    """(cosines, match logits, a loss of both) of a matcher of ours."""
    image_tokens = model.encode_image(images)
    cosines = model.features_of(image_tokens) @ model.text_features(tokens).T
    return retrieval_loss(cosines, model.match(tokens, image_tokens), 0.07)


def their_retrieval(reference, tokens, images):
    attention_mask = (tokens != CONFIG.pad_token).long()
    given = {"pixel_values": images, "attention_mask": attention_mask}
    itc = reference(input_ids=first(CONFIG.start_token, tokens), use_itm_head=False, **given).itm_score
    itm = reference(input_ids=first(CONFIG.encode_token, tokens), use_itm_head=True, **given).itm_score
    return retrieval_loss(itc, itm, 0.07)


def test_captioning_equals_transformers(agree, perturb):
    torch.manual_seed(0)
    reference = perturb(make(transformers.BlipForConditionalGeneration))
    tokens, images = texts(5, CONFIG), pictures(5)
    their_logits, their_loss = their_captions(reference, tokens, images)
    their_loss.backward()
    ours = filled("transformers-captioning", state(reference))
    logits, loss = captions(ours, tokens, images)
    loss.backward()
    agree("blip.parity.captioning.logits", "next-token logits against transformers", logits, their_logits)
    agree("blip.parity.captioning.loss", "caption loss behind a prompt against transformers", loss, their_loss)
    gradients_agree(agree, "captioning", "captioning", ours, reference, "transformers-captioning")


def test_retrieval_heads_equal_transformers(agree, perturb):
    torch.manual_seed(0)
    reference = perturb(make(transformers.BlipForImageTextRetrieval))
    tokens, images = texts(6, CONFIG), pictures(6)
    their_cosines, their_matches, their_loss = their_retrieval(reference, tokens, images)
    their_loss.backward()
    ours = filled("transformers-retrieval", state(reference))
    cosines, matches, loss = retrieval(ours, tokens, images)
    loss.backward()
    agree("blip.parity.retrieval.itc", "picture-text cosines against transformers", cosines, their_cosines)
    agree("blip.parity.retrieval.itm", "match logits against transformers", matches, their_matches)
    agree("blip.parity.retrieval.loss", "loss of both heads against transformers", loss, their_loss)
    gradients_agree(agree, "retrieval", "both heads", ours, reference, "transformers-retrieval")


def test_question_answering_equals_transformers(agree, perturb):
    """transformers 5.23 forgets the mask over a question's padding on its way into the decoder's cross-attention
    (BlipTextAttention hands on no encoder_attention_mask), the authors' code does not. So it is asked one unpadded
    question at a time, and ours all of them at once."""
    torch.manual_seed(0)
    reference = perturb(make(transformers.BlipForQuestionAnswering, WIDE))
    questions, answers, images = texts(5, CONFIG), texts(5, CONFIG, length=9, seed=3), pictures(5)
    told = (answers[:, 1:] != 0).sum()
    their_loss = 0.0
    for question, answer, image in zip(questions, answers, images, strict=True):
        question, answer = question[question != 0][None], first(CONFIG.decode_token, answer[answer != 0][None])
        output = reference(
            input_ids=first(CONFIG.encode_token, question), pixel_values=image[None], labels=answer,
            attention_mask=torch.ones_like(question), decoder_input_ids=answer,
        )  # fmt: skip
        their_loss = their_loss + output.loss * (answer.shape[1] - 1) / told
    their_loss.backward()
    ours = filled("transformers-vqa", state(reference), WIDE)
    loss = ours(images, questions, answers, torch.arange(5)) * len(images) / told  # theirs is the mean over tokens
    loss.backward()
    agree("blip.parity.vqa.loss", "answer loss against transformers", loss, their_loss)
    gradients_agree(agree, "vqa", "question answering", ours, reference, "transformers-vqa")


def test_answers_are_ranked_as_transformers_scores_them(perturb):
    """The likeliest by summed smoothed loss, computed answer by answer with transformers' decoder."""
    torch.manual_seed(0)
    reference = perturb(make(transformers.BlipForQuestionAnswering, WIDE))
    ours = filled("transformers-vqa", state(reference), WIDE)
    questions, answers, images = texts(4, CONFIG), texts(7, CONFIG, length=9, seed=5), pictures(4)
    with torch.no_grad():
        states = ours.ask(questions, ours.encode_image(images))
        found = ours.rank(states, questions, answers, candidates=7)
        for row in range(4):
            asked = states[row : row + 1, : int((questions[row] != 0).sum())]
            losses = []
            for answer in first(CONFIG.decode_token, answers):
                kept = answer[answer != 0][None]
                loss = reference.text_decoder(kept, encoder_hidden_states=asked, labels=kept).loss
                losses.append(loss * (kept.shape[1] - 1))
            assert int(found[row]) == int(torch.stack(losses).argmin())


@pytest.mark.parametrize("format", [name for name in FORMATS if name.startswith("transformers")])
def test_the_converter_returns_every_tensor_of_transformers_exactly(format, agree, perturb):
    kinds = {
        "transformers-captioning": (transformers.BlipForConditionalGeneration, CONFIG),
        "transformers-retrieval": (transformers.BlipForImageTextRetrieval, CONFIG),
        "transformers-vqa": (transformers.BlipForQuestionAnswering, WIDE),
    }
    kind, config = kinds[format]
    published = state(perturb(make(kind, config)))
    back = FORMATS[format].to_published(filled(format, published, config).state_dict())
    what = f"{format} weights, to ours and back"
    agree(f"blip.parity.{format}.converter", what, back, published, tolerance=0.0)
    make(kind, config).load_state_dict(back, strict=True)


def test_the_image_encoder_equals_timm_under_the_authors_names(agree, perturb):
    """The authors' image encoder is timm's, name by name."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = perturb(
        timm.models.VisionTransformer(
            CONFIG.image_size, CONFIG.patch, embed_dim=CONFIG.vision_width, depth=CONFIG.vision_layers,
            num_heads=CONFIG.vision_heads, num_classes=0,
        )
    )  # fmt: skip
    published = {f"visual_encoder.{key}": value for key, value in state(reference).items()}
    vision = {key: rule for key, rule in FORMATS["captioning"].map.items() if str(key).startswith("visual_")}
    ours = Blip(CONFIG).eval()
    ours.load_state_dict(ours.state_dict() | to_ours(published, vision), strict=True)
    with torch.no_grad():
        mine, theirs = ours.encode_image(pictures(3)), reference.forward_features(pictures(3))
    agree("blip.parity.timm.image", "picture tokens under the authors' names against timm", mine, theirs)


def test_uint8_pictures_give_what_normalised_floats_give(agree):
    torch.manual_seed(0)
    ours, plain = of_uint8_and_floats(Blip(CONFIG).eval().encode_image, CONFIG)
    agree("blip.parity.uint8", "picture tokens of uint8 pixels against normalised floats", ours, plain)


# ---- pre-training against the equations


class Captured:
    """What hard_negatives was asked, and answers that are known."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, batch, same=None, floor=0.0):
        self.asked.append((batch, same, floor))
        return self.answer


@pytest.mark.parametrize("by_picture", [False, True], ids=["own pair", "all texts of a picture"])
def test_pretraining_equals_its_equations_over_two_steps(by_picture, agree, perturb, monkeypatch):
    torch.manual_seed(0)
    model = perturb(BlipPretraining(CONFIG)).train()
    with torch.no_grad():
        model.temperature.fill_(0.11)
    before = copy.deepcopy(model)
    images, tokens, ids = pictures(5), texts(5, CONFIG), torch.tensor([7, 3, 7, 1, 0])
    if by_picture:  # a picture that the queue knows
        model.queue.ids[4] = before.queue.ids[4] = 3
    answer = blip_model.Negatives(images=torch.tensor([1, 0, 4, 2, 3]), texts=torch.tensor([3, 4, 1, 0, 1]))
    asked = Captured(answer)
    monkeypatch.setattr(blip_model, "hard_negatives", asked)
    key, alpha = f"blip.parity.pretraining.{'by-picture' if by_picture else 'own-pair'}", 0.3
    given_ids = ids if by_picture else None
    for step in range(2):
        queue = copy.deepcopy(before.queue)
        for name, slow in before.momentum.named_parameters():
            quick = dict(before.blip.named_parameters())[name]
            slow.data = CONFIG.momentum * slow.data + (1 - CONFIG.momentum) * quick.data
        output = model(images, tokens, given_ids, alpha, prompt=PROMPT)
        losses = blip_losses(output, CONFIG.label_smoothing)
        with torch.no_grad():
            blip = before.blip
            slow_images = before.momentum.image_features(images)
            slow_texts = before.momentum.text_features(first(CONFIG.start_token, tokens), tokens != 0)
            features = blip.image_features(images), blip.text_features(tokens), slow_images, slow_texts
            queued = queue.images, queue.texts
            loss_itc, sides = naive.contrast(
                *(f.tolist() for f in (*features, *queued)), float(model.temperature), alpha,
                ids.tolist() if by_picture else None, queue.ids.tolist(),
            )  # fmt: skip
            pairs = [(row, row) for row in range(5)]
            wrong = [(row, int(answer.images[row])) for row in range(5)]
            wrong += [(int(answer.texts[row]), row) for row in range(5)]
            image_tokens = blip.encode_image(images)
            yes, no = (
                [blip.match(tokens[t : t + 1], image_tokens[i : i + 1])[0].tolist() for t, i in some]
                for some in (pairs, wrong)
            )
            written = blip.caption_logits(tokens, image_tokens)
            loss_lm = naive.smoothed_next_token_loss(
                written.tolist(), first(CONFIG.decode_token, tokens).tolist(), 0, PROMPT, CONFIG.label_smoothing
            )
        expected = torch.tensor([loss_itc, naive.match_loss(yes, no), loss_lm])
        agree(
            f"{key}.losses",
            f"ITC, ITM and LM in step {step + 1} against their equations",
            torch.stack([*losses]),
            expected,
        )
        batch, same, floor = asked.asked[-1]
        if by_picture:  # negatives by the student's own features
            cosines = features[0] @ features[1].T / model.temperature
            sides = cosines.tolist(), cosines.T.tolist()
        floors = 0.0 if by_picture else 1e-4
        assert floor == floors and (same is None) != by_picture
        for mine, side in zip(batch, sides, strict=True):
            wanted = torch.tensor(naive.negative_probabilities(side, ids.tolist() if by_picture else None, floors))
            belong = torch.eye(5, dtype=torch.bool) if same is None else same
            drawn = (mine.softmax(1) + floor).masked_fill(belong, 0)
            agree(f"{key}.negatives", "hard negatives' probabilities", drawn / drawn.sum(1, keepdim=True), wanted)
        # the queue took the teacher's features and the pictures' ids, in order, from where it stood
        places = slice(5 * step, 5 * step + 5)
        queue.images[places], queue.texts[places] = slow_images, slow_texts
        if by_picture:
            queue.ids[places] = ids
        agree(f"{key}.queue", "the queue behind a step", model.queue.images, queue.images)
        agree(f"{key}.queue", "the queue behind a step", model.queue.texts, queue.texts)
        assert torch.equal(model.queue.ids, queue.ids) and int(model.queue.next) == 5 * step + 5
        agree(f"{key}.momentum", "the momentum copies behind a step", state(model.momentum), state(before.momentum))
        # a step of training, so that teacher and student differ
        losses.total().backward()
        with torch.no_grad():
            for parameter in model.blip.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        before.blip.load_state_dict(model.blip.state_dict())
        before.queue.load_state_dict(model.queue.state_dict())


def test_pictures_seen_once_train_as_pictures_seen_by_every_text(agree, perturb):
    """Keys and values of the pictures are computed once for all texts: gradients as without."""
    torch.manual_seed(0)
    model = perturb(BlipPretraining(CONFIG))
    images, tokens = pictures(4), texts(4, CONFIG)
    answer = blip_model.Negatives(images=torch.tensor([1, 0, 3, 2]), texts=torch.tensor([3, 2, 1, 0]))
    grads = []
    for recompute in (False, True):
        set_recompute(model.blip, recompute)
        model.zero_grad()
        image_tokens = model.blip.encode_image(images)
        yes, no, seen = model.matching(tokens, image_tokens, answer)
        assert (seen is None) == recompute
        logits, _ = model.blip.caption_targets(tokens, image_tokens, 0, seen and blip_model.again(seen, None))
        (yes.square().sum() + no.sin().sum() + logits.square().mean()).backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    agree("blip.parity.seen-once", "gradients with pictures' keys computed once and per text", *grads)


# ---- faults that have to be told


def stacks(model):
    return [stack for stack in (model.text_encoder, model.text_decoder) if stack is not None]


def layers(model):
    return [layer for stack in stacks(model) for layer in stack.layers]


def _causal_the_wrong_way(plant, model):
    for stack in stacks(model):
        plant(stack.layers, "forward", lambda real, x, causal=False, **given: real(x, causal=not causal, **given))


def _padding_seen(plant, model):
    for stack in stacks(model):
        plant(stack.layers, "forward", lambda real, x, mask=None, **given: real(x, **given))


def _no_first_token_of_the_mode(plant, model):
    start = model.config.start_token
    model.config = replace(model.config, encode_token=start, decode_token=start)


def _no_label_smoothing(plant, model):
    model.config = replace(model.config, label_smoothing=0.0)


def _prompt_learned(plant, model):
    if model.text_decoder is not None:
        plant(model, "caption_targets", lambda real, tokens, image_tokens, prompt=0: real(tokens, image_tokens))


OF_CAPTIONS = {"no label smoothing": _no_label_smoothing, "prompt learned": _prompt_learned}
FAULTS = OF_CAPTIONS | {
    "no cross-attention": in_each(layers, lambda layer: setattr(layer, "cross_attention", None)),
    "keys and values of cross-attention exchanged": in_each(
        layers, lambda layer: rolled(layer.cross_attention.kv.weight, CONFIG.text_width)
    ),
    "causal the wrong way": _causal_the_wrong_way,
    "padding seen": _padding_seen,
    "no first token of the mode": _no_first_token_of_the_mode,
    "no final vision norm": lambda plant, model: setattr(model.vision_encoder, "output_norm", torch.nn.Identity()),
    "wrong eps": wrong_eps,
    "quick GELU": in_each(layers, lambda layer: setattr(layer.mlp, "activation", QuickGELU())),
    "positions shifted": in_each(stacks, lambda stack: rolled(stack.embeddings.position.weight, 1)),
    "patches in column order": patches_in_column_order,
    "layers in reverse": in_each(stacks, lambda stack: layers_in_reverse(stack.layers)),
}


def test_every_mutant_is_told_from_the_reference(count, perturb):
    torch.manual_seed(0)
    heads = {
        "transformers-captioning": (transformers.BlipForConditionalGeneration, captions, their_captions),
        "transformers-retrieval": (transformers.BlipForImageTextRetrieval, retrieval, their_retrieval),
    }
    tokens, images = texts(5, CONFIG), pictures(5)
    caught = {name: [] for name in FAULTS}
    for format, (kind, ours_runs, theirs_runs) in heads.items():
        reference = perturb(make(kind))
        with torch.no_grad():
            theirs = theirs_runs(reference, tokens, images)
            sound = filled(format, state(reference))
            for name, fault in FAULTS.items():
                mutant = copy.deepcopy(sound)
                with planting() as plant:
                    fault(plant, mutant)
                    caught[name].append(largest(ours_runs(mutant, tokens, images), theirs) > 1e-5)
    missed = {name for name, found in caught.items() if not (any if name in OF_CAPTIONS else all)(found)}
    assert len(FAULTS) >= 12 and not missed, f"not caught: {missed}"
    count("blip.parity.mutants", "faults planted in our model and caught", len(caught) - len(missed), len(FAULTS))


def test_every_fault_of_pretraining_is_told_from_its_equations(count, perturb, monkeypatch):
    """Faults in what no library computes: each has to move a loss of a step behind one of training."""
    torch.manual_seed(0)
    sound = perturb(BlipPretraining(CONFIG)).train()
    images, tokens, ids = pictures(5), texts(5, CONFIG), torch.tensor([7, 3, 7, 1, 0])
    faults = {
        "the teacher stands still": lambda m: setattr(m, "config", replace(m.config, momentum=1.0)),
        "the teacher is the student": lambda m: setattr(m, "config", replace(m.config, momentum=0.0)),
        "the queue stays": lambda m: setattr(m.queue, "push", lambda *given: None),
        "the queue grows from its other end": lambda m: m.queue.next.fill_(10),
        "no soft labels": lambda m: setattr(m, "fault", {"alpha": 0.0}),
        "partners forgotten": lambda m: setattr(m, "fault", {"ids": None}),
    }

    def losses_after_a_step(model):
        torch.manual_seed(1)
        given = {"ids": ids, "alpha": 0.4} | getattr(model, "fault", {})
        for _ in range(2):
            output = model(images, tokens, given["ids"], given["alpha"], Objectives(itm=False, lm=False))
            loss = blip_losses(output, 0.1).total()
            loss.backward()
            with torch.no_grad():
                for parameter in model.blip.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.5 * parameter.grad
                        parameter.grad = None
        return float(loss.detach()), model.queue.images.clone()

    right, queue = losses_after_a_step(copy.deepcopy(sound))
    again, same_queue = losses_after_a_step(copy.deepcopy(sound))
    assert right == again and torch.equal(queue, same_queue)
    caught = []
    for name, plant in faults.items():
        faulty = copy.deepcopy(sound)
        plant(faulty)
        loss, left = losses_after_a_step(faulty)
        if abs(loss - right) > 1e-5 or not torch.equal(queue, left):
            caught.append(name)
    count("blip.parity.pretraining.mutants", "faults planted in pre-training and caught", len(caught), len(faults))


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["other widths", "equal widths"])
def test_question_answering_starts_with_pretrained_weights(config, perturb):
    torch.manual_seed(0)
    blip = perturb(Blip(config))
    vqa = BlipVqa.started_from(blip)
    tokens = texts(2, CONFIG)
    with torch.no_grad():
        ours = vqa.ask(tokens, vqa.encode_image(pictures(2)))
        assert torch.equal(ours, blip.ground(tokens, blip.encode_image(pictures(2))))
    for ours, theirs in zip(vqa.text_decoder.layers, blip.text_decoder.layers, strict=True):
        assert torch.equal(ours.attention.qkv.weight, theirs.attention.qkv.weight)
        assert torch.equal(ours.cross_attention.q.weight, theirs.cross_attention.q.weight)
        keys, seen = ours.cross_attention.kv.weight, theirs.cross_attention.kv.weight
        assert keys.shape[1] == config.text_width and (config is CONFIG or torch.equal(keys, seen))
