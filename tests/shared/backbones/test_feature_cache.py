"""Features of a frozen encoder: computed once, found again, never mistaken for another's, mended where damaged."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shared.backbones.feature_cache import features_of
from shared.backbones.vision import vit_encoder
from shared.core.errors import UserError
from shared.nn.vit import VisionTransformer


def encoder_of(seed=0, calls=None):
    torch.manual_seed(seed)
    encoder = vit_encoder(VisionTransformer(24, 8, 40, 2, 2, mean=(0.3,) * 3, std=(0.6,) * 3), "last")
    if calls is not None:
        encoder.module.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    return encoder


def pictures(count=7, seed=1):
    return torch.randint(0, 256, (count, 3, 24, 24), generator=torch.Generator().manual_seed(seed)).byte()


def test_a_second_reader_gets_the_same_numbers_without_the_encoder(tmp_path):
    calls, said = [], []
    encoder = encoder_of(calls=calls)
    first = features_of(encoder, pictures(), key="train", folder=tmp_path, batch=3, say=said.append)
    assert calls == [3, 3, 1] and first.shape == (7, 10, 40)
    torch.testing.assert_close(first, encoder(pictures()))
    again = features_of(encoder_of(calls=calls), pictures(), key="train", folder=tmp_path, say=said.append)
    assert torch.equal(again, first) and calls == [3, 3, 1, 7]  # the last is this test's own
    assert "computed in" in said[0] and "from the cache in" in said[1]


def test_other_weights_pictures_or_precision_are_computed_for_themselves(tmp_path):
    first = features_of(encoder_of(), pictures(), key="train", folder=tmp_path)
    others = [
        features_of(encoder_of(seed=1), pictures(), key="train", folder=tmp_path),
        features_of(encoder_of(), pictures(seed=2), key="train", folder=tmp_path),
        features_of(encoder_of(), pictures(), key="train", folder=tmp_path, dtype=torch.bfloat16),
    ]
    assert len(list(tmp_path.glob("train-*.safetensors"))) == 4
    assert not torch.equal(others[0], first) and not torch.equal(others[1], first)
    torch.testing.assert_close(others[2], first.bfloat16())


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 64
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"not a weight file")])
def test_a_damaged_file_is_computed_anew_with_one_warning(tmp_path, capsys, damage):
    first = features_of(encoder_of(), pictures(), key="train", folder=tmp_path).clone()
    (path,) = tmp_path.glob("*.safetensors")
    damage(path)
    assert torch.equal(features_of(encoder_of(), pictures(), key="train", folder=tmp_path), first)
    assert capsys.readouterr().err.count("computed anew") == 1
    assert torch.equal(features_of(encoder_of(), pictures(), key="train", folder=tmp_path), first)
    assert not capsys.readouterr().err


def test_a_file_of_another_encoder_under_this_name_is_not_believed(tmp_path, capsys):
    first = features_of(encoder_of(), pictures(), key="train", folder=tmp_path).clone()
    (path,) = tmp_path.glob("*.safetensors")
    features_of(encoder_of(), pictures(5), key="other", folder=tmp_path)
    (other,) = tmp_path.glob("other-*.safetensors")
    path.write_bytes(other.read_bytes())  # sound, but of five pictures
    assert torch.equal(features_of(encoder_of(), pictures(), key="train", folder=tmp_path), first)
    assert "computed anew" in capsys.readouterr().err


def test_of_several_that_ask_at_once_one_computes_and_the_others_wait(tmp_path):
    calls = []
    encoder = encoder_of(calls=calls)
    encoder.module.register_forward_pre_hook(lambda module, inputs: time.sleep(0.3))
    with ThreadPoolExecutor(3) as several:  # each opens the lock for itself, as processes do
        found = list(several.map(lambda _: features_of(encoder, pictures(), key="train", folder=tmp_path), range(3)))
    assert calls == [7] and all(torch.equal(one, found[0]) for one in found)


def test_a_precision_that_is_none_of_features_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"features of train: no precision torch\.int8"):
        features_of(encoder_of(), pictures(), key="train", folder=tmp_path, dtype=torch.int8)
