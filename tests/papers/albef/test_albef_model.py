"""ALBEF's parts: objective, training step, two ranks, tasks, files. The numbers are held against a reference in
tests/parity/test_albef.py."""

import copy
from dataclasses import replace

import albef_ranks
import pytest
import torch
from ranks import on_two_ranks
from tests_common import CATALOG, ROOT
from torch.nn import functional as F

from papers.albef.config import VARIANTS, Objective, with_tokenizer
from papers.albef.evidence.structure import step
from papers.albef.losses import albef_losses
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.module import (
    AlbefModule,
    FinetuningModule,
    adamw,
    decay_groups,
    example,
    ramp,
)
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import (
    AlbefRetrieval,
    AlbefVqa,
    Distilled,
    Entailment,
    Nlvr2,
    PairEncoder,
    QuestionAnswering,
    TextAssignment,
    heat_map,
)
from papers.albef.weights import FORMATS, load_any, load_file, load_released, published_of, start
from shared.core.errors import UserError
from shared.core.paper_card import load_paper
from shared.core.recipe import load_recipe
from shared.nn.bert import BertLayers
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.tools.footprint import count_encoders, count_objectives
from shared.weights.load import save_weights
from shared.weights.manifest import Entry

TINY = replace(VARIANTS["albef-tiny"](), queue=8)
RECIPE = AlbefRecipe(model="albef-tiny", batch=4, steps=40, learning_rate=3e-3, warmup_steps=4)


def model():
    torch.manual_seed(0)
    return Albef(TINY)


def batch(size=4, **more):
    _, (images, tokens, ids) = example(size)
    return images, tokens, ids


def silent(module):
    module.log = lambda *args, **kwargs: None
    return module


# ---- the objective


@pytest.mark.parametrize("objective", [
    Objective(itc=False, negatives="random"), Objective(mlm=False), Objective(itc=False, mlm=False, negatives="random"),
    Objective(alpha_itc=0, alpha_mlm=0), Objective(negatives="random"),
])  # fmt: skip
def test_every_arm_trains_what_its_losses_reach_and_nothing_else(objective):
    torch.manual_seed(0)
    module = silent(AlbefModule(AlbefPretraining(model()), RECIPE, objective))
    before = copy.deepcopy(module.state_dict())
    optimizer = module.configure_optimizers()["optimizer"]
    loss = module.training_step(batch(), 0)
    loss.backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert any("mlm_head" in name for name in trained) == objective.mlm
    assert any("_proj" in name or name.endswith("temperature") for name in trained) == objective.itc
    optimizer.step()
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    still = {name for name in changed if name.startswith("model.student.") and name not in trained}
    assert changed and not still
    assert ("model.queue.next" in changed) == objective.itc


def test_hard_negatives_without_a_contrastive_loss_are_refused():
    with pytest.raises(ValueError, match="negatives='random'"):
        Objective(itc=False)
    with pytest.raises(ValueError, match="'hard' or 'random'"):
        Objective(negatives="easy")


def test_a_ramp_of_nothing_is_no_distillation_at_all():
    torch.manual_seed(0)
    output = AlbefPretraining(model())(*batch()[:2])
    plain = albef_losses(output, Objective(alpha_itc=0, alpha_mlm=0))
    begun, grown = (albef_losses(output, Objective(), by) for by in (0.0, 1.0))
    assert torch.equal(begun.total, plain.total) and not torch.equal(grown.itc, plain.itc)
    assert not torch.equal(grown.mlm, plain.mlm) and torch.equal(grown.itm, plain.itm)


