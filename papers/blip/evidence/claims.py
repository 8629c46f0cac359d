"""The arms of BLIP's claims: each trains one model from (recipe, seed) and measures it; a claim compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from papers.blip.data import ExperimentData, Text, load
from papers.blip.encode import encoded, reranked, text_features, tokens_of, write
from papers.blip.evidence.capfilt import CapFilt, kept_of
from papers.blip.evidence.capfilt_page import Decision, counts, write_lines, write_page
from papers.blip.model import Blip
from papers.blip.recipe import BlipRecipe
from shared.core.paper_package import Claim, Context
from shared.experiments.effects import difference, means, save_first_seed
from shared.metrics import caption_scores, reranked_points, retrieval_hits_from_features

__all__ = ["ARMS", "CLAIMS", "load"]


# ---- measuring


def measure(model: Blip, data: ExperimentData, recipe: BlipRecipe) -> dict:
    """R@1 on held-out pictures in points, mean of both directions: `r1` after re-ranking, `itc_r1` without."""
    eval_set = data.eval_set
    tokens = tokens_of(data.tokenizer, eval_set.texts, data.config)
    pictures = encoded(model.eval(), eval_set.images)
    itc = retrieval_hits_from_features(pictures.features, text_features(model, tokens), eval_set.owner, ks=(1,))
    points = reranked_points(
        *reranked(model, pictures, tokens, recipe.candidates), itc, eval_set.owner, recipe.candidates
    )
    return points | {"parameters": sum(p.numel() for p in model.parameters())}


def filtered(decisions: Sequence[Decision]) -> dict:
    """Shares in percent: `removed` of all texts, and where the truth is known how many of the removed were wrong
    (`precision`) and how many of the wrong were removed (`recall`), of the web's texts and of the written ones."""
    shares = {"removed": 100 * sum(not decision.kept for decision in decisions) / len(decisions)}
    for origin, count in counts(decisions).items():
        shares[f"{origin}_removed"] = 100 * count.get("dropped", 0) / count["texts"]
        if "known" in count:
            false = count.get("false dropped", 0) + count.get("false kept", 0)
            shares[f"{origin}_false"] = 100 * false / count["known"]
            shares[f"{origin}_precision"] = 100 * count.get("false dropped", 0) / max(1, count.get("dropped", 0))
            shares[f"{origin}_recall"] = 100 * count.get("false dropped", 0) / max(1, false)
    return shares


# ---- the arms


def noisy(context: Context) -> dict:
    """Pre-trained on all web pairs and the clean ones: the baseline of most claims."""
    work = CapFilt.of(context)
    model, stats = work.pretrained()
    return stats | measure(model.blip, work.data, context.recipe)


def on_texts(context: Context, texts: Sequence[Text], sharing: str = "all_but_sa", longer: float = 1.0) -> dict:
    """A new model on these texts of web pictures and on the clean pairs."""
    work = CapFilt.of(context)
    model = work.new_model(sharing)
    steps = round(context.recipe.steps * longer)
    stats = work.train(model, [*texts, *work.data.clean], context.folder, context.arm, steps=steps)
    save_first_seed(context, model.blip, work.data.tokenizer)
    return stats | measure(model.blip, work.data, context.recipe)


def on_web(sharing: str = "all_but_sa", longer: bool = False) -> Callable[[Context], dict]:
    """Like `noisy`, with encoder and decoder sharing something else (Table 3), or for longer."""

    def arm(context: Context) -> dict:
        return on_texts(context, CapFilt.of(context).data.web, sharing, context.recipe.longer if longer else 1.0)

    return arm


def on_kept(decide: Callable[[CapFilt], list[Decision]]) -> Callable[[Context], dict]:
    """On the texts that the filter keeps."""

    def arm(context: Context) -> dict:
        work = CapFilt.of(context)
        decisions = decide(work)
        if context.first and context.arm == "both":
            show(decisions, work.data, context)
        return on_texts(context, kept_of(decisions)) | filtered(decisions)

    return arm


def captioner_only(context: Context) -> dict:
    work = CapFilt.of(context)
    return on_texts(context, [*work.data.web, *work.written("captioner", "nucleus")])


def continued(context: Context) -> dict:
    """The pre-trained model goes on with the bootstrapped set (Table 13)."""
    work = CapFilt.of(context)
    model, _ = work.pretrained()
    texts = [*kept_of(work.bootstrapped()), *work.data.clean]
    stats = work.train(model, texts, context.folder, context.arm)
    return stats | measure(model.blip, work.data, context.recipe)


