"""What holds for the weights of every paper: each kind of published file comes back bit for bit, what does not fit is
refused in one line that leaves no file. The published names themselves are held in each paper's own tests."""

import json

import pytest
import torch
from tests_common import CATALOG

from shared.cli import main
from shared.core.errors import UserError
from shared.weights.load import save_weights
from shared.weights.safe_load import read_tensors

NOT_TINY = {  # of sizes or language models that no tiny variant has; the paper's own tests take others
    ("clip", "openai-resnet"),
    ("blip2", "lavis-t5"),
    ("blip2", "transformers-retrieval"),
    ("blip2", "transformers-generation"),
}
FORMATS = {name: getattr(CATALOG.package(name).weights, "FORMATS", {}) for name in CATALOG.names()}
KINDS = [(name, kind) for name, formats in FORMATS.items() for kind in formats if (name, kind) not in NOT_TINY]
papers = pytest.mark.parametrize("name", CATALOG.names())
kinds = pytest.mark.parametrize(("name", "kind"), KINDS)


def own_file(name, kind, folder):
    """(a tiny variant, a file under our names of a model that this kind of file is of, its parameters moved)."""
    for variant, config in CATALOG.variants(name).items():
        if variant.startswith(f"{name}-tiny"):
            torch.manual_seed(0)
            try:
                model = CATALOG.package(name).weights.FORMATS[kind].build(config())
            except UserError:
                continue
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            save_weights(model, folder / "own.safetensors")
            return variant, folder / "own.safetensors"
    raise AssertionError(f"no tiny variant of {name} has weights of kind {kind}")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@kinds
def test_every_kind_of_file_goes_out_and_comes_back_bit_for_bit(name, kind, tmp_path):
    convert = CATALOG.package(name).weights.convert
    variant, own = own_file(name, kind, tmp_path)
    published, back, again = (tmp_path / f"{file}.safetensors" for file in ("published", "back", "again"))
    convert(own, published, variant, kind)
    assert read_tensors(published).keys().isdisjoint(key for key in read_tensors(own) if ".blocks." in key)
    convert(published, back, variant, "ours")
    assert same(read_tensors(back), read_tensors(own))
    convert(back, again, variant, kind)
    assert published.read_bytes() == again.read_bytes()


