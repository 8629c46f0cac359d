"""The Q-Former: who sees whom under its three masks, cached queries, two feed-forward branches, decoding."""

import pytest
import torch

from shared.core.errors import UserError
from shared.nn.attention import use_backend
from shared.nn.bert import TokenHead
from shared.nn.blocks import set_recompute
from shared.nn.generation import GenerationSettings, generate
from shared.nn.qformer import QFormer

Q, D, L, HEADS, HIDDEN, C, V, POSITIONS = 5, 24, 5, 3, 40, 20, 50, 16
B, T, S = 4, 9, 7


def moved(module, seed=0, by=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def qformer(layers=L, vocabulary=V, cross_every=2, dropout=0.0):
    torch.manual_seed(0)
    return moved(
        QFormer(
            Q,
            D,
            layers,
            HEADS,
            HIDDEN,
            C,
            vocabulary=vocabulary,
            positions=POSITIONS,
            cross_every=cross_every,
            dropout=dropout,
        )
    )


def given(seed=1, rows=B):
    """Texts padded on the right, each to another length, and contexts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, V, (rows, T), generator=generator)
    attention_mask = torch.arange(T) < torch.tensor([T, 4, 6, 2][:rows])[:, None]
    return tokens.masked_fill(~attention_mask, 0), attention_mask, torch.randn(rows, S, C, generator=generator)


def cached(model, tokens, attention_mask, context):
    """`look`, then `write` behind what it left. (B, Q + T, D)"""
    caches = model.caches()
    return torch.cat(
        [model.encode_queries(context, caches=caches), model.decode_text(tokens, attention_mask, caches)], dim=1
    )


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# ---- the multimodal causal mask


def test_text_behind_cached_queries_equals_one_pass_under_the_multimodal_causal_mask_with_its_gradients():
    model, (tokens, attention_mask, context) = qformer(), given()
    weight = torch.randn(B, Q + T, D, generator=torch.Generator().manual_seed(2))
    weight[:, Q:][~attention_mask] = 0  # what stands at padding concerns nobody
    found = []
    for run in (cached, QFormer.joint_causal):
        model.zero_grad()
        seen = context.clone().requires_grad_()
        out = run(model, tokens, attention_mask, seen)
        (out * weight).sum().backward()
        found.append([out[:, :Q], out[:, Q:][attention_mask], seen.grad, *(p.grad for p in model.parameters())])
    assert len(found[0]) == 3 + len(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)
        assert one.abs().max() > 0


@pytest.mark.parametrize("backend", ["flex", "reference"])
def test_every_backend_reads_the_masks_alike(backend):
    model, (tokens, attention_mask, context) = qformer(), given()
    runs = (cached, QFormer.joint_causal, QFormer.match, lambda m, t, p, c: m.encode_text(t, p))
    with torch.no_grad():
        for run in runs:
            wanted = run(model, tokens, attention_mask, context)
            with use_backend(backend):
                close(
                    run(model, tokens, attention_mask, context)[:, -T:][attention_mask], wanted[:, -T:][attention_mask]
                )


def test_queries_never_change_with_the_text_where_text_is_written_and_do_where_it_is_matched():
    model, (tokens, attention_mask, context) = qformer(), given()
    other = torch.where(attention_mask, (tokens + 7) % (V - 1) + 1, 0)
    with torch.no_grad():
        alone = model.encode_queries(context)
        for text in (tokens, other):
            close(model.joint_causal(text, attention_mask, context)[:, :Q], alone)
        one, two = (model.match(text, attention_mask, context)[:, :Q] for text in (tokens, other))
    assert (one - two).abs().amax((1, 2)).min() > 1e-2 and (one - alone).abs().amax((1, 2)).min() > 1e-2


def test_written_text_sees_what_stands_before_it_and_nothing_after():
    model, (tokens, _, context) = qformer(), given()
    attention_mask = torch.ones(B, T, dtype=torch.bool)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 3) % V
    with torch.no_grad():
        for run in (cached, QFormer.joint_causal):
            before, after = (run(model, text, attention_mask, context)[:, Q:] for text in (tokens, changed))
            close(after[:, :5], before[:, :5])
            assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-4
        read, again = model.encode_text(tokens, attention_mask), model.encode_text(changed, attention_mask)
        assert (read - again).abs().amax(-1).min() > 1e-4  # text alone is read in both directions


def test_written_text_sees_every_query():
    model, (tokens, attention_mask, context) = qformer(layers=1), given()
    with torch.no_grad():
        caches = model.caches()
        model.encode_queries(context, caches=caches)
        wanted = model.decode_text(tokens, attention_mask, caches)
        for query in range(Q):
            one = model.caches()
            model.encode_queries(context, caches=one)
            one[0].values = one[0].values.clone()
            one[0].values[:, :, query] += 1
            assert (model.decode_text(tokens, attention_mask, one) - wanted)[attention_mask].abs().amax(-1).min() > 1e-4


def test_padding_and_other_rows_change_nothing():
    model, (tokens, attention_mask, context) = qformer(), given()
    wide = torch.cat([tokens, torch.full((B, 3), 9)], dim=1)
    also = torch.cat([attention_mask, torch.zeros(B, 3, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        for run in (cached, QFormer.joint_causal, QFormer.match, lambda m, t, p, c: m.encode_text(t, p)):
            whole = run(model, tokens, attention_mask, context)[:, -T:][attention_mask]
            close(run(model, wide, also, context)[:, -T - 3 : -3][attention_mask], whole)
            for row in range(B):
                one = slice(row, row + 1)
                alone = run(model, tokens[one], attention_mask[one], context[one])[:, -T:][attention_mask[one]]
                close(alone, run(model, tokens, attention_mask, context)[:, -T:][one][attention_mask[one]])


# ---- the context


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_cross_attention_is_in_every_so_many_layers_from_the_first_on(every, expected):
    model = qformer(cross_every=every)
    assert [i for i, layer in enumerate(model.layers) if layer.cross_attention is not None] == expected
    looked = []
    for index, layer in enumerate(model.layers):
        if layer.cross_attention is not None:
            layer.cross_attention.register_forward_hook(lambda *_, index=index: looked.append(index))
    tokens, attention_mask, context = given()
    with torch.no_grad():
        model.match(tokens, attention_mask, context)
        assert looked == expected
        model.encode_text(tokens, attention_mask)
        model.decode_text(tokens, attention_mask, filled(model, context))
    assert looked == expected * 2  # once more by the queries that were cached, never by text


def filled(model, context):
    caches = model.caches()
    model.encode_queries(context, caches=caches)
    return caches


def test_text_learns_of_the_context_through_queries_alone_and_so_a_layer_later():
    tokens, attention_mask, context = given()
    for layers, reaches in ((1, False), (2, True)):
        model = qformer(layers)
        with torch.no_grad():
            for run in (cached, QFormer.joint_causal, QFormer.match):
                one, two = (run(model, tokens, attention_mask, seen) for seen in (context, context + 1))
                assert (one[:, :Q] - two[:, :Q]).abs().amax(-1).min() > 1e-4
                change = (one[:, Q:] - two[:, Q:])[attention_mask].abs().amax(-1)
                assert change.min() > 1e-5 if reaches else change.max() == 0


def test_text_is_deaf_to_the_context_where_it_is_read_alone():
    model, (tokens, attention_mask, context) = qformer(), given()
    context.requires_grad_()
    model.match(tokens, attention_mask, context)[:, Q:].sum().backward()
    assert context.grad.abs().max() > 0
    with torch.no_grad():
        for layer in model.layers:
            if layer.cross_attention is not None:
                for parameter in layer.cross_attention.parameters():
                    parameter.fill_(torch.nan)
        assert model.encode_text(tokens, attention_mask).isfinite().all()


def test_a_context_looked_at_once_serves_many_and_in_any_order():
    model, (tokens, attention_mask, context) = qformer(), given()
    rows = torch.tensor([2, 0, 3, 3])
    with torch.no_grad():
        seen = model.look_at(context)
        assert [one is None for one in seen] == [False, True] * (L // 2) + [False]
        close(model.encode_queries(seen), model.encode_queries(context))
        chosen = [one and one.of(rows) for one in seen]
        close(model.match(tokens, attention_mask, chosen), model.match(tokens, attention_mask, context[rows]))
        behind = [one and one.behind(other) for one, other in zip(seen, model.look_at(context + 1), strict=True)]
        last = [one and one.of(rows + B) for one in behind]
        close(model.match(tokens, attention_mask, last), model.match(tokens, attention_mask, context[rows]))


def test_texts_in_succession_share_one_context():
    model, (tokens, attention_mask, context) = qformer(), given()
    with torch.no_grad():
        wanted = model.match(tokens, attention_mask, context[:2].repeat_interleave(2, 0))
        close(model.match(tokens, attention_mask, context[:2]), wanted)


# ---- branches, positions, embeddings


def test_queries_and_text_have_feed_forward_branches_of_their_own_and_share_self_attention():
    tokens, attention_mask, context = given()

    def outputs(model):
        with torch.no_grad():
            return model.encode_queries(context), model.encode_text(tokens, attention_mask)

    before = outputs(qformer())
    for part, changes in {
        "query_mlp": (True, False),
        "query_mlp_norm": (True, False),
        "mlp": (False, True),
        "mlp_norm": (False, True),
        "cross_attention": (True, False),
        "cross_norm": (True, False),
        "attention": (True, True),
        "attention_norm": (True, True),
    }.items():
        model = qformer()
        moved(getattr(model.layers[2], part), seed=5)
        assert tuple(not torch.equal(x, y) for x, y in zip(outputs(model), before, strict=True)) == changes, part


def test_both_branches_are_at_work_in_one_pass():
    """Of match's output, the queries' part hears of the text's branch, and the text's part of the queries'."""
    tokens, attention_mask, context = given()
    with torch.no_grad():
        before = qformer().match(tokens, attention_mask, context)
        for part in ("query_mlp", "mlp"):
            last, first = qformer(), qformer()
            moved(getattr(last.layers[-1], part), seed=5)
            moved(getattr(first.layers[0], part), seed=5)
            own = slice(0, Q) if part == "query_mlp" else slice(Q, None)
            change = (last.match(tokens, attention_mask, context) - before).abs().amax((0, 2)) > 1e-5
            assert change[own].all() and change.sum() == (Q if part == "query_mlp" else T)
            assert ((first.match(tokens, attention_mask, context) - before).abs().amax((0, 2)) > 1e-5).all()


def test_the_queries_branch_begins_as_a_copy_of_the_texts():
    torch.manual_seed(3)
    model = QFormer(Q, D, L, HEADS, HIDDEN, C, vocabulary=V)
    for layer in model.layers:
        for ours, theirs in ((layer.query_mlp, layer.mlp), (layer.query_mlp_norm, layer.mlp_norm)):
            for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(one, other) and one is not other
    first, second = model.layers[0], model.layers[1]
    assert not torch.equal(first.mlp.up.weight, second.mlp.up.weight)
    assert float(model.query_tokens.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_queries_have_no_position_and_texts_begin_at_position_0_behind_them():
    model, (tokens, attention_mask, context) = qformer(), given()
    with torch.no_grad():
        wanted = model.encode_queries(context), cached(model, tokens, attention_mask, context)
        model.embeddings.position.weight[T:] = torch.nan
        assert torch.equal(cached(model, tokens, attention_mask, context), wanted[1])
        model.embeddings.position.weight[:] = torch.nan
        assert torch.equal(model.encode_queries(context), wanted[0])


def test_queries_pass_the_norm_of_the_embeddings_and_its_dropout_each_row_for_itself():
    _, _, context = given()
    model = qformer(layers=1, dropout=0.5)
    with torch.no_grad():
        wanted = torch.nn.functional.layer_norm(
            model.query_tokens, (D,), model.embeddings.norm.weight, model.embeddings.norm.bias, eps=1e-12
        )
        entered = []
        model.layers[0].register_forward_pre_hook(lambda layer, args: entered.append(args[0]))
        model.encode_queries(context)
        close(entered[0], wanted.expand(B, -1, -1))
        model.train().encode_queries(context)
    assert (entered[1] == 0).float().mean() == pytest.approx(0.5, abs=0.15)
    assert not torch.equal(entered[1][0] == 0, entered[1][1] == 0)


def test_without_a_vocabulary_no_text_is_left_and_the_queries_look_the_same():
    whole, (_, _, context) = qformer(), given()
    bare = qformer(vocabulary=None)
    state = whole.state_dict()
    assert set(bare.state_dict()) == {
        key for key in state if ".mlp" not in key and "word" not in key and "position" not in key
    }
    bare.load_state_dict({key: state[key] for key in bare.state_dict()})
    with torch.no_grad():
        assert torch.equal(bare.encode_queries(context), whole.encode_queries(context))


def test_recomputed_activations_give_the_same_gradients():
    model, (tokens, attention_mask, context) = qformer().train(), given()
    gradients, passes = [], []
    model.layers[1].register_forward_pre_hook(lambda *_: passes.append(1))
    for recompute in (False, True):
        set_recompute(model, recompute)
        model.zero_grad()
        seen = model.look_at(context)
        (model.match(tokens, attention_mask, seen).sum(1) * torch.arange(D)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(passes) == 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_queries_cache_is_written_once_and_may_be_read_again():
    model, (tokens, attention_mask, context) = qformer(), given()
    with torch.no_grad():
        caches = filled(model, context)
        first, second = (model.decode_text(tokens, attention_mask, caches) for _ in range(2))
        assert torch.equal(first, second)
        other = filled(model, context[:1])
        assert {cache.length for cache in other} == {Q}


# ---- decoding


def head():
    torch.manual_seed(4)
    return moved(TokenHead(D, V))


def whole_logits(model, out, tokens, context):
    states = model.joint_causal(tokens, torch.ones_like(tokens, dtype=torch.bool), context)
    return out(states[:, Q:], model.embeddings.word.weight)


def test_decoding_step_by_step_equals_the_whole_text_at_once():
    model, out, (_, _, context) = qformer(), head(), given()
    tokens = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        wanted = whole_logits(model, out, tokens, context)
    decoding = model.decoding(out, context)
    found = [decoding.prefill(tokens[:, :4], torch.ones(B, 4, dtype=torch.bool))]
    found += [decoding.step(tokens[:, i]) for i in range(4, T)]
    close(torch.stack(found, 1), wanted[:, 3:])


@pytest.mark.parametrize("left", [False, True])
def test_padded_prompts_of_either_side_go_on_as_each_does_alone(left):
    model, out, (tokens, attention_mask, context) = qformer(), head(), given()
    if left:
        tokens = torch.stack([row.roll(int((~real).sum())) for row, real in zip(tokens, attention_mask, strict=True)])
        attention_mask = attention_mask.flip(1)
    following = torch.randint(1, V, (B, 3), generator=torch.Generator().manual_seed(6))
    decoding = model.decoding(out, context)
    found = [decoding.prefill(tokens, attention_mask)] + [decoding.step(following[:, i]) for i in range(3)]
    with torch.no_grad():
        for row in range(B):
            text = torch.cat([tokens[row][attention_mask[row]], following[row]])[None]
            wanted = whole_logits(model, out, text, context[row : row + 1])
            close(torch.stack(found, 1)[row], wanted[0, -4:])


def test_rows_may_be_chosen_repeated_and_dropped_on_the_way():
    model, out, (_, _, context) = qformer(), head(), given()
    tokens = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(6))
    rows = torch.tensor([3, 1, 1])
    decoding = model.decoding(out, context)
    decoding.prefill(tokens[:, :5], torch.ones(B, 5, dtype=torch.bool))
    decoding.select(rows)
    following = torch.tensor([4, 5, 6])
    with torch.no_grad():
        wanted = whole_logits(model, out, torch.cat([tokens[rows, :5], following[:, None]], 1), context[rows])
    close(decoding.step(following), wanted[:, -1])


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_generated_depends_on_no_other_row(beams):
    model, out, (tokens, attention_mask, context) = qformer(), head(), given()
    settings = GenerationSettings(stop=(7,), max_new_tokens=6, beams=beams)
    together = generate(model.decoding(out, context), tokens, settings, attention_mask=attention_mask)
    for row in range(B):
        one = slice(row, row + 1)
        alone = generate(model.decoding(out, context[one]), tokens[one], settings, attention_mask=attention_mask[one])
        assert alone.tokens == together.tokens[one]
    assert any(together.tokens)


def test_a_text_beyond_the_positions_is_refused_in_one_line():
    model, (_, _, context) = qformer(), given()
    tokens = torch.ones(B, POSITIONS, dtype=torch.long)
    decoding = model.decoding(head(), context)
    decoding.prefill(tokens, tokens.bool())
    with pytest.raises(UserError, match=r"17 tokens, but it has 16 positions"):
        decoding.step(tokens[:, 0])
