"""One file of predictions under several scoring protocols: how far scoring alone moves the number.

Each line of the file is {"id": ..., "prediction": "...", "references": ["...", ...]}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.core.errors import UserError, nearest
from shared.core.text import shown
from shared.metrics import captioning, vqa
from shared.metrics.names import Scored, metric_name
from shared.metrics.pope import PROTOCOLS as POPE_PROTOCOLS
from shared.metrics.pope import pope, pope_accuracy

MOST = 20  # samples shown of each metric
_WIDTH = 60


@dataclass(frozen=True)
class Sample:
    id: str
    prediction: str
    references: list[str]
    line: int


def _ten(references: list[str]) -> str | None:
    return None if len(references) == vqa.ANSWERS else f"{len(references)} references, needs {vqa.ANSWERS} answers"


def _yes_or_no(references: list[str]) -> str | None:
    if references in (["yes"], ["no"]):
        return None
    return f"references are {shown(references, _WIDTH)}, needs one, yes or no"


@dataclass(frozen=True)
class Protocol:
    """`score` and `beside` take (predictions, references); `lacks(references)` says what a sample lacks, or None."""

    score: Callable[[list[str], list[list[str]]], Scored]
    lacks: Callable[[list[str]], str | None] = lambda references: None
    beside: Callable[[list[str], list[list[str]]], str] = lambda predictions, references: ""  # next to the score


def protocols() -> dict[str, Protocol]:
    """By the metric's name, as `vqa/acc@official`; those with the same words before the @ are compared."""
    found = {}
    for name in vqa.PROTOCOLS:
        found[metric_name("vqa", "acc", name)] = Protocol(partial(_first_score, vqa.vqa_accuracy, protocol=name), _ten)
    found[metric_name("vqa", "acc", "exact")] = Protocol(partial(_first_score, vqa.exact_match))
    scorers: dict[str, Callable] = {"cider_d": captioning.cider_d, "rouge_l": captioning.rouge_l}
    scorers |= {f"bleu{n}": lambda *tokens, n=n: captioning.bleu(*tokens)[n - 1] for n in (1, 2, 3, 4)}
    for metric, scorer in scorers.items():
        for name in captioning.TOKENISATIONS:
            found[metric_name("caption", metric, name)] = Protocol(partial(_caption_score, scorer, name))
    for name in POPE_PROTOCOLS:
        found[metric_name("pope", "acc", name)] = Protocol(
            partial(_pope_score, name), _yes_or_no, partial(_pope_beside, name)
        )
    return found


def _first_score(
    scorer: Callable[..., dict[str, Scored]], predictions: list[str], references: list, **options
) -> Scored:
    return next(iter(scorer(predictions, references, **options).values()))


def _caption_score(scorer: Callable[..., Scored], way: str, predictions: list[str], references: list) -> Scored:
    return scorer(*captioning.tokenise_all(predictions, references, way))


def _pope_score(protocol: str, predictions: list[str], references: list[list[str]]) -> Scored:
    return pope_accuracy(predictions, [label for [label] in references], protocol)


def _pope_beside(protocol: str, predictions: list[str], references: list[list[str]]) -> str:
    scores = pope(predictions, [label for [label] in references], protocol)
    percent = {name.split("/")[1].split("@")[0]: 100 * value for name, value in scores.items()}
    return f"f1 {percent['f1']:.2f}, yes {percent['yes_ratio']:.1f} %, not parsed {percent['parse_failures']:.1f} %"