def test_distillation_grows_over_the_recipes_first_steps():
    assert [ramp(step, replace(RECIPE, alpha_ramp_steps=4)) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert ramp(0, RECIPE) == 1.0


def test_a_text_without_a_masked_word_and_one_of_start_and_end_give_finite_losses():
    config = replace(TINY, mlm_probability=0.0)
    images, tokens, _ = batch()
    tokens[1, 1:] = config.pad
    tokens[1, 1] = config.end
    torch.manual_seed(0)
    losses = albef_losses(AlbefPretraining(Albef(config))(images, tokens), Objective())
    assert losses.total.isfinite() and float(losses.mlm.detach()) == 0.0


def test_the_temperature_stays_in_its_bounds():
    training = AlbefPretraining(model())
    for value, expected in ((3.0, 0.5), (-1.0, 0.001)):
        training.student.temperature.data.fill_(value)
        training(*batch()[:2])
        assert float(training.student.temperature.detach()) == pytest.approx(expected)


def test_the_teacher_moves_to_the_student_by_the_momentum_and_gets_no_gradient():
    torch.manual_seed(0)
    training = AlbefPretraining(Albef(replace(TINY, momentum=0.75)))
    before = training.teacher.vision_proj.weight.clone()
    training.student.vision_proj.weight.data += 1
    output = training(*batch()[:2])
    assert torch.allclose(training.teacher.vision_proj.weight, before + 0.25)
    assert not any(p.requires_grad for p in training.teacher.parameters())
    assert not output.teacher_similarities.image_to_text.requires_grad and not output.teacher_words.requires_grad


# ---- the training step


def test_biases_and_gains_do_not_decay_positions_class_token_and_temperature_do():
    training = AlbefPretraining(model())
    decayed, spared = ({id(p) for p in group["params"]} for group in decay_groups(training, 0.02))
    names = {id(p): name for name, p in training.student.named_parameters()}
    assert {names[i] for i in decayed} == {
        name
        for name, p in training.student.named_parameters()
        if p.ndim >= 2 or name in ("temperature", "vision_encoder.positions.class_token")
    }
    assert decayed | spared == set(names) and not decayed & spared


def test_the_learning_rate_warms_up_from_its_last_value_and_returns_to_it():
    recipe = replace(RECIPE, learning_rate=1e-4, last_learning_rate=1e-5, warmup_steps=10, steps=100)
    configured = adamw(model(), recipe)
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-5 + 0.9e-5) and max(rates) == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-5) and rates[9] == pytest.approx(1e-4)


# salesforce/ALBEF:configs/Retrieval_coco.yaml and VQA.yaml, and what overrides the paper's recipe for them
TUNED = {
    "retrieval": ("learning_rate=1e-5 last_learning_rate=1e-6 warmup_steps=0", 1e-5, 1e-5),
    "vqa": ("learning_rate=2e-5 last_learning_rate=1e-6 first_learning_rate=1e-5 warmup_steps=400", 1.0025e-5, 2e-5),
}


@pytest.mark.parametrize("task", TUNED)
def test_the_papers_recipe_can_say_the_schedules_of_fine_tuning(task):
    overrides, first, peak = TUNED[task]
    recipe = load_recipe(
        ROOT / "recipes/albef/paper.yaml", AlbefRecipe, [*overrides.split(), "steps=1000", "batch=256"]
    )
    [share] = adamw(model(), recipe)["lr_scheduler"]["scheduler"].lr_lambdas[:1]
    rates = [recipe.learning_rate * share(step) for step in range(1001)]
    assert (rates[0], rates[recipe.warmup_steps], rates[-1]) == pytest.approx((first, peak, 1e-6))
    assert max(rates) == pytest.approx(peak) and recipe.weight_decay == 0.02


def test_a_learning_rate_that_warms_up_from_above_its_peak_is_refused():
    with pytest.raises(UserError, match="between 0 and learning_rate"):
        replace(RECIPE, first_learning_rate=1.0)


def test_a_queue_that_batches_do_not_fill_evenly_is_refused_before_the_first_step():
    module = AlbefModule(AlbefPretraining(model()), replace(RECIPE, batch=3))
    with pytest.raises(UserError, match="queue of 8: must be a multiple of the batch of 3"):
        module.on_fit_start()
    AlbefModule(AlbefPretraining(model()), RECIPE).on_fit_start()


@pytest.mark.parametrize(
    ("changed", "message"), [({"strategy": "zero3"}, r"zero3.*zero1 or zero2"), ({"accumulate": 2}, "accumulate")]
)
def test_weights_and_batches_in_pieces_are_refused(changed, message):
    recipe = replace(RECIPE, **changed)
    for make in (lambda: AlbefModule(AlbefPretraining(model()), recipe), lambda: FinetuningModule(model(), recipe)):
        with pytest.raises(UserError, match=message):
            make()


