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
from shared.metrics import caption_scores, reranked_hits, retrieval_hits_from_features

__all__ = ["ARMS", "CLAIMS", "load"]


# ---- measuring


def measure(model: Blip, data: ExperimentData, recipe: BlipRecipe) -> dict:
    """R@1 on held-out pictures in points, mean of both directions: `r1` after re-ranking, `itc_r1` without."""
    eval_set = data.eval_set
    tokens = tokens_of(data.tokenizer, eval_set.texts, data.config)
    pictures = encoded(model.eval(), eval_set.images)
    i2t, t2i = reranked(model, pictures, tokens, recipe.candidates)
    protocol = f"itc-top{recipe.candidates}-itm+itc"
    hits = reranked_hits(i2t, t2i, eval_set.owner, ks=(1,), protocol=protocol)
    plain = retrieval_hits_from_features(pictures.features, text_features(model, tokens), eval_set.owner, ks=(1,))
    return {
        "r1": 50 * sum(hits.values()),
        "itc_r1": 50 * sum(plain.values()),
        "i2t_r1": 100 * hits[f"retrieval/i2t_r1@{protocol}"],
        "t2i_r1": 100 * hits[f"retrieval/t2i_r1@{protocol}"],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def filtered(decisions: Sequence[Decision]) -> dict:
    """Shares in percent: `removed` of all texts, and where the truth is known how many of the removed were wrong
    (`precision`) and how many of the wrong were removed (`recall`), of the web's texts and of the written ones."""
    found = {"removed": 100 * sum(not one.kept for one in decisions) / len(decisions)}
    for origin, of in counts(decisions).items():
        found[f"{origin}_removed"] = 100 * of.get("dropped", 0) / of["texts"]
        if "known" in of:
            false = of.get("false dropped", 0) + of.get("false kept", 0)
            found[f"{origin}_false"] = 100 * false / of["known"]
            found[f"{origin}_precision"] = 100 * of.get("false dropped", 0) / max(1, of.get("dropped", 0))
            found[f"{origin}_recall"] = 100 * of.get("false dropped", 0) / max(1, false)
    return found


# ---- the arms


def noisy(context: Context) -> dict:
    """Pre-trained on all web pairs and the clean ones: the baseline of most claims."""
    work = CapFilt.of(context)
    model, told = work.pretrained()
    return told | measure(model.blip, work.data, context.recipe)


def on_texts(context: Context, texts: Sequence[Text], sharing: str = "all_but_sa", longer: float = 1.0) -> dict:
    """A new model on these texts of web pictures and on the clean pairs."""
    work = CapFilt.of(context)
    model = work.new_model(sharing)
    steps = round(context.recipe.steps * longer)
    told = work.train(model, [*texts, *work.data.clean], context.folder, context.arm, steps=steps)
    if context.first:
        keep_model(model.blip, work.data, context)
    return told | measure(model.blip, work.data, context.recipe)


def filter_only(context: Context) -> dict:
    decisions = CapFilt.of(context).decisions("filter", "web")
    return on_texts(context, kept_of(decisions)) | filtered(decisions)


def captioner_only(context: Context) -> dict:
    work = CapFilt.of(context)
    return on_texts(context, [*work.data.web, *work.written("captioner", "nucleus")])


def both(context: Context) -> dict:
    work = CapFilt.of(context)
    decisions = work.bootstrapped()
    if context.first:
        show(decisions, work.data, context)
    return on_texts(context, kept_of(decisions)) | filtered(decisions)


def both_beam(context: Context) -> dict:
    decisions = CapFilt.of(context).bootstrapped(how="beam")
    return on_texts(context, kept_of(decisions)) | filtered(decisions)


def coupled(context: Context) -> dict:
    """One model, fine-tuned with all three losses, writes and judges (Table 4)."""
    decisions = CapFilt.of(context).bootstrapped("coupled", "coupled")
    return on_texts(context, kept_of(decisions)) | filtered(decisions)


def longer(context: Context) -> dict:
    return on_texts(context, CapFilt.of(context).data.web, longer=context.recipe.longer)


def continued(context: Context) -> dict:
    """The pre-trained model goes on with the bootstrapped set (Table 13)."""
    work = CapFilt.of(context)
    model, _ = work.pretrained()
    texts = [*kept_of(work.bootstrapped()), *work.data.clean]
    told = work.train(model, texts, context.folder, context.arm)
    return told | measure(model.blip, work.data, context.recipe)


def sharing(mode: str) -> Callable[[Context], dict]:
    """Table 3: pre-trained like `noisy`, with encoder and decoder sharing something else."""

    def arm(context: Context) -> dict:
        return on_texts(context, CapFilt.of(context).data.web, mode)

    return arm


def captioning(name: str, prompted: bool) -> Callable[[Context], dict]:
    """The captioner of CapFilt as such: CIDEr-D and BLEU-4 in points, on held-out pictures, by beam search."""

    def arm(context: Context) -> dict:
        work = CapFilt.of(context)
        model, told = work.tuned(name)
        eval_set = work.data.eval_set
        how = work.writing("beam", None if prompted else "")
        said = write(model.blip, work.data.tokenizer, eval_set.images, how)
        found = caption_scores(said, eval_set.references)
        if context.first:
            keep_model(model.blip, work.data, context)
        return {
            "waited": told["waited"],
            "cider": 100 * found["caption/cider_d@treebank"].score,
            "bleu4": 100 * found["caption/bleu4@treebank"].score,
        }

    return arm


def keep_model(model: Blip, data: ExperimentData, context: Context) -> None:
    """The first seed's model and tokenizer stay with the run: figures are drawn from them, users can load them."""
    from shared.weights.load import save_weights

    save_weights(model, context.folder / "model.safetensors", {"variant": context.recipe.model})
    data.tokenizer.save(context.folder / "tokenizer.json")


def show(decisions: Sequence[Decision], data: ExperimentData, context: Context) -> None:
    """What was kept, dropped and written, to page through."""
    write_lines(context.folder / "capfilt.jsonl", decisions)
    known = any(one.true is not None for one in decisions)
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
    "filter_only": filter_only,
    "captioner_only": captioner_only,
    "both": both,
    "both_beam": both_beam,
    "coupled": coupled,
    "longer": longer,
    "continued": continued,
    "share_all": sharing("all"),
    "share_all_but_ca": sharing("all_but_ca"),
    "share_none": sharing("none"),
    "captioner": captioning("captioner", prompted=True),
    "captioner_bare": captioning("captioner-bare", prompted=False),
}


