"""The command line: `python -m papers VERB`. Heavy imports come inside the verbs: `list` and `cite` answer at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.core.catalog import Catalog
from shared.core.console import Console, quiet
from shared.core.errors import UserError, nearest
from shared.core.paper_card import bibtex
from shared.core.recipe import SCALES
from shared.core.text import shown


def main(folder: Path, package: str, argv: list[str] | None = None) -> None:
    """Run one verb; a UserError is one line on standard error and exit code 2, Ctrl-C is 130."""
    catalog = Catalog(folder.resolve(), package)
    options = parse(argv)
    if not getattr(options, "verb", None):
        parser().print_help()
        return
    try:
        code = options.run(catalog, options)
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept in runs/", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(code or 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """argparse gives up on words behind an option; `key=value` may stand anywhere."""
    options, rest = parser().parse_known_args(argv)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def fail(message: str) -> int:
    print(f"papers: {message}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="papers", description="Vision-language papers, re-implemented and re-measured.")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, run: Callable, help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    verb("list", list_papers, "the papers, their scales and how many rows each rung has")
    sub = verb("reproduce", reproduce, "reported against reproduced, on four rungs")
    sub.add_argument("paper", nargs="?", help="a paper, or 'all'")
    sub.add_argument("--scale", default="mini", help=f"one of {', '.join(SCALES)} (default: mini)")
    sub.add_argument("--seeds", type=int, help="how many paired seeds")
    sub.add_argument("--dry", action="store_true", help="only print what would run, be downloaded and cost")
    sub.add_argument("-v", "--verbose", action="store_true", help="show third-party warnings")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe")
    sub.add_argument(
        "--fresh", action="store_true", help="begin anew, even where an interrupted run could be gone on with"
    )
    sub = verb("train", train, "one model on one recipe, on one device or many (torchrun, SLURM); resumes by itself")
    sub.add_argument("paper")
    sub.add_argument("--scale", default="mini", help=f"one of {', '.join(SCALES)} (default: mini)")
    sub.add_argument("--out", type=Path, help="folder of checkpoints and weights (default: runs/PAPER/train-SCALE)")
    sub.add_argument("-v", "--verbose", action="store_true", help="show third-party warnings")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe")
    sub = verb("chaos", chaos, "kill a small run at random moments; it must end as one never interrupted")
    sub.add_argument("paper")
    sub.add_argument("--kills", type=int, default=20)
    sub.add_argument("--seed", type=int, default=0, help="of the random moments")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe")
    sub = verb("calibrate", calibrate, "how often a verdict is false where nothing differs")
    sub.add_argument("paper")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe")
    sub = verb("plan", plan, "memory, time and cost of a full-size training on GPUs that are not at hand")
    sub.add_argument("variant", help="such as clip-vit-l-14")
    sub.add_argument("--gpus", type=int, default=1)
    sub.add_argument("--gpu", default="h100")
    sub.add_argument("--efficiency", type=float, help="share of the GPU's peak that is reached")
    sub.add_argument("--price", type=float, help="of a GPU-hour; without it no cost is said")
    sub.add_argument("--batch", type=int, help="global batch (default: the paper's)")
    sub.add_argument("--zero", type=int, help="one ZeRO stage, 0 to 3 (default: all)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe")
    sub = verb("doctor", doctor, "what this machine has, lacks and could run; ends in a block to paste into an issue")
    sub.add_argument("paper", nargs="?")
    sub.add_argument("--scale", default="mini", help=f"one of {', '.join(SCALES)} (default: mini)")
    sub.add_argument("--verify", action="store_true", help="hash large cached files too")
    sub = verb("deliver", deliver, "send to MLflow what it lacks of a run because its server was away")
    sub.add_argument("folders", nargs="*", type=Path, help="of runs; default: all in runs/ that were not sent whole")
    sub = verb("compare", compare, "one table over all papers and scales, from results/")
    sub.add_argument("paths", nargs="*", type=Path, help="report.json files (default: results/*/*.json)")
    sub = verb("report", report, "print the newest report of a paper, keep it, or write the generated tables")
    sub.add_argument("paper", nargs="?")
    sub.add_argument("--keep", action="store_true", help="copy its report.json to results/, as committed evidence")
    sub.add_argument("--judge", action="store_true", help="take the verdicts of kept evidence anew, by today's rule")
    sub.add_argument("--tables", action="store_true", help="write the generated tables of README and cards anew")
    sub = verb("convert", convert, "published weights to ours (safetensors), or ours to published names")
    sub.add_argument("source", type=Path)
    sub.add_argument("target", type=Path)
    sub.add_argument("--paper", default="clip")
    sub.add_argument("--variant", required=True)
    sub.add_argument("--to", default="ours", help="ours, or one of the paper's published formats")
    sub.add_argument("--tokenizer", type=Path, help="of weights trained here, for an exported folder")
    sub = verb("cite", cite, "BibTeX of a paper, its data and base weights")
    sub.add_argument("paper", nargs="?")
    sub = verb("fetch", fetch, "bring and check files of the manifest")
    sub.add_argument("ids", nargs="*", help="manifest entries")
    sub.add_argument("--paper", help="what this paper's mini recipe reads")
    sub.add_argument("--verify", action="store_true", help="hash cached files in full")
    sub = verb("zeroshot", zeroshot, "classify your own pictures by labels you write")
    sub.add_argument("pictures", nargs="+", type=Path)
    sub.add_argument("--model", default="clip-vit-b-32")
    sub.add_argument("--weights", type=Path, help="a local weights file instead of the manifest's")
    sub.add_argument("--tokenizer", type=Path, help="the tokenizer.json of weights trained here")
    sub.add_argument(
        "--labels", required=True, action="append", metavar="LABELS",
        help="comma-separated: 'a cat,a dog'; or given once a label, which may then hold commas",
    )  # fmt: skip
    sub.add_argument("--template", default="a photo of {}.", help="put around each label (default: %(default)r)")
    sub = verb("caption", caption, "captions of your own pictures, one line each")
    sub.add_argument("pictures", nargs="+", type=Path, help="files, or folders of them")
    speaks(sub)
    in_batches(sub)
    sub.add_argument("--nucleus", type=float, metavar="P", help="sample from the likeliest words that hold this share")
    sub.add_argument("--seed", type=int, default=0, help="of sampling")
    sub.add_argument("--prompt", help="what captions begin with (default: what the model was trained with)")
    sub = verb("ask", ask, "a question about your own pictures, one line each")
    sub.add_argument("pictures", nargs="+", type=Path, help="files, or folders of them")
    sub.add_argument("question")
    speaks(sub)
    in_batches(sub)
    sub.add_argument("--answers", type=Path, metavar="FILE", help="a JSON list of the answers to choose among")
    sub = verb("chat", chat, "a dialogue about a picture: a question a line, until an empty one or the end of input")
    sub.add_argument("picture", type=Path)
    speaks(sub, "blip2-vit-g-opt-2.7b")
    sub = verb("rescore", rescore, "one file of predictions under several scoring protocols: how far they lie apart")
    sub.add_argument("predictions", type=Path, help='lines of {"id": ..., "prediction": ..., "references": [...]}')
    sub.add_argument("--protocols", default="", help="comma-separated: vqa/acc@official,vqa/acc@always")
    sub = verb("bench", bench, "ours against other libraries: same weights, same bytes, in turns, in one run")
    sub.add_argument("paper", nargs="?", default="clip")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    verb("check", check, "recipes against their schema, generated tables fresh, files short; the size of the house")
    return top


def speaks(sub: argparse.ArgumentParser, model: str = "blip-base") -> None:
    """What every verb takes that lets a model speak of pictures."""
    sub.add_argument("--model", default=model, help="(default: %(default)s)")
    sub.add_argument("--weights", type=Path, help="a local weights file instead of the manifest's")
    sub.add_argument("--tokenizer", type=Path, help="the tokenizer.json of weights trained here")
    sub.add_argument("--beams", type=int, help="of beam search (default: as the model's paper has it)")


def in_batches(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--batch", type=int, default=16, help="pictures at once (default: %(default)s)")


# ---- verbs


def list_papers(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.tools.readme_tables import papers_table

    print(papers_table(catalog))
    print("make reproduce PAPER=<paper> [SCALE=smoke|mini|field|gpu|paper]")


def reproduce(catalog: Catalog, options: argparse.Namespace) -> None:
    if not options.paper:
        list_papers(catalog, options)
        return
    if "=" in options.paper:
        raise UserError(f"name the paper before {options.paper}; there are: {', '.join(catalog.names())}, all")
    seeds = [] if options.seeds is None else [f"seeds={options.seeds}"]
    console = Console()
    for name in catalog.names() if options.paper == "all" else [catalog.known(options.paper)]:
        recipe = catalog.recipe(name, options.scale, [*options.overrides, *seeds])
        if options.dry:
            from shared.tools.plan import dry_run

            print(dry_run(catalog, recipe))
            continue
        command = f"make reproduce PAPER={name} SCALE={options.scale}"
        command += f" SEEDS={options.seeds}" if seeds else ""
        command += f' ARGS="{" ".join(options.overrides)}"' if options.overrides else ""
        with console.waiting("starting"):
            from shared.experiments.reproduce import reproduce as run
        if not options.verbose:
            quiet()
        show_report(run(catalog, recipe, command, console, options.fresh))


def show_report(path: Path) -> None:
    from shared.report.text import brief, terminal_table
    from shared.report.write import read_report

    print(terminal_table(brief(read_report(path))))
    for name in ("report.html", "report.md", "report.json"):
        print(f"{path.parent / name}")


def train(catalog: Catalog, options: argparse.Namespace) -> None:
    recipe = catalog.recipe(catalog.known(options.paper), options.scale, options.overrides)
    console = Console()
    with console.waiting("starting"):
        from shared.training.train import train as run
    if not options.verbose:
        quiet()
    print(run(catalog, recipe, options.out, console) / "model.safetensors")


def chaos(catalog: Catalog, options: argparse.Namespace) -> int:
    import tempfile

    from shared.tools.crash_test import chaos as run

    if options.kills < 1:
        raise UserError(f"--kills {options.kills}: give at least 1")
    name = catalog.known(options.paper)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        found = run(catalog, name, options.kills, options.seed, Path(folder), options.overrides, Console().say)
    print(found)
    for line in found.differences:
        print(line)
    return 0 if found.equal == found.runs else 1


def calibrate(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.experiments.calibration import line, run

    quiet()
    path = run(catalog, catalog.known(options.paper), options.overrides, Console())
    print(line(path))
    print(path)


def plan(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.tools.plan import EFFICIENCY, make_plan, text

    efficiency = EFFICIENCY if options.efficiency is None else options.efficiency
    planned = make_plan(
        catalog, options.variant, options.gpus, options.gpu, efficiency, options.batch, options.zero,
        options.overrides, Console(),
    )  # fmt: skip
    print(text(planned, options.price))


def doctor(catalog: Catalog, options: argparse.Namespace) -> int:
    from shared.tools.doctor import doctor as examine

    return examine(catalog, options.paper and catalog.known(options.paper), options.scale, options.verify)


def deliver(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.training import tracking

    folders = options.folders or tracking.undelivered(catalog.root)
    for folder in folders:
        print(f"{folder}: delivered; MLflow lacked {tracking.deliver(folder, catalog.root)} arms of it")
    if not folders:
        print("nothing is missing: all that was tracked has arrived")


def compare(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.report.evidence_table import results
    from shared.report.write import compare as table

    print(table(options.paths or [path for name in catalog.names() for path in results(catalog, name)]))


def report(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.report.evidence_table import judge_results, keep_result
    from shared.tools.readme_tables import write_tables

    if options.judge:
        for name in [options.paper] if options.paper else catalog.names():
            for path in judge_results(catalog, catalog.known(name)):
                print(f"judged anew: {path}")
    if options.tables:
        for path in write_tables(catalog):
            print(f"written: {path}")
    if not options.paper or options.judge:
        if options.tables or options.judge:
            return
        raise UserError(f"name a paper: {', '.join(catalog.names())}")
    runs = catalog.root / "runs" / catalog.known(options.paper)
    found = sorted(runs.glob("*/*/report.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{runs}: no report yet; make reproduce PAPER={options.paper} writes the first")
    if options.keep:
        print(f"kept: {keep_result(catalog, found[-1])}")
    show_report(found[-1])


def convert(catalog: Catalog, options: argparse.Namespace) -> None:
    catalog.variant(options.paper, options.variant)
    package = catalog.package(options.paper)
    if options.target.suffix == ".safetensors":
        package.weights.convert(options.source, options.target, options.variant, options.to)
    elif package.offers("weights", "export"):  # a folder that the library of that name loads
        given = options.source, options.target, options.variant, options.to
        package.weights.export(*given, options.tokenizer, catalog)
    else:
        raise UserError(f"papers/{options.paper} is exported to no library; name a *.safetensors file")
    print(options.target)


def cite(catalog: Catalog, options: argparse.Namespace) -> None:
    names = [catalog.known(options.paper)] if options.paper else catalog.names()
    print("\n".join(bibtex(catalog.card(name)) for name in names), end="")


def fetch(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.weights.fetch import fetch as bring
    from shared.weights.manifest import Entry, load_manifest

    manifest = load_manifest(catalog.root / "checkpoints_manifest.yaml")
    ids = list(options.ids)
    if not ids:
        from shared.data.dataset import entries_of

        names = [catalog.known(options.paper)] if options.paper else catalog.names()
        ids = sorted({entry for name in names for entry in entries_of(catalog.recipe(name, "mini", []).data)})
    for id in ids:
        if id not in manifest:
            raise UserError(f"no entry '{id}' in the manifest; {nearest(id, manifest)}")

    def fetch_one(entry: Entry) -> None:
        with Console().waiting(f"{entry.id} ({entry.origin})") as say:
            path = bring(entry, verify=options.verify, report=lambda id, done, _: say(f"{id}: {done / 1e6:.0f} MB"))
        print(f"{entry.id}  sha256 {str(entry.sha256)[:16]}...  {path}")

    for id in ids:
        fetch_one(manifest[id])


def zeroshot(catalog: Catalog, options: argparse.Namespace) -> int:
    from shared.inference import predict

    paper = options.model.split("-")[0]
    catalog.variant(paper, options.model)
    given = options.labels[0].split(",") if len(options.labels) == 1 else options.labels
    labels = [label.strip() for label in given if label.strip()]
    if len(labels) < 2:
        raise UserError("--labels needs at least two labels, separated by commas: --labels 'a cat,a dog'")
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"--labels: {twice!r} is given twice, and pictures of it would be shared out")
    if "{}" not in options.template:
        raise UserError(f"--template {options.template!r} has no {{}} where the label goes")
    package = catalog.package(paper)
    if "zeroshot" not in package.uses():
        raise UserError(f"{options.model}: papers/{paper} scores no labels; give a model of CLIP")
    files = predict.picture_files(options.pictures)  # before weights are fetched: a wrong path should cost nothing
    model = package.inference.load_for_inference(options.model, options.weights, options.tokenizer, "zeroshot")
    return predict.look(files, predict.zeroshot_task(model, labels, options.template), predict.CHUNK, Console())


def caption(catalog: Catalog, options: argparse.Namespace) -> int:
    from shared.inference.predict import caption_task

    if options.nucleus is not None and not 0 < options.nucleus <= 1:
        raise UserError(f"--nucleus {options.nucleus}: give a share above 0 and up to 1, as 0.9")
    chosen = options.prompt, options.beams, options.nucleus, options.seed
    return over_pictures(catalog, options, "caption", lambda model: caption_task(model, *chosen))


def ask(catalog: Catalog, options: argparse.Namespace) -> int:
    from shared.data.vqa import answer_list
    from shared.inference.predict import ask_task

    if not options.question.strip():
        raise UserError("the question is empty; ask something, in quotes")
    chosen = options.question, answer_list(options.answers) if options.answers else None, options.beams
    return over_pictures(catalog, options, "ask", lambda model: ask_task(model, *chosen))


def chat(catalog: Catalog, options: argparse.Namespace) -> int:
    from shared.inference.predict import chat_task, talk

    if not options.picture.is_file():
        raise UserError(f"{shown(options.picture)}: no such file; give one picture")
    task = chat_task(model_that_speaks(catalog, options, "chat"), options.beams)
    return talk(options.picture, task, sys.stdin)


def over_pictures(catalog: Catalog, options: argparse.Namespace, use: str, task: Callable[[Any], Any]) -> int:
    from shared.inference.predict import look, picture_files

    if options.batch < 1:
        raise UserError(f"--batch {options.batch}: give at least 1")
    files = picture_files(options.pictures)  # before weights are fetched: a wrong path should cost nothing
    return look(files, task(model_that_speaks(catalog, options, use)), options.batch, Console())


def model_that_speaks(catalog: Catalog, options: argparse.Namespace, use: str) -> Any:
    if options.beams is not None and options.beams < 1:
        raise UserError(f"--beams {options.beams}: give at least 1")
    paper = catalog.paper_that_answers(options.model)
    with Console().waiting("loading the model"):
        package = catalog.package(paper)
        if use not in package.uses():
            raise UserError(f"{options.model}: papers/{paper} holds no dialogue; `ask` puts one question to it")
        return package.inference.load_for_inference(options.model, options.weights, options.tokenizer, use)


def rescore(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.metrics.rescore import rescore as run

    print(run(options.predictions, [name.strip() for name in options.protocols.split(",") if name.strip()]))


def bench(catalog: Catalog, options: argparse.Namespace) -> None:
    from shared.tools.bench import run

    quiet()
    run(catalog.package(catalog.known(options.paper)).bench, catalog.root, options.overrides)


def check(catalog: Catalog, options: argparse.Namespace) -> int:
    """Everything a reader relies on without running it."""
    from shared.tools.house import problems, sizes

    found = problems(catalog)
    for problem in found:
        print(problem, file=sys.stderr)
    print(sizes(catalog))
    print(f"checked: {len(catalog.names())} papers, {len(found)} problems")
    return 1 if found else 0
