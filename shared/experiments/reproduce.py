"""`reproduce`: climbs the four rungs for one paper and one recipe, and writes the report of reported vs reproduced."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

from shared.core.catalog import Catalog
from shared.core.console import Console
from shared.core.errors import UserError
from shared.core.files import write_whole
from shared.core.paper_card import UNITS, ClaimRow, PaperCard
from shared.core.provenance import commit_and_dirty, environment_text, machine_description
from shared.core.recipe import Recipe, to_yaml
from shared.experiments.pretrained_parts import PretrainedPart
from shared.experiments.run_dir import RunFolder, open_run
from shared.report.rows import Figure, Report, Row, Sample
from shared.training.tracking import Tracker


def reproduce(catalog: Catalog, recipe: Recipe, command: str, console: Console, fresh: bool = False) -> Path:
    """Run the recipe's rungs and return the path of report.json. Everything lands in runs/<paper>/<scale>/<stamp>/.

    An interrupted run of the same recipe and code is gone on with, unless `fresh`: no finished arm is trained again.
    """
    from shared.report.write import write

    if recipe.devices * recipe.nodes > 1:
        raise UserError(
            f"devices={recipe.devices} nodes={recipe.nodes}: a reproduction trains every arm on one device; "
            "`python -m papers train` trains one model on many"
        )
    commit, dirty = commit_and_dirty(catalog.root)  # of what runs, not of what is edited meanwhile
    name, card = recipe.paper, catalog.card(recipe.paper)
    run = open_run(catalog.root, recipe, fresh)
    folder = run.path
    if run.sessions > 1:
        console.say(f"going on with the interrupted run in {folder} (--fresh begins anew)")
    console.stages(len([rung for rung in recipe.rungs if rung != "claims"]) + 2 * ("claims" in recipe.rungs) + 1)
    rows: dict[str, list[Row]] = {}
    data: dict = {"name": recipe.data, "digest": None, "coverage": [], "credits": [], "note": None}
    figures: list[Figure] = []
    samples: list[Sample] = []
    tracker = None

    parity = ParityTests(catalog, name, folder) if "parity" in recipe.rungs else None
    if "structure" in recipe.rungs:
        console.stage("structure: the full-size networks, on the meta device")
        rows["structure"] = structure_rows(catalog, card, console)
    if "claims" in recipe.rungs:
        console.stage(f"data: {recipe.data}")
        recipe, data = prepare_data(catalog, recipe, console)
        run.same("data", data["digest"])
        if used := pretrained_parts_of(catalog, recipe, console):
            run.same("artifacts", {one.title: one.digest for one in used})
            data["artifacts"] = [one.line for one in used]
        console.stage("claims: every arm and seed, trained and measured")
        rows["claims"], outcomes, tracker = run_claims(catalog, card, recipe, data, run, command, console)
        try:
            figures, samples = catalog.package(name).figures.draw(recipe, outcomes, folder)
        except Exception as error:  # a figure must not cost the rows that were trained for
            console.say(f"figures could not be drawn: {type(error).__name__}: {error}")
    if parity:
        console.stage("parity: against independent implementations, fp32, small random weights")
        with console.waiting("parity tests"):
            rows["parity"] = parity.rows()
    if "metrics" in recipe.rungs:
        console.stage("metrics: released weights on the paper's benchmarks")
        rows["metrics"] = metric_rows(catalog, card, recipe, console)

    console.stage("report")
    if run.sessions > 1:
        data["run"] = [*data.get("run", []), f"gone on with after an interruption, {run.sessions} sessions"]
    report = Report(
        paper=name,
        title=card.paper.title,
        scale=recipe.scale,
        commit=commit,
        dirty=dirty,
        data=data,
        machine=machine_description(),
        seconds=round(run.seconds, 1),
        started=run.started,
        rows=[row for rung in ("structure", "parity", "claims", "metrics") for row in rows.get(rung, [])],
        figures=figures,
        samples=samples,
        command=command,
        recipe=to_yaml(recipe),
        environment=environment_text(),
    )
    path = write(report, folder)
    if tracker:
        tracker.update(again=True)
    return path


# ---- structure


def structure_rows(catalog: Catalog, card: PaperCard, console: Console) -> list[Row]:
    measure = catalog.package(card.paper.key).structure.measure
    by_variant = defaultdict(list)
    for row in card.structure:
        by_variant[row.variant].append(row)
    found = []
    for variant, wanted in console.bar(by_variant.items(), "variants"):
        measured = measure(variant)
        for row in wanted:
            value = measured[row.part] / UNITS[row.unit]
            whole = row.unit in ("count", "parameters")
            match = abs(value - row.reported) <= row.tolerance + 1e-9
            found.append(
                Row(
                    "structure",
                    row.id,
                    f"{variant}: {row.part.replace('_', ' ')}, {row.unit}",
                    reported=int(row.reported) if whole else row.reported,
                    reproduced=round(value) if whole else round(value, 4),
                    tolerance=row.tolerance,
                    verdict="match" if match else "mismatch",
                    source=row.source,
                )
            )
    return found


# ---- parity


class ParityTests:
    """tests/parity/test_<paper>.py in a process of its own, begun at once: it runs beside what leaves a core idle."""

    def __init__(self, catalog: Catalog, name: str, folder: Path):
        self.name, self.test = name, catalog.root / "tests" / "parity" / f"test_{name}.py"
        self.place, self.log = self.test.relative_to(catalog.root).as_posix(), folder / "parity.log"
        self.process: subprocess.Popen | None = None
        if not self.test.is_file() or any(missing(module) for module in ("pytest", "transformers")):
            return
        self.out = folder / f"parity-{os.getpid()}.json"  # a killed run's tests may still write theirs
        options = ["-q", "-p", "no:cacheprovider", "--rows", str(self.out)]
        command = [sys.executable, "-m", "pytest", *options, str(self.test)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=catalog.root, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        atexit.register(self.process.kill)  # nobody waits for it where a run fails

    def rows(self) -> list[Row]:
        """A row for each difference that was measured, once all are."""
        if self.process is None:
            need = f"the development extras: pip install -e '.[dev]', then `python -m pytest {self.place}`"
            return [Row("parity", f"{self.name}.parity", "against independent implementations", need=need)]
        code = self.process.wait()
        if not self.out.is_file() or code not in (0, 1):
            raise UserError(f"the parity tests did not run (exit code {code}); see {self.log}")
        measured = json.loads(self.out.read_text())
        self.out.unlink()
        rows = []
        for found in measured:
            if "difference" in found:
                match = found["difference"] <= found["tolerance"]
                reported, value, tolerance = "equal", f"max |difference| {found['difference']:.1e}", found["tolerance"]
            else:
                match = found["found"] == found["expected"]
                reported, value, tolerance = found["expected"], found["found"], 0
            verdict = "match" if match else "mismatch"
            as_row = partial(Row, "parity", found["id"], found["what"], reported, value, source=self.place)
            rows.append(as_row(tolerance=tolerance, verdict=verdict))
        if code == 1 and all(row.verdict == "match" for row in rows):
            raise UserError(f"a parity test failed before it measured anything; see {self.log}")
        return rows


def missing(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is None


# ---- claims


def prepare_data(catalog: Catalog, recipe: Recipe, console: Console) -> tuple[Recipe, dict]:
    """Fetch what the data needs, load it once to see that it is sound, and describe it for the report."""
    from shared.data.dataset import fetch_dataset
    from shared.experiments.ablations import seeds_of

    note = None
    try:
        with console.waiting(f"fetching {recipe.data}") as say:
            if not recipe.data_root:
                fetch_dataset(recipe.data, report=lambda entry, done, total: say(f"{entry}: {done / 1e6:.0f} MB"))
    except UserError as error:
        if recipe.data != "emoji":
            raise
        note = f"the emoji artwork could not be fetched, so drawn shapes stand in for it: {error}"
        console.say(note)
        recipe = dataclasses.replace(recipe, data="shapes")
    with console.waiting("reading the data"):
        dataset = catalog.package(recipe.paper).claims.load(recipe, seeds_of(recipe)[0])
    console.say(
        f"{dataset.name}: {len(dataset.train.ids)} training pictures, {len(dataset.test.ids)} test pictures"
        + (f", {len(dataset.classes)} classes" if dataset.classes else "")
    )
    coverage = [dataclasses.asdict(one) for one in dataset.coverage]
    return recipe, {
        "name": dataset.name,
        "digest": dataset.digest,
        "coverage": coverage,
        "credits": list(dataset.credits),
        "note": note or dataset.note,
    }


def pretrained_parts_of(catalog: Catalog, recipe: Recipe, console: Console) -> list[PretrainedPart]:
    """What the paper's claims take of other papers, by claims.pretrained_parts(recipe) where there is one."""
    offered = getattr(catalog.package(recipe.paper).claims, "pretrained_parts", None)
    if offered is None:
        return []
    with console.waiting("artifacts of other papers"):
        return offered(recipe)


