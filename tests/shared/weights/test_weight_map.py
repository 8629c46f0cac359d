"""Weight maps both ways, weight files of every kind read without running them, and cards held against models."""

import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from shared.core.errors import UserError
from shared.nn.positions import resample_square
from shared.weights.load import check_card, load_weights, save_weights
from shared.weights.manifest import Entry
from shared.weights.safe_load import read_header, read_tensors
from shared.weights.weight_map import Rule, carried_to, to_ours, to_published

MAP = {
    "embed.weight": "embedding.weight",
    ("layers.{}.q.weight", "layers.{}.k.weight", "layers.{}.v.weight"): "blocks.{}.attention.qkv.weight",
    "layers.{}.proj": Rule("blocks.{}.projection.weight", transpose=True),
    "stages.{}.{}.conv": "trunk.{}.parts.{}.weight",
    "layers.{}.mask": None,
    "version": None,
}


def published():
    torch.manual_seed(0)
    tensors = {"embed.weight": torch.randn(7, 3), "version": torch.tensor(1), "stages.2.10.conv": torch.randn(2, 2)}
    for layer in (0, 1, 11):
        tensors |= {f"layers.{layer}.{part}.weight": torch.randn(3, 3) for part in "qkv"}
        tensors[f"layers.{layer}.proj"] = torch.randn(3, 5)
        tensors[f"layers.{layer}.mask"] = torch.ones(2)
    return tensors


def test_a_map_renames_concatenates_transposes_and_drops():
    theirs = published()
    ours = to_ours(theirs, MAP)
    assert set(ours) == {"embedding.weight", "trunk.2.parts.10.weight"} | {
        f"blocks.{i}.{name}.weight" for i in (0, 1, 11) for name in ("attention.qkv", "projection")
    }
    stacked = torch.cat([theirs[f"layers.11.{part}.weight"] for part in "qkv"])
    assert torch.equal(ours["blocks.11.attention.qkv.weight"], stacked)
    assert torch.equal(ours["blocks.1.projection.weight"], theirs["layers.1.proj"].T)


def test_a_map_runs_backwards_without_loss():
    theirs = published()
    ours = to_ours(theirs, MAP)
    back = to_published(ours, MAP)
    kept = {key for key in theirs if "mask" not in key and key != "version"}
    assert set(back) == kept and all(torch.equal(back[key], theirs[key]) for key in kept)
    again = to_ours(back, MAP)
    assert set(again) == set(ours) and all(torch.equal(again[key], ours[key]) for key in ours)


def test_every_leftover_and_missing_key_is_listed_at_once():
    theirs = published()
    theirs["surprise"] = torch.ones(1)
    theirs["layers.x.proj"] = torch.ones(1)
    theirs["layers.01.proj"] = torch.ones(1)
    del theirs["layers.1.k.weight"], theirs["embed.weight"]
    with pytest.raises(UserError) as caught:
        to_ours(theirs, MAP)
    told = str(caught.value)
    assert "published keys without a row in the map: surprise, layers.x.proj, layers.01.proj" in told
    assert "published keys missing: embed.weight, layers.1.k.weight" in told and "\n" not in told


def test_keys_and_shapes_are_held_against_the_model():
    theirs = published()
    expected = {key: tensor.shape for key, tensor in to_ours(theirs, MAP).items()}
    to_ours(theirs, MAP, expected)
    del expected["embedding.weight"]
    expected["blocks.12.projection.weight"] = (5, 3)
    expected["blocks.0.projection.weight"] = (3, 5)
    with pytest.raises(UserError) as caught:
        to_ours(theirs, MAP, expected)
    told = str(caught.value)
    assert "keys that the model lacks: embedding.weight" in told
    assert "keys of the model without a weight: blocks.12.projection.weight" in told
    assert "other shapes: blocks.0.projection.weight (5, 3) for (3, 5)" in told


def test_dropped_keys_are_not_required():
    theirs = {key: tensor for key, tensor in published().items() if "mask" not in key and key != "version"}
    assert set(to_ours(theirs, MAP)) == set(to_ours(published(), MAP))


def test_the_way_back_is_as_strict():
    ours = to_ours(published(), MAP)
    ours["extra"] = torch.ones(1)
    del ours["embedding.weight"]
    with pytest.raises(UserError, match=r"without a row in the map: extra; our keys missing: embedding.weight"):
        to_published(ours, MAP)
    with pytest.raises(UserError, match=r"qkv: \(4, 2\) does not split into 3 equal parts"):
        to_published({"qkv": torch.ones(4, 2)}, {("q", "k", "v"): "qkv"})


