"""The account of what was read: k injected faults are counted as exactly k with their reasons, and too many stop."""

import io
import json
import random
import tarfile

import corpus
import pytest

from shared.core.errors import UserError
from shared.data.readers import folder_records, karpathy_records, parquet_records, read_pictures

MANY = 300
FAULTS = {  # kind of fault: (what it makes of a picture's bytes, the reason it is counted under)
    "cut in half": (corpus.half, "cut short"),
    "cut, with an end put on it": (lambda content: corpus.half(content) + b"\xff\xd9", "cut short"),
    "nothing": (lambda _: b"", "no picture"),
    "a web page": (lambda _: b"<html>404</html>", "no picture"),
    "a bomb": (lambda _: corpus.png(60_000, 60_000, bytes(99)), "too large"),
    "numbers without a white": (lambda _: corpus.drawn(0.5, form="TIFF", mode="F"), "unknown range"),
    "a thread": (lambda _: corpus.png(200_000, 1, bytes(600_001)), "sides too unequal"),
}


def contents(seed):
    """{number: bytes} of MANY pictures with every kind of fault k times among them, and {number: reason}."""
    chance = random.Random(seed)
    spoiled = chance.sample(range(MANY), 3 * len(FAULTS))
    reasons, pictures = {}, {}
    for number in range(MANY):
        pictures[number] = corpus.drawn((number % 256, number // 256, 90), (24, 24))
    for place, number in enumerate(spoiled):
        spoil, reason = list(FAULTS.values())[place % len(FAULTS)]
        pictures[number], reasons[number] = spoil(pictures[number]), reason
    return pictures, reasons


def as_folder(root, pictures):
    (root / "train" / "cat").mkdir(parents=True)
    for number, content in pictures.items():
        (root / "train" / "cat" / f"{number:03d}.jpg").write_bytes(content)
    return lambda: folder_records(root, "train")


def as_parquet(root, pictures):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    rows = {"image": list(pictures.values()), "label": ["cat"] * MANY, "key": [f"{n:03d}.jpg" for n in pictures]}
    pq.write_table(pa.table(rows), root / "train.parquet")
    return lambda: parquet_records(root / "train.parquet")


def as_karpathy(root, pictures):
    root.mkdir()
    rows = [{"filename": f"{n:03d}.jpg", "split": "train", "sentences": [{"raw": f"no {n}"}]} for n in pictures]
    (root / "dataset.json").write_text(json.dumps({"images": rows}))
    (root / "images").mkdir()
    for number, content in pictures.items():
        (root / "images" / f"{number:03d}.jpg").write_bytes(content)
    return lambda: karpathy_records(root)["train"]


def as_karpathy_tar(root, pictures):
    records = as_karpathy(root, {})
    rows = [{"filename": f"{n:03d}.jpg", "split": "train", "sentences": [{"raw": f"no {n}"}]} for n in pictures]
    (root / "dataset.json").write_text(json.dumps({"images": rows}))
    with tarfile.open(root / "images.tar", "w") as archive:
        for number, content in pictures.items():
            member = tarfile.TarInfo(f"{number:03d}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return records


FORMATS = {"folder": as_folder, "parquet": as_parquet, "karpathy": as_karpathy, "karpathy in a tar": as_karpathy_tar}


def account(records, **options):
    return read_pictures("set", records(), 8, max_pixels=1_000_000, max_dropped=1.0, **options)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", FORMATS)
def test_every_injected_fault_is_counted_once_with_its_reason_and_nothing_else(form, seed, tmp_path):
    pictures, reasons = contents(seed)
    kept, images, coverage = account(FORMATS[form](tmp_path / "set", pictures))
    dropped = {int(id[-7:-4]): reason.split(":")[0] for id, reason in coverage.dropped.items()}
    assert dropped == reasons and len(coverage.dropped) == 3 * len(FAULTS)
    assert (coverage.expected, coverage.read) == (MANY, MANY - len(reasons)) and len(kept) == len(
        images
    ) == coverage.read
    assert coverage.reasons == {
        "cut short": 6,
        "no picture": 6,
        "too large": 3,
        "unknown range": 3,
        "sides too unequal": 3,
    }
    reds = [int(record.id[-7:-4]) % 256 for record in kept]  # each picture stayed with its id
    assert abs(images[:, 0].mean(axis=(1, 2)) - reds).max() < 4


def test_missing_files_and_captions_are_counted_as_well(tmp_path):
    pictures, reasons = contents(0)
    records = as_karpathy(tmp_path / "set", pictures)
    whole = [number for number in pictures if number not in reasons]
    for number in whole[:4]:
        (tmp_path / "set" / "images" / f"{number:03d}.jpg").unlink()
    table = json.loads((tmp_path / "set" / "dataset.json").read_text())
    for number in whole[4:9]:
        table["images"][number]["sentences"] = [{"raw": " \u2028 "}]
    table["images"][whole[9]]["filename"] = "../000.jpg"
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(table))
    coverage = account(records)[2]
    assert len(coverage.dropped) == len(reasons) + 10
    found = coverage.reasons
    assert (found["the file is missing"], found["it has no caption"]) == (4, 5)
    assert found["its path leads out of the folder"] == 1


def test_a_file_that_may_not_be_read_is_a_reason_and_not_a_crash(tmp_path, monkeypatch):
    from pathlib import Path

    records = as_folder(tmp_path / "set", {n: corpus.drawn() for n in range(3)})
    plain = Path.read_bytes

    def read(path):
        if path.name == "001.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert dict(account(records)[2].dropped) == {"train/cat/001.jpg": "unreadable: Permission denied"}


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_no_picture_by_its_size_is_not_read(form, tmp_path, monkeypatch):
    import sys

    from shared.data import readers

    monkeypatch.setattr(sys.modules[__name__], "MANY", 3)
    monkeypatch.setattr(readers, "LARGEST_FILE", 5_000)
    pictures = {0: corpus.drawn(), 1: corpus.drawn() + bytes(5_000), 2: corpus.drawn()}
    (reason,) = account(FORMATS[form](tmp_path / "set", pictures))[2].dropped.values()
    assert reason in (f"too large: {len(pictures[1]):,} bytes", f"the archive holds it as {len(pictures[1]):,} bytes")


# --- the digest


def few():
    return {n: corpus.drawn((n, 9, 9), form="PNG") for n in range(6)}


def reordered(items):
    return dict(sorted(items.items(), key=lambda item: (item[0] * 5) % 7))


@pytest.mark.parametrize("form", FORMATS)
def test_the_digest_does_not_depend_on_the_order_on_disk(form, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[__name__], "MANY", 6)
    first, second = few(), reordered(few())
    assert list(first) != list(second)
    digests = [account(FORMATS[form](tmp_path / str(i), each))[2].digest for i, each in enumerate((first, second))]
    assert digests[0] == digests[1] and len(digests[0]) == 64


@pytest.mark.parametrize("form", FORMATS)
def test_the_digest_changes_with_any_byte_that_was_read(form, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[__name__], "MANY", 6)
    seen = {account(FORMATS[form](tmp_path / "as it was", few()))[2].digest}
    for number in range(6):  # a byte behind the end of a PNG changes no pixel
        each = few()
        each[number] += b"\0"
        seen.add(account(FORMATS[form](tmp_path / str(number), each))[2].digest)
    assert len(seen) == 7


def test_the_digest_changes_with_ids_labels_captions_and_with_what_was_left_out(tmp_path):
    def digest(name, change=lambda rows: None, spoil=None):
        as_karpathy(tmp_path / name, few())
        if spoil is not None:
            (tmp_path / name / "images" / f"{spoil:03d}.jpg").write_bytes(b"")
        table = json.loads((tmp_path / name / "dataset.json").read_text())
        change(table["images"])
        (tmp_path / name / "dataset.json").write_text(json.dumps(table))
        return account(lambda: karpathy_records(tmp_path / name)["train"])[2].digest

    def renamed(rows):
        rows[0]["filename"] = "./000.jpg"

    changes = {
        "none": digest("none"),
        "id": digest("id", renamed),
        "category": digest("category", lambda rows: rows[0].update(category="cat")),
        "caption": digest("caption", lambda rows: rows[0].update(sentences=[{"raw": "another"}])),
        "two captions": digest("two", lambda rows: rows[0].update(sentences=[{"raw": "no"}, {"raw": "0"}])),
        "dropped": digest("dropped", spoil=0),
        "another dropped": digest("another", spoil=1),
    }
    assert len(set(changes.values())) == len(changes)


def test_an_id_cannot_pose_as_two(tmp_path):
    """Ids are strangers' words: one with a line break must not read as the account of another set."""
    from shared.data.readers import Record

    content = corpus.drawn()
    one = [Record("a", lambda: content), Record("b", lambda: content)]
    line = account(lambda: one[:1])[2].digest
    for id in ("a\nb", 'a"]\n["b', f"a\n{line}\nb"):
        assert account(lambda id=id: [Record(id, lambda: content)])[2].digest != account(lambda: one)[2].digest


# --- too many


@pytest.mark.parametrize(("bad", "stops"), [(0, False), (1, False), (2, True)])
def test_more_than_a_thousandth_stops_the_run(bad, stops, tmp_path):
    from shared.data.readers import Record

    content = corpus.png(8, 8, (b"\0" + bytes([7] * 8)) * 8, 8, 0)
    records = [Record(f"{n}.png", lambda n=n: b"" if n < bad else content) for n in range(1000)]
    if not stops:
        assert read_pictures("set", records, 8)[2].read == 1000 - bad
        return
    with pytest.raises(UserError, match=r"^set: 2 of 1000 pictures cannot be read .* more than 0\.1%: get the files"):
        read_pictures("set", records, 8)


def test_the_line_names_the_first_few_counts_by_reason_and_tells_the_way_out(tmp_path):
    pictures, _ = contents(0)
    records = as_folder(tmp_path / "set", pictures)
    with pytest.raises(UserError) as caught:
        read_pictures("set", records(), 8, max_pixels=1_000_000)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 700
    counts = "6 cut short, 6 no picture, 3 too large, 3 unknown range, 3 sides too unequal"
    assert line.startswith("set: 21 of 300 pictures cannot be read (")
    assert sorted(line[line.index("(") + 1 : line.index(";")].split(", ")) == sorted(counts.split(", "))
    assert line.count("train/cat/") == 3
    assert line.endswith("more than 0.1%: get the files again, or allow it with max_dropped=0.07")
    assert read_pictures("set", records(), 8, max_pixels=1_000_000, max_dropped=0.07)[2].read == 279
