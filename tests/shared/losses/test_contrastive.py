"""The chunked contrastive loss against the plain one (itself checked in test_distributed and tests/parity)."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from shared.core.errors import UserError
from shared.losses.contrastive import chunked_contrastive_loss, contrastive_loss
from shared.tools import bench_core, doctor
from shared.tools.bench_setup import Setup
from shared.tools.bench_timing import in_child

# B, D, chunk, logit_scale
SIZES = {
    "chunk divides": (12, 5, 4, 7.0),
    "chunk does not divide": (13, 5, 4, 7.0),
    "chunk of one": (7, 5, 1, 7.0),
    "chunk of all": (9, 4, 9, 7.0),
    "chunk beyond all": (9, 4, 1000, 7.0),
    "one pair": (1, 3, 4, 7.0),
    "odd width": (31, 33, 8, 14.3),
    "greatest scale": (129, 65, 32, 100.0),
    "no scale": (129, 65, 50, 1.0),
}


def pairs(B, D, alike=0.0, dtype=torch.float32):
    """Images and texts (B, D), L2-normalised; the greater alike, the closer a pair."""
    generator = torch.Generator().manual_seed(B + D)
    images, texts = (torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return [F.normalize(x, dim=-1).to(dtype) for x in (images, texts + alike * images)]


def gradients(loss, images, texts, scale, dtype=None, **options):
    """The loss and its gradients, with a gradient of 3 from above."""
    inputs = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in (images, texts, scale)]
    value = loss(*inputs, **options)
    (3 * value).backward()
    return [value.detach(), *(x.grad for x in inputs)]


def difference(a, b):
    """Features' gradients: norm of the difference by the norm of b. Numbers: absolute, relative where b is above 1.

    The gradient of the scale is a sum of terms of both signs that together weigh up to 2: relative to what is left of
    it, no fp32 sum is good to 1e-6.
    """
    assert a.shape == b.shape and a.isfinite().all()
    unit = max(1.0, float(b.norm())) if b.numel() == 1 else float(b.norm()) or 1.0
    return float((a - b).norm()) / unit


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("B, D, chunk, scale", SIZES.values(), ids=SIZES)
def test_value_and_gradients_are_those_of_the_plain_loss(B, D, chunk, scale, dtype, tolerance):
    images, texts = pairs(B, D)
    arguments = (images, texts, torch.tensor(scale), dtype)
    plain = gradients(contrastive_loss, *arguments)
    chunked = gradients(chunked_contrastive_loss, *arguments, chunk=chunk)
    for ours, theirs in zip(chunked, plain, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert difference(ours, theirs) <= tolerance


def far_column():
    """Logits near 100 but for one column near -100: exp of the difference is 0 in fp32."""
    images = F.normalize(torch.eye(8)[0] + 0.1 * pairs(700, 8)[0], dim=-1)
    texts = images.clone()
    texts[5] = -images[5]
    return images, texts


@pytest.mark.parametrize(
    "images, texts, scale",
    [(*pairs(700, 96), 14.3), (*pairs(700, 96, 1.0), 14.3), (*pairs(700, 96, 0.3), 100.0), (*far_column(), 100.0)],
    ids=["strangers", "matched", "trained", "far column"],
)
def test_it_is_as_near_to_fp64_as_the_plain_loss(images, texts, scale):
    arguments = (images, texts, torch.tensor(scale))
    exact = gradients(contrastive_loss, *arguments, torch.float64)
    plain = gradients(contrastive_loss, *arguments)
    chunked = gradients(chunked_contrastive_loss, *arguments, chunk=200)
    for ours, theirs, truth in zip(chunked, plain, exact, strict=True):
        # a lucky rounding is no yardstick: at least 1e-6
        assert difference(ours, truth) <= max(1e-6, 1.5 * difference(theirs, truth))


def test_gradients_agree_with_finite_differences():
    images, texts = (x.requires_grad_() for x in pairs(5, 3, dtype=torch.float64))
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *of: chunked_contrastive_loss(*of, chunk=2), (images, texts, scale))


def test_a_second_derivative_is_refused():
    images, texts = (x.requires_grad_() for x in pairs(5, 3))
    loss = chunked_contrastive_loss(images, texts, torch.tensor(4.0), chunk=2)
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(loss, images, create_graph=True)


@pytest.mark.parametrize("trained", [t for t in itertools.product([True, False], repeat=3) if any(t)])
def test_what_is_frozen_gets_no_gradient_and_changes_none(trained):
    found = []
    for loss in (contrastive_loss, chunked_contrastive_loss):
        inputs = [x.requires_grad_(t) for x, t in zip((*pairs(11, 6), torch.tensor(7.0)), trained, strict=True)]
        loss(*inputs, **({"chunk": 4} if loss is chunked_contrastive_loss else {})).backward()
        found.append([x.grad for x in inputs])
    for plain, chunked, t in zip(*found, trained, strict=True):
        assert (chunked is not None) == t
        assert not t or difference(chunked, plain) <= 1e-6


@pytest.mark.parametrize("loss, frozen, products", [("plain", False, 6), ("chunked", False, 4), ("chunked", True, 3)])
def test_four_products_do_the_work_of_six(loss, frozen, products):
    B, D = 24, 5
    function = contrastive_loss if loss == "plain" else partial(chunked_contrastive_loss, chunk=7)
    images, texts = pairs(B, D)
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **options: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        inputs = images.requires_grad_(not frozen), texts.requires_grad_(), torch.tensor(7.0).requires_grad_()
        function(*inputs).backward()
    assert counter.get_total_flops() == products * 2 * B * B * D


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_fp32(dtype):
    images, texts = (x.to(dtype) for x in pairs(23, 9))
    scale = torch.tensor(100.0)
    plain = [x.float() for x in gradients(contrastive_loss, images, texts, scale)]
    inputs = [x.clone().requires_grad_() for x in (images, texts, scale)]
    value = chunked_contrastive_loss(*inputs, chunk=6)
    (3 * value).backward()
    assert value.dtype == torch.float32 and difference(value.detach(), plain[0]) <= 1e-6
    assert [x.grad.dtype for x in inputs] == [dtype, dtype, torch.float32]
    for x, expected in zip(inputs, plain[1:], strict=True):  # both rounded to dtype in the end
        torch.testing.assert_close(x.grad.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_autocast_changes_nothing():
    images, texts = pairs(23, 9)
    arguments = (images, texts, torch.tensor(100.0))
    outside = gradients(chunked_contrastive_loss, *arguments, chunk=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(chunked_contrastive_loss, *arguments, chunk=6)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_a_scale_of_shape_one_keeps_its_shape():
    arguments = (*pairs(7, 5), torch.tensor([7.0]))
    plain = gradients(contrastive_loss, *arguments)
    chunked = gradients(chunked_contrastive_loss, *arguments, chunk=3)
    assert chunked[3].shape == (1,) and difference(chunked[3], plain[3]) <= 1e-6


class LargestTensor(TorchDispatchMode):
    """Remembers the greatest number of entries that any operation's result had or was laid out over."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.entries = max(self.entries, x.numel(), x.untyped_storage().size() // x.element_size())
        return result


