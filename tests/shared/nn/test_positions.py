"""Rotary, xPos, sine tables and resampled tables, against their formulas written out number by number."""

import math

import pytest
import torch
from torch.testing import assert_close

from shared.core.errors import UserError
from shared.nn.positions import Rotary, resample_grid, sincos_1d, sincos_2d


def xpos_by_the_formula(x, sign, scale_base):
    """Sun et al. 2022, algorithm 1, one pair of channels at a time in double precision; sign: +1 query, -1 key."""
    out, width = torch.zeros_like(x, dtype=torch.float64), x.shape[-1]
    for n in range(x.shape[-2]):
        for i in range(width // 2):
            theta = 10_000 ** (-2 * i / width)
            zeta = 1.0 if scale_base is None else ((i / (width / 2) + 0.4) / 1.4) ** (n / scale_base)
            a, b = x[..., n, 2 * i].double(), x[..., n, 2 * i + 1].double()
            out[..., n, 2 * i] = zeta**sign * (a * math.cos(n * theta) - b * math.sin(n * theta))
            out[..., n, 2 * i + 1] = zeta**sign * (b * math.cos(n * theta) + a * math.sin(n * theta))
    return out


@pytest.mark.parametrize("scale_base", [None, 7.0])
def test_rotary_equals_the_papers_formula(scale_base):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 9, 10), torch.randn(2, 3, 9, 10)
    turned_q, turned_k = Rotary(10, xpos_scale=scale_base)(q, k, 0)
    assert_close(turned_q.double(), xpos_by_the_formula(q, 1, scale_base), atol=1e-5, rtol=0)
    assert_close(turned_k.double(), xpos_by_the_formula(k, -1, scale_base), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_scores_depend_on_the_distance_alone(scale_base):
    torch.manual_seed(0)
    rotary, q, k = Rotary(16, xpos_scale=scale_base), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    near, far = ((lambda q, k: q @ k.mT)(*rotary(q, k, offset)) for offset in (0, 300))
    assert_close(near, far, atol=1e-3, rtol=0)
    assert (near - q @ k.mT).abs().max() > 0.1


def test_xpos_lets_far_tokens_fade():
    rotary, ones = Rotary(64, xpos_scale=512.0), torch.ones(1, 1, 600, 64)
    plain = Rotary(64)
    faded, kept = ((lambda q, k: q[0, 0, -1] @ k[0, 0].mT)(*turn(ones, ones)) for turn in (rotary, plain))
    assert_close(faded[-1], kept[-1])
    assert faded[:100].abs().max() < kept[:100].abs().max()


def test_a_later_offset_continues_the_sequence_and_the_dtype_is_kept():
    torch.manual_seed(0)
    rotary, q, k = Rotary(8, xpos_scale=512.0), torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8)
    whole, parts = rotary(q, k, 0), [rotary(q[:, :, :4], k[:, :, :4], 0), rotary(q[:, :, 4:], k[:, :, 4:], 4)]
    for whole_one, *pieces in zip(whole, *parts, strict=True):
        assert_close(torch.cat(pieces, dim=2), whole_one, atol=1e-6, rtol=0)
    far, _ = rotary(q.bfloat16(), k.bfloat16(), 1001)
    assert far.dtype == torch.bfloat16
    assert_close(far.float(), rotary(q.bfloat16().float(), k, 1001)[0], atol=0, rtol=2**-8)


def test_an_odd_head_width_cannot_be_turned_in_pairs():
    with pytest.raises(UserError, match="head width 7 is odd"):
        Rotary(7)


def test_the_same_grid_returns_the_table_itself():
    table = torch.randn(1 + 6, 5)
    assert resample_grid(table, (2, 3), (2, 3)) is table


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_a_linear_ramp_stays_a_ramp_and_class_tokens_stay_put(prefix):
    rows, columns, finer = 6, 8, 2
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    table = torch.cat([torch.randn(prefix, 2), torch.stack([y.flatten() / rows, x.flatten() / columns], dim=1)])
    resized = resample_grid(table, (rows, columns), (finer * rows, finer * columns), prefix)
    assert_close(resized[:prefix], table[:prefix], atol=0, rtol=0)
    inner = resized[prefix:].reshape(finer * rows, finer * columns, 2)[4:-4, 4:-4]
    y, x = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    assert_close(inner, torch.stack([y / 12, x / 16], dim=-1)[4:-4, 4:-4], atol=1e-4, rtol=0)


@pytest.mark.parametrize("antialias", [True, False])
def test_resampling_is_the_bicubic_filter_of_its_parameter(antialias):
    """A single peak doubled in size shows the kernel itself: a = -0.5 with antialias, -0.75 without."""

    def cubic(t, a):
        t = abs(t)
        return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t < 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    peak = torch.zeros(7, 9)
    peak[3, 4] = 1.0
    doubled = resample_grid(peak.reshape(-1, 1), (7, 9), (14, 18), 0, antialias=antialias).reshape(14, 18)
    a = -0.5 if antialias else -0.75
    at = [[cubic((i + 0.5) / 2 - 3.5, a) * cubic((j + 0.5) / 2 - 4.5, a) for j in range(18)] for i in range(14)]
    assert_close(doubled, torch.tensor(at), atol=1e-5, rtol=0)


def test_resampling_keeps_dtype_and_gradient_and_names_a_wrong_grid():
    table = torch.randn(1 + 6, 5, dtype=torch.bfloat16, requires_grad=True)
    resized = resample_grid(table, (2, 3), (4, 5))
    assert resized.shape == (21, 5) and resized.dtype == torch.bfloat16
    resized.sum().backward()
    assert (table.grad != 0).all()
    with pytest.raises(UserError, match="7 rows, but 1 \\+ 3 x 3 expected"):
        resample_grid(table, (3, 3), (4, 5))


def test_sine_tables_equal_their_formulas():
    width, rows, columns = 8, 3, 5
    table, flat = sincos_2d(width, (rows, columns)), sincos_1d(width, columns)
    assert table.shape == (15, 8) and flat.shape == (5, 8) and table.dtype == torch.float32
    for n in range(columns):
        for i in range(width // 2):
            assert math.isclose(flat[n, i], math.sin(n / 10_000 ** (2 * i / width)), abs_tol=1e-6)
            assert math.isclose(flat[n, width // 2 + i], math.cos(n / 10_000 ** (2 * i / width)), abs_tol=1e-6)
    for row in range(rows):
        for column in range(columns):
            at = table[row * columns + column]
            for place, half in ((column, at[:4]), (row, at[4:])):
                expected = [f(place / 10_000 ** (i / 2)) for f in (math.sin, math.cos) for i in range(2)]
                assert_close(half, torch.tensor(expected), atol=1e-6, rtol=0)
    assert_close(sincos_1d(8, torch.tensor([4.0, 1.0])), flat[[4, 1]], atol=0, rtol=0)


def test_sine_tables_name_a_width_that_does_not_split():
    with pytest.raises(UserError, match="width 7 is odd"):
        sincos_1d(7, 3)
    with pytest.raises(UserError, match="width 6 does not split"):
        sincos_2d(6, (2, 2))
