"""BLIP's own wiring: what encoder and decoder share, the three modes, what each objective trains, decoding."""

import copy
from dataclasses import replace

import pytest
import torch

from papers.blip.config import SHARINGS, VARIANTS, with_tokenizer
from papers.blip.evidence.structure import med
from papers.blip.losses import blip_losses
from papers.blip.model import Blip, BlipPretraining, Objectives, copied, cross_attention_kv
from papers.blip.module import CAPTIONER, FILTER, PRETRAINING, BlipModule, example, learning_rate_share, trim_padding
from papers.blip.recipe import BlipRecipe
from shared.core.errors import UserError
from shared.nn.blocks import Block, set_recompute
from shared.tokenizers.small_bpe import SmallTokenizer

TINY = VARIANTS["blip-tiny"]()
PARTS = ("attention", "attention_norm", "cross_attention", "cross_norm", "mlp", "mlp_norm")


def moved(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def texts(rows, length=TINY.context, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TINY.start_token, (rows, length), generator=generator)
    tokens[:, 0] = TINY.start_token
    for row in range(rows):
        end = 3 + (5 * row) % (length - 4)
        tokens[row, end], tokens[row, end + 1 :] = TINY.end_token, TINY.pad_token
    return tokens


def pictures(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 3, TINY.image_size, TINY.image_size), generator=generator).byte()


@pytest.mark.parametrize(
    "sharing, apart",
    [
        ("all", set()),
        ("all_but_sa", {"attention", "attention_norm"}),
        ("all_but_ca", {"cross_attention", "cross_norm"}),
        ("none", set(PARTS)),
    ],
)
def test_encoder_and_decoder_share_tensors_as_table_3_says(sharing, apart):
    model = Blip(replace(TINY, sharing=sharing))
    encoder, decoder = model.text_encoder, model.text_decoder
    for ours, theirs in zip(decoder.layers, encoder.layers, strict=True):
        for part in PARTS:
            same = [a is b for a, b in zip(getattr(ours, part).parameters(), getattr(theirs, part).parameters())]  # noqa: B905
            assert set(same) == {part not in apart}, part
    assert (decoder.embeddings is encoder.embeddings) == (sharing != "none")
    assert decoder.head.dense.weight is not None and len(list(decoder.whole())) == len(set(decoder.whole()))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_shared_tensor_stands_once_in_parameters_and_state(sharing):
    model = Blip(replace(TINY, sharing=sharing))
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters())


def test_sharing_orders_the_parameter_counts():
    counts = {sharing: med(replace(TINY, sharing=sharing)) for sharing in SHARINGS}
    assert counts["all"] < counts["all_but_sa"] == counts["all_but_ca"] < counts["none"]


@pytest.mark.parametrize("sharing", SHARINGS)
def test_sharing_outlives_copies_casts_and_loading(sharing):
    torch.manual_seed(0)
    model = moved(Blip(replace(TINY, sharing=sharing)))
    twin = copy.deepcopy(model)
    other = Blip(replace(TINY, sharing=sharing)).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    tokens, images = texts(2), pictures(2)
    with torch.no_grad():
        wanted = model.caption_logits(tokens, model.encode_image(images))
        for one in (twin, other, twin.double().float()):
            assert torch.equal(one.caption_logits(tokens, one.encode_image(images)), wanted)
        # a copy's decoder goes with its own encoder
        for parameter in twin.text_encoder.parameters():
            parameter.zero_()
        assert torch.equal(model.caption_logits(tokens, model.encode_image(images)), wanted)
        changed = twin.caption_logits(tokens, twin.encode_image(images))
    assert torch.equal(changed, wanted) == (sharing == "none")


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_captioner_and_a_matcher_cut_out_of_a_model_compute_the_same(sharing):
    torch.manual_seed(0)
    config = replace(TINY, sharing=sharing)
    model = moved(Blip(config))
    captioner = copied(model, Blip(config, encoder=False)).eval()
    matcher = copied(model, Blip(config, decoder=False)).eval()
    tokens, images = texts(3), pictures(3)
    with torch.no_grad():
        image_tokens = model.encode_image(images)
        assert torch.equal(captioner.caption_logits(tokens, image_tokens), model.caption_logits(tokens, image_tokens))
        assert torch.equal(matcher.match(tokens, image_tokens), model.match(tokens, image_tokens))
        assert torch.equal(matcher.text_features(tokens), model.text_features(tokens))


def test_each_mode_puts_its_own_first_token_on_a_copy():
    torch.manual_seed(0)
    model, tokens, images = moved(Blip(TINY)), texts(2), pictures(2)
    before, other = tokens.clone(), tokens.clone()
    other[:, 0] = 7
    with torch.no_grad():
        image_tokens = model.encode_image(images)
        for run in (
            model.encode_text,
            lambda t: model.match(t, image_tokens),
            lambda t: model.caption_logits(t, image_tokens),
        ):
            assert torch.equal(run(tokens), run(other))
    assert torch.equal(tokens, before)


