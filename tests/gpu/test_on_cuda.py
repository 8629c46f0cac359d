"""What a GPU computes is what a CPU computes in fp32, nearly so in bf16; and every paper trains there."""

import copy
import math

import pytest
import torch
from tests_common import CATALOG

from papers.blip2.config import VARIANTS as BLIP2
from papers.blip2.evidence import bench as blip2_bench
from papers.blip2.model import Blip2Qformer
from papers.clip.config import VARIANTS as CLIP
from papers.clip.evidence import bench as clip_bench
from papers.clip.model import Clip
from papers.clip.module import example as clip_example
from papers.clip.recipe import ClipRecipe
from shared.data.loader import Batches
from shared.experiments.stage_cache import own_randomness
from shared.losses.contrastive import chunked_contrastive_loss, contrastive_loss
from shared.nn.attention import StructuredMask, attention, use_backend
from shared.tools import bench_timing
from shared.tools.bench_setup import compiled, stepper
from shared.training.callbacks import MetricRecorder
from shared.training.trainer import make_trainer

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest entry
PAPERS = CATALOG.names()
GPU = "cuda"


def on_gpu(batch):
    return tuple(x.to(GPU) for x in batch)


def gap(found, expected) -> float:
    """The largest difference over all pairs of tensors, as a share of the largest entry of its pair."""
    pairs = [(f.detach().double().cpu(), e.detach().double().cpu()) for f, e in zip(found, expected, strict=True)]
    assert all(f.shape == e.shape for f, e in pairs)
    gaps = [float((f - e).abs().max() / e.abs().max().clamp(min=1e-30)) for f, e in pairs]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


# ---- attention


