"""One state dict out of a checkpoint, whatever strategy wrote it: weights leave a training as one safetensors file.

A single process and DDP write one file, ZeRO a folder in which every rank keeps its piece of the fp32 master weights.
Lightning's converter calls the same function of deepspeed, but runs the pickles of the checkpoint on its way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from shared.core.errors import UserError
from shared.weights.load import save_weights

PREFIX = "model."  # where a paper's LightningModule keeps its model
TAG = "checkpoint"  # of Lightning: the folder, inside a ZeRO checkpoint, with one file or two a rank
STATE = "state.ckpt"  # of a sealed checkpoint (shared/training/checkpointing.py)


def consolidate_to(checkpoint: Path, target: Path) -> None:
    """Write the weights of `checkpoint` (see `consolidate`) as safetensors, with the keys of the paper's model."""
    save_weights(consolidate(checkpoint), target)


def consolidate(checkpoint: Path) -> dict[str, Tensor]:
    """The model's state dict, fp32 where it was trained so, on the CPU, to be loaded strictly on one process.

    checkpoint: a sealed folder, or a Trainer's own checkpoint, which is a file, or under ZeRO a folder. UserError where
    it is neither, where a rank's part is missing or unreadable, or holds more than tensors and plain values.
    """
    state = checkpoint / STATE if (checkpoint / STATE).exists() else checkpoint
    try:
        if state.is_dir():
            tensors = _of_zero(state)
        else:
            tensors = torch.load(state, map_location="cpu", weights_only=True)["state_dict"]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{state}: cannot read it ({error.strerror or error}); name a checkpoint") from None
    except Exception as error:  # parsers of foreign or cut files fail in many ways
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{state}: refused as a checkpoint ({reason}); take an earlier one") from error
    refuse_outside(tensors, state)
    return {key.removeprefix(PREFIX): tensor.detach() for key, tensor in tensors.items()}


def refuse_outside(keys: Iterable[str], place: object) -> None:
    """UserError where weights lie beside the module's `model`: they would have no name in a file of the model."""
    if others := [key for key in keys if not key.startswith(PREFIX)]:
        raise UserError(f"{place}: {', '.join(others[:8])} lie outside `{PREFIX}`; keep weights in the model")


def _of_zero(folder: Path) -> dict[str, Tensor]:
    written_by(folder)
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{folder}: reading ZeRO's checkpoints needs deepspeed: pip install -e '.[deepspeed]'")
    with quiet_and_plain():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        tensors = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
        whole = folder / TAG / "mp_rank_00_model_states.pt"  # below ZeRO-3 the module is whole on every rank
        if whole.is_file():  # frozen parameters have no master copy; ZeRO-1 leaves them out
            own = torch.load(whole, map_location="cpu", weights_only=True)["module"]
            tensors |= {key: value for key, value in own.items() if key not in tensors}
        return tensors


def written_by(folder: Path) -> int:
    """How many ranks wrote a ZeRO checkpoint. UserError where the folder is none."""
    ranks = len(list((folder / TAG).glob("*_optim_states.pt")))
    if not ranks:
        raise UserError(f"{folder}: not a checkpoint of ZeRO: there is no {TAG}/*_optim_states.pt in it")
    return ranks


@contextlib.contextmanager
def quiet_and_plain() -> Iterator[None]:
    """Inside, deepspeed prints nothing, and its torch.load takes tensors, plain values and deepspeed's own few records.

    By itself it would run whatever a checkpoint's pickles name.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    records = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    nowhere = io.StringIO()
    with (
        mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"),
        torch.serialization.safe_globals(records),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