def test_a_long_list_of_keys_is_cut_to_eight_and_counted():
    with pytest.raises(UserError, match=r"k0, k1, k2, k3, k4, k5, k6, k7, \.\.\. \(30 in all\)"):
        to_ours({f"k{i}": torch.ones(1) for i in range(30)}, {})


def test_positions_are_carried_to_another_grid_and_all_else_has_to_fit():
    expected = {"vision.positions.position": torch.zeros(1 + 16, 5), "norm.weight": torch.zeros(3)}
    given = {"vision.positions.position": torch.randn(1 + 9, 5), "norm.weight": torch.ones(3)}
    found = carried_to(expected, given)
    wanted = resample_square(given["vision.positions.position"], torch.zeros(1 + 16, 5), antialias=False)
    assert torch.equal(found["vision.positions.position"], wanted) and torch.equal(found["norm.weight"], torch.ones(3))
    assert len(given["vision.positions.position"]) == 1 + 9, "what was given stays as it was"
    for wrong in (
        {"norm.weight": torch.ones(4)},
        {"norm.bias": torch.ones(3)},
        {"vision.positions.rows": torch.ones(10, 5)},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            carried_to(expected, given | wrong)


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        ({"a.{}": "b"}, r"differ in their number of \{\}"),
        ({("a.{}", "c"): "b.{}"}, r"differ in their number of \{\}"),
        ({"a.{}": "b.{}", "a.0": "c"}, r"two rows name 'a.0'"),
        ({"a.{}": "b.{}", "c": "b.0"}, r"two rows give 'b.0'"),
        ({"a.{}": Rule("b.{}", transpose=True), "c": None}, r"transpose is for matrices"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(weight_map, fault):
    with pytest.raises(UserError, match=fault):
        to_ours({"a.0": torch.ones(1), "c": torch.ones(1)}, weight_map)


# files


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 5).half()
        self.mask = torch.ones(2, 2)  # a plain tensor: in no state dict
        self.register_buffer("count", torch.arange(4))
        self.gates = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x.half()).float() + self.mask.sum() + self.count.sum()


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), nn.LayerNorm(5))
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.table = nn.Parameter(torch.randn(6, 4).bfloat16())
        self.shared = self.blocks[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self.blocks(x)) * self.scale + self.table.float().sum()


def same(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """{how: path} of TorchScript archives of one model."""
    folder, model = tmp_path_factory.mktemp("scripts"), Tiny().eval()
    paths = {how: folder / f"{how}.pt" for how in ("script", "trace")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), paths["script"])
        torch.jit.save(torch.jit.trace(model, torch.randn(2, 3)), paths["trace"])
    return paths


