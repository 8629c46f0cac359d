"""BLIP-2's arms with their models on a GPU: one that is pretended (pretended.py), so that mixed devices fail here."""

from dataclasses import replace

import pytest
import torch
from pretended import PretendedGpu, on
from test_blip2_claims import SMALL, context, encoders  # noqa: F401

from papers.blip2.evidence import claims, stages
from papers.blip2.module import example
from shared.experiments import effects


@pytest.fixture
def gpu(monkeypatch):
    """Lightning trains on the CPU, since its accelerator is a real one, and leaves the model where it would."""

    def fit(module, *args, **more):
        waited = bridge_fit(module, *args, **more)
        module.to("cuda")
        return waited

    bridge_fit = effects.fit
    monkeypatch.setattr(effects, "fit", fit)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(stages, "device_for", lambda recipe: torch.device("cuda"))
    with PretendedGpu() as found:
        yield found


def test_a_pretended_gpu_refuses_what_a_real_one_would(gpu):
    here, there = torch.ones(3), torch.ones(3).to("cuda")
    assert there.device == torch.device("cuda:0") and (there * 2).is_cuda and not there.cpu().is_cuda
    assert torch.equal((there + here.to(there)).cpu(), 2 * here) and there[torch.tensor([0, 2])].is_cuda
    assert torch.zeros(2, device=there.device).is_cuda and (there * torch.tensor(2.0)).is_cuda
    for mixed in (lambda: there + here, lambda: here[there.long()].add_(there), lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="on the CPU beside others on the GPU"):
            mixed()
    with pytest.raises(TypeError, match="numpy reads no tensor of a GPU"):
        there.numpy()


def test_a_step_of_stage_1_stays_on_its_device(gpu):
    module, batch = example(4)
    module.log = lambda *args, **more: None
    module.to("cuda")
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step(on("cuda", batch), 0).backward()
    optimizer.step()
    assert all(p.is_cuda and p.grad.is_cuda for p in module.parameters())


@pytest.mark.parametrize("arm", claims.ARMS)
def test_every_arm_stays_on_its_device(gpu, tmp_path, arm):
    recipe = replace(SMALL, pairs=24, lm_texts=24, lm_steps=1, steps=1, stage2_steps=1, headline_steps=1)
    torch.manual_seed(3)
    found = claims.ARMS[arm](replace(context(tmp_path, arm, recipe=recipe), first=arm == "base"))
    assert found and all(isinstance(value, (int, float, str, dict)) for value in found.values())
