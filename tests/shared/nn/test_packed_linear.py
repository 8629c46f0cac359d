"""Packed linear layers compute what the plain ones do, and stand aside where they cannot."""

import copy

import pytest
import torch
from torch import nn

from shared.nn import packed_linear as packed
from shared.nn.causal_lm import SmallLanguageModel
from shared.nn.packed_linear import PackedLinear, pack

pytestmark = pytest.mark.skipif(not packed.can_pack(torch.float32), reason="this torch has no oneDNN operations")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (70, 2, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_what_the_layer_gave(dtype, shape, bias):
    if not packed.can_pack(dtype):
        pytest.skip("not on this machine")
    torch.manual_seed(0)
    layer = nn.Linear(24, 41, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer)(x), layer(x), **close)
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)  # other strides
        torch.testing.assert_close(PackedLinear(layer)(turned), layer(x), **close)


def test_a_whole_model_is_packed_and_speaks_as_before():
    torch.manual_seed(0)
    model = SmallLanguageModel(97, 64, 48, 2, 4).eval()
    other = copy.deepcopy(model)
    pack(other)
    assert sum(isinstance(part, PackedLinear) for part in other.modules()) == 8
    assert not any(isinstance(part, nn.Linear) for part in other.modules())
    x = torch.randn(3, 11, 48)
    with torch.inference_mode():
        torch.testing.assert_close(other.states(x, None), model.states(x, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_through_a_frozen_packed_model_as_through_the_plain_one(dtype):
    if not packed.can_pack(dtype):
        pytest.skip("not on this machine")
    torch.manual_seed(0)
    model = SmallLanguageModel(97, 64, 48, 2, 4, kv_heads=2, mlp_width=80).to(dtype).requires_grad_(False)
    other = copy.deepcopy(model)
    pack(other, through=True)
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in other.parameters()) == count and set(other.state_dict()) == set(model.state_dict())
    x = torch.randn(3, 11, 48)
    gradients = []
    for one in (model, other):
        given = x.clone().requires_grad_()
        one.logits(one.states(given, None)).square().mean().backward()
        gradients.append(given.grad)
        assert not any(p.requires_grad or p.grad is not None for p in one.parameters())
    gap = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert gap < (1e-5 if dtype == torch.float32 else 2e-2)


def test_through_packs_no_layer_that_is_trained():
    both = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4, bias=False))
    pack(both, through=True)
    assert isinstance(both[0], PackedLinear) and type(both[1]) is nn.Linear


def test_a_layer_that_two_hold_is_packed_once_and_other_kinds_are_left(monkeypatch):
    class Other(nn.Linear):
        pass

    shared = nn.Linear(4, 4)
    both = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared]), "c": Other(4, 4), "d": nn.Linear(4, 4).double()})
    pack(both)
    assert both["a"] is both["b"][0] and isinstance(both["a"], PackedLinear)
    assert type(both["c"]) is Other and type(both["d"]) is nn.Linear
    monkeypatch.setattr(packed, "can_pack", lambda dtype: False)
    plain = nn.Sequential(nn.Linear(4, 4))
    pack(plain)
    assert type(plain[0]) is nn.Linear


def test_a_torch_without_these_operations_packs_nothing(monkeypatch):
    packed.can_pack.cache_clear()

    def absent(self, x):
        raise AttributeError("no such operation")

    monkeypatch.setattr(PackedLinear, "forward", absent)
    assert not packed.can_pack(torch.float32)
    packed.can_pack.cache_clear()