def rewritten(source: Path, target: Path, **members: bytes) -> Path:
    """A copy of an archive with some members replaced, by the end of their names ('/' as '__')."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            for name, replacement in members.items():
                if info.filename.endswith("/" + name.replace("__", "/")):
                    data = replacement
            new.writestr(info.filename, data)
    return target


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_archive_gives_the_state_dict_of_its_module(scripted, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(scripted[how]).state_dict()
    assert {"blocks.0.lin.weight", "blocks.0.count", "scale", "shared.bias"} <= set(expected)
    assert "blocks.0.mask" not in expected
    same(read_tensors(scripted[how]), expected)


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_a_torchscript_archive_with_a_malicious_pickle_is_refused_and_nothing_runs(scripted, tmp_path):
    import builtins
    import os

    witness = tmp_path / "witness"
    for protocol in (0, 2, 4):
        for evil in (
            Evil(os.system, f"touch {witness}"),
            Evil(builtins.eval, f"open({str(witness)!r}, 'w')"),
            Evil(builtins.getattr, "torch", "upper"),
            Evil(torch.load, str(witness)),
        ):
            data = pickle.dumps({"x": evil}, protocol=protocol)
            path = rewritten(scripted["trace"], tmp_path / "evil.pt", **{"data.pkl": data})
            with pytest.raises(UserError, match=r"evil.pt: asks for \S+, which weights do not need; not loaded"):
                read_tensors(path)
    assert not witness.exists()


def test_a_name_that_only_looks_like_a_module_gets_an_empty_shell(scripted, tmp_path):
    witness = tmp_path / "witness"
    data = f"c__torch__.os\nsystem\n(S'touch {witness}'\ntR.".encode()
    with pytest.raises(UserError, match="refused as a weight file"):
        read_tensors(rewritten(scripted["trace"], tmp_path / "shell.pt", **{"data.pkl": data}))
    assert not witness.exists()


def test_a_tensor_that_reaches_outside_its_storage_is_refused(scripted, tmp_path):
    with zipfile.ZipFile(scripted["trace"]) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
    size = b"K\x06K\x04\x86" if b"K\x06K\x04\x86" in data else b"(K\x06K\x04t"  # the shape (6, 4) of `table`
    assert size in data
    for wrong in (b"K\x07K\x04", b"K\x06K\x05"):
        forged = data.replace(size, size.replace(b"K\x06K\x04", wrong))
        with pytest.raises(UserError, match=r"a tensor \(\d, \d\) does not fit its storage of 24"):
            read_tensors(rewritten(scripted["trace"], tmp_path / "forged.pt", **{"data.pkl": forged}))


def test_a_storage_that_is_cut_or_packed_is_refused(scripted, tmp_path):
    with pytest.raises(UserError, match="refused as a weight file"):
        read_tensors(rewritten(scripted["trace"], tmp_path / "cut.pt", data__1=b"\0\0"))
    with zipfile.ZipFile(scripted["trace"]) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, bytes(80 << 20) if name.endswith("/data/0") else old.read(name))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_tensors(tmp_path / "bomb.pt")


def test_a_torch_archive_is_read_with_weights_only(tmp_path):
    state = Tiny().state_dict()
    for wrapped in (state, {"state_dict": state, "epoch": 3}, {"model": state, "optimizer": {"lr": 1.0}}):
        torch.save(wrapped, tmp_path / "w.pt")
        same(read_tensors(tmp_path / "w.pt"), state)
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    same(read_tensors(tmp_path / "old.bin"), state)


def test_a_file_that_holds_more_than_tensors_is_refused(tmp_path):
    torch.save({"w": torch.ones(1), "epoch": 3, "name": "x"}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"not a state dict, these are no tensors: epoch, name"):
        read_tensors(tmp_path / "w.pt")
    torch.save([torch.ones(1)], tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"not a state dict"):
        read_tensors(tmp_path / "w.pt")


def test_a_header_is_read_without_its_tensors(tmp_path, monkeypatch):
    state = Tiny().state_dict()
    save_weights(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.pt", "w.safetensors"):
        if name == "w.safetensors":
            monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("tensors were read"))
        header = read_header(tmp_path / name)
        assert {k: (t.shape, t.dtype) for k, t in header.items()} == {k: (t.shape, t.dtype) for k, t in state.items()}
        assert all(tensor.is_meta for tensor in header.values())


def test_names_shapes_and_kinds_are_compared_before_a_tensor_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("tensors were read"))
    model, weight_map = nn.Linear(3, 2), {"w": Rule("weight", transpose=True), "b": "bias"}
    good = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    for wrong, fault in (
        ({"surplus": torch.ones(1)}, "keys that the model lacks: surplus"),
        ({"bias": torch.ones(3)}, r"other shapes: bias \(3,\) for \(2,\)"),
        ({"bias": torch.ones(2, dtype=torch.long)}, r"other kinds of numbers: bias torch.int64 for torch.float32"),
    ):
        save_weights(good | wrong, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=rf"w.safetensors: weights do not fit the model: {fault}"):
            load_weights(model, tmp_path / "w.safetensors")
    save_weights({"w": torch.ones(2, 3), "b": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"weights do not fit the map: other shapes: weight \(3, 2\) for \(2, 3\)"):
        load_weights(model, tmp_path / "w.safetensors", weight_map)


def test_what_is_no_weight_file_is_refused_in_one_line(tmp_path):
    for name, content in {
        "text.pt": b"hello, this is no weight file",
        "empty.pt": b"",
        "cut.safetensors": (1 << 20).to_bytes(8, "little") + b'{"a":',
        "bomb.safetensors": (1 << 60).to_bytes(8, "little") + b"{}",
        "cut.zip": b"PK\x03\x04 and nothing more",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            read_tensors(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"absent.pt: cannot read it \(No such file"):
        read_tensors(tmp_path / "absent.pt")


def test_weights_survive_saving_and_loading(tmp_path):
    model, other = Tiny(), Tiny()
    save_weights(model, tmp_path / "w.safetensors", {"commit": "abc", "seeds": [1, 2]})
    same(read_tensors(tmp_path / "w.safetensors"), model.state_dict())
    load_weights(other, tmp_path / "w.safetensors")
    same(other.state_dict(), model.state_dict())
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "commit": "abc", "seeds": "[1, 2]"}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_tied_weights_and_views_are_written_out(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": base,
        "b": base,
        "row": base[1],
        "turned": base.T,
        "none": torch.empty(0),
        "empty": torch.empty(0, 2),
    }
    save_weights(tensors, tmp_path / "w.safetensors")
    same(read_tensors(tmp_path / "w.safetensors"), tensors)


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(2)}, path)

    def full(_tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"w.safetensors: cannot write it \(No space left"):
        save_weights({"a": torch.zeros(2)}, path)
    same(read_tensors(path), {"a": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_published_file_loads_through_its_map_and_keeps_the_models_dtype(tmp_path):
    model = nn.ModuleDict({"qkv": nn.Linear(3, 6, bias=False), "out": nn.Linear(3, 5)})
    parts = {name: torch.randn(2, 3).half() for name in "qkv"}
    torch.save(parts | {"o.w": torch.randn(3, 5), "o.b": torch.randn(5)}, tmp_path / "w.pt")
    weight_map = {("q", "k", "v"): "qkv.weight", "o.w": Rule("out.weight", transpose=True), "o.b": "out.bias"}
    load_weights(model, tmp_path / "w.pt", weight_map)
    assert model["qkv"].weight.dtype == torch.float32
    assert torch.equal(model["qkv"].weight, torch.cat([parts[name] for name in "qkv"]).float())


def test_a_file_that_does_not_fit_leaves_the_model_untouched(tmp_path):
    model = nn.Linear(3, 2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_weights({"weight": torch.ones(2, 3), "bia": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w.safetensors: weights do not fit the model: .*lacks: bia; .*weight: bias$"):
        load_weights(model, tmp_path / "w.safetensors")
    save_weights({"w": torch.ones(3, 2), "b": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=r"w.safetensors: weights do not fit the map: other shapes: weight \(3, 2\) for"
    ):
        load_weights(model, tmp_path / "w.safetensors", {"w": "weight", "b": "bias"})
    same(model.state_dict(), before)


# cards

CARD = {
    "preprocess": {"size": 224, "resize": "bicubic", "antialias": True, "mean": [0.48, 0.46], "std": [0.27, 0.26]},
    "tokenizer": {"kind": "clip-bpe", "vocabulary": 49408, "context": 77},
    "config": {"activation": "quick_gelu", "norm_eps": 1e-5},
}


def entry(card):
    return Entry("clip", "CLIP", "checkpoint", {"type": "path", "path": "x"}, "x", None, **card)


def test_a_model_that_agrees_with_the_card_passes():
    check_card(entry(CARD), {**CARD, "preprocess": {**CARD["preprocess"], "mean": (0.48, 0.46), "extra": 1}})
    check_card(entry({**CARD, "config": {"activation": None}}), CARD)  # null: the manifest does not know
    check_card(entry({}), {})


@pytest.mark.parametrize(
    ("block", "name", "ours"),
    [
        ("preprocess", "size", 336),
        ("preprocess", "resize", "bilinear"),
        ("preprocess", "antialias", False),
        ("preprocess", "antialias", 1),
        ("preprocess", "mean", [0.5, 0.46]),
        ("preprocess", "std", [0.27]),
        ("tokenizer", "kind", "small-bpe"),
        ("tokenizer", "vocabulary", 49152),
        ("tokenizer", "context", 76),
        ("config", "activation", "gelu"),
        ("config", "norm_eps", 1e-6),
        ("config", "norm_eps", None),
    ],
)
def test_a_model_that_differs_from_the_card_is_refused_with_both_values(block, name, ours):
    config = {**CARD, block: {**CARD[block], name: ours}}
    with pytest.raises(UserError) as caught:
        check_card(entry(CARD), config)
    theirs = CARD[block][name]
    assert str(caught.value) == f"clip: {block}.{name} is {theirs} in the manifest but {ours} in the model"


def test_a_model_that_says_nothing_is_refused():
    with pytest.raises(UserError, match=r"clip: tokenizer.kind is clip-bpe in the manifest but None in the model"):
        check_card(entry(CARD), {"preprocess": CARD["preprocess"]})
