"""How a training is spread over processes: Lightning's own strategies, DDP, and DeepSpeed's ZeRO 1 to 3.

ZeRO: Rajbhandari et al. 2020 (arXiv:1910.02054). The stages' settings are data: recipes/deepspeed/*.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from shared.core.errors import UserError
from shared.core.files import ROOT
from shared.core.recipe import Recipe
from shared.weights.consolidate import quiet_and_plain, written_by

CONFIGS = ROOT / "recipes" / "deepspeed"
NAMES = ("auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload")


def strategy_of(recipe: Recipe) -> str | Strategy:
    """What the Trainer is given as `strategy`. UserError for an unknown name, and for ZeRO without deepspeed."""
    name = recipe.strategy
    if name not in NAMES:
        raise UserError(f"recipe: no strategy '{name}'; there are: {', '.join(NAMES)}")
    if name == "auto":
        return name
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True)
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"strategy {name} needs deepspeed, which is not installed: pip install -e '.[deepspeed]'")
    if recipe.accelerator == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config["train_micro_batch_size_per_gpu"] = recipe.batch // (recipe.devices * recipe.nodes * recipe.accumulate)
    return Zero(config=config)


@contextmanager
def whole(*parameters: nn.Parameter) -> Iterator[tuple[Tensor, ...]]:
    """The parameters' values, to be read or changed in place, wherever the strategy keeps them.

    An ordinary parameter is its own value. ZeRO trains an fp32 master copy in pieces, from which every step overwrites
    the module's parameter: a change of that alone would be lost. Here the whole master is given, and where it differs
    on leaving, master and module are written. All ranks must enter and do the same.
    """
    values = {p: _read(p) if _sharded(p) else p.data for p in parameters}
    before = {p: value.clone() for p, value in values.items() if _sharded(p)}
    yield tuple(values[p] for p in parameters)
    for p in before:
        if not torch.equal(values[p], before[p]):
            _write(p, values[p])


def _sharded(parameter: nn.Parameter) -> bool:
    """Under ZeRO-3 (ds_id), or trained under ZeRO-1 and 2."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _read(parameter: nn.Parameter) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    with GatheredParameters([parameter]):  # what is frozen has no master
        return parameter.data.clone()


def _write(parameter: Any, value: Tensor) -> None:
    """The same whole value on every rank -> the pieces of the master, and the module's parameter."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):  # ZeRO-1 and 2: the module's parameter is whole on every rank
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
        return
    if parameter.requires_grad:
        # Not safe_set_full_fp32_param: it fails where the ranks do not divide the elements, as those of a scalar.
        piece, group = parameter.ds_tensor.numel(), parameter.ds_process_group
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        padded = functional.pad(value.flatten(), (0, piece * ranks - value.numel()))
        safe_set_local_fp32_param(parameter, padded[rank * piece : (rank + 1) * piece])
    with _BytesOfScalars(), GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


class Zero(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, also on CPU (which Lightning's own refuses) and with scalar parameters."""

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0) if self._on_cpu else super().root_device  # deepspeed asks for an index

    def setup_environment(self) -> None:
        if self._on_cpu:
            DDPStrategy.setup_environment(self)
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if not self._on_cpu:
            return super().setup_distributed()
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled on the spot
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def init_deepspeed(self) -> None:
        with _BytesOfScalars():
            super().init_deepspeed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with _BytesOfScalars(), super().model_sharded_context():
            yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the batches it accumulates; deepspeed would divide it again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        ranks = written_by(path)
        if ranks != self.world_size:
            raise UserError(
                f"{path}: written by {ranks} ranks, but this run has {self.world_size}; start it on {ranks} "
                "(devices x nodes), or begin anew from its weights (shared.weights.consolidate)"
            )
        with quiet_and_plain():
            return super().load_checkpoint(path, weights_only)


class _BytesOfScalars(TorchFunctionMode):
    """deepspeed sends parameters as bytes, and torch views no scalar (CLIP's logit_scale) as bytes, but one element."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.view and args[1:] == (torch.uint8,) and args[0].ndim == 0:
            args = (args[0].view(1), torch.uint8)
        return func(*args, **(kwargs or {}))