def test_nothing_depends_on_the_batch_or_on_padding():
    torch.manual_seed(0)
    model, tokens, images = moved(Blip(TINY)), texts(4), pictures(4)
    wide = torch.cat([tokens, torch.zeros(4, 9, dtype=torch.long)], dim=1)
    with torch.no_grad():
        seen = model.encode_image(images)
        for run in (
            lambda t, s: model.text_features(t),
            model.match,
            lambda t, s: model.caption_logits(t, s)[:, : TINY.context],
        ):
            whole = run(tokens, seen)
            torch.testing.assert_close(run(wide, seen), whole, atol=1e-5, rtol=0)
            alone = torch.cat([run(tokens[i : i + 1], seen[i : i + 1]) for i in range(4)])
            torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)


def test_texts_in_succession_share_one_picture():
    torch.manual_seed(0)
    model, tokens, images = moved(Blip(TINY)), texts(6), pictures(2)
    with torch.no_grad():
        seen = model.encode_image(images)
        found = model.match(tokens, seen)
        assert found.shape == (6, 2)
        torch.testing.assert_close(found, model.match(tokens, seen.repeat_interleave(3, 0)), atol=1e-5, rtol=0)


def test_decoding_step_by_step_equals_the_whole_text_at_once():
    torch.manual_seed(0)
    model, images = moved(Blip(TINY)), pictures(3)
    tokens = torch.randint(1, TINY.start_token, (3, 9))
    tokens[:, 0] = TINY.decode_token
    with torch.no_grad():
        seen = model.encode_image(images)
        wanted = model.caption_logits(tokens, seen)
        decoding = model.decoding(seen)
        found = [decoding.prefill(tokens[:, :4], torch.ones(3, 4, dtype=torch.bool))]
        found += [decoding.step(tokens[:, i]) for i in range(4, 9)]
    torch.testing.assert_close(torch.stack(found, 1), wanted[:, 3:], atol=1e-5, rtol=0)


def test_a_prompt_is_given_and_not_learned():
    torch.manual_seed(0)
    model, tokens, images = moved(Blip(TINY)), texts(3), pictures(3)
    seen = model.encode_image(images)
    logits, targets = model.caption_targets(tokens, seen, prompt=4)
    wanted = torch.cat([row[4:][row[4:] != TINY.pad_token] for row in tokens])
    assert torch.equal(targets, wanted) and logits.shape == (len(wanted), TINY.vocabulary)


@pytest.mark.parametrize(
    "objectives", [PRETRAINING, CAPTIONER, FILTER, Objectives(itm=False), Objectives(itm=False, lm=False)], ids=str
)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_exactly_what_an_objective_trains_gets_a_gradient(objectives, sharing):
    torch.manual_seed(0)
    model = BlipPretraining(replace(TINY, sharing=sharing)).train()
    module = BlipModule(model, BlipRecipe(model="blip-tiny"), objectives)
    output = model(pictures(4), texts(4), None, 0.4, objectives)
    blip_losses(output, 0.1).total().backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name, p in module.named_parameters() if p.grad is not None} == trained
    assert [name for name, p in module.named_parameters() if name in trained and not p.grad.abs().max() > 0] == []
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert len(group["params"]) == len(trained) and group["weight_decay"] == 0.05


def test_matching_without_contrast_is_refused():
    with pytest.raises(ValueError, match="train both"):
        BlipModule(BlipPretraining(TINY), BlipRecipe(model="blip-tiny"), Objectives(itc=False))


def test_weights_in_pieces_are_refused():
    for strategy in ("zero3", "zero3_offload"):
        with pytest.raises(UserError, match=r"zero3.*zero1 or zero2"):
            BlipModule(BlipPretraining(TINY), BlipRecipe(model="blip-tiny", strategy=strategy))


def test_batches_in_pieces_are_refused():
    with pytest.raises(UserError, match="accumulate would move momentum copies and queue"):
        BlipModule(BlipPretraining(TINY), BlipRecipe(model="blip-tiny", accumulate=2))


def test_momentum_and_queue_move_in_training_alone():
    torch.manual_seed(0)
    model = moved(BlipPretraining(TINY))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model(pictures(4), texts(4))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        model.train()(pictures(4), texts(4))
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"momentum", "queue"}


def test_a_queue_that_batches_do_not_fill_evenly_is_refused_before_training():
    module, batch = example(5)
    with pytest.raises(UserError, match="queue of 8: must be a multiple of the batch of 5"):
        module.on_train_batch_start(batch, 0)
    module, batch = example(4)
    module.on_train_batch_start(batch, 0)


def test_the_temperature_is_kept_within_its_bounds():
    module, batch = example(4)
    module.log = lambda *args, **kwargs: None
    for start, kept in ((3.0, 0.5), (-1.0, 0.001)):
        with torch.no_grad():
            module.model.temperature.fill_(start)
        module.training_step(batch, 0)
        assert float(module.model.temperature.detach()) == pytest.approx(kept)