def test_the_configuration_takes_the_tokenizers_ids_and_a_mask_of_its_own():
    plain = SmallTokenizer.train(["a cat", "a dog"], 300)
    config = with_tokenizer(TINY, plain)
    assert (config.vocabulary, config.mask) == (plain.vocab_size + 1, plain.vocab_size)
    masked = SmallTokenizer.train(["a cat", "a dog"], 300, specials=("mask",))
    config = with_tokenizer(TINY, masked)
    assert (config.vocabulary, config.mask, config.end) == (masked.vocab_size, masked.mask, masked.end)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_first_position_alone_is_what_all_layers_give_there(dropout):
    torch.manual_seed(0)
    layers = BertLayers.make(3, 24, 3, 40, context_width=20, dropout=dropout).train(dropout == 0.0)
    x, context = torch.randn(4, 7, 24), torch.randn(2, 5, 20)  # two texts a picture
    attention_mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
    given = {"mask": attention_mask[:, None, None], "context": context}
    weight = torch.randn(4, 24)
    found = []
    for run in (lambda: layers.first(x, **given), lambda: layers(x, **given)[:, 0]):
        layers.zero_grad()
        out = run()
        (out * weight).sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in layers.parameters())])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))
    layers.train().recompute = True
    torch.manual_seed(1)
    recomputed = layers.first(x, **given)
    layers.recompute = False
    torch.manual_seed(1)
    assert torch.allclose(layers.first(x, **given), recomputed)


# ---- two ranks


def test_the_queue_is_the_same_on_both_ranks_and_holds_all_of_them_in_order():
    first, second = on_two_ranks(albef_ranks.on_rank)
    alone, rows = albef_ranks.training(), albef_ranks.ROWS  # one rank with the whole batch
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one[1:] == other[1:], "the ranks' queues differ"
        similar = albef_ranks.step(alone, index)
        for ours, whole in zip(one[1:], alone.queue.buffers(), strict=True):
            assert torch.allclose(torch.tensor(ours).float(), whole.float(), atol=1e-6)
        columns = torch.tensor(one[0])
        assert columns.shape == (rows, rows + alone.queue.size)  # own batch, then the queue of all
        expected = torch.cat([similar[:rows, :rows], similar[:rows, 2 * rows :]], dim=1)
        assert torch.allclose(columns, expected, atol=1e-5)


# ---- tasks


