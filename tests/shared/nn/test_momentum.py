"""Momentum encoders and queues: the exact average, the order of the queue, the same on two real ranks."""

import pytest
import torch
from ranks import on_two_ranks
from torch import nn
from torch.testing import assert_close

from shared.core.errors import UserError
from shared.nn.momentum import FeatureQueue, follow, momentum_copy

SIZE, WIDTH = 10, 3


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))


def test_a_momentum_copy_is_apart_and_learns_nothing_by_itself():
    student = network(0)
    teacher = momentum_copy(student)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    before = teacher[0].weight.clone()
    with torch.no_grad():
        student[0].weight += 1
    assert_close(teacher[0].weight, before, atol=0, rtol=0)


@pytest.mark.parametrize("momentum", [0.995, 0.4, 0.0, 1.0])
def test_the_teacher_follows_by_the_exponential_moving_average(momentum):
    student, teacher = network(1), momentum_copy(network(2))
    for _ in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
        expected = [momentum * t.double() + (1 - momentum) * s.detach().double() for t, s in pairs]
        follow(teacher, student, momentum)
        for (found, _), wanted in zip(pairs, expected, strict=True):
            assert_close(found.double(), wanted, atol=1e-6, rtol=0)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_parameters_are_matched_by_name_not_by_order():
    student, teacher = nn.ModuleDict(), nn.ModuleDict()
    for name in ("a", "b", "head"):
        student[name] = nn.Linear(2, 2)
    for name in ("b", "a"):
        teacher[name] = nn.Linear(2, 2)
    follow(teacher, student, 0.0)
    assert_close(teacher["a"].weight, student["a"].weight)
    assert_close(teacher["b"].bias, student["b"].bias)
    with pytest.raises(KeyError):
        follow(student, teacher, 0.5)


def batch(first, size):
    """Features that say which they are: picture i is (i, i, i), its text (-i, -i, -i)."""
    numbers = torch.arange(first, first + size, dtype=torch.float32)[:, None].expand(-1, WIDTH)
    return numbers, -numbers, torch.arange(first, first + size) * 100


def test_the_oldest_features_give_way_also_across_the_end():
    queue = FeatureQueue(SIZE, WIDTH)
    kept = queue.images.clone()
    for first in (0, 4):
        queue.push(*batch(first, 4))
    assert queue.images[:8, 0].tolist() == list(range(8)) and int(queue.next) == 8
    assert_close(queue.images[8:], kept[8:], atol=0, rtol=0)
    assert queue.ids.tolist() == [0, 100, 200, 300, 400, 500, 600, 700, -1, -1]
    queue.push(*batch(8, 4))
    assert queue.images[:, 1].tolist() == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert queue.texts[:, 2].tolist() == [-10, -11, -2, -3, -4, -5, -6, -7, -8, -9]
    assert queue.ids.tolist() == [1000, 1100, 200, 300, 400, 500, 600, 700, 800, 900] and int(queue.next) == 2
    queue.push(*batch(20, SIZE))
    assert sorted(queue.images[:, 0].tolist()) == list(range(20, 30)) and int(queue.next) == 2


def test_features_without_ids_forget_the_ids_they_replace():
    queue = FeatureQueue(SIZE, WIDTH)
    queue.push(*batch(0, 5))
    queue.push(*batch(5, 5))
    queue.push(*batch(10, 5)[:2])
    assert queue.ids.tolist() == [-1] * 5 + [500, 600, 700, 800, 900]


def test_a_fresh_queue_is_normalised_noise_the_same_everywhere_and_takes_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    queue = FeatureQueue(50, WIDTH)
    assert_close(torch.rand(3), expected, atol=0, rtol=0)
    torch.manual_seed(1)
    again = FeatureQueue(50, WIDTH)
    for name in ("images", "texts"):
        assert_close(getattr(queue, name).norm(dim=1), torch.ones(50))
        assert_close(getattr(queue, name), getattr(again, name), atol=0, rtol=0)
    assert (queue.images - queue.texts).abs().max() > 0.1 and (queue.ids == -1).all()
    with torch.device("meta"):
        assert FeatureQueue(SIZE, WIDTH).images.is_meta


def test_queue_and_place_belong_to_the_checkpoint():
    queue, other = FeatureQueue(SIZE, WIDTH), FeatureQueue(SIZE, WIDTH)
    queue.push(*batch(0, 7))
    assert set(queue.state_dict()) == {"images", "texts", "ids", "next"}
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(*batch(7, 6))
    for name, value in queue.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert not list(queue.parameters())


def test_pushed_features_are_cut_off_from_the_graph_and_keep_the_queues_precision():
    queue = FeatureQueue(SIZE, WIDTH)
    images = torch.randn(4, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    queue.push(images, images * 2)
    assert queue.images.dtype == torch.float32 and not queue.images.requires_grad
    assert_close(queue.texts[:4], (images * 2).float().detach())


def test_batches_that_do_not_fit_the_queue_are_refused():
    queue = FeatureQueue(SIZE, WIDTH)
    queue.check(5)
    with pytest.raises(UserError, match="queue of 10: must be a multiple of the batch of 4"):
        queue.check(4)
    with pytest.raises(UserError, match="queue of 10: smaller than the batch of 11"):
        queue.push(*batch(0, 11))


def on_rank(rank):
    """Two ranks with seeds of their own push pairs of their own, in three steps that pass the queue's end."""
    torch.manual_seed(rank)
    queue = FeatureQueue(SIZE, WIDTH)
    for step in range(3):
        queue.push(*batch(4 * step + 2 * rank, 2))
    return {name: value.tolist() for name, value in queue.state_dict().items()}


def test_two_ranks_hold_the_queue_that_one_would_hold():
    first, second = on_two_ranks(on_rank)
    alone = FeatureQueue(SIZE, WIDTH)
    for step in range(3):
        alone.push(*batch(4 * step, 4))
    assert first == second == {name: value.tolist() for name, value in alone.state_dict().items()}
