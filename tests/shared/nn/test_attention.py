"""The attention seam: every backend against a loop over single numbers, the module against torch's own, the cache."""

import math

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch.testing import assert_close

from shared.core.errors import UserError
from shared.nn.attention import Attention, KVCache, StructuredMask, attention, set_default_backend, use_backend
from shared.nn.positions import Rotary

# B, H, G, T, S, K: no two alike where it can be helped
SIZES = {
    "odd sizes": (2, 3, 3, 5, 5, 7),
    "batch of one": (1, 4, 4, 6, 6, 8),
    "more keys": (2, 3, 3, 5, 11, 4),
    "more queries": (2, 3, 3, 9, 4, 6),
    "grouped heads": (2, 6, 2, 5, 7, 4),
    "one query": (3, 4, 2, 1, 9, 8),
    "many keys": (1, 2, 1, 131, 150, 16),
}
MASKS = ["none", "padding", "empty rows", "queries and keys", "per head", "structured"]


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tensors(B, H, G, T, S, K, dtype=torch.float32):
    torch.manual_seed(B + H + T + S)
    return [torch.randn(B, heads, n, K, dtype=dtype, requires_grad=True) for heads, n in ((H, T), (G, S), (G, S))]


def mask_of(kind, B, H, T, S):
    """The mask to pass, and the same as a dense (B, H, T, S) tensor (None: everything)."""
    torch.manual_seed(T)
    if kind == "none":
        return None, None
    if (
        kind == "padding"
    ):  # the first keys are padding, as in left-padded decoding: with causality, early queries starve
        mask = (torch.arange(S) >= torch.arange(B)[:, None] + 1)[:, None, None]
    elif kind == "empty rows":
        mask = torch.rand(B, 1, T, S) < 0.6
        mask[0, :, -1] = False
        mask[-1, :, 0] = False
    elif kind == "queries and keys":
        mask = torch.rand(T, S) < 0.6
    elif kind == "per head":
        mask = torch.rand(B, H, T, S) < 0.6
    else:  # interleaved media: a text token sees the patches of the one picture it belongs to (0: none)
        picture_of_key, picture_of_query = 1 + torch.arange(S) // 2, torch.randint(0, 2 + S // 2, (B, T))
        dense = picture_of_query[:, None, :, None] == picture_of_key
        rule = StructuredMask(lambda b, h, q, k: picture_of_query[b, q] == picture_of_key[k], B, 1, T, S)
        return rule, dense.expand(B, H, T, S)
    return mask, mask.expand(B, H, T, S)


def by_loops(q, k, v, allowed, causal, scale):
    """softmax(scale q k^T) v, one query at a time, in Python's own numbers."""
    (B, H, T, K), G, S = q.shape, k.shape[1], k.shape[2]
    out = torch.zeros(B, H, T, K)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(T):
                seen = [
                    j for j in range(S) if (allowed is None or allowed[b, h, i, j]) and (not causal or j <= i + S - T)
                ]
                weights = [math.exp(scale * float(q[b, h, i] @ k[b, g, j])) for j in seen]
                for j, weight in zip(seen, weights, strict=True):
                    out[b, h, i] += weight / sum(weights) * v[b, g, j]
    return out


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", list(SIZES)[:-1])
def test_the_reference_equals_a_loop_over_single_queries(size, kind, causal):
    B, H, _, T, S, _ = SIZES[size]
    mask, dense = mask_of(kind, B, H, T, S)
    with torch.no_grad():
        q, k, v = tensors(*SIZES[size])
        ours = attention(q, k, v, mask=mask, causal=causal, scale=0.4, backend="reference")
        assert_close(ours, by_loops(q, k, v, dense, causal, 0.4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_all_backends_agree_in_outputs_and_gradients(size, kind, causal, monkeypatch):
    # Uncompiled flex still traces each new mask, half a second a case; the padded-row test below leaves that on.
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    B, H, _, T, S, _ = SIZES[size]
    mask, _ = mask_of(kind, B, H, T, S)
    q, k, v = tensors(*SIZES[size])
    expected = attention(q, k, v, mask=mask, causal=causal, scale=0.4, backend="reference")
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    assert expected.isfinite().all() and all(gradient.isfinite().all() for gradient in expected_gradients)

    ours = attention(q, k, v, mask=mask, causal=causal, scale=0.4, backend="sdpa")
    assert_close(ours, expected, atol=1e-5, rtol=0)
    for ours_gradient, gradient in zip(torch.autograd.grad(ours, (q, k, v), upstream), expected_gradients, strict=True):
        assert_close(ours_gradient, gradient, atol=1e-5, rtol=0)
    with torch.no_grad():
        ours = attention(q, k, v, mask=mask, causal=causal, scale=0.4, backend="flex")
    assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "reference", "flex"])