def fit_by_heart(task, given, steps=40, rate=4e-3):
    """First and last loss over one batch that comes again and again, without a teacher."""
    module = silent(FinetuningModule(task, replace(RECIPE, learning_rate=rate, steps=steps), alpha=0.0))
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(steps):
        loss = module.training_step(given, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def test_entailment_learns_a_batch_by_heart():
    images, tokens, _ = batch(6)
    task, labels = Distilled(Entailment(model())), torch.tensor([0, 1, 2, 0, 1, 2])
    first, last = fit_by_heart(task, (images, tokens, labels))
    assert last < 0.2 * first and torch.equal(task.predict(images, tokens), labels)


def test_nlvr2_learns_which_of_two_pictures_is_the_first():
    images, tokens, _ = batch(6)
    torch.manual_seed(0)
    pairs = torch.stack([images, images.roll(1, 0)], dim=1)
    pairs[::2] = pairs[::2].flip(1)
    task, labels = Distilled(Nlvr2(PairEncoder(model()))), torch.tensor([0, 1] * 3)
    first, last = fit_by_heart(task, (pairs, tokens, labels))
    assert last < 0.2 * first and torch.equal(task.predict(pairs, tokens), labels)


def test_the_two_layers_of_a_pair_start_alike_and_share_keys_and_values():
    albef = model()
    original = copy.deepcopy(albef.multimodal_encoder)
    pair = PairEncoder(albef)
    layers = pair.encoder.multimodal_encoder
    assert len(layers) == 2 * TINY.fusion_layers
    for index, layer in enumerate(layers):
        state = original[index // 2].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert layers[0].cross_attention.kv is layers[1].cross_attention.kv
    assert layers[0].cross_attention.q is not layers[1].cross_attention.q
    apart = PairEncoder(model(), share=False).encoder.multimodal_encoder
    assert apart[0].cross_attention.kv is not apart[1].cross_attention.kv
    copied = Distilled(Nlvr2(pair)).teacher.pair.encoder.multimodal_encoder
    assert copied[2].cross_attention.kv is copied[3].cross_attention.kv is not layers[2].cross_attention.kv


def test_text_assignment_shows_its_own_picture_two_times_of_three_and_never_one_twice():
    task = TextAssignment(PairEncoder(model()))
    torch.manual_seed(0)
    features = F.normalize(torch.randn(6, 32), dim=-1)
    own, shares = torch.arange(6), torch.zeros(3)
    for _ in range(500):
        rows, labels = task.assign(features)
        assert (rows[:, 0] != rows[:, 1]).all()
        assert torch.equal(rows[:, 0] == own, labels == 0) and torch.equal(rows[:, 1] == own, labels == 1)
        shares += labels.bincount(minlength=3) / 6 / 500
    assert (shares - 1 / 3).abs().max() < 0.03
    with pytest.raises(ValueError, match="take 3 or more"):
        task.assign(features[:2])


def test_text_assignment_trains_all_but_the_projections_and_nlvr2_goes_on_from_it():
    images, tokens, _ = batch(6)
    task = TextAssignment(PairEncoder(model()))
    before = task.pair.encoder.vision_proj.weight.clone()
    torch.manual_seed(0)
    assert all(loss > 0 for loss in fit_by_heart(task, (images, tokens), steps=2))
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    assert "head.weight" in trained and not any("_proj" in name or "temperature" in name for name in trained)
    assert torch.equal(task.pair.encoder.vision_proj.weight, before)
    going_on = Nlvr2(task.pair)
    assert going_on.pair.encoder.multimodal_encoder is task.pair.encoder.multimodal_encoder


def vqa_batch(size=4):
    images, questions, _ = batch(size)
    answers = torch.zeros(size, 4, dtype=torch.long)
    answers[:, 0] = TINY.start
    answers[:, 1] = torch.arange(5, 5 + size)
    answers[:, 2] = TINY.end
    answers[0, 2:] = torch.tensor([9, TINY.end])  # one of two words
    return images, questions, answers


def test_vqa_learns_answers_by_heart_and_ranks_them_first():
    torch.manual_seed(0)
    images, questions, answers = vqa_batch()
    task = AlbefVqa(QuestionAnswering(model()))
    given = images, questions, answers, torch.ones(4), torch.arange(4)
    first, last = fit_by_heart(task, given)
    assert last < 0.2 * first
    assert task.predict(images, questions, answers, keep=3).tolist() == [0, 1, 2, 3]
    ranked = task.rank(images, questions, answers, keep=99)
    assert ranked.answers.shape == (4, 4) and torch.allclose(ranked.probabilities.sum(1), torch.ones(4))
    task.AT_ONCE = 3
    assert torch.allclose(task.rank(images, questions, answers).probabilities, ranked.probabilities, atol=1e-6)


def test_an_answers_loss_counts_by_its_weight_and_by_questions():
    torch.manual_seed(0)
    images, questions, answers = vqa_batch()
    task = AlbefVqa(QuestionAnswering(model()), distil=False).eval()
    owner = torch.arange(4)
    with torch.no_grad():
        one = task.loss(images, questions, answers, torch.ones(4), owner)
        half = task.loss(images, questions, answers, torch.full((4,), 0.5), owner)
        doubled = task.loss(images, questions, answers.repeat(2, 1), torch.full((8,), 0.5), owner.repeat(2))
    assert torch.allclose(half * 2, one) and torch.allclose(doubled, one)


def test_the_answer_decoder_starts_from_the_multimodal_encoder():
    torch.manual_seed(0)
    config = replace(TINY, vision_width=64, vision_heads=2)
    albef = Albef(config)
    fusion, head = copy.deepcopy(albef.multimodal_encoder), copy.deepcopy(albef.mlm_head)
    decoder = QuestionAnswering(albef).text_decoder
    assert all(torch.equal(value, fusion.state_dict()[key]) for key, value in decoder.layers.state_dict().items())
    assert torch.equal(decoder.head.dense.weight, head.dense.weight)
    assert decoder.embeddings.word.weight is not albef.text_encoder.embeddings.word.weight


def test_retrieval_fine_tuning_learns_a_batch_whose_pictures_have_two_texts():
    images, tokens, _ = batch(8)
    ids = torch.tensor([0, 1, 2, 3] * 2)
    images[4:] = images[:4]
    torch.manual_seed(0)
    task = AlbefRetrieval(model())
    first, last = fit_by_heart(task, (images, tokens, ids), steps=50)
    # at best: both texts of a picture, in batch and queue, share its target of four
    assert last - torch.tensor(4.0).log() < 0.35 * first
    assert set(task.queue.ids.tolist()) == {0, 1, 2, 3}


def pretrained_in_part():
    """Pre-training whose momentum copy is not the student, with pictures of known owners in its queue."""
    torch.manual_seed(0)
    training = AlbefPretraining(model())
    with torch.no_grad():
        for parameter in training.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, tokens, ids = batch(4)
    taught = training.teach(images, tokens)
    training.queue.push(taught.image_features, taught.text_features, ids)
    return training


def test_retrieval_fine_tuning_goes_on_from_the_files_momentum_copy_and_queue(tmp_path):
    training = pretrained_in_part()
    published = published_of(training.state_dict(), "pretraining", TINY, training)
    torch.save({"model": {key: value.clone() for key, value in published.items()}}, tmp_path / "albef.pth")
    task = AlbefRetrieval.started_from(load_any(tmp_path / "albef.pth", TINY))
    wanted = {key: value for key, value in training.state_dict().items() if ".mlm_head." not in key}
    found = task.state_dict()
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if key != "queue.ids" and not torch.equal(found[key], wanted[key])] == []
    assert set(AlbefRetrieval.started_from(training).queue.ids.tolist()) == {-1}  # known no more
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    images, tokens, ids = batch(4)
    FinetuningModule(task, RECIPE)
    assert task.training and task.student.training and task.loss(images, tokens, ids, alpha=0.4).isfinite()


@pytest.mark.parametrize("start_from", [AlbefVqa.started_from, Distilled.entailment_from])
def test_answers_and_entailment_go_on_from_the_momentum_copy(start_from):
    training = pretrained_in_part()
    expected = copy.deepcopy(training.teacher.state_dict())
    task = start_from(training)
    student, teacher = task.student.state_dict(), task.teacher.state_dict()
    encoders = {key: value for key, value in teacher.items() if key.startswith("encoder.")}
    assert encoders and all(torch.equal(value, expected[key[8:]]) for key, value in encoders.items())
    assert not any(torch.equal(value, student[key]) for key, value in encoders.items() if value.ndim > 1)
    head = "text_decoder.head." if "text_decoder.head.bias" in teacher else "head."
    same = [torch.equal(value, student[key]) for key, value in teacher.items() if key.startswith(head)]
    assert same and all(same) == (head == "head.")  # what pre-training had not is the student's
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())