def test_the_matrix_of_all_pairs_is_never_made():
    B, D, chunk = 90, 7, 16
    largest = {}
    for loss, options in ((contrastive_loss, {}), (chunked_contrastive_loss, {"chunk": chunk})):
        arguments = (*pairs(B, D), torch.tensor(7.0))
        with LargestTensor() as seen:
            gradients(loss, *arguments, **options)
        largest[loss] = seen.entries
    assert largest[contrastive_loss] == B * B  # the witness sees what it is meant to see, forward and backward
    assert largest[chunked_contrastive_loss] == max(B * D, chunk * chunk)


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_of_nothing_is_refused(chunk):
    with pytest.raises(UserError, match=f"chunk is {chunk}"):
        chunked_contrastive_loss(*pairs(4, 3), torch.tensor(7.0), chunk=chunk)


def test_features_that_are_no_pairs_are_refused():
    images, texts = pairs(6, 3)
    with pytest.raises(UserError, match=r"\(5, 3\) and \(6, 3\)"):
        chunked_contrastive_loss(images[:5], texts, torch.tensor(7.0))


def test_the_measurement_sees_the_plain_losses_matrices_and_not_the_chunked_ones():
    B = 3000
    plain, chunked = (in_child(bench_core.loss_memory, "cpu", B, chunk, 8) for chunk in (None, 256))
    matrix = 4 * B * B
    # the reserve that is asked for must hold what is really taken
    assert 3.9 * matrix < plain < bench_core.MATRICES * matrix + bench_core.GIB
    assert 0 < chunked < matrix


def test_the_plain_loss_is_left_out_with_a_reason_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 2 * 2**30)
    monkeypatch.setattr(bench_core, "in_child", lambda function, *arguments: 3 * 2**20)
    monkeypatch.setattr(bench_core, "race", lambda calls, *rest, **options: [{"name": name} for name in calls])
    times, memory = bench_core._time_and_memory(Setup("cpu", "fp32", 2, 9.0, []), 32768)
    why = {"plain": "the plain loss of 32768 pairs needs about 17.0 GiB, 2.0 GiB are free"}
    assert times == [{"name": "chunked", "not_run": why}]
    assert [row["name"] for row in memory] == ["chunked"] and memory[0]["not_run"] == why


def test_both_losses_are_timed_in_turns_and_agree(monkeypatch):
    monkeypatch.setattr(bench_core, "in_child", lambda function, *arguments: 3 * 2**20)
    times, _ = bench_core._time_and_memory(Setup("cpu", "fp32", 2, 9.0, []), 1500)
    assert [(row["name"], len(row["seconds"])) for row in times] == [("chunked", 2), ("plain", 2)]
