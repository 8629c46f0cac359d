"""Published formats in small: every broken picture counted, every missing file named, hostile ones refused."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from published import encoded, entry, make_folder, make_karpathy, write_parquet

from shared.core.errors import UserError
from shared.data.images import PictureError, decode_image, fitted_image, square
from shared.data.readers import folder_records, karpathy_records, parquet_records, read_pictures


def noise(seed=0, size=(64, 48)):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


# --- one picture


def test_a_picture_becomes_rgb_whatever_its_mode():
    assert decode_image(encoded((10, 200, 90), form="PNG"))[3, 3].tolist() == [10, 200, 90]
    assert decode_image(encoded(77, form="PNG", mode="L"))[0, 0].tolist() == [77, 77, 77]
    assert decode_image(encoded(77 * 256, form="PNG", mode="I;16"))[0, 0].tolist() == [77, 77, 77]
    assert decode_image(encoded(77 * 256, form="TIFF", mode="I;16B"))[0, 0].tolist() == [77, 77, 77]
    red = decode_image(encoded((0, 255, 255, 0), form="JPEG", mode="CMYK"))[0, 0]
    assert np.abs(red - np.array([255, 0, 0])).max() < 4


@pytest.mark.parametrize(("mode", "reason"), [("I", "32-bit numbers"), ("F", "floating-point numbers")])
def test_a_picture_whose_white_nobody_knows_is_refused(mode, reason):
    with pytest.raises(PictureError, match=f"unknown range: pixels are {reason}"):
        decode_image(encoded(77, form="TIFF", mode=mode))


def test_transparency_lies_over_white():
    assert decode_image(encoded((0, 0, 0, 0), form="PNG", mode="RGBA"))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=1)
    assert decode_image(file.getvalue())[0, 0].tolist() == [255, 255, 255]


def test_a_picture_is_turned_upright_by_its_exif_tag():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(encoded(size=(20, 16), exif=exif)).shape == (20, 16, 3)


def test_a_cut_jpeg_is_refused():
    whole = noise()
    assert decode_image(whole).shape == (48, 64, 3)
    with pytest.raises(PictureError, match="truncated"):
        decode_image(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "options",
    [{}, {"restart_marker_blocks": 4}, {"quality": 100, "subsampling": 0}],
    ids=["plain", "restarts", "full colour"],
)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_cut_jpeg_with_an_end_put_on_it_is_refused_and_a_whole_grey_one_is_not(mode, share, options):
    image = Image.open(io.BytesIO(noise())).convert(mode)
    image.paste(127 if mode == "CMYK" else 128, (0, 24, 64, 48))  # what libjpeg fills gaps with; it ends the picture
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    whole = file.getvalue()
    assert decode_image(whole).shape == (48, 64, 3)
    with pytest.raises(PictureError, match=r"^cut short"):
        decode_image(whole[: int(share * len(whole))] + b"\xff\xd9")


def test_a_progressive_jpeg_is_never_half_grey():
    file = io.BytesIO()
    Image.open(io.BytesIO(noise())).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    with pytest.raises(PictureError, match=r"^cut short"):
        decode_image(whole[: len(whole) // 2])
    first = whole.index(b"\xff\xc4", whole.index(b"\xff\xda"))  # the end of the first scan
    with pytest.raises(PictureError, match=r"^cut short"):
        decode_image(whole[: first - 40] + b"\xff\xd9")


def test_a_jpeg_whose_tail_was_never_written_is_refused():
    whole = noise()
    with pytest.raises(PictureError, match=r"^cut short"):
        decode_image(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows, depth=8, colour=2, interlaced=0, before=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    ("depth", "colour", "bits"), [(8, 2, 24), (1, 0, 1), (16, 0, 16), (8, 4, 16), (8, 6, 32), (4, 0, 4), (16, 2, 48)]
)
def test_a_png_with_fewer_rows_than_it_promises_is_refused_and_a_black_one_is_not(depth, colour, bits):
    row = bytes(1 + -(-13 * bits // 8))
    assert decode_image(png(13, 40, row * 40, depth, colour)).shape == (40, 13, 3)
    for rows in (39, 20, 1):
        with pytest.raises(PictureError, match=r"^cut short"):
            decode_image(png(13, 40, row * rows, depth, colour))


def test_interlaced_rows_are_counted_as_well():
    whole = bytes(sum((1 + 3 * w) * h for w, h in [(2, 2), (2, 2), (4, 2), (3, 4), (7, 3), (6, 7), (13, 6)]))
    assert decode_image(png(13, 13, whole, interlaced=1)).shape == (13, 13, 3)
    with pytest.raises(PictureError, match=r"^cut short"):
        decode_image(png(13, 13, whole[:-1], interlaced=1))


def test_a_palette_that_lies_is_a_reason_and_not_a_crash():
    lying = png(4, 4, b"\0\1\1\1\1" * 4, 8, 3, before=chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", bytes(300)))
    with pytest.raises(PictureError, match=r"^broken: ValueError, palette index out of range"):
        decode_image(lying)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [8_100, 9_600, 12_000, 60_000])
def test_a_png_bomb_is_refused_from_its_header(side, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("a pixel was decoded"))
    with pytest.raises(PictureError, match="more than 64,000,000"):
        decode_image(png(side, side, bytes(999)))


def test_the_pixel_limit_can_be_set():
    with pytest.raises(PictureError, match="20 x 16 pixels are more than 319"):
        decode_image(encoded(), max_pixels=319)
    assert decode_image(encoded(), max_pixels=320).shape == (16, 20, 3)


@pytest.mark.parametrize("content", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_refused(content):
    with pytest.raises(PictureError):
        decode_image(content)


def test_truncated_pictures_are_never_let_through_by_pillows_flag():
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("size", [(50, 33), (33, 50), (31, 31), (24, 24), (97, 24)])
def test_squares_equal_torchvisions_resize_and_centre_crop(size):
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    image = Image.open(io.BytesIO(noise(1, size))).convert("RGB")
    theirs = CenterCrop(24)(Resize(24, InterpolationMode.BICUBIC)(image))
    assert np.array_equal(np.asarray(square(image, 24)), np.asarray(theirs))


def unusual_pictures():
    """{what: encoded bytes of 40 x 26} of pictures that the released codes and ours decode differently."""
    rng = np.random.default_rng(5)
    colours = Image.fromarray(rng.integers(0, 256, (26, 40, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = Image.fromarray(rng.integers(0, 256, (26, 40, 4), dtype=np.uint8), "RGBA")
    deep = Image.fromarray(rng.integers(0, 60_000, (26, 40), dtype=np.uint16))
    made = {
        "turned": (colours, "JPEG", {"exif": turned}),
        "alpha": (alpha, "PNG", {}),
        "palette": (colours.quantize(16), "PNG", {}),
        "bilevel": (colours.convert("1"), "PNG", {}),
        "sixteen bits": (deep, "PNG", {}),
        "ink": (colours.convert("CMYK"), "JPEG", {}),
    }
    found = {}
    for what, (picture, kind, options) in made.items():
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found[what] = buffer.getvalue()
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["CLIP", "ALBEF, BLIP"])
@pytest.mark.parametrize("what", unusual_pictures())
def test_benchmarks_see_pictures_as_the_released_codes_do(what, whole):
    from torchvision import transforms as T

    content, bicubic = unusual_pictures()[what], T.InterpolationMode.BICUBIC
    picture = Image.open(io.BytesIO(content))
    if whole:
        theirs = T.Resize((16, 16), bicubic)(picture.convert("RGB"))
    else:
        theirs = T.Compose([T.Resize(16, bicubic), T.CenterCrop(16)])(picture).convert("RGB")
    ours = fitted_image(content, 16, whole=whole, released=True)
    assert (ours == np.asarray(theirs).transpose(2, 0, 1)).all()
    if what in ("turned", "alpha", "sixteen bits"):
        assert (fitted_image(content, 16, whole=whole) != ours).any(), "a user's own pictures are seen otherwise"


def test_a_thread_like_picture_does_not_blow_up_when_it_is_resized():
    with pytest.raises(PictureError, match="too unequal"):
        square(Image.new("RGB", (30_000, 1)), 224, max_pixels=64_000_000)


# --- parquet


ONE_CLASS = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a"]}}}})}


def test_parquet_rows_have_keys_labels_and_bytes(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", [(encoded(), "cat"), (encoded(), "fire_engine")], key=["a", "b"])
    records = parquet_records(path)
    assert [(r.id, r.label) for r in records] == [("train/a", "cat"), ("train/b", "fire engine")]
    kept, images, coverage = read_pictures("set", records, 8)
    assert images.shape == (2, 3, 8, 8) and images.dtype == np.uint8 and len(kept) == 2
    assert (coverage.expected, coverage.read, coverage.share, dict(coverage.dropped)) == (2, 2, 1.0, {})


def test_parquet_structs_and_numbered_labels_are_read_as_hugging_face_writes_them(tmp_path):
    names = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    rows = [({"bytes": encoded(), "path": "x.jpg"}, 1), ({"bytes": encoded(), "path": None}, 0)]
    records = parquet_records(write_parquet(tmp_path / "t.parquet", rows, {"huggingface": json.dumps(names)}))
    assert [r.label for r in records] == ["dog", "cat"] and decode_image(records[0].read()).shape == (16, 20, 3)
    plain = parquet_records(write_parquet(tmp_path / "u.parquet", rows))
    assert [r.label for r in plain] == ["1", "0"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write_parquet(f / "v.parquet", [(b"", None)]), "row 0 has no label"),
        (lambda f: write_parquet(f / "b.parquet", [(b"", "a"), (b"", "_ ")]), "row 1 has no label"),
        (lambda f: f / "train.parquet", r"no file .*train\.parquet: set data_root"),
        (lambda f: (f / "x.parquet").write_bytes(b"junk") and f / "x.parquet", "no readable parquet"),
        (lambda f: write_parquet(f / "y.parquet", [(b"", 1)], image_name="pic"), "no column 'image'.*has pic, label"),
        (lambda f: write_parquet(f / "z.parquet", [(b"", "a")] * 2, key=["k", "k"]), "'z/k' occurs twice"),
        (lambda f: write_parquet(f / "w.parquet", [(b"", 5)], ONE_CLASS), "label 5, but the file names 1"),
    ],
)  # fmt: skip
def test_an_unusable_parquet_file_is_named_with_the_way_out(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        parquet_records(make(tmp_path))


# --- image folders


def test_an_image_folder_is_read_in_the_order_of_its_paths(tmp_path):
    make_folder(tmp_path, "train", ["dog", "ice_cream"], 2)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no picture")
    records = folder_records(tmp_path, "train")
    assert [r.id for r in records] == [f"train/{c}/{i}.jpg" for c in ("dog", "ice_cream") for i in range(2)]
    assert records[2].label == "ice cream"


def test_a_class_folder_without_a_name_is_refused(tmp_path):
    make_folder(tmp_path, "train", ["cat", "__"], 1)
    with pytest.raises(UserError, match="__' is no name of a class: rename the folder"):
        folder_records(tmp_path, "train")


def test_a_missing_or_empty_image_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*train: set data_root .*train/CLASS/PICTURE\.jpg"):
        folder_records(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no picture in"):
        folder_records(tmp_path, "train")


# --- coverage


def spoiled_folder(root, good, cut=(), missing=()):
    make_folder(root, "train", ["a"], good)
    records = folder_records(root, "train")
    for i in cut:
        path = root / "train" / "a" / f"{i}.jpg"
        path.write_bytes(noise(i)[:900])
    return records


def test_corrupt_pictures_are_dropped_counted_and_named(tmp_path):
    records = spoiled_folder(tmp_path, 20, cut=(3, 7))
    kept, images, coverage = read_pictures("set", records, 8, max_dropped=0.1)
    assert (coverage.expected, coverage.read, coverage.share) == (20, 18, 0.9) and len(kept) == len(images) == 18
    assert set(coverage.dropped) == {"train/a/3.jpg", "train/a/7.jpg"}
    assert all("truncated" in reason for reason in coverage.dropped.values())
    greens = [10 * int(record.id.split("/")[-1].split(".")[0]) for record in kept]
    assert np.abs(images[:, 1].mean(axis=(1, 2)) - greens).max() < 4 and 30 not in greens  # each its own picture


def test_too_many_corrupt_pictures_are_an_error_that_names_them_and_the_way_out(tmp_path):
    records = spoiled_folder(tmp_path, 20, cut=(3, 7))
    with pytest.raises(
        UserError, match=r"set: 2 of 20 .*\(2 cut short; train/a/3\.jpg: .*truncated.*0\.1%.*max_dropped=0\.1$"
    ):
        read_pictures("set", records, 8)
    assert read_pictures("set", records, 8, max_dropped=0.1)[2].read == 18


def test_no_picture_at_all_is_an_error():
    with pytest.raises(UserError, match="set: there are no pictures to read"):
        read_pictures("set", [], 8)


def test_the_coverage_digest_follows_the_bytes_that_were_read(tmp_path):
    records = spoiled_folder(tmp_path, 5)
    first = read_pictures("set", records, 8)[2].digest
    assert read_pictures("set", records, 8)[2].digest == first
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(encoded((1, 2, 3)))
    assert read_pictures("set", records, 8)[2].digest != first


# --- Karpathy


@pytest.mark.parametrize(
    "layout",
    [{"tar": True}, {"folder": "images"}, {"folder": ""}, {"folder": "flickr30k-images", "dataset": "flickr30k"}],
)
def test_karpathy_splits_are_read_from_a_tar_or_from_any_published_folder(tmp_path, layout):
    rows = [entry(0), entry(1, "restval"), entry(2, "val"), entry(3, "test")]
    splits = karpathy_records(make_karpathy(tmp_path / "d", rows, **layout))
    assert {k: [r.id for r in v] for k, v in splits.items()} == {
        "train": ["0.jpg", "1.jpg"],
        "val": ["2.jpg"],
        "test": ["3.jpg"],
    }
    assert splits["train"][1].captions == ("picture 1", "two lines")
    assert read_pictures("k", splits["train"], 8)[2].share == 1.0


def test_the_coco_layout_has_its_folders_in_filepath(tmp_path):
    rows = [entry(0, filepath="train2014"), entry(1, "test", filepath="val2014")]
    splits = karpathy_records(make_karpathy(tmp_path / "d", rows) / "dataset.json")
    assert splits["test"][0].id == "val2014/1.jpg" and decode_image(splits["test"][0].read()).shape == (16, 20, 3)


def test_missing_pictures_and_captions_are_counted_as_dropped(tmp_path):
    rows = [entry(i) for i in range(6)]
    root = make_karpathy(tmp_path / "d", rows, tar=True)
    rows += [entry(6), entry(7) | {"sentences": []}]
    (root / "dataset.json").write_text(json.dumps({"images": rows}))
    _, _, coverage = read_pictures("k", karpathy_records(root)["train"], 8, max_dropped=0.5)
    assert dict(coverage.dropped) == {"6.jpg": "the archive has no such file", "7.jpg": "it has no caption"}


def test_a_path_in_the_json_cannot_leave_the_folder(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encoded())
    root = make_karpathy(tmp_path / "d", [entry(0)])
    rows = [entry(0), entry(1) | {"filename": "../secret.jpg"}, entry(2) | {"filename": str(tmp_path / "secret.jpg")}]
    (root / "dataset.json").write_text(json.dumps({"images": rows}))
    _, _, coverage = read_pictures("k", karpathy_records(root)["train"], 8, max_dropped=1.0)
    assert coverage.read == 1 and set(coverage.dropped.values()) == {"its path leads out of the folder"}


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encoded())
    kinds = {"0.jpg": tarfile.SYMTYPE, "1.jpg": tarfile.LNKTYPE, "2.jpg": tarfile.FIFOTYPE}
    root = make_karpathy(tmp_path / "d", [entry(i) for i in range(4)])
    with tarfile.open(root / "images.tar", "w") as archive:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.jpg")
            archive.addfile(member)
        member = tarfile.TarInfo("3.jpg")
        member.size = len(encoded())
        archive.addfile(member, io.BytesIO(encoded()))
    _, _, coverage = read_pictures("k", karpathy_records(root)["train"], 8, max_dropped=1.0)
    link, device = (f"the archive holds it as a {kind}" for kind in ("link", "device"))
    assert dict(coverage.dropped) == {"0.jpg": link, "1.jpg": link, "2.jpg": device} and coverage.read == 1


def test_a_cut_tar_is_an_error_that_names_it(tmp_path):
    root = make_karpathy(tmp_path / "d", [entry(i) for i in range(3)], tar=True)
    tar = root / "images.tar"
    tar.write_bytes(b"junk" * 300)
    with pytest.raises(UserError, match=r"images\.tar: no readable tar or zip archive"):
        karpathy_records(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no dataset\*\.json in .*set data_root"),
        ("{", "not in Karpathy's form"),
        ('{"images": [{"filename": "a.jpg"}]}', "not in Karpathy's form .KeyError: 'split'"),
        ('{"images": []}', "lists no images"),
        (
            '{"images": [{"filename": "a.jpg", "split": "train", "sentences": []}]}',
            r"no pictures \(looked for .*images\.tar",
        ),
    ],
)
def test_an_unusable_karpathy_set_is_named_with_the_way_out(tmp_path, content, message):
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message):
        karpathy_records(tmp_path)


def test_an_unknown_split_and_a_second_json_are_refused(tmp_path):
    root = make_karpathy(tmp_path / "d", [entry(0, "dev")])
    with pytest.raises(UserError, match="is in split 'dev'"):
        karpathy_records(root)
    (root / "dataset_coco.json").write_text("{}")
    with pytest.raises(UserError, match="2 of them"):
        karpathy_records(root)