def test_a_heat_map_is_of_the_pictures_grid_and_leaves_no_gradient():
    albef, (images, tokens, _) = model().eval(), batch()
    with torch.no_grad():
        maps = heat_map(albef, images, tokens, layer=1)
    assert maps.shape == (4, 4, 4) and (maps >= 0).all() and maps.sum() > 0
    assert all(p.grad is None for p in albef.parameters()) and not maps.requires_grad
    with pytest.raises(ValueError, match="layer 2 of 2"):
        heat_map(albef, images, tokens, layer=2)


# ---- structure, cost and files


def test_a_planned_step_counts_both_copies_and_the_queue():
    passes = count_encoders(lambda: step("albef-tiny"))
    assert passes.forward(8) == 2 * passes.forward(4) and passes.backward(8) > passes.forward(8)
    contrast = count_objectives(lambda: step("albef-tiny"))["momentum"]
    # four products of queries and keys, and two backward for each of the student's two
    config = VARIANTS["albef-tiny"]()
    assert contrast.flops(4, 4) == pytest.approx(2 * 4 * (4 + config.queue) * config.embed_width * (4 + 2), rel=0.01)


def test_every_structure_row_of_the_paper_is_met():
    measured = CATALOG.package("albef").structure.measure("albef-base")
    for row in load_paper(ROOT / "papers" / "albef" / "paper.yaml").structure:
        value = measured[row.part] / (1e6 if row.unit.startswith("M ") else 1)
        assert abs(value - row.reported) <= row.tolerance, f"{row.id}: {value}"


