"""What is frozen takes no gradient, is not saved, and is not switched to training mode."""

import copy

import pytest
import torch
from torch import nn

from shared.nn.frozen import Frozen, assert_only_trained, trainable, weights_digest


class Head(nn.Module):
    """A trained layer behind a frozen one that has dropout and a batch norm."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(3)
        frozen = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5))
        for parameter in frozen.parameters():
            nn.init.normal_(parameter)
        self.encoder = Frozen(frozen, **options)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.encoder(x).to(self.head.weight.dtype))


def test_training_changes_the_head_and_not_a_number_of_the_frozen_part():
    model, x = Head().train(), torch.randn(11, 5)
    before = weights_digest(model.encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    assert_only_trained(optimizer, model)
    head = model.head.weight.detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert weights_digest(model.encoder) == before  # running means too
    assert not torch.equal(model.head.weight, head)
    assert all(p.grad is None for p in model.encoder.module.parameters())


def test_training_mode_does_not_reach_the_frozen_part():
    model, x = Head(), torch.randn(11, 5)
    expected = model.eval().encoder(x)
    model.train()
    assert model.training and not model.encoder.module.training
    torch.testing.assert_close(model.encoder(x), expected)


def test_numbers_come_in_the_frozen_parts_precision_and_indices_as_they_are():
    table = Frozen(nn.Embedding(5, 3), torch.bfloat16)
    assert table(torch.tensor([4, 1])).dtype == torch.bfloat16
    seen = []
    part = nn.Identity()
    part.forward = lambda *given: seen.extend(given)
    Frozen(part, torch.bfloat16)(torch.ones(2), torch.tensor([1]), None)
    assert [getattr(one, "dtype", one) for one in seen] == [torch.bfloat16, torch.int64, None]


def test_the_state_dict_holds_the_trained_part_alone_and_loads_strictly():
    model = Head()
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    model.load_state_dict(model.state_dict(), strict=True)


def test_asking_the_owner_for_gradients_does_not_unfreeze():
    model = Head().requires_grad_(True)
    assert not any(p.requires_grad for p in model.encoder.module.parameters())
    assert {id(p) for p in trainable(model)} == {id(p) for p in model.head.parameters()}


@pytest.mark.parametrize("through", [False, True])
def test_gradients_pass_through_to_the_input_where_asked_alone(through):
    model, x = Head(through=through), torch.randn(11, 5, requires_grad=True)
    y = model.encoder(x)
    assert y.requires_grad == through
    if through:
        y.square().sum().backward()
        assert x.grad.abs().sum() > 0


def test_sixteen_bit_stays_whatever_the_owner_is_cast_to():
    model, x = Head(dtype=torch.bfloat16), torch.randn(11, 5)
    assert {p.dtype for p in model.encoder.module.parameters()} == {torch.bfloat16}
    assert model(x).dtype == torch.float32
    model.double()
    assert model.head.weight.dtype == torch.float64
    assert {p.dtype for p in model.encoder.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_alone_may_be_in_sixteen_bit_and_multiply_so_while_the_stream_stays_whole(dtype):
    torch.manual_seed(3)
    module = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7), nn.LayerNorm(7)).requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(11, 5)
    wanted = module(x)
    frozen = Frozen(copy.deepcopy(module), dtype, matrices=True)
    seen = []
    for part in frozen.module:
        part.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    for _ in range(2):
        dtypes = [p.dtype for p in frozen.module.parameters()]
        assert dtypes == [torch.float32] * 2 + [dtype] * 2 + [torch.float32] * 2
        found = frozen(x)
        assert seen[-3:-1] == [torch.float32, dtype] and not found.requires_grad
        assert 0 < (found.float() - wanted).abs().max() < 0.1 and found.shape == (11, 7)
        nn.ModuleList([frozen]).double()  # a change that is meant for others
    assert Frozen(copy.deepcopy(module), None, matrices=True)(x).equal(wanted)


def test_a_move_between_devices_reaches_the_frozen_part():
    model = Head().to("meta")
    assert {p.device.type for p in model.encoder.module.parameters()} == {"meta"}


def test_attributes_of_the_frozen_module_are_found_and_a_wrong_name_is_an_error():
    frozen = Frozen(nn.Linear(5, 7))
    assert frozen.in_features == 5
    with pytest.raises(AttributeError, match="no attribute 'wdith'"):
        _ = frozen.wdith
    with pytest.raises(AttributeError, match="no attribute 'width'"):
        _ = Frozen.__new__(Frozen).width  # not built yet


def test_a_copy_computes_the_same():
    model, x = Head(dtype=torch.float64), torch.randn(11, 5)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def optimizer_of(*parameters):
    return torch.optim.SGD([{"params": list(parameters)}], lr=0.1)


def test_an_optimizer_that_has_the_wrong_parameters_is_refused_by_their_names():
    model = Head()
    weight, bias = model.head.weight, model.head.bias
    assert_only_trained(optimizer_of(weight, bias), model)
    with pytest.raises(ValueError, match=r"left out: head\.bias"):
        assert_only_trained(optimizer_of(weight), model)
    with pytest.raises(ValueError, match=r"of another module: one of shape \(7, 5\)"):
        assert_only_trained(optimizer_of(weight, bias, model.encoder.module[0].weight), model)
    bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen: head\.bias"):
        assert_only_trained(optimizer_of(weight, bias), model)
    optimizer = optimizer_of(weight)
    optimizer.param_groups.append({"params": [weight]})
    with pytest.raises(ValueError, match=r"given twice: head\.weight"):
        assert_only_trained(optimizer, model)


def test_a_digest_tells_weights_buffers_precision_and_settings_apart():
    def digest(*settings, change=lambda module: None):
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
        change(module)
        return weights_digest(module, *settings)

    changes = [
        lambda module: module[0].bias.data[2].add_(1e-3),
        lambda module: module[1].running_var[4].add_(1e-3),
        lambda module: module.bfloat16(),
    ]
    found = [digest(), digest("last"), digest("second-last"), *(digest(change=change) for change in changes)]
    assert digest() == found[0] and len(set(found)) == len(found)