# ---- effects


def difference(treatment: str, baseline: str, name: str = "r1") -> Callable[[dict], float]:
    def effect(measured: dict[str, dict]) -> float:
        return measured[treatment][name] - measured[baseline][name]

    return effect


def means(**names: Sequence[str]) -> Callable[[list[dict]], str]:
    """arm=(what, ...) -> 'arm what 12.3, ...' averaged over seeds: what stands beside an effect."""

    def shown(seeds: list[dict[str, dict]]) -> str:
        parts = []
        for arm, several in names.items():
            for name in several:
                values = [one[arm][name] for one in seeds if name in one.get(arm, {})]
                if values:
                    mean = sum(values) / len(values)
                    parts.append(f"{arm} {name} {mean:,.0f}" if name == "parameters" else f"{arm} {name} {mean:.1f}")
        return ", ".join(parts)

    return shown


R1 = ("r1", "itc_r1")
CLAIMS: dict[str, Claim] = {
    "blip.capfilt.filter_only": Claim(
        ("filter_only", "noisy"),
        difference("filter_only", "noisy"),
        shown=means(noisy=R1, filter_only=(*R1, "web_removed", "web_precision", "web_recall")),
    ),
    "blip.capfilt.captioner_only": Claim(
        ("captioner_only", "noisy"), difference("captioner_only", "noisy"), shown=means(noisy=R1, captioner_only=R1)
    ),
    "blip.capfilt.both": Claim(
        ("both", "noisy", "filter_only", "captioner_only"),
        difference("both", "noisy"),
        shown=means(noisy=R1, filter_only=R1, captioner_only=R1, both=(*R1, "removed", "written_false")),
    ),
    "blip.nucleus_vs_beam": Claim(
        ("both", "both_beam"),
        difference("both", "both_beam"),
        shown=means(
            both=("r1", "written_removed", "written_false"), both_beam=("r1", "written_removed", "written_false")
        ),
    ),
    "blip.sharing.all_but_sa": Claim(
        ("noisy", "share_all"),
        difference("noisy", "share_all"),
        shown=means(noisy=("r1", "parameters"), share_all=("r1", "parameters")),
    ),
    "blip.sharing.all_but_ca": Claim(
        ("share_all_but_ca", "share_all"),
        difference("share_all_but_ca", "share_all"),
        shown=means(share_all_but_ca=("r1", "parameters"), share_all=("r1", "parameters")),
    ),
    "blip.sharing.vs_none": Claim(
        ("noisy", "share_none"),
        difference("noisy", "share_none"),
        shown=means(noisy=("r1", "parameters"), share_none=("r1", "parameters")),
    ),
    "blip.capfilt.decoupled": Claim(
        ("both", "coupled"),
        difference("both", "coupled"),
        shown=means(both=("r1", "removed", "written_removed"), coupled=("r1", "removed", "written_removed")),
    ),
    "blip.capfilt.not_longer_training": Claim(
        ("longer", "noisy"), difference("longer", "noisy"), shown=means(noisy=R1, longer=R1)
    ),
    "blip.capfilt.new_model": Claim(
        ("both", "continued"), difference("both", "continued"), shown=means(both=R1, continued=R1)
    ),
    "blip.caption_prompt": Claim(
        ("captioner", "captioner_bare"),
        difference("captioner", "captioner_bare", "cider"),
        shown=means(captioner=("cider", "bleu4"), captioner_bare=("cider", "bleu4")),
    ),
}
