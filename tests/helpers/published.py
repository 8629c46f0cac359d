"""Tiny sets in their published layouts, for the tests of the data layer."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(colour=(200, 30, 30), size=(20, 16), form="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, form, **options)
    return file.getvalue()


def write_parquet(path, rows, metadata=None, image_name="image", **columns):
    table = pa.table({image_name: [r[0] for r in rows], "label": [r[1] for r in rows], **columns})
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return path


def make_folder(root, split, classes, per_class):
    for c, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for i in range(per_class):
            (root / split / name / f"{i}.jpg").write_bytes(encoded((40 * c, 10 * i, 90)))


def entry(i, split="train", **more):
    row = {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f"picture {i}"}, {"raw": " two\nlines "}]}
    return row | more


def make_karpathy(root, rows, tar=False, folder="", dataset="toy"):
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps({"dataset": dataset, "images": rows}))
    files = {
        (f"{r['filepath']}/" if "filepath" in r else "") + r["filename"]: encoded((9, 9, i)) for i, r in enumerate(rows)
    }
    if tar:
        with tarfile.open(root / "images.tar", "w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in files.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def emoji(name, category, subcategory, order, added="1.0", google=True, twitter=True):
    return {
        "name": name, "category": category, "subcategory": subcategory, "sort_order": order, "added_in": added,
        "image": f"{order:04x}.png", "has_img_google": google, "has_img_twitter": twitter,
    }  # fmt: skip


ANIMALS, FOOD = "Animals & Nature", "Food & Drink"
EMOJI = [
    emoji("CAT FACE", ANIMALS, "animal-mammal", 1),
    emoji("CAT", ANIMALS, "animal-mammal", 2),
    emoji("BLACK CAT", ANIMALS, "animal-mammal", 3),
    emoji("FOX FACE", ANIMALS, "animal-mammal", 4, "3.0"),
    emoji("OWL", ANIMALS, "animal-bird", 5),
    emoji("RED APPLE", FOOD, "food-fruit", 6),
    emoji("GRAPES", FOOD, "food-fruit", 7),
    emoji("BLACK SCISSORS", "Objects", "office", 8),
    emoji("ONLY GOOGLE BIRD", ANIMALS, "animal-bird", 9, twitter=False),
    emoji("KEYCAP 1", "Symbols", "keycap", 10),
    emoji("Wales Flag", "Flags", "subdivision-flag", 11),
    emoji("EMOJI MODIFIER FITZPATRICK TYPE-3", "Component", "skin-tone", 12),
    emoji("GRINNING FACE", "Smileys & Emotion", "face-smiling", 13),
    emoji("CLOCK FACE ONE OCLOCK", "Travel & Places", "time", 14),
]
EMOJI_NOUNS = ["cat", "owl", "red apple", "grapes", "scissors", "fox"]


def sprite_png(shade, side=64):
    picture = np.zeros((side, side, 4), np.uint8)
    picture[side // 4 : -side // 4, side // 4 : -side // 4] = (shade, 255 - shade, shade // 2, 255)
    file = io.BytesIO()
    Image.fromarray(picture, "RGBA").save(file, "PNG")
    return file.getvalue()


def emoji_package(folder, vendor, table=EMOJI, leave_out=()):
    files = {"package/emoji.json": json.dumps(table).encode()}
    for row in table:
        shade = 10 * row["sort_order"] + (100 if vendor == "twitter" else 0)
        files[f"package/img/{vendor}/64/{row['image']}"] = sprite_png(shade)
    path = folder / f"emoji-datasource-{vendor}-16.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            if name not in leave_out:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path