def test_columns_of_padding_are_cut_off_and_change_no_loss():
    tokens = texts(4)
    wide = torch.cat([tokens, torch.zeros(4, 9, dtype=torch.long)], dim=1)
    assert (
        torch.equal(trim_padding(wide, 0), trim_padding(tokens, 0)) and trim_padding(wide, 0).shape[1] < wide.shape[1]
    )
    losses = []
    for some in (trim_padding(wide, 0), wide):
        torch.manual_seed(0)
        model = BlipPretraining(TINY).train()
        losses.append(torch.stack([*blip_losses(model(pictures(4), some, None, 0.4), 0.1)]))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


def test_alpha_rises_and_the_learning_rate_falls_by_epoch():
    module, _ = example(4)
    module.recipe.alpha, module.recipe.alpha_ramp = 0.4, 10
    assert [module.alpha(step) for step in (0, 5, 10, 99)] == [0.0, 0.2, 0.4, 0.4]
    recipe = BlipRecipe(
        warmup_steps=2, steps=100, batch=10, pairs=50, decay=0.5, learning_rate=1.0, min_learning_rate=0.2
    )
    shares = [learning_rate_share(step, recipe) for step in (0, 1, 4, 5, 9, 10, 50)]
    assert shares == [0.5, 1.0, 1.0, 0.5, 0.5, 0.25, 0.2]
    assert learning_rate_share(0, replace(recipe, warmup_steps=20)) == 0.2  # nor does warm-up begin below the floor
    cosine = replace(recipe, decay=0.0, min_learning_rate=0.0)
    assert learning_rate_share(100, cosine) == pytest.approx(0.0)


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    gradients, passes = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        module = BlipModule(BlipPretraining(TINY), BlipRecipe(model="blip-tiny", recompute=recompute))
        for stack in (module.model.blip.vision_encoder.blocks, module.model.blip.text_encoder.layers):
            stack[0].register_forward_pre_hook(lambda block, *_: passes.append(block))
        torch.manual_seed(1)
        output = module.model(pictures(4), texts(4), None, 0.4)
        blip_losses(output, 0.1).total().backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        again = {block: passes.count(block) for block in passes}
        assert list(again.values()) == ([2, 4] if recompute else [1, 2])  # pictures; texts alone and grounded
        passes.clear()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_pictures_that_were_looked_at_are_seen_where_activations_are_recomputed():
    torch.manual_seed(0)
    model, tokens, images = moved(Blip(TINY)), texts(3), pictures(3)
    image_tokens = model.encode_image(images).detach()
    wanted = model.match(tokens, image_tokens)
    set_recompute(model.train(), True)
    found = model.match(tokens, image_tokens, cross_attention_kv(model.text_encoder.layers, image_tokens))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_tokenizers_ids_become_the_configurations():
    tokenizer = SmallTokenizer.train(["a cat", "a dog"], 300, ("decode_start", "encode_start"))
    config = with_tokenizer(TINY, tokenizer)
    assert (config.decode_token, config.encode_token) == (tokenizer.decode_start, tokenizer.encode_start)
    assert config.vocabulary == tokenizer.vocab_size > config.encode_token


def test_an_unknown_sharing_is_refused():
    with pytest.raises(ValueError, match="all_but_sa"):
        replace(TINY, sharing="some")


def test_stochastic_depth_drops_whole_samples_in_training_alone_and_keeps_the_mean():
    torch.manual_seed(0)
    block = Block(8, 2, drop_path=0.25)
    y = torch.ones(4000, 3, 8)
    assert torch.equal(block.eval().kept(y), y)
    kept = block.train().kept(y)
    per_sample = kept.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == 1 / 0.75).all(1)).all()
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.03)
    depths = [b.drop_path for b in Blip(replace(TINY, vision_layers=3, drop_path=0.1)).vision_encoder.blocks]
    assert depths == pytest.approx([0.0, 0.05, 0.1])


def test_the_step_that_a_plan_counts_is_the_one_that_trains():
    """Its numbers of multiply-adds are those of a real step, with as many texts and no padding."""
    from torch.utils.flop_counter import FlopCounterMode

    from papers.blip.evidence.structure import step
    from papers.blip.module import PRETRAINING

    work = step("blip-tiny")
    images, tokens = work.batch(4)
    tokens[:] = torch.randint(1, TINY.start_token, tokens.shape)
    with FlopCounterMode(display=False) as counted:
        work.objectives["momentum"](*work.encode(images, tokens)).backward()
    model = BlipPretraining(TINY).train()
    with FlopCounterMode(display=False) as real:
        blip_losses(model(images, tokens, None, 0.4, PRETRAINING), 0.1).total().backward()
    assert counted.get_total_flops() == real.get_total_flops()