def published_file(tmp_path):
    training = AlbefPretraining(model())
    path = tmp_path / "albef.pth"
    published = published_of(training.state_dict(), "pretraining", TINY, training)
    torch.save({"model": {key: value.clone() for key, value in published.items()}}, path)
    return training, path


def test_a_published_file_loads_whole_or_as_the_model_alone(tmp_path):
    training, path = published_file(tmp_path)
    expected = training.state_dict()
    for loaded in (load_any(path, TINY).state_dict(), {f"student.{k}": v for k, v in load_file(path, TINY).state_dict(
            ).items()}):  # fmt: skip
        assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    save_weights(training.student, tmp_path / "alone.safetensors", {})
    alone = load_file(tmp_path / "alone.safetensors", TINY).state_dict()
    assert all(torch.equal(value, expected[f"student.{key}"]) for key, value in alone.items())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_under_our_own_names_loads_as_what_it_is(kind, tmp_path):
    torch.manual_seed(0)
    made = FORMATS[kind].build(TINY)
    save_weights(made, tmp_path / "own.safetensors", {})
    loaded = load_any(tmp_path / "own.safetensors", TINY)
    expected = made.state_dict()
    assert type(loaded) is type(made) and loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    save_weights({k: v for k, v in expected.items() if not k.endswith("mlp.up.bias")}, tmp_path / "own.safetensors", {})
    with pytest.raises(UserError, match=r"own\.safetensors: .*without a weight"):
        load_any(tmp_path / "own.safetensors", TINY)


def test_a_file_of_our_own_loads_at_another_picture_size_in_both_copies(tmp_path):
    training = AlbefPretraining(model())
    save_weights(training, tmp_path / "own.safetensors", {})
    loaded = load_any(tmp_path / "own.safetensors", replace(TINY, image_size=48))
    for name in ("student", "teacher"):
        before, after = (getattr(one, name).vision_encoder.positions.position for one in (training, loaded))
        grid = before[1:].T.reshape(1, TINY.vision_width, 4, 4)
        wanted = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)[0].flatten(1).T
        torch.testing.assert_close(after, torch.cat([before[:1], wanted]))


def test_a_file_of_a_task_is_not_the_model_alone(tmp_path):
    task = Distilled(Entailment(model()))
    published = published_of(task.state_dict(), "entailment", TINY, task)
    torch.save({"model": {key: value.clone() for key, value in published.items()}}, tmp_path / "task.pth")
    with pytest.raises(UserError, match="fine-tuned for a task of its own"):
        load_file(tmp_path / "task.pth", TINY)


def test_a_released_file_is_held_against_its_card(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "albef-tiny", lambda: replace(TINY, tokenizer="bert-wordpiece"))
    _, path = published_file(tmp_path)
    monkeypatch.setattr("papers.albef.weights.fetch", lambda entry: path)
    card = {"size": 48, "resize": "bicubic", "antialias": True, "mean": list(TINY.mean), "std": list(TINY.std)}
    entry = Entry(
        id="albef", what="x", kind="checkpoint", source={"type": "path"}, file="albef.pth", sha256=None,
        preprocess=card, tokenizer={"kind": "bert-wordpiece", "vocabulary": TINY.vocabulary, "context": 12},
    )  # fmt: skip
    loaded = load_released("albef-tiny", entry)
    assert loaded.config.image_size == 48 and loaded.config.context == 12
    assert len(loaded.teacher.vision_encoder.positions.position) == 1 + 6 * 6
    wrong = replace(entry, preprocess=card | {"mean": [0.5, 0.5, 0.5]})
    with pytest.raises(UserError, match=r"preprocess\.mean"):
        load_released("albef-tiny", wrong)


def test_pretraining_may_start_from_nothing():
    albef = model()
    before = copy.deepcopy(albef.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in start(albef).state_dict().items())
