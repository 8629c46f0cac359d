"""Everything below is skipped where there is no CUDA GPU; ci/gpu runs it where there is one."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.path.parent.name == "gpu":
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """Convolutions are the one thing that torch rounds to TF32 unasked."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