@kinds
def test_a_tensor_too_many_too_few_or_of_another_form_is_refused(name, kind, tmp_path):
    package = CATALOG.package(name).weights
    variant, own = own_file(name, kind, tmp_path)
    path, target = tmp_path / "published.safetensors", tmp_path / "target.safetensors"
    package.convert(own, path, variant, kind)
    published, format = read_tensors(path), package.FORMATS[kind]
    copies = format.copies(published)
    needed = [
        key
        for key in published
        if key not in {*copies, *copies.values(), *format.marks} and not key.endswith("position_ids")
    ]
    key = needed[len(needed) // 2]
    for broken, message in (
        (published | {"stranger": torch.zeros(1)}, "stranger"),
        ({name: tensor for name, tensor in published.items() if name != key}, "missing|without a weight"),
        (published | {key: torch.cat([published[key]] * 4)}, " for "),
    ):
        save_weights(broken, path)
        with pytest.raises(UserError, match=rf"published\.safetensors: .*({message})"):
            package.convert(path, target, variant, "ours")
    for copy in copies:
        save_weights(published | {copy: published[copy] + 1}, path)
        with pytest.raises(UserError, match=r"published\.safetensors: .* differs from"):
            package.convert(path, target, variant, "ours")
    assert not target.exists()


@papers
def test_what_cannot_be_converted_is_said_in_one_line(name, tmp_path):
    package = CATALOG.package(name).weights
    kind = next(kind for paper, kind in KINDS if paper == name)
    variant, own = own_file(name, kind, tmp_path)
    target = tmp_path / "target.safetensors"
    for to in ("flax", "OURS"):
        with pytest.raises(UserError, match=f"--to {to}: choose ours, {', '.join(package.FORMATS)}$"):
            package.convert(own, target, variant, to)
    with pytest.raises(UserError, match="none: no such file"):
        package.convert(tmp_path / "none", target, variant, "ours")
    save_weights({"layer.weight": torch.zeros(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match=r"strange\.safetensors: these are not [A-Z][A-Za-z0-9-]* weights"):
        package.convert(tmp_path / "strange.safetensors", target, variant, "ours")
    save_weights({**read_tensors(own), "stranger": torch.zeros(1)}, own)
    with pytest.raises(UserError, match=r"own\.safetensors: .*stranger"):
        package.convert(own, target, variant, "ours")
    assert not target.exists()


@pytest.mark.parametrize("name", [name for name, formats in FORMATS.items() if len(formats) > 1])
def test_weights_of_another_kind_are_refused_by_its_name(name, tmp_path):
    """A file is of one kind; of the others it lacks something or has too much."""
    package = CATALOG.package(name).weights
    variant, own = own_file(name, next(kind for paper, kind in KINDS if paper == name), tmp_path)
    target, refused = tmp_path / "target.safetensors", 0
    for kind in package.FORMATS:
        try:
            package.convert(own, target, variant, kind)
        except UserError as error:
            assert f" as {kind}: " in str(error) or "name a folder" in str(error)
            refused += 1
    assert refused


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "model._orig_mod."])
@papers
def test_what_a_wrapper_puts_before_every_name_is_taken_off(name, wrapper, tmp_path):
    kind = next(kind for paper, kind in KINDS if paper == name)
    variant, own = own_file(name, kind, tmp_path)
    wrapped = {f"{wrapper}{key}": tensor for key, tensor in read_tensors(own).items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer_states": [{}]}, tmp_path / "run.ckpt")
    CATALOG.package(name).weights.convert(tmp_path / "run.ckpt", tmp_path / "back.safetensors", variant, "ours")
    assert same(read_tensors(tmp_path / "back.safetensors"), read_tensors(own))


WITH_CONFIG = [name for name in CATALOG.names() if CATALOG.package(name).offers("weights", "TRANSFORMERS_DEFAULTS")]


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_a_configuration_of_another_model_beside_the_weights_is_refused(name, tmp_path):
    """Heads, activations and epsilons change every number and no tensor's shape."""
    package = CATALOG.package(name).weights
    variant, own = own_file(name, next(kind for paper, kind in KINDS if paper == name), tmp_path)
    ours, target = package.hf_config(CATALOG.variants(name)[variant]()), tmp_path / "target.safetensors"

    def converted_beside(config):
        (tmp_path / "config.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")
        package.convert(own, target, variant, "ours")

    converted_beside(ours)
    converted_beside({"model_type": "another library's", "vision_config": {"num_attention_heads": 7}})
    for part, defaults in package.TRANSFORMERS_DEFAULTS.items():
        for key, default in defaults.items():
            other = "relu" if isinstance(default, str) else 3 * ours[part][key]
            with pytest.raises(UserError, match=rf"config\.json: another model .*{part}\.{key} is {other}, ours"):
                converted_beside(ours | {part: ours[part] | {key: other}})
            if ours[part][key] != default:
                left_out = {k: value for k, value in ours[part].items() if k != key}
                with pytest.raises(UserError, match=rf"{part}\.{key} is {default}, ours"):
                    converted_beside(ours | {part: left_out})
    with pytest.raises(UserError, match=r"config\.json: no configuration"):
        converted_beside("a text")


@papers
def test_the_command_line_writes_files_and_says_where_there_are_no_folders(name, tmp_path, capsys):
    kind = next(kind for paper, kind in KINDS if paper == name)
    variant, own = own_file(name, kind, tmp_path)
    options = ["--paper", name, "--variant", variant, "--to", kind]

    def run(target):
        with pytest.raises(SystemExit) as ended:
            main(CATALOG.folder, "papers", ["convert", str(own), str(target), *options])
        return ended.value.code, capsys.readouterr()

    code, printed = run(tmp_path / "target.safetensors")
    assert code == 0 and printed.out.strip() == str(tmp_path / "target.safetensors")
    code, printed = run(tmp_path / "folder.bin")
    written = CATALOG.package(name).offers("weights", "export")
    assert code == 2 and ("a folder of another name is for" if written else "exported to no library") in printed.err