def masks(B, H, T, S, device):
    """kind: (mask, causal)."""
    torch.manual_seed(0)
    dense = torch.rand(B, 1, T, S) < 0.6
    dense[0, :, 2] = False  # a query that sees nothing
    return {
        "all": (None, False),
        "causal": (None, True),
        "starved": (dense.to(device), False),
        "documents": (StructuredMask(lambda b, h, q, k: q // 48 == k // 48, 1, 1, T, S), True),
    }


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", ["all", "causal", "starved", "documents"])
@pytest.mark.parametrize("backend", ["sdpa", "reference", "flex"])
def test_attention_and_its_gradients_are_those_of_the_cpu(backend, kind, dtype):
    if backend == "flex" and (kind != "documents" or dtype == torch.float32):
        pytest.skip("compiled anew for each, some seconds; the others are compared when they are timed")
    B, H, G, T, S, K = 3, 8, 2, 144, 144, 64
    torch.manual_seed(1)
    q, k, v, gradient = (torch.randn(B, heads, T, K) for heads in (H, G, G, H))

    def outputs(device, of, backend):
        mask, causal = masks(B, H, T, S, device)[kind]
        inputs = [x.to(device, of).requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, mask=mask, causal=causal, backend=backend)
        return [out, *torch.autograd.grad(out, inputs, gradient.to(out))]

    expected = outputs("cpu", torch.float64, "reference")
    assert gap(outputs(GPU, dtype, backend), expected) < BOUNDS[dtype]


# ---- models


@pytest.mark.parametrize("name", ["clip-tiny", "clip-rn50"])
def test_clip_sees_and_reads_as_on_the_cpu(name):
    config = CLIP[name]()
    torch.manual_seed(0)
    model = Clip(config).eval()
    data = clip_bench.inputs(config, 3, "cpu")
    with torch.no_grad():
        expected = model(*data)
        model.to(GPU)
        assert gap(model(*on_gpu(data)), expected) < 1e-4
        with torch.autocast(GPU, torch.bfloat16):
            assert gap(model(*on_gpu(data)), expected) < 5e-2


@pytest.mark.parametrize(("precision", "by_layer"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_clip_trains_as_on_the_cpu_also_compiled(precision, by_layer):
    config = CLIP["clip-tiny"]()
    data = clip_bench.inputs(config, 6, "cpu")
    one = clip_bench.contestants(config, "cpu")["ours"]
    model = copy.deepcopy(one.model).to(GPU)
    other = clip_bench.contestant("ours", compiled(model) if by_layer else model, config)
    expected, found = (stepper(c.model, c.loss, of) for c, of in ((one, "fp32"), (other, precision)))
    for _ in range(4):  # the loss falls by a tenth
        assert gap([found(*on_gpu(data))], [expected(*data)]) < (1e-3 if precision == "fp32" else 2e-2)


def test_the_qformer_reads_looks_and_writes_as_on_the_cpu():
    config = BLIP2["blip2-tiny"]()
    torch.manual_seed(0)
    model = Blip2Qformer(config).eval()
    features = torch.randn(4, config.vision.tokens, config.vision.width)
    _, tokens = blip2_bench.inputs(config, 4, "cpu")

    @torch.no_grad()
    def outputs(model, features, tokens):
        seen = model.qformer.look_at(model.vision_norm(features))
        attention_mask, started = model.attention_mask(tokens), model.with_start(tokens)
        matched = model.qformer.match(tokens, attention_mask, seen)
        return (
            model.qformer.encode_queries(seen),
            model.text_features(tokens),
            matched,
            model.qformer.joint_causal(started, attention_mask, seen),
        )

    expected = outputs(model, features, tokens)
    assert gap(outputs(model.to(GPU), *on_gpu((features, tokens))), expected) < 1e-4


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_plain_one_in_fp64(chunk):
    torch.manual_seed(0)
    features = [torch.nn.functional.normalize(torch.randn(250, 48), dim=-1) for _ in range(2)]

    def outputs(loss, device, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in (*features, torch.tensor(14.3))]
        value = loss(*inputs)
        return [value, *torch.autograd.grad(value, inputs)]

    expected = outputs(contrastive_loss, "cpu", torch.float64)
    found = outputs(lambda *x: chunked_contrastive_loss(*x, chunk=chunk), GPU, torch.float32)
    assert gap(found, expected) < 1e-4
    assert gap(outputs(contrastive_loss, GPU, torch.float32), expected) < 1e-4


def test_beams_write_the_same_words_as_transformers_on_either_device():
    pytest.importorskip("transformers")
    config = blip2_bench.OPT_TINY
    written = []
    for device in ("cpu", GPU):
        torch.manual_seed(0)
        pixels, _ = blip2_bench.inputs(config, 5, "cpu")
        prompts = blip2_bench.prompts(config, 5, "cpu")
        both = blip2_bench.writers(config, device, torch.float32)
        written.append(
            {
                name: write(*on_gpu((pixels, prompts)) if device == GPU else (pixels, prompts))
                for name, write in both.items()
            }
        )
    assert all(torch.equal(found["ours"], found["transformers"]) for found in written)


# ---- training


@pytest.mark.parametrize("name", PAPERS)
def test_one_batch_can_be_learned_by_heart(name):
    torch.manual_seed(0)
    module, batch = CATALOG.package(name).module.example(8)
    module.log = lambda *args, **kwargs: None
    module, batch = module.to(GPU), on_gpu(batch)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    losses = []
    for _ in range(60):
        with torch.autocast(GPU, torch.bfloat16):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    assert losses[-1] < 0.2 * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"


@pytest.mark.parametrize("name", PAPERS)
def test_the_first_loss_is_that_of_the_cpu(name):
    torch.manual_seed(0)
    module, batch = CATALOG.package(name).module.example(8)
    module.log = lambda *args, **kwargs: None
    expected = module.eval().training_step(batch, 0)
    found = module.to(GPU).training_step(on_gpu(batch), 0)
    assert gap([found], [expected]) < 5e-2  # hard negatives are drawn by each device's own generator


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_on_the_gpu_and_keeps_the_curve(tmp_path, precision):
    module, batch = clip_example(16)
    module.recipe = ClipRecipe(
        model="clip-tiny", steps=6, batch=8, pairs=16, accelerator=GPU, precision=precision, learning_rate=2e-3
    )
    curves = MetricRecorder(8, every=2)
    make_trainer(module.recipe, tmp_path, [curves]).fit(module, Batches(batch, 8, 6, 0).loader())
    losses = [value for _, value in curves.values["loss"]]
    assert len(losses) == 3 and all(map(math.isfinite, losses))


def test_the_matrix_peak_and_the_memory_meter_measure_the_gpu():
    peak = bench_timing.matrix_peak(GPU, "bf16")
    assert peak["flops_per_second"] > 1e12
    meter = bench_timing.MemoryMeter(GPU)
    block = torch.empty(64, 2**20, dtype=torch.uint8, device=GPU)
    assert meter.peak() == block.numel()


def test_a_backend_chosen_for_all_reaches_the_gpu():
    config = CLIP["clip-tiny"]()
    model = Clip(config).to(GPU).eval()
    data = clip_bench.inputs(config, 3, GPU)
    with torch.no_grad():
        expected = model(*data)
        with use_backend("reference"):
            assert gap(model(*data), expected) < 1e-4


def test_a_stage_leaves_the_generator_of_the_gpu_where_it_was():
    torch.manual_seed(0)
    expected = torch.rand(3, device=GPU)
    torch.manual_seed(0)
    with own_randomness(1, "a stage"):
        torch.rand(5, device=GPU)
    assert torch.equal(torch.rand(3, device=GPU), expected)
