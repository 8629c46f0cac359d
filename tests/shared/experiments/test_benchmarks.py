"""One pass over a set of pictures: what a row needs, how much is read at once, what is dropped, what rows share."""

from types import SimpleNamespace

import pytest
import yaml
from benchmark_rows import forget_scores, karpathy, nocaps, written
from published import encoded

from shared.core.errors import UserError
from shared.core.paper_card import MetricRow, Need
from shared.data.readers import Record
from shared.experiments import benchmarks
from shared.experiments.benchmarks import Benchmark, Released, accuracy, itself, released_file, run_benchmark
from shared.weights.manifest import load_manifest


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A manifest with one entry, whose file is there, an empty folder of data, and the recipe of a run."""
    forget_scores()
    monkeypatch.chdir(tmp_path)
    entry = {
        "what": "weights", "kind": "checkpoint", "source": {"type": "url", "urls": ["https://example.org/w.pth"]},
        "file": "w.pth", "sha256": None, "licence": "none",
    }  # fmt: skip
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump({"w": entry}))
    for folder in ("coco", "nocaps", "weights"):
        (tmp_path / folder).mkdir()
    (tmp_path / "weights" / "w.pth").write_bytes(b"weights")
    recipe = SimpleNamespace(
        paper="clip", scale="paper", data_root=str(tmp_path), manifest=str(tmp_path / "manifest.yaml")
    )
    return SimpleNamespace(root=tmp_path, recipe=recipe)


def row(metric, dataset="MSCOCO", split="5k test", weights="w"):
    return MetricRow(
        id="clip.metrics.x", variant="v", dataset=dataset, split=split, metric=metric, reported=50.0, remeasured=None,
        tolerance=1.0, source="Table 1", need=Need(weights=weights, data="as published"),
    )  # fmt: skip


def needs(row, entries, root):
    return [released_file("weights", entries[row.need.weights], root)]


def load(weights):
    return Released(None, None, image_size=8)


def measured(world, benchmark, wanted, **recipe):
    return run_benchmark(
        wanted, SimpleNamespace(**vars(world.recipe) | recipe), {"task": benchmark, "caption": benchmark}, needs, load
    )


def pictures(count, broken=()):
    return [Record(f"{i}.jpg", bytes if i in broken else encoded) for i in range(count)]


def shapes(seen):
    return lambda run, released, samples, images: (seen.append(tuple(images.shape)), [True] * len(samples))[1]


def test_pictures_are_read_a_part_at_a_time_and_rows_of_another_measure_share_the_scores(world):
    seen = []
    scores = {"a": 0.25, "b": 0.5}
    benchmark = Benchmark(lambda run: pictures(7), itself, shapes(seen), lambda *given: scores, chunk=3)
    assert measured(world, benchmark, row("task/a@p")) == 25.0 and measured(world, benchmark, row("task/b@p")) == 50.0
    assert seen == [(3, 1, 3, 8, 8), (3, 1, 3, 8, 8), (1, 1, 3, 8, 8)]
    measured(world, benchmark, row("task/a@other"))
    assert len(seen) == 6, "another protocol is another pass"


@pytest.mark.parametrize(("count", "broken", "dropped"), [(3000, (5, 1500, 2999), 3), (3000, (5, 6, 7, 9), None)])
def test_a_thousandth_of_the_pictures_may_be_broken(world, count, broken, dropped):
    benchmark = Benchmark(lambda run: pictures(count, broken), itself, shapes([]), accuracy(lambda record: record.id))
    if dropped is None:
        with pytest.raises(UserError, match=r"coco: 4 broken pictures of 3000: 5\.jpg \(no picture.*, 6\.jpg .*7\.jpg"):
            measured(world, benchmark, row("task/accuracy@p"))
        return
    assert measured(world, benchmark, row("task/accuracy@p")) == 0.0
    read = benchmarks.predicted(
        benchmarks.Run(None, "", "", "", world.root), load(None), benchmark, pictures(count, broken)
    )
    assert [len(part) for part in read] == [count - dropped] * 2


def test_the_picture_that_is_broken_is_named_not_its_sample(world):
    pairs = [SimpleNamespace(pictures=pictures(2, broken=(1,)))]
    benchmark = Benchmark(lambda run: pairs, benchmarks.both_pictures, shapes([]), accuracy(lambda pair: True))
    with pytest.raises(UserError, match=r"1 broken pictures of 1: 1\.jpg \(no picture"):
        measured(world, benchmark, row("task/accuracy@p"))


def test_what_is_here_is_told_from_what_is_missing_and_nothing_is_read_at_another_scale(world):
    benchmark = Benchmark(None, None, None, None)
    with pytest.raises(
        UserError, match=r"SCALE=paper .*data \S+coco \(as published\): here; weights \S+w\.pth .*: here"
    ):
        measured(world, benchmark, row("task/a@p"), scale="mini")
    (world.root / "weights" / "w.pth").unlink()
    with pytest.raises(
        UserError, match=r"coco \(as published\): here; weights \S+w\.pth \(https://example.*\): missing"
    ):
        measured(world, benchmark, row("task/a@p"))
    with pytest.raises(UserError, match=r"vqav2 \(as published\): missing; "):
        measured(world, benchmark, row("task/a@p", "VQAv2"))
    with pytest.raises(UserError, match=r"an entry 'other' in .*manifest\.yaml"):
        measured(world, benchmark, row("task/a@p", weights="other"))


def test_a_file_of_the_manifest_lies_under_its_published_name(world):
    entries = load_manifest(world.recipe.manifest)
    assert released_file("weights", entries["w"], world.root).place == world.root / "weights" / "w.pth"


def test_captions_of_mscoco_are_scored_and_those_of_nocaps_are_written_once_for_all_its_domains(world):
    karpathy(world.root / "coco", [["a red circle on a table"], ["a blue square on a chair"]])
    nocaps(world.root / "nocaps")
    calls = []

    def write(run, released, records, images):
        calls.append(run.dataset)
        return [text for record in records for text in (record.captions[:1] or [f"caption {record.id}"])]

    benchmark = benchmarks.captioning(write)
    assert measured(world, benchmark, row("caption/bleu4@ptb")) == pytest.approx(100.0)
    assert measured(world, benchmark, row("caption/cider@ptb")) > 0
    for domain in ("in-domain", "overall"):
        with pytest.raises(UserError, match="the server of NoCaps scores them") as message:
            measured(world, benchmark, row("caption/cider@nocaps-server", "NoCaps", f"val {domain}"))
        assert written(message) == [{"image_id": n, "caption": f"caption {n}"} for n in (7, 8)]
    assert calls == ["MSCOCO", "NoCaps"]