def run_claims(
    catalog: Catalog, card: PaperCard, recipe: Recipe, data: dict, run: RunFolder, command: str, console: Console
) -> tuple[list[Row], dict[int, dict[str, dict]], Tracker]:
    """Train every arm once a seed, then let each claim compare them. -> rows, {seed: {arm: measurements}}, its run."""
    from shared.experiments.ablations import run_arms, seeds_of

    wanted = [row for row in card.claims if not recipe.claims or row.id in recipe.claims]
    claims = catalog.package(recipe.paper).claims.CLAIMS
    arms = list(dict.fromkeys(arm for row in wanted for arm in claims[row.id].arms))
    jobs = len(arms) * recipe.seeds
    outcomes: dict[int, dict[str, dict]] = defaultdict(dict)
    folder, waited = run.path, []
    write_whole(folder / "recipe.yaml", to_yaml(recipe))
    tracker = Tracker(
        folder,
        catalog.root,
        experiment=recipe.paper,
        name=f"{recipe.scale} {data['name']}",
        data=data["name"],
        data_digest=data["digest"],
        command=command,
        about=card.paper.title,
        tags={"scale": recipe.scale, "seeds": recipe.seeds},
        params=dataclasses.asdict(recipe),
    )
    package = catalog.package(recipe.paper).name
    with tracker, console.progress(jobs, f"{len(arms)} arms x {recipe.seeds} seeds", "trainings") as bar:
        for outcome in run_arms(package, recipe, arms, folder / "arms", lambda samples: bar.advance(0)):
            outcomes[outcome.seed][outcome.arm] = outcome.measured
            waited += [outcome.measured["waited"]] if "waited" in outcome.measured else []
            run.keep()
            bar.note(f"{sum(map(len, outcomes.values()))} of {jobs} trained")
            bar.advance(1)
            tracker.update()
        rows = [claim_row(row, claims[row.id], recipe, outcomes) for row in wanted]
    if waited:
        data["run"] = [f"waited for data {100 * sum(waited) / len(waited):.2g} % of the training time"]
    seeds = seeds_of(recipe)
    return rows, {seed: outcomes[seed] for seed in seeds}, tracker