def test_a_fully_padded_row_gives_zeros_in_every_backend(backend):
    q, k, v = tensors(2, 3, 3, 5, 7, 4)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1] = False
    with torch.set_grad_enabled(backend != "flex"):
        out = attention(q, k, v, mask=mask, backend=backend)
    assert (out[0, :, 2] == 0).all() and (out[1] == 0).all() and (out[0, :, 3] != 0).all()
    if backend != "flex":
        for gradient in torch.autograd.grad(out.square().sum() + out.sum(), (q, k, v)):
            assert gradient.isfinite().all() and (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_a_kernel_that_answers_nan_for_nothing_cannot_leak_it(monkeypatch):
    """Some kernels divide by the empty sum; whichever runs must never be asked for a softmax over nothing."""
    kernel, asked = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*arguments, attn_mask=None, **options):
        asked.append(attn_mask)
        return kernel(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    q, k, v = tensors(2, 3, 3, 5, 5, 4)
    attention(q, k, v, mask=mask_of("padding", 2, 3, 5, 5)[0], causal=True)
    assert asked[0].any(-1).all()
    attention(q, k, v, causal=True)
    assert asked[1] is None  # the fast path stays maskless


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_half_precision_stays_close_and_keeps_its_dtype(backend):
    q, k, v = tensors(2, 6, 2, 9, 9, 16)
    expected = attention(q, k, v, causal=True, backend="reference")
    ours = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True, backend=backend)
    assert ours.dtype == torch.bfloat16
    assert_close(ours.float(), expected, atol=3e-2, rtol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_in_half_precision_are_those_of_single(size, kind, causal):
    """On a CPU the sdpa backend has a backward pass of its own in bf16. That of torch strays by up to 2.1e-2."""
    B, H, _, T, S, _ = SIZES[size]
    mask, _ = mask_of(kind, B, H, T, S)
    half = [x.detach().bfloat16().requires_grad_() for x in tensors(*SIZES[size])]
    wide = [x.detach().float().requires_grad_() for x in half]
    outputs = [attention(*inputs, mask=mask, causal=causal, backend="sdpa") for inputs in (half, wide)]
    gradient = torch.randn_like(outputs[1]).bfloat16()
    ours = torch.autograd.grad(outputs[0], half, gradient)
    expected = torch.autograd.grad(outputs[1], wide, gradient.float())
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert_close(mine.float(), theirs, rtol=0, atol=3e-2 * float(theirs.abs().max()) + 1e-6)


def test_the_reference_accumulates_in_float32_under_autocast():
    q, k, v = tensors(1, 2, 2, 5, 5, 16)
    expected = attention(q, k, v, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(attention(q, k, v, backend="reference"), expected, atol=0, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_dropout_keeps_the_mean_and_changes_with_the_seed(backend):
    q, k, v = (torch.randn(1, 1, n, 4) for n in (3, 400, 400))
    v = v.abs()
    torch.manual_seed(0)
    first = attention(q * 0, k, v, dropout=0.5, backend=backend)
    second = attention(q * 0, k, v, dropout=0.5, backend=backend)
    assert (first != second).any()
    assert_close(first.mean(), v.mean(), atol=0.1, rtol=0)


def test_a_structured_mask_is_computed_once_and_survives_inference_mode():
    calls = []
    mask = StructuredMask(lambda b, h, q, k: calls.append(1) is None and k <= q, 1, 1, 5, 5)
    q, k, v = tensors(2, 3, 3, 5, 5, 4)
    with torch.inference_mode():
        blocks = mask.block_mask("cpu")
        attention(q, k, v, mask=mask)
    calls.clear()
    assert_close(attention(q, k, v, mask=mask), attention(q, k, v, causal=True))
    assert mask.block_mask("cpu") is blocks and not calls
    # what a training step after a validation could not save for its backward pass
    assert not mask.dense("cpu").is_inference() and not blocks.kv_indices.is_inference()


def test_one_structured_mask_serves_with_and_without_causality():
    mask = StructuredMask(lambda b, h, q, k: k != 1, 1, 1, 3, 4)
    free = [[True, False, True, True]] * 3
    assert mask.dense("cpu").tolist() == [[free]]
    assert mask.dense("cpu", causal=True).tolist() == [
        [[[True, False, False, False], [True, False, True, False], free[0]]]
    ]
    assert mask.dense("cpu").tolist() == [[free]]


def test_flex_on_cpu_refuses_gradients_and_dropout_and_names_the_way_out():
    q, k, v = tensors(1, 2, 2, 3, 3, 4)
    with pytest.raises(UserError, match="sdpa"):
        attention(q, k, v, backend="flex")
    with torch.no_grad(), pytest.raises(UserError, match="dropout"):
        attention(q, k, v, backend="flex", dropout=0.1)


def test_the_backend_is_chosen_once_and_restored(monkeypatch):
    used = []
    for name in ("sdpa", "reference"):
        monkeypatch.setitem(attention.__globals__["_BACKENDS"], name, lambda q, *_, name=name: used.append(name) or q)
    q, k, v = tensors(1, 1, 1, 2, 2, 2)
    attention(q, k, v)
    with use_backend("reference"):
        attention(q, k, v)
        attention(q, k, v, backend="sdpa")
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        _ = 1 / 0
    attention(q, k, v)
    assert used == ["sdpa", "reference", "sdpa", "sdpa"]
    with pytest.raises(UserError, match="unknown backend 'flash', expected one of sdpa, flex, reference"):
        set_default_backend("flash")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5, 7), "float32, expected bool"),
        (torch.ones(2, 7, dtype=torch.bool), r"\(2, 7\) does not broadcast to \(B, H, T, S\) = \(2, 3, 5, 7\)"),
        (StructuredMask(lambda b, h, q, k: k <= q, 2, 1, 5, 6), "does not broadcast"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors(2, 3, 3, 5, 7, 4), mask=mask)


def test_keys_that_do_not_fit_are_refused():
    q, k, v = tensors(2, 3, 2, 5, 7, 4)
    with pytest.raises(ValueError, match="do not fit together"):
        attention(q, k, v)


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_equals_torchs_module_with_the_same_weights(bias):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(24, 3, bias=bias, batch_first=True)
    ours = Attention(24, 3, bias=bias)
    copied = {"qkv.weight": theirs.in_proj_weight, "out.weight": theirs.out_proj.weight}
    if bias:
        torch.nn.init.normal_(theirs.in_proj_bias)
        torch.nn.init.normal_(theirs.out_proj.bias)
        copied |= {"qkv.bias": theirs.in_proj_bias, "out.bias": theirs.out_proj.bias}
    ours.load_state_dict(copied)
    x, padding = torch.randn(2, 5, 24), torch.tensor([[False] * 5, [False, False, False, True, True]])
    upper = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, key_padding_mask=padding, attn_mask=upper)
    got = ours(x, mask=~padding[:, None, None], causal=True)
    assert_close(got, expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(got)
    (expected_gradient,) = torch.autograd.grad(expected, theirs.in_proj_weight, upstream)
    (gradient,) = torch.autograd.grad(got, ours.qkv.weight, upstream)
    assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_cross_attention_equals_torchs_module_with_the_same_weights():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(24, 3, kdim=10, vdim=10, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours = Attention(24, 3, context_width=10)
    ours.load_state_dict(
        {
            "q.weight": theirs.q_proj_weight,
            "q.bias": theirs.in_proj_bias[:24],
            "kv.weight": torch.cat([theirs.k_proj_weight, theirs.v_proj_weight]),
            "kv.bias": theirs.in_proj_bias[24:],
            "out.weight": theirs.out_proj.weight,
            "out.bias": theirs.out_proj.bias,
        }
    )
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    assert_close(ours(x, context), theirs(x, context, context)[0], atol=1e-5, rtol=0)


def test_a_module_with_grouped_heads_equals_one_with_their_keys_repeated():
    torch.manual_seed(0)
    grouped, full = Attention(24, 6, kv_heads=2, out_width=9), Attention(24, 6, out_width=9)
    state = grouped.state_dict()
    for name in ("qkv.weight", "qkv.bias"):
        q, k, v = state[name].split([24, 8, 8])
        repeated = [x.unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1) for x in (k, v)]
        state[name] = torch.cat([q, *repeated])
    full.load_state_dict(state)
    x = torch.randn(2, 5, 24)
    assert grouped(x).shape == (2, 5, 9)
    assert_close(grouped(x), full(x), atol=1e-5, rtol=0)


def test_a_module_is_told_what_it_cannot_do():
    x = torch.randn(1, 3, 8)
    with pytest.raises(UserError, match="divide"):
        Attention(8, 3)
    with pytest.raises(UserError, match="divide"):
        Attention(8, 4, kv_heads=3)
    with pytest.raises(ValueError, match="context_width"):
        Attention(8, 2)(x, x)
    with pytest.raises(ValueError, match="needs its context"):
        Attention(8, 2, context_width=8)(x)
    with pytest.raises(ValueError, match="rotary"):
        Attention(8, 2, context_width=8)(x, x, rotary=Rotary(4))


@torch.no_grad()
@pytest.mark.parametrize("max_length", [None, 11])
@pytest.mark.parametrize("xpos_scale", [None, 16.0])
@pytest.mark.parametrize("steps", [[1] * 11, [4, 3, 1, 1, 2]], ids=["one by one", "in chunks"])
def test_cached_decoding_equals_the_full_forward(max_length, xpos_scale, steps):
    torch.manual_seed(0)
    layer, rotary, cache = Attention(24, 6, kv_heads=2), Rotary(4, xpos_scale=xpos_scale), KVCache(max_length)
    x = torch.randn(2, 11, 24)
    expected = layer(x, causal=True, rotary=rotary)
    pieces = [layer(piece, causal=True, rotary=rotary, cache=cache) for piece in x.split(steps, dim=1)]
    assert cache.length == 11
    assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_left_padding_changes_nothing_in_cached_decoding():
    torch.manual_seed(0)
    layer, rotary, cache = Attention(24, 3), Rotary(8), KVCache()
    x = torch.randn(1, 6, 24)
    expected = layer(x, causal=True, rotary=rotary)[:, -1:]
    padded = torch.cat([torch.randn(1, 3, 24), x], dim=1)
    seen = torch.arange(9)[None, None, None] >= 3
    layer(padded[:, :-1], mask=seen[..., :-1], causal=True, rotary=rotary, cache=cache)
    last = layer(padded[:, -1:], mask=seen, causal=True, rotary=rotary, cache=cache)
    assert_close(last, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_reordered_beams_decode_as_if_they_had_always_been_so():
    torch.manual_seed(0)
    layer, cache = Attention(24, 3), KVCache()
    past, new = torch.randn(3, 5, 24), torch.randn(4, 1, 24)
    beams = torch.tensor([2, 0, 0, 1])
    layer(past, causal=True, cache=cache)
    cache.reorder(beams)
    expected = layer(torch.cat([past[beams], new], dim=1), causal=True)[:, -1:]
    assert_close(layer(new, causal=True, cache=cache), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_cross_attention_reads_its_context_once():
    torch.manual_seed(0)
    layer, cache = Attention(24, 3, context_width=10), KVCache()
    x, context = torch.randn(2, 3, 24), torch.randn(2, 7, 10)
    expected = layer(x, context)
    read = []
    layer.kv.register_forward_hook(lambda *_: read.append(1))
    pieces = [layer(x[:, :1], context, cache=cache), layer(x[:, 1:2], context, cache=cache)]
    pieces.append(layer(x[:, 2:], cache=cache))
    assert read == [1] and cache.length == 7
    assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=0)


def test_a_cache_grows_by_doubling_or_stops_at_its_length():
    k = torch.randn(1, 2, 3, 4)
    growing, fixed, storages = KVCache(), KVCache(max_length=4), set()
    for _ in range(8):
        keys, values = growing.append(k, -k)
        storages.add(keys.untyped_storage().data_ptr())
    assert len(storages) <= 4  # 3, 6, 12, 24 positions
    assert keys.untyped_storage().nbytes() == 24 * 2 * 4 * 4
    assert_close(keys, k.repeat(1, 1, 8, 1), atol=0, rtol=0)
    assert_close(values, -keys, atol=0, rtol=0)
    assert fixed.append(k, k)[0].untyped_storage().nbytes() == 4 * 2 * 4 * 4
    with pytest.raises(ValueError, match="6 positions asked, max_length is 4"):
        fixed.append(k, k)


def test_module_and_masks_compile_without_a_graph_break():
    torch._dynamo.reset()
    layer, rotary, x = Attention(24, 3), Rotary(8, xpos_scale=16.0), torch.randn(2, 5, 24)
    q, k, v = tensors(2, 3, 3, 5, 5, 4)
    masks = [mask_of(kind, 2, 3, 5, 5)[0] for kind in ("padding", "structured")]

    def run(x):
        return layer(x, causal=True, rotary=rotary), *(attention(q, k, v, mask=mask, causal=True) for mask in masks)

    assert_close(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("rows, tokens", [(3, 1), (3, 4), (1, 4)])
def test_rows_in_succession_share_a_context_as_if_each_had_its_own(rows, tokens, backend, masked):
    torch.manual_seed(0)
    layer = Attention(24, 6, kv_heads=2, context_width=10)
    x, context = torch.randn(2 * rows, tokens, 24), torch.randn(2, 7, 10, requires_grad=True)
    mask = (torch.arange(7) < torch.tensor([7, 3])[:, None])[:, None, None] if masked else None
    with use_backend(backend):
        expected = layer(
            x,
            context.repeat_interleave(rows, 0),
            mask=None if mask is None else mask.repeat_interleave(rows, 0),
        )
        found = layer(x, context, mask=mask)
    assert_close(found, expected, atol=1e-6, rtol=0)
    upstream = torch.randn_like(found)
    (wanted,) = torch.autograd.grad(expected, context, upstream)
    (gradient,) = torch.autograd.grad(found, context, upstream)
    assert_close(gradient, wanted, atol=1e-6, rtol=0)


def test_rows_that_do_not_share_a_context_evenly_are_refused():
    layer = Attention(24, 3, context_width=10)
    for rows, causal in ((5, False), (1, False), (4, True)):
        with pytest.raises(ValueError, match="do not fit together"):
            layer(torch.randn(rows, 2, 24), torch.randn(2, 7, 10), causal=causal)
    with pytest.raises(ValueError, match="does not broadcast"):
        layer(torch.randn(4, 2, 24), torch.randn(2, 7, 10), mask=torch.ones(4, 1, 2, 7, dtype=torch.bool))
    assert layer(torch.randn(0, 2, 24), torch.randn(0, 7, 10)).shape == (0, 2, 24)


def test_the_module_drops_attention_weights_in_training_alone():
    torch.manual_seed(0)
    layer, x = Attention(24, 3, dropout=0.5), torch.randn(2, 5, 24)
    plain = Attention(24, 3)
    plain.load_state_dict(layer.state_dict())
    assert (layer(x) - layer(x)).abs().max() > 1e-2
    with pytest.MonkeyPatch.context() as patch:  # the share that the module asks for
        asked = []
        backend = lambda q, k, v, mask, causal, scale, dropout: asked.append(dropout) or q  # noqa: E731
        patch.setitem(attention.__globals__["_BACKENDS"], "sdpa", backend)
        layer(x)
        layer.eval()(x)
    assert asked == [0.5, 0.0]
    assert_close(layer(x), plain(x), atol=0, rtol=0)