def captioning(name: str, prompted: bool) -> Callable[[Context], dict]:
    """The captioner of CapFilt as such: CIDEr-D and BLEU-4 in points, on held-out pictures, by beam search."""

    def arm(context: Context) -> dict:
        work = CapFilt.of(context)
        model, stats = work.tuned(name)
        eval_set = work.data.eval_set
        generation = work.generation("beam", None if prompted else "")
        captions = write(model.blip, work.data.tokenizer, eval_set.images, generation)
        scores = caption_scores(captions, eval_set.references)
        save_first_seed(context, model.blip, work.data.tokenizer)
        return {
            "waited": stats["waited"],
            "cider": 100 * scores["caption/cider_d@treebank"].score,
            "bleu4": 100 * scores["caption/bleu4@treebank"].score,
        }

    return arm


def show(decisions: Sequence[Decision], data: ExperimentData, context: Context) -> None:
    """What was kept, dropped and written, to page through."""
    write_lines(context.folder / "capfilt.jsonl", decisions)
    known = any(decision.true is not None for decision in decisions)
    note = (
        f"{len(data.web_pictures)} web pictures of {data.dataset.name}, seed {context.seed}, beside "
        f"{len(data.clean)} clean texts that the captioner and the filter learned from. A text is kept where the "
        f"filter gives a match at least {decisions[0].threshold:.3g}."
    )
    if known:
        note += (
            " Of a web text it is known whether it belongs to its picture; a written text counts as true if it names "
            "the thing that is shown."
        )
    write_page(context.folder / "capfilt.html", decisions, data.dataset.train.images, "CapFilt: kept and dropped", note)


ARMS: dict[str, Callable[[Context], dict]] = {
    "noisy": noisy,
    "filter_only": on_kept(lambda work: work.decisions("filter", "web")),
    "captioner_only": captioner_only,
    "both": on_kept(lambda work: work.bootstrapped()),
    "both_beam": on_kept(lambda work: work.bootstrapped(search="beam")),
    "coupled": on_kept(lambda work: work.bootstrapped("coupled", "coupled")),  # one model does both (Table 4)
    "longer": on_web(longer=True),
    "continued": continued,
    "share_all": on_web("all"),
    "share_all_but_ca": on_web("all_but_ca"),
    "share_none": on_web("none"),
    "captioner": captioning("captioner", prompted=True),
    "captioner_bare": captioning("captioner-bare", prompted=False),
}


# ---- effects


def better(treatment: str, baseline: str, key: str = "r1", beside: Sequence[str] = (), **shown: Sequence[str]) -> Claim:
    """shown: keys of each arm whose means stand beside the effect; beside: arms that are shown alone."""
    return Claim((treatment, baseline, *beside), difference(treatment, baseline, key), shown=means(**shown))


R1, SIZE = ("r1", "itc_r1"), ("r1", "parameters")
WRITTEN = ("r1", "written_removed", "written_false")
REMOVED = ("r1", "removed", "written_removed")
CAPTIONS = ("cider", "bleu4")
CLAIMS: dict[str, Claim] = {
    "blip.capfilt.filter_only": better(
        "filter_only", "noisy", noisy=R1, filter_only=(*R1, "web_removed", "web_precision", "web_recall")
    ),
    "blip.capfilt.captioner_only": better("captioner_only", "noisy", noisy=R1, captioner_only=R1),
    "blip.capfilt.both": better(
        "both", "noisy", beside=("filter_only", "captioner_only"),
        noisy=R1, filter_only=R1, captioner_only=R1, both=(*R1, "removed", "written_false"),
    ),
    "blip.nucleus_vs_beam": better("both", "both_beam", both=WRITTEN, both_beam=WRITTEN),
    "blip.sharing.all_but_sa": better("noisy", "share_all", noisy=SIZE, share_all=SIZE),
    "blip.sharing.all_but_ca": better("share_all_but_ca", "share_all", share_all_but_ca=SIZE, share_all=SIZE),
    "blip.sharing.vs_none": better("noisy", "share_none", noisy=SIZE, share_none=SIZE),
    "blip.capfilt.decoupled": better("both", "coupled", both=REMOVED, coupled=REMOVED),
    "blip.capfilt.not_longer_training": better("longer", "noisy", noisy=R1, longer=R1),
    "blip.capfilt.new_model": better("both", "continued", both=R1, continued=R1),
    "blip.caption_prompt": better(
        "captioner", "captioner_bare", "cider", captioner=CAPTIONS, captioner_bare=CAPTIONS
    ),
}  # fmt: skip