def claim_row(row: ClaimRow, claim, recipe: Recipe, outcomes: dict[int, dict[str, dict]]) -> Row:
    """Effect, interval and verdict of one claim, by the rule that paper.yaml declared before the run."""
    from shared.metrics.stats import Rule, verdict

    rule = Rule(row.direction, row.margin or 0.0)
    as_row = partial(Row, "claims", row.id, reported=row.reported_as or row.reported, source=row.source)
    if recipe.scale == "smoke":
        need = f"a scale that can tell: make reproduce PAPER={recipe.paper} SCALE=mini (smoke only proves that it runs)"
        return as_row(row.statement, need=need)
    several = [outcomes[seed] for seed in sorted(outcomes)][: claim.seeds(recipe) if claim.seeds else None]
    effects = [claim.effect(measured) for measured in several]
    if any(effect is None for effect in effects):
        return as_row(row.statement, need=f"{claim.need}; this run read {recipe.data}")
    try:
        judged = verdict(effects, rule)
    except UserError as error:  # a diverged seed
        return as_row(row.statement, need=str(error))
    notes = [claim.shown(several)] if claim.shown else []
    if judged.word == "inconclusive" and judged.smallest_effect is not None:
        notes.append(f"smallest effect this run could have seen: {judged.smallest_effect:.2g}")
    beside = "; ".join(note for note in (*notes, judged.note) if note)
    return as_row(
        f"{row.statement} ({beside})" if beside else row.statement,
        reproduced=round(judged.mean, 4),
        low=None if judged.low is None else round(judged.low, 4),
        high=None if judged.high is None else round(judged.high, 4),
        tolerance=f"{rule}, {row.unit}",
        seeds=len(several),
        verdict=judged.word,
    )


# ---- metrics


def metric_rows(catalog: Catalog, card: PaperCard, recipe: Recipe, console: Console) -> list[Row]:
    """Score the released weights where weights and data are at hand; say exactly what is lacking where not."""
    measure = catalog.package(recipe.paper).benchmarks.measure
    rows = []
    for row in console.bar(card.metrics, "rows"):
        what = f"{row.variant} on {row.dataset} ({row.split}): {row.metric}"
        if row.remeasured:
            what += f"; {row.remeasured.by} measured {row.remeasured.value:g}"
        as_row = partial(Row, "metrics", row.id, what, row.compared_with, source=row.source)
        try:
            value = measure(row, recipe)
        except UserError as lacking:
            rows.append(as_row(need=str(lacking)))
            continue
        verdict = "match" if abs(value - row.compared_with) <= row.tolerance else "mismatch"
        rows.append(as_row(reproduced=round(value, 2), tolerance=row.tolerance, verdict=verdict))
    return rows
