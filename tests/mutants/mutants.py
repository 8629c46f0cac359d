"""Faults of the kind that spoil results in this field, one edit of a source file each, and the tests that must fail.

`old` has to stand exactly once in the file, so that no rewording of the code can disarm a mutant in silence.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted fault: in `file`, `old` becomes `new`; at least one test in the files `tests` has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file: str, *tests: str):
    """mutant(name, old, new) in this file, expected to be caught by these test files."""
    return lambda name, old, new: Mutant(name, file, old, new, tuple(f"tests/{test}.py" for test in tests))


_patches = _of("shared/nn/patch_embedding.py", "shared/nn/test_patch_embedding")
_attention = _of("shared/nn/attention.py", "shared/nn/test_attention")
_positions = _of("shared/nn/positions.py", "shared/nn/test_positions")
_blocks = _of("shared/nn/blocks.py", "shared/nn/test_blocks")
_vision = _of("shared/nn/vit.py", "shared/nn/test_blocks", "parity/test_clip")
_text = _of("shared/nn/text_transformer.py", "shared/nn/test_blocks", "parity/test_clip")
_losses = _of("shared/losses/contrastive.py", "shared/nn/test_distributed")
_chunked = _of("shared/losses/contrastive.py", "shared/losses/test_contrastive", "shared/nn/test_distributed")
_distributed = _of("shared/nn/distributed.py", "shared/nn/test_distributed")
_model = _of("papers/clip/model.py", "parity/test_clip")
_module = _of("papers/clip/module.py", "shared/training/test_trainer")
_config = _of("papers/clip/config.py", "papers/clip/test_clip_metrics")
_converter = _of("papers/clip/weights.py", "parity/test_clip")
_evaluate = _of("papers/clip/encode.py", "papers/clip/test_clip_claims")
_claims = _of("papers/clip/evidence/claims.py", "papers/clip/test_clip_claims")
_clip_bpe = _of("shared/tokenizers/clip.py", "shared/tokenizers/test_tokenizers")
_tokens = _of("shared/tokenizers/base.py", "shared/tokenizers/test_tokenizers")
_scoring = _of("shared/metrics/classification.py", "shared/metrics/test_metrics")
_retrieval = _of("shared/metrics/retrieval.py", "shared/metrics/test_metrics")
_probe = _of("shared/metrics/probe.py", "shared/metrics/test_metrics")
_scenes = _of("shared/data/synthetic/scenes.py", "shared/data/test_scenes", "shared/data/test_dataset")
_splits = _of("shared/data/seeded.py", "shared/data/test_scenes")
_world = _of("shared/data/dataset.py", "shared/data/test_dataset")
_wording = _of("shared/data/synthetic/captions.py", "shared/data/test_scenes")
_batches = _of("shared/data/loader.py", "shared/training/test_trainer")
_adapters = _of("shared/data/readers.py", "shared/data/test_readers")
_optim = _of("shared/training/optim.py", "shared/training/test_trainer")
_callbacks = _of("shared/training/callbacks.py", "shared/training/test_trainer")
_training = _of("shared/training/trainer.py", "shared/training/test_trainer")
_arms = _of("shared/experiments/ablations.py", "shared/training/test_trainer")
_effects = _of("shared/experiments/effects.py", "shared/experiments/test_effects")
_stats = _of("shared/metrics/stats.py", "shared/metrics/test_stats")
_calibration = _of("shared/experiments/calibration.py", "shared/experiments/test_calibration")
_transfer = _of("shared/weights/download.py", "shared/weights/test_fetch", "shared/weights/test_download")
_checkpoints = _of("shared/weights/weight_map.py", "shared/weights/test_weight_map")
_qformer = _of("shared/nn/qformer.py", "shared/nn/test_qformer")
_bridge = _of("papers/blip2/model.py", "papers/blip2/test_blip2_model")
_objectives = _of("papers/blip2/losses.py", "papers/blip2/test_blip2_model")
_page = _of("shared/report/html.py", "shared/report/test_report")

MUTANTS = (
    # pictures
    _patches("mean-not-subtracted", "((128 / 255 - mean) / std)", "(128 / 255 / std)"),
    _patches("pixels-over-256", "(128 / (255 * std))", "(128 / (256 * std))"),
    _patches("patches-column-by-column", "b (h w) (c p q)", "b (w h) (c p q)"),
    _positions("position-grid-resampled-to-its-corners", "align_corners=False", "align_corners=True"),
    _vision(
        "rows-and-columns-of-the-picture-swapped",
        "grid = (images.shape[-2] // patch, images.shape[-1] // patch)",
        "grid = (images.shape[-1] // patch, images.shape[-2] // patch)",
    ),
    _vision("features-of-the-last-patch", "self.output_norm(x[:, 0])", "self.output_norm(x[:, -1])"),
    # transformer
    _blocks("quick-gelu-lost", '"quick_gelu": QuickGELU', '"quick_gelu": nn.GELU'),
    _blocks(
        "quick-gelu-wrong-in-the-backward-pass-alone",
        "silu_backward(gradient, x * 1.702)",
        "silu_backward(gradient, x)",
    ),
    _blocks(
        "norm-eps-ignored",
        "self.mlp_norm = nn.LayerNorm(width, eps=eps)",
        "self.mlp_norm = nn.LayerNorm(width, eps=1e-3)",
    ),
    _config("norm-eps-of-another-vit", "eps: float = 1e-5", "eps: float = 1e-6"),
    _attention("attention-scaled-by-the-width", "K**-0.5 if scale is None", "(H * K) ** -0.5 if scale is None"),
    _attention("queries-aligned-with-the-first-keys", "tril(S - T)", "tril(0)"),
    _attention("a-query-of-nothing-sees-everything", "return out.masked_fill(~sees, 0.0)", "return out"),
    # texts
    _text("causal-mask-lost", "self.blocks(x, causal=True)", "self.blocks(x)"),
    _text(
        "text-read-at-the-last-position",
        "x = x[torch.arange(len(x), device=x.device), end]",
        "x = x[:, -1]",
    ),
    _text("text-read-at-the-largest-id", "(tokens == self.end_token).int().argmax(dim=1)", "tokens.argmax(dim=1)"),
    _text("text-read-before-its-end", "device=x.device), end]", "device=x.device), end - 1]"),
    _tokens("truncation-loses-the-end-token", "[*ids[: context - 1], self.end]", "ids[:context]"),
    _clip_bpe("capitals-kept", '" ".join(text.split()).lower()', '" ".join(text.split())'),
    # objective
    _model("temperature-inverted", "self.logit_scale.exp())", "(-self.logit_scale).exp())"),
    _model(
        "text-features-not-normalised",
        "F.normalize(self.encode_text(tokens).float(), dim=-1)",
        "self.encode_text(tokens).float()",
    ),
    _module("logit-scale-not-capped", "logit_scale.clamp_(0, LARGEST_LOGIT_SCALE)", "pass"),
    _losses(
        "loss-in-one-direction", "F.cross_entropy(text_to_image, target)", "F.cross_entropy(image_to_text, target)"
    ),
    _losses("targets-of-the-first-rank-on-all", "+ rank * rows", "+ 0 * rows"),
    _chunked(
        "sums-over-a-rank-alone",
        "add_exponentials_over_ranks(column_max, column_sum)",
        "_ = add_exponentials_over_ranks",
    ),
    _distributed("gathered-gradient-not-summed", "dist.all_reduce(gradient)", "pass"),
    _distributed(
        "gathered-gradient-of-the-first-rank",
        "gradient[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]",
        "gradient[: ctx.rows]",
    ),
    # training
    _optim("biases-decay", 'if p.ndim < 2], "weight_decay": 0.0}', 'if p.ndim < 2], "weight_decay": weight_decay}'),
    _optim("warm-up-begins-at-nothing", "(step + 1) / recipe.warmup_steps", "step / recipe.warmup_steps"),
    _callbacks("measured-in-training-mode", "pl_module.eval()", "pass"),
    _batches("every-epoch-in-the-same-order", "* 1_000_003 + epoch", "* 1_000_003"),
    _batches("ranks-see-the-same-share", "[self.rank :: self.ranks]\n", "[:: self.ranks]\n"),
    _arms("arms-of-a-seed-start-apart", "seed_everything(self.seed,", "seed_everything(self.seed + len(self.arm),"),
    _effects(
        "every-seed-draws-the-data-of-the-first",
        "key = (digest(context.recipe), context.seed)",
        "key = (digest(context.recipe), 0)",
    ),
    # weights
    _converter(
        "picture-projection-not-transposed", 'Rule("vision_proj.weight", transpose=True)', 'Rule("vision_proj.weight")'
    ),
    _converter("query-and-key-exchanged", 'for name in "qkv")', 'for name in "kqv")'),
    _checkpoints("keys-that-the-model-lacks-are-let-through", "[k for k in found if k not in shapes]", "[]"),
    _transfer("hash-not-compared", "digest(stream)) != sha256", "digest(stream)) is None"),
    # data
    _scenes(
        "test-shows-the-scenes-of-training",
        'SeededRandom("scene", seed, split, index, attempt)',
        'SeededRandom("scene", seed, index, attempt)',
    ),
    _scenes("held-out-compositions-in-training", "if colour not in held_out_colours(name, seed, share))", ")"),
    _splits("validation-leaks-into-training", "place -= share", "place -= share / 2"),
    _world("validation-pictures-stay-in-training", 'if place == "train"]', "if place]"),
    _world(
        "the-other-artist-is-the-same",
        "self.split(test_scenes, class_test.captions, self.other)",
        "self.split(test_scenes, class_test.captions)",
    ),
    _world("distractors-that-were-held-out-too", "if c not in hidden]", "if c != colour]"),
    _wording(
        "prompt-without-its-article", "template.format(with_article(noun, number_of(noun)))", "template.format(noun)"
    ),
    _adapters(
        "dropped-pictures-counted-as-read",
        "Coverage(name, len(records), len(kept),",
        "Coverage(name, len(records), len(records),",
    ),
    # scores
    _scoring("top-k-off-by-one", "(_ahead(scores, labels) < k)", "(_ahead(scores, labels) <= k)"),
    _scoring("ties-for-the-model", "(~(scores < true)).sum(dim=1) - 1", "(scores > true).sum(dim=1)"),
    _scoring(
        "prompts-averaged-before-they-are-normalised",
        "F.normalize(text_features, dim=-1).mean(dim=1)",
        "text_features.mean(dim=1)",
    ),
    _retrieval(
        "retrieval-ranks-off-by-one",
        "from_text.append((~(block < true)).sum(dim=1) - 1)",
        "from_text.append((~(block < true)).sum(dim=1))",
    ),
    _retrieval("retrieval-ties-for-the-model", "(~(block < best) & ~right)", "((block > best) & ~right)"),
    _retrieval(
        "sibling-captions-as-rivals", "(~(block < best) & ~right).sum(dim=1)", "(~(block < best)).sum(dim=1) - 1"
    ),
    _probe(
        "probe-tuned-on-the-test-labels",
        "float(model.score(known_x, known_y))",
        "float(model.score(_array(test_x), test_y.cpu().numpy()))",
    ),
    # claims
    _evaluate(
        "prompts-of-other-classes",
        "for name in classes for template in templates",
        "for template in templates for name in classes",
    ),
    _claims(
        "ensemble-of-one-template", '"ensemble": (data.phrases, ENSEMBLE)', '"ensemble": (data.phrases, (TEMPLATE,))'
    ),
    _claims(
        "bare-names-in-the-template", '"bare": (dataset.classes, ("{}",))', '"bare": (dataset.classes, (TEMPLATE,))'
    ),
    _claims("raw-captions-keep-their-prefix", "raw = [without_prefix(text) for text in texts]", "raw = texts"),
    _claims(
        "shift-measured-at-home",
        "image_features(model, dataset.shift.images)",
        "image_features(model, dataset.class_test.images)",
    ),
    _claims("compositions-against-any-text", "torch.zeros(len(offered), dtype=torch.long)", "offered.argmax(1)"),
    _claims(
        "efficiency-upside-down",
        "samples_to_reach(theirs, level) / samples_to_reach(ours, level)",
        "samples_to_reach(ours, level) / samples_to_reach(theirs, level)",
    ),
    # verdicts
    _stats("normal-interval-for-few-seeds", "t.ppf(0.5 + level / 2, freedom)", "t.ppf(0.5 + level / 2, 1e9)"),
    _stats("deviation-of-a-whole-population", "statistics.stdev(values)", "statistics.pstdev(values)"),
    _stats("verdict-upside-down", "low > rule.margin, high < rule.margin", "high < rule.margin, low > rule.margin"),
    _stats(
        "verdict-by-the-mean", "holds, fails = low > rule.margin,", "holds, fails = (low + high) / 2 > rule.margin,"
    ),
    _stats(
        "equal-if-either-bound-is",
        "-rule.margin < low and high < rule.margin",
        "-rule.margin < low or high < rule.margin",
    ),
    _stats("agreement-of-few-seeds-decides", "2.0 ** (1 - len(effects)) > 1 - level", "False"),
    _calibration(
        "seeds-used-twice", "draw.sample(range(len(measured)), size)", "draw.choices(range(len(measured)), k=size)"
    ),
    # a bridge of queries between frozen models
    _qformer(
        "cross-attention-in-the-other-layers",
        "None if i % cross_every else context_width",
        "context_width if i % cross_every else None",
    ),
    _qformer(
        "one-feed-forward-for-queries-and-text",
        "self.query_mlp_norm(looking + self.dropout(self.query_mlp(looking)))",
        "(self.mlp_norm or self.query_mlp_norm)(looking + (self.mlp or self.query_mlp)(looking))",
    ),
    _qformer("queries-causal-in-the-multimodal-mask", "((k < queries) | ((q >= queries) & (k <= q)))", "(k <= q)"),
    _qformer("queries-see-the-text-that-is-written", "((q >= queries) & (k <= q))", "(q < queries) | (k <= q)"),
    _qformer(
        "text-positions-behind-the-queries",
        "self.embeddings(tokens), 0, mask=mask",
        "self.embeddings(tokens, torch.arange(tokens.shape[1]) + len(self.query_tokens)), 0, mask=mask",
    ),
    _qformer(
        "written-text-sees-what-follows",
        "mask=mask, causal=True, caches=caches)",
        "mask=mask, causal=False, caches=caches)",
    ),
    _qformer(
        "no-gradient-through-the-queries-cache",
        "self.keys, self.values, self.length = k, v, k.shape[2]",
        "self.keys, self.values, self.length = k.detach(), v.detach(), k.shape[2]",
    ),
    _qformer(
        "queries-without-their-norm", "queries = self.embeddings.norm(self.query_tokens)", "queries = self.query_tokens"
    ),
    _qformer(
        "text-looks-at-the-context",
        "        if text.shape[1]:\n",
        "        if queries and text.shape[1] and self.cross_attention is not None:\n"
        "            text = self.cross_norm(text + self.cross_attention(text, seen[0], cache=seen[1]))\n"
        "        if text.shape[1]:\n",
    ),
    _qformer("the-queries-branch-begins-at-random", "        self.copy_text_branch()\n", ""),
    _qformer(
        "padding-is-read",
        "self.layers(self.embeddings(tokens), 0, mask=key_mask(attention_mask))",
        "self.layers(self.embeddings(tokens), 0)",
    ),
    _qformer(
        "left-padding-counts-as-positions",
        "self._written(tokens, positions_of(attention_mask))",
        "self._written(tokens, None)",
    ),
    _qformer(
        "a-written-token-stands-one-too-early",
        "position = self.attention_mask.sum(1, keepdim=True)",
        "position = self.attention_mask.sum(1, keepdim=True) - 1",
    ),
    _qformer("beams-keep-other-beams-keys", "            cache.reorder(rows)\n", "            cache.length\n"),
    _bridge("queries-pooled-by-their-mean", "gathered(texts)).amax(-1)", "gathered(texts)).mean(-1)"),
    _bridge("first-query-alone-is-contrasted", "gathered(images)).amax(-1)", "gathered(images))[..., 0]"),
    _bridge(
        "negatives-including-the-positive", "ids[:, None] == all_ids[None])", "(ids[:, None] == all_ids[None]) & False)"
    ),
    _bridge("temperature-multiplies", "image_to_text / self.temperature", "image_to_text * self.temperature"),
    _bridge(
        "temperature-clamped", "text_to_image / self.temperature", "text_to_image / self.temperature.clamp(0.001, 0.5)"
    ),
    _bridge(
        "keys-of-contrast-take-gradients",
        "    with torch.no_grad():\n        return all_gather(x.detach())",
        "    return all_gather(x)",
    ),
    _bridge("pairs-of-all-ranks-numbered-alike", " + world()[0] * len(features)", ""),
    _bridge("first-query-alone-matches", ".float().mean(1)", ".float()[:, 0]"),
    _bridge("text-votes-on-the-match", "states[:, : self.config.queries]", "states"),
    _bridge(
        "false-pictures-where-false-texts-belong",
        "torch.cat([own, negatives.images, own])",
        "torch.cat([own, own, negatives.images])",
    ),
    _bridge(
        "false-pictures-of-other-ranks-without-gradient",
        "all_gather(context)[negatives.images]",
        "gathered(context)[negatives.images]",
    ),
    _bridge(
        "generation-begins-with-cls",
        "tokens[:, 0] = self.config.decode_token",
        "tokens[:, 0] = self.config.start_token",
    ),
    _bridge(
        "prompt-is-learned",
        "attention_mask & (torch.arange(tokens.shape[1], device=tokens.device) >= given)",
        "attention_mask",
    ),
    _bridge("prompt-mis-split-by-one", ">= given)", "> given)"),
    _bridge(
        "the-language-model-does-not-see-the-prefix",
        "F.pad(attention_mask, (prefix.shape[1], 0), value=True)",
        "F.pad(attention_mask, (prefix.shape[1], 0), value=False)",
    ),
    _bridge(
        "vision-norm-in-half-precision",
        "return normed.to(self.weight.dtype)",
        "return normed.to(features.dtype)",
    ),
    _bridge("stage-2-from-any-weights", '"missing": sorted(set(wanted) - set(found)),', '"missing": [],'),
    _objectives(
        "contrast-not-smoothed",
        "(1 - smoothing) * output.targets + smoothing / output.targets.shape[1]",
        "output.targets",
    ),
    _objectives("language-model-loss-smoothed", "smoothing=0.0)", "smoothing=0.1)"),
    # the report
    _page("html-not-escaped", "autoescape=True", "autoescape=False"),
)