def rescore(path: Path, names: Sequence[str]) -> str:
    """The report as text: protocol and score, how far they lie apart, and the samples they differ on most.

    Scores are times 100, as papers print them. Raises UserError for a file, a line or a protocol that cannot be used.
    """
    chosen = _choose(names)
    samples = read_predictions(path)
    for name, protocol in chosen.items():
        for sample in samples:
            if wrong := protocol.lacks(sample.references):
                raise UserError(f"{shown(path)}: line {sample.line}, id {shown(sample.id, _WIDTH)}: {wrong} for {name}")
    said, right = [sample.prediction for sample in samples], [sample.references for sample in samples]
    scores = {name: protocol.score(said, right) for name, protocol in chosen.items()}
    wide = max(map(len, [*chosen, "protocol"]))
    lines = [f"{shown(path)}: {len(samples):,} samples, scores x 100", "", f"{'protocol':{wide}} |  score"]
    for name, scored in scores.items():
        beside = chosen[name].beside(said, right)
        lines.append(f"{name:{wide}} | {100 * scored.score:6.2f}" + (f"   {beside}" if beside else ""))
    for metric in dict.fromkeys(name.split("@")[0] for name in chosen):
        same = {name: scored for name, scored in scores.items() if name.split("@")[0] == metric}
        lines += ["", *_apart(metric, same, samples)]
    return "\n".join(lines)


def read_predictions(path: Path) -> list[Sample]:
    """Lines end at `\\n` alone: JSON may hold U+2028 unescaped. Empty lines are passed over."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise UserError(f"{shown(path)}: {reason}; give a file with one JSON object a line") from None
    samples = [
        _sample(line, f"{shown(path)}: line {n}", n) for n, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if not samples:
        raise UserError(f"{shown(path)}: no predictions in it; give a file with one JSON object a line")
    lines: dict[str, int] = {}
    for sample in samples:
        if (first := lines.setdefault(sample.id, sample.line)) != sample.line:
            raise UserError(
                f"{shown(path)}: line {sample.line}: id {shown(sample.id, _WIDTH)} stands on line {first} already"
            )
    return samples


def _sample(line: str, where: str, number: int) -> Sample:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", None) or "nested too deep, or a number too long"
        raise UserError(f"{where} is not JSON: {why}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is a {type(record).__name__}, expected an object with id, prediction and references")
    for key in ("id", "prediction", "references"):
        if key not in record:
            raise UserError(f"{where} has no '{key}', expected id, prediction and references")
    id, prediction, references = record["id"], record["prediction"], record["references"]
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise UserError(f"{where}: id is {shown(id, _WIDTH)}, expected a string or an integer")
    if not isinstance(prediction, str):
        raise UserError(f"{where}: prediction is {shown(prediction, _WIDTH)}, expected a string")
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise UserError(f"{where}: references are {shown(references, _WIDTH)}, expected a list of strings, not empty")
    return Sample(str(id), prediction, references, number)


def _choose(names: Sequence[str]) -> dict[str, Protocol]:
    known = protocols()
    if not names:
        raise UserError(f"--protocols: name one or more, separated by commas: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UserError(f"no protocol '{shown(name, _WIDTH)}'; {nearest(name, known)}")
    return {name: known[name] for name in names}


def _apart(metric: str, same: dict[str, Scored], samples: list[Sample]) -> list[str]:
    if len(same) == 1:
        return [f"{metric}: one protocol only, so nothing to compare"]
    low, high = (choose(same, key=lambda name: same[name].score) for choose in (min, max))
    gap = 100 * (same[high].score - same[low].score)
    ends = f", from {100 * same[low].score:.2f} ({low}) to {100 * same[high].score:.2f} ({high})" if gap else ""
    lines = [f"{metric}: scoring alone moves the number by {gap:.2f}{ends}"]
    each_sample = zip(*(scored.samples for scored in same.values()), strict=True)
    spread = [max(scores) - min(scores) for scores in each_sample]
    differing = [place for place in sorted(range(len(samples)), key=lambda i: -spread[i]) if spread[place] > 1e-12]
    lines.append(f"{len(differing):,} of {len(samples):,} samples differ" + ("; the most:" if differing else ""))
    for place in differing[:MOST]:
        sample = samples[place]
        each = ", ".join(f"{name.split('@')[1]} {100 * scored.samples[place]:.1f}" for name, scored in same.items())
        more = f" (+{len(sample.references) - 1})" if len(sample.references) > 1 else ""
        said, right = _quoted(sample.prediction), _quoted(sample.references[0])
        lines.append(f"  {100 * spread[place]:6.1f}  id {shown(sample.id, _WIDTH)}: {each}; {said} for {right}{more}")
    return lines


def _quoted(text: str) -> str:
    return f'"{shown(text, _WIDTH)}"' if text else '""'
