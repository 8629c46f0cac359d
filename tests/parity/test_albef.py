"""ALBEF against a naive reference written from the equations (references/albef.py): outputs, losses, gradients,
momentum copy and queue over several steps, the draws' distributions, every task; converters; planted faults.

The reference reads the names of the official checkpoints, so that every comparison passes through the converter. No two
sizes coincide.
"""

import copy
from dataclasses import replace

import pytest
import torch
from faults import largest, planting, rolled
from references.albef import Albef as Reference
from torch.nn import functional as F

from papers.albef import model as model_file
from papers.albef import tasks as tasks_file
from papers.albef.config import AlbefConfig, Objective
from papers.albef.losses import albef_losses
from papers.albef.model import Albef, AlbefPretraining, of_the_batch
from papers.albef.tasks import heat_map, word_maps
from papers.albef.weights import FORMATS, filled, from_bert, from_deit, ours_of, published_of
from shared.losses.image_text import IGNORED, Masked, Negatives, Similarities, hard_negatives, mask_tokens
from shared.weights.weight_map import UserError

CONFIG = AlbefConfig(
    image_size=18,
    patch=6,
    vision_width=24,
    vision_layers=2,
    vision_heads=3,
    text_width=40,
    text_layers=2,
    fusion_layers=3,
    text_heads=4,
    mlp_width=56,
    vocabulary=67,
    positions=14,
    context=11,
    embed_width=20,
    queue=8,
    momentum=0.8,
    dropout=0.0,
    start=61,
    end=62,
    mask=63,
)
SIZES = {
    "vision_heads": CONFIG.vision_heads,
    "text_heads": CONFIG.text_heads,
    "text": CONFIG.text_layers,
    "fusion": CONFIG.fusion_layers,
    "momentum": CONFIG.momentum,
    "pad": CONFIG.pad,
}
BATCH, ALPHA, RATE = 4, 0.3, 0.05
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CONFIG.mean, CONFIG.std))


def texts(rows, length, generator):
    tokens = torch.randint(1, CONFIG.start, (rows, length), generator=generator)
    tokens[:, 0] = CONFIG.start
    ends = torch.randint(3, length, (rows,), generator=generator)
    ends[0] = length - 1
    tokens[torch.arange(rows), ends] = CONFIG.end
    return tokens.masked_fill(torch.arange(length) > ends[:, None], CONFIG.pad)


