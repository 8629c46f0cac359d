"""Shards feed every rank and worker its own samples, in an order that follows from the seed, from any position."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from shared.core.errors import UserError
from shared.data.webdataset import Shards, count_samples, read_shard

webdataset = pytest.importorskip("webdataset")


def picture(number):
    content = io.BytesIO()
    Image.new("RGB", (9, 8), (number % 256, number // 256, 7)).save(content, "PNG")
    return content.getvalue()


def write_shard(path, numbers, broken=()):
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            png = b"no picture" if number in broken else picture(number)
            for name, content in ((f"{number:06d}.png", png), (f"{number:06d}.txt", f"number {number}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    for shard in range(4):
        write_shard(tmp_path / f"{shard}.tar", range(shard * 10, shard * 10 + 10))
    return tmp_path


def encode(image, caption):
    return image, torch.tensor(int(caption.split()[1]))


def shards(folder, **changes):
    return Shards(**{"folder": folder, "size": 8, "encode": encode, "batch": 4, "steps": 20, "seed": 1} | changes)


def numbers(loader, items):
    reader = iter(loader)
    return [next(reader)[1].tolist() for _ in range(items)]


def test_an_epoch_shows_every_sample_once_with_its_own_picture_and_the_next_another_order(folder):
    reader = iter(shards(folder).loader())
    seen = []
    for _ in range(20):
        images, found = next(reader)
        assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
        assert images[:, 0, 0, 0].tolist() == found.tolist(), "caption and picture belong together"
        seen += found.tolist()
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40)) and seen[:40] != seen[40:]
    assert numbers(shards(folder, seed=2).loader(), 10) != [seen[i : i + 4] for i in range(0, 40, 4)]


def test_ranks_and_accumulation_share_the_batch_without_overlap(folder):
    parts = [numbers(shards(folder, rank=rank, ranks=2, accumulate=2).loader(), 20) for rank in range(2)]
    assert all(len(item) == 1 for part in parts for item in part)
    assert sorted(n for part in parts for item in part for n in item) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trained", [1, 7, 13])
def test_from_any_position_the_rest_is_the_same(folder, workers, trained):
    whole = numbers(shards(folder).loader(workers), 20)
    loader = shards(folder).loader(workers)
    reader = iter(loader)
    for _ in range(trained + 2):  # the reader is ahead of what is trained
        next(reader)
    state = json.loads(json.dumps(loader.position(trained)))
    state["consumed"] = {int(key): value for key, value in state["consumed"].items()}
    resumed = shards(folder).loader(workers)
    resumed.seek(state)
    assert numbers(resumed, 20 - trained) == whole[trained:]


def test_shards_before_the_position_are_not_opened(folder, monkeypatch):
    from shared.data import webdataset as module

    opened = []
    read = module.read_shard
    monkeypatch.setattr(module, "read_shard", lambda path, count: opened.append(path.name) or read(path, count))
    loader = shards(folder).loader()
    loader.seek({"items": 8, "consumed": {0: 32}, "workers": 0, "read": 32, "dropped": {}})
    numbers(loader, 1)
    assert len(opened) == 1


def test_broken_samples_are_counted_exactly_also_over_a_resume(tmp_path):
    write_shard(tmp_path / "a.tar", range(20), broken={3, 14, 15, 16})
    loader = shards(tmp_path, max_dropped=0.5).loader()
    seen = numbers(loader, 2)
    resumed = shards(tmp_path, max_dropped=0.5).loader()
    resumed.seek(loader.position(2))
    seen += numbers(resumed, 2)
    state = resumed.position(4)
    assert sorted(n for item in seen for n in item) == [n for n in range(20) if n not in (3, 14, 15, 16)]
    # a broken one behind the last that was trained is not read yet
    assert state["read"] == 16 + sum(state["dropped"].values()) and sum(state["dropped"].values()) in (2, 3, 4)
    numbers(resumed, 5)
    assert sum(resumed.position(8)["dropped"].values()) >= 4


def test_too_many_broken_samples_stop_the_run_and_are_named(tmp_path):
    write_shard(tmp_path / "a.tar", range(20), broken={4, 5})
    with pytest.raises(UserError, match=r"2 of \d+ samples cannot be used, more than 0.1 %.*a.tar/00000[45]"):
        numbers(shards(tmp_path).loader(), 20)


def test_too_few_shards_for_the_readers_are_refused(folder):
    with pytest.raises(UserError, match="4 shards do not feed 6 readers"):
        shards(folder, ranks=2, rank=0).loader(workers=3)


def test_other_workers_at_a_resume_are_refused(folder):
    loader = shards(folder).loader(1)
    with pytest.raises(UserError, match="workers was 0"):
        loader.seek(shards(folder).loader(0).position(0))


def test_a_cut_or_changed_shard_and_an_empty_folder_are_one_line_each(folder, tmp_path):
    content = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(content[: len(content) // 3 + 100])
    with pytest.raises(UserError, match=r"0\.tar"):
        numbers(shards(folder).loader(), 20)
    with pytest.raises(UserError, match="no shards"):
        shards(tmp_path / "nothing")


def test_the_digest_tells_other_shards(folder):
    before = shards(folder).digest
    write_shard(folder / "3.tar", range(30, 41))
    assert shards(folder).digest != before and count_samples(folder / "3.tar") == 11


def test_a_shard_that_webdataset_wrote_is_read_as_webdataset_reads_it(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(7):
            writer.write({"__key__": f"deep/{number:03d}", "seg.PNG": picture(number), "txt": f"number {number}"})
    theirs = list(webdataset.WebDataset([str(path)], shardshuffle=False, nodesplitter=None, workersplitter=None))
    assert count_samples(path) == 7
    ours = read_shard(path, 7)
    assert [{k: v for k, v in sample.items() if k != "__url__"} for sample in ours] == [
        {k: v for k, v in sample.items() if not k.startswith("__") or k == "__key__"} for sample in theirs
    ]


def test_two_files_of_one_sample_and_suffix_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("1.png", "1.PNG"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"a\.tar: .*1\.PNG.*get the shard again$"):
        read_shard(tmp_path / "a.tar", 1)