def batch(step=0, rows=BATCH, pictures=()):
    """uint8 pictures (rows, *pictures, 3, S, S), and texts of different lengths."""
    generator = torch.Generator().manual_seed(100 + step)
    size = CONFIG.image_size
    images = torch.randint(0, 256, (rows, *pictures, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, texts(rows, CONFIG.context, generator)


def normalised(images):
    return (images / 255 - MEAN) / STD


def made(format, perturb, config=CONFIG):
    torch.manual_seed(0)
    model = perturb(FORMATS[format].build(config))
    for name, parameter in model.named_parameters():
        if name.endswith("temperature"):
            parameter.data.fill_(0.2)
    return model


def reference_of(model, format, config=CONFIG):
    """The reference with the model's numbers; a tensor that stands under several names is one leaf."""
    published = published_of(model.state_dict(), format, config, model)
    trained = {
        id(parameter): name.startswith("student.") or format == "text-assignment"
        for name, parameter in model.named_parameters()
    }
    assert any(trained.values())
    leaves = {}
    for key, value in published.items():
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
        leaf = leaves.setdefault(place, value.detach().clone())
        momentum = key.partition(".")[0].endswith("_m") or "queue" in key
        published[key] = leaf.requires_grad_(leaf.is_floating_point() and not momentum)
    return Reference(published, SIZES)


def gradients(reference, model, format, config=CONFIG):
    """What the reference found, under our names, of what ours trains."""
    zeros = {k: torch.zeros_like(v) for k, v in reference.p.items()}
    theirs = {k: (zeros[k] if v.grad is None else v.grad) for k, v in reference.p.items()}
    theirs |= {k: v for k, v in reference.p.items() if not v.is_floating_point()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = ours_of(theirs, format, config, model)
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    return ours, {name: found[name] for name in trained}


class Draws:
    """Lets the model draw, and keeps what it drew for the reference. One word is replaced by the id of padding, which
    the whole vocabulary has too: it is attended to all the same."""

    def __init__(self, monkeypatch):
        self.negatives = self.masked = None
        for file in (model_file, tasks_file):
            monkeypatch.setattr(file, "hard_negatives", self._negatives)
        monkeypatch.setattr(model_file, "mask_tokens", self._mask)

    def _negatives(self, *args, **kwargs) -> Negatives:
        self.negatives = hard_negatives(*args, **kwargs)
        return self.negatives

    def _mask(self, *args, **kwargs) -> Masked:
        self.masked = mask_tokens(*args, **kwargs)
        for row, place in (self.masked.labels != IGNORED).nonzero()[:1].tolist():
            self.masked.tokens[row, place] = CONFIG.pad
        return self.masked


def our_step(model, step, objective=None):
    objective = objective or Objective(alpha_itc=ALPHA, alpha_mlm=ALPHA)
    torch.manual_seed(step)
    images, tokens = batch(step)
    output = model(images, tokens, objective)
    return output, albef_losses(output, objective)


def their_step(reference, step, draws):
    images, tokens = batch(step)
    wrong = draws.negatives
    masked = draws.masked
    return reference.pretrain(
        normalised(images), tokens, ALPHA, wrong.images, wrong.texts, masked.tokens, masked.labels
    )


def test_three_steps_of_pretraining_equal_the_reference(monkeypatch, agree, perturb):
    """Losses and all gradients of each step; then momentum copy and queue, which the third step has wrapped around."""
    model, draws = made("pretraining", perturb), Draws(monkeypatch)
    reference = reference_of(model, "pretraining")
    for step in range(3):
        output, losses = our_step(model, step)
        losses.total.backward()
        theirs = their_step(reference, step, draws)
        sum(theirs).backward()
        place = f"albef.parity.pretraining.step-{step + 1}"
        for name, one, other in zip(losses._fields, losses, theirs, strict=True):
            agree(f"{place}.{name}", f"{name} loss, step {step + 1}", one, other.detach())
        agree(f"{place}.similarities", "similarities of the batch", torch.stack(
            list(of_the_batch(output.similarities, BATCH))), torch.stack(reference.batch_similarities))  # fmt: skip
        itm = torch.cat([output.positives, output.negatives])
        agree(f"{place}.itm-logits", f"matching logits, step {step + 1}", itm, reference.itm_logits)
        ours, found = gradients(reference, model, "pretraining")
        agree(f"{place}.gradients", f"all gradients, step {step + 1}", ours, found)
        assert all(value.abs().max() > 0 for value in ours.values()), "a gradient that is zero compares nothing"
        with torch.no_grad():
            for parameter in model.student.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
            for leaf in {id(v): v for v in reference.p.values() if v.requires_grad}.values():
                leaf -= RATE * leaf.grad
                leaf.grad = None
    state = ours_of(reference.p, "pretraining", CONFIG, model)
    for part in ("student", "teacher", "queue"):
        ours = {k: v for k, v in model.state_dict().items() if k.startswith(f"{part}.")}
        agree(f"albef.parity.pretraining.{part}", f"{part} after three steps", ours, {k: state[k] for k in ours})
    assert int(model.queue.next) == 3 * BATCH % CONFIG.queue


def test_features_of_both_towers_equal_the_reference(agree, perturb):
    model = made("pretraining", perturb)
    reference, (images, tokens) = reference_of(model, "pretraining"), batch()
    student = model.student
    seen, read, image, text = reference.features(normalised(images), tokens)
    ours = {
        "image-tokens": (student.encode_image(images), seen),
        "text-states": (student.encode_text(tokens), read),
        "image": (student.image_features(student.encode_image(images)), image),
        "text": (student.text_features(student.encode_text(tokens)), text),
    }
    attention_mask = tokens != CONFIG.pad
    for name, (one, other) in ours.items():
        if name == "text-states":  # what stands at padding is read by nobody
            one, other = one[attention_mask], other[attention_mask]
        agree(f"albef.parity.features.{name}", f"{name.replace('-', ' ')} of random weights", one, other)


def test_retrieval_with_several_texts_a_picture_equals_the_reference(monkeypatch, agree, perturb):
    model, draws = made("retrieval", perturb), Draws(monkeypatch)
    reference, ids = reference_of(model, "retrieval"), torch.tensor([7, 3, 7, 5])
    for step in range(2):
        images, tokens = batch(step)
        torch.manual_seed(step)
        losses = model(images, tokens, ids, ALPHA)
        assert not (ids[draws.negatives.texts] == ids).any() and not (ids[draws.negatives.images] == ids).any()
        theirs = reference.retrieve(
            normalised(images), tokens, ids, ALPHA, draws.negatives.images, draws.negatives.texts
        )
        for name, one, other in zip(losses._fields, losses, theirs, strict=True):
            agree(f"albef.parity.retrieval.step-{step + 1}.{name}", f"{name} loss of retrieval", one, other.detach())
    losses.total.backward()
    sum(theirs).backward()
    agree("albef.parity.retrieval.gradients", "all gradients of retrieval", *gradients(reference, model, "retrieval"))
    state = ours_of(reference.p, "retrieval", CONFIG, model)
    agree("albef.parity.retrieval.state", "momentum copy, queue and ids", model.state_dict(), state)


@pytest.mark.parametrize(("format", "pictures", "classes"), [("entailment", (), 3), ("nlvr2", (2,), 2)])
def test_classification_equals_the_reference(format, pictures, classes, agree, perturb):
    model = made(format, perturb)
    reference, (images, tokens) = reference_of(model, format), batch(pictures=pictures)
    labels = torch.arange(BATCH) % classes
    loss = model.loss(images, tokens, labels, ALPHA)
    theirs, logits = reference.classification(normalised(images), tokens, labels, ALPHA)
    loss.backward()
    theirs.backward()
    agree(f"albef.parity.{format}.logits", f"{format} logits", model.student(images, tokens), logits)
    agree(f"albef.parity.{format}.loss", f"{format} loss, distilled", loss, theirs)
    agree(f"albef.parity.{format}.gradients", f"all gradients of {format}", *gradients(reference, model, format))
    assert torch.equal(model.predict(images, tokens), logits.argmax(1))


def test_text_assignment_equals_the_reference(monkeypatch, agree, perturb):
    model = made("text-assignment", perturb)
    reference, (images, tokens) = reference_of(model, "text-assignment"), batch()
    rows, labels = torch.tensor([[0, 2], [3, 1], [0, 1], [3, 0]]), torch.tensor([0, 1, 2, 0])
    monkeypatch.setattr(model, "assign", lambda features: (rows, labels))
    loss, theirs = model.loss(images, tokens), reference.assign(normalised(images), tokens, rows, labels)
    loss.backward()
    theirs.backward()
    agree("albef.parity.text-assignment.loss", "text assignment loss", loss, theirs)
    ours, found = gradients(reference, model, "text-assignment")
    agree("albef.parity.text-assignment.gradients", "all gradients of text assignment", ours, found)


def test_answers_equal_the_reference(agree, perturb):
    model = made("vqa", perturb)
    reference, (images, questions) = reference_of(model, "vqa"), batch()
    answers = texts(6, 5, torch.Generator().manual_seed(3))
    weights, owner = torch.tensor([0.3, 0.7, 1.0, 0.4, 0.6, 1.0]), torch.tensor([0, 0, 1, 2, 2, 3])
    loss = model.loss(images, questions, answers, weights, owner, ALPHA)
    theirs = reference.vqa(normalised(images), questions, answers, weights, owner, ALPHA)
    loss.backward()
    theirs.backward()
    agree("albef.parity.vqa.loss", "answer loss, weighted and distilled", loss, theirs)
    agree("albef.parity.vqa.gradients", "all gradients of VQA", *gradients(reference, model, "vqa"))

    candidates, keep = texts(9, 5, torch.Generator().manual_seed(4)), 5
    ranked = model.rank(images, questions, candidates, keep)
    expected = [reference.rank(normalised(images)[i], questions[i], candidates, keep) for i in range(BATCH)]
    assert ranked.answers.tolist() == [[index for index, _ in one] for one in expected]
    scores = torch.tensor([[score for _, score in one] for one in expected]).softmax(1)
    agree("albef.parity.vqa.ranking", "probabilities of the kept candidates", ranked.probabilities, scores)


def test_grad_cam_equals_the_reference(agree, perturb):
    model = made("pretraining", perturb).student
    reference = reference_of(made("pretraining", perturb), "pretraining")
    images, tokens = batch()
    for layer in range(CONFIG.fusion_layers):
        ours, theirs = word_maps(model, images, tokens, layer), reference.word_maps(normalised(images), tokens, layer)
        agree(f"albef.parity.grad-cam.{layer}", f"Grad-CAM of multimodal layer {layer}", ours, theirs.detach())
    alone = heat_map(model, images[1:2], tokens[1:2, : int((tokens[1] != CONFIG.pad).sum())])
    agree("albef.parity.grad-cam.padding", "a padded text's map and the text alone", heat_map(
        model, images, tokens)[1:2], alone)  # fmt: skip


# ---- distributions of what is drawn


def test_hard_negatives_are_drawn_by_the_other_sides_similarities(count):
    """Chi-square over 10,000 draws: the frequencies are the softmax of the batch's similarities, own pair left out."""
    torch.manual_seed(0)
    size, times = 5, 10_000
    similar = Similarities(*(2 * torch.randn(size, size) for _ in range(2)))
    fitting = 0
    for field, side in (("texts", similar.image_to_text), ("images", similar.text_to_image)):
        weights = side.softmax(1).fill_diagonal_(0)
        expected = weights / weights.sum(1, keepdim=True) * (times // size)
        drawn = torch.stack([getattr(hard_negatives(similar), field) for _ in range(times // size)])
        found = torch.stack([(drawn == column).sum(0) for column in range(size)], dim=1)  # (row, column)
        assert found.diagonal().eq(0).all()
        off = ~torch.eye(size, dtype=torch.bool)
        chi = ((found - expected) ** 2 / expected)[off].sum()
        fitting += int(chi < 40)  # 15 degrees of freedom: beyond 40 once in 2,000
    count("albef.parity.negatives.distribution", "directions whose draws fit the reference's weights", fitting, 2)


def test_words_are_corrupted_as_often_and_as_said(count):
    """15 % of all but [CLS] and padding; of those 80 % hidden, 10 % any word, 10 % kept; [SEP] too."""
    torch.manual_seed(0)
    tokens = batch(rows=4)[1].repeat(4_000, 1)
    masked = AlbefPretraining(Albef(CONFIG)).mask(tokens)
    chosen, changed = masked.labels != IGNORED, masked.tokens != tokens
    open_ = (tokens != CONFIG.pad) & (tokens != CONFIG.start)
    hidden = chosen & (masked.tokens == CONFIG.mask)
    other = chosen & changed & ~hidden
    shares = {
        "chosen": (chosen.sum() / open_.sum(), 0.15),
        "hidden": (hidden.sum() / chosen.sum(), 0.8 + 0.1 / CONFIG.vocabulary),
        "replaced": (other.sum() / chosen.sum(), 0.1 * (1 - 2 / CONFIG.vocabulary)),
        "kept": ((chosen & ~changed).sum() / chosen.sum(), 0.1 * (1 + 1 / CONFIG.vocabulary)),
        "end": (chosen[tokens == CONFIG.end].float().mean(), 0.15),
        "words": (torch.tensor(masked.tokens[other].unique().numel() / (CONFIG.vocabulary - 1)), 1.0),
    }
    assert not chosen[~open_].any() and not (changed & ~chosen).any()
    assert torch.equal(masked.labels[chosen], tokens[chosen])
    fitting = [name for name, (found, expected) in shares.items() if abs(float(found) - expected) < 0.01]
    count("albef.parity.corruption", "shares of the corruption that are as said", len(fitting), len(shares))


# ---- converters


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_published_file_goes_in_and_comes_back_exactly(format, agree, perturb):
    model = made(format, perturb)
    published = {k: v.clone() for k, v in published_of(model.state_dict(), format, CONFIG, model).items()}
    back = filled(published, CONFIG)
    assert type(back) is type(model) and not back.training
    agree(f"albef.parity.converter.{format}", f"{format} weights, published and back", back.state_dict(),
          model.state_dict(), tolerance=0.0)  # fmt: skip
    again = published_of(back.state_dict(), format, CONFIG, back)
    agree(f"albef.parity.converter.{format}.names", f"{format} names, there and back", again, published, tolerance=0.0)


def test_keys_that_two_layers_share_have_to_be_equal(perturb):
    model = made("nlvr2", perturb)
    published = published_of(model.state_dict(), "nlvr2", CONFIG, model)
    key = "text_encoder.encoder.layer.3.crossattention.self.key.weight"
    published[key] = published[key] + 1
    with pytest.raises(UserError, match="differs from"):
        filled(published, CONFIG)


def test_positions_of_both_copies_are_carried_to_another_picture_size(agree, perturb):
    model = made("pretraining", perturb)
    published = published_of(model.state_dict(), "pretraining", CONFIG, model)
    larger = filled(published, replace(CONFIG, image_size=30))
    for copy_name, theirs in (("student", "visual_encoder"), ("teacher", "visual_encoder_m")):
        table = published[f"{theirs}.pos_embed"]
        grid = table[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)
        expected = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)[0]
        found = getattr(larger, copy_name).vision_encoder.positions.position
        agree(f"albef.parity.positions.{copy_name}", f"positions of the {copy_name}, 3 x 3 to 5 x 5", found, expected)


def test_deit_and_bert_fill_the_encoders(agree):
    """Random weights made by timm and transformers: the ViT's tokens, BERT's lower and upper layers, its word head."""
    vit = pytest.importorskip("timm.models.vision_transformer")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = replace(CONFIG, queue=BATCH)
    theirs = vit.VisionTransformer(
        img_size=CONFIG.image_size, patch_size=CONFIG.patch, embed_dim=CONFIG.vision_width, num_classes=7,
        depth=CONFIG.vision_layers, num_heads=CONFIG.vision_heads,
    ).eval()  # fmt: skip
    bert = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=CONFIG.vocabulary, hidden_size=CONFIG.text_width, intermediate_size=CONFIG.mlp_width,
            num_hidden_layers=CONFIG.text_layers + CONFIG.fusion_layers, num_attention_heads=CONFIG.text_heads,
            max_position_embeddings=CONFIG.positions, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ).eval()  # fmt: skip
    for parameter in [*theirs.parameters(), *bert.parameters()]:
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    albef = Albef(config)
    before = copy.deepcopy(albef.state_dict())
    from_deit(albef, theirs.state_dict())
    old_names = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in bert.state_dict().items()}
    from_bert(albef, old_names)
    albef.eval()

    images, tokens = batch()
    with torch.no_grad():
        agree("albef.parity.start.deit", "tokens of timm's ViT", albef.encode_image(images), theirs.forward_features(
            normalised(images)))  # fmt: skip
        attention_mask = tokens != CONFIG.pad
        output = bert(tokens, attention_mask=attention_mask.long(), output_hidden_states=True)
        states = albef.encode_text(tokens)
        lower = output.hidden_states[CONFIG.text_layers]
        agree("albef.parity.start.bert-lower", "BERT's lower layers", states[attention_mask], lower[attention_mask])
        fused = albef.multimodal_encoder(states, mask=attention_mask[:, None, None])
        words = albef.mlm_head(fused[attention_mask], albef.text_encoder.embeddings.word.weight)
        agree("albef.parity.start.bert-upper", "BERT's upper layers and word head", words, output.prediction_logits[
            attention_mask])  # fmt: skip
    kept = [k for k in before if ".cross_" in k or k.startswith(("vision_proj", "text_proj", "itm_head"))]
    assert kept and all(torch.equal(albef.state_dict()[key], before[key]) for key in kept)
    larger = Albef(replace(config, image_size=30))
    from_deit(larger, theirs.state_dict())
    assert len(larger.vision_encoder.positions.position) == 1 + 5 * 5


# ---- planted faults


def _momentum_after_the_features(plant, model):
    follow = model_file.follow

    def late(real, images, tokens):
        with planting() as still:
            still(model_file, "follow", lambda *_: None)
            taught = real(images, tokens)
        follow(model.teacher, model.student, model.config.momentum)
        return taught

    plant(model, "teach", late)


def _queue_before_the_batch(plant, model):
    def other_order(real, taught):
        queue = model.queue
        return torch.cat([queue.images, taught.image_features]), torch.cat([queue.texts, taught.text_features])

    plant(model, "keys", other_order)


def _pushed_before_compared(plant, model):
    def early(real, taught):
        model.queue.push(taught.image_features, taught.text_features)
        return real(taught)

    plant(model, "keys", early)


def _with_negatives(change):
    return lambda plant, model: plant(
        model_file, "match_with_negatives", lambda real, *given: real(*given[:-1], change(given[-1]))
    )


def _masked_words_not_encoded_anew(plant, model):
    student = model.student

    def words(real, tokens, attention_mask, image_tokens, wanted):
        embedded, mask = student.text_encoder.embeddings(tokens), attention_mask[:, None, None]
        fused = student.multimodal_encoder(embedded, mask=mask, context=image_tokens)
        return student.mlm_head(fused[wanted], student.text_encoder.embeddings.word.weight)

    plant(student, "words", words)


def _no_cross_attention(plant, model):
    for layer in model.student.multimodal_encoder:
        plant(layer, "forward", lambda real, x, **given: real(x, **given | {"context": None}))


OWN = torch.arange(BATCH)
FAULTS = {
    "momentum stands still": lambda plant, model: plant(model_file, "follow", lambda real, *_: None),
    "momentum after the features": _momentum_after_the_features,
    "momentum the other way": lambda plant, model: plant(
        model_file, "follow", lambda real, teacher, student, beta: real(teacher, student, 1 - beta)
    ),
    "queue before the batch": _queue_before_the_batch,
    "pushed before compared": _pushed_before_compared,
    "features exchanged in the queue": lambda plant, model: plant(
        model.queue, "push", lambda real, images, texts: real(texts, images)
    ),
    "no queue": lambda plant, model: plant(
        model, "keys", lambda real, taught: (taught.image_features, taught.text_features)
    ),
    "temperature multiplies": lambda plant, model: plant(
        model_file, "similarities", lambda real, *given: real(*given[:-1], 1 / given[-1])
    ),
    "teacher not asked": lambda plant, model: setattr(model, "_objective", Objective(alpha_itc=0, alpha_mlm=0)),
    "words taught by the student": lambda plant, model: plant(
        model.teacher, "words", lambda real, *given: model.student.words(*given)
    ),
    "negatives exchanged": _with_negatives(lambda wrong: Negatives(images=wrong.texts, texts=wrong.images)),
    "negatives are positives": _with_negatives(lambda wrong: Negatives(OWN, OWN)),
    "no cross-attention": _no_cross_attention,
    "masked words not encoded anew": _masked_words_not_encoded_anew,
    "padding of the corrupted text": lambda plant, model: plant(
        model.student,
        "words",
        lambda real, tokens, attention_mask, *given: real(tokens, model.student.attention_mask(tokens), *given),
    ),
    "padding is seen": lambda plant, model: plant(model_file, "key_mask", lambda real, attention_mask: None),
    "output norm skipped": lambda plant, model: plant(
        model.student.vision_encoder.output_norm, "forward", lambda real, x: x
    ),
    "keys and values exchanged": lambda plant, model: rolled(
        model.student.multimodal_encoder[1].cross_attention.kv.weight, CONFIG.text_width
    ),
    "positions from one": lambda plant, model: plant(
        model.student.text_encoder.embeddings,
        "forward",
        lambda real, tokens: real(tokens, 1 + torch.arange(tokens.shape[1])),
    ),
    "features from another token": lambda plant, model: plant(
        model.student, "text_features", lambda real, states: real(states[:, 1:])
    ),
}


def test_every_planted_fault_is_told_from_the_reference(count, perturb):
    """Two steps, so that what a fault does to momentum copy and queue is seen too."""

    def difference(fault=None):
        with pytest.MonkeyPatch.context() as monkeypatch, planting() as plant:
            model = made("pretraining", perturb)
            reference, draws, found = reference_of(model, "pretraining"), Draws(monkeypatch), 0.0
            if fault:
                fault(plant, model)
            for step in range(2):
                with torch.no_grad():
                    _, losses = our_step(model, step, getattr(model, "_objective", None))
                    found = max(found, largest(losses, their_step(reference, step, draws)))
                for parameter in model.student.parameters():  # the student moves alike in both
                    parameter.data.mul_(0.9)
                for leaf in {id(v): v for v in reference.p.values() if v.requires_grad}.values():
                    leaf.data.mul_(0.9)
        return found

    assert difference() <= 1e-5
    caught = [name for name, fault in FAULTS.items() if difference(fault) > 1e-4]
    assert len(FAULTS) >= 15 and len(caught) == len(FAULTS), f"not caught: {FAULTS.keys() - set(caught)}"
    count("albef.parity.mutants", "faults planted in our model and caught", len(caught), len(FAULTS))
