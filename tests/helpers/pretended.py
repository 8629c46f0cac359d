"""A GPU where there is none: CPU tensors that say they lie on one, so that code which mixes devices fails here too.

What it knows: an operation takes tensors of one device, beside single numbers and indices from the CPU; copies, `to`
and `cpu` cross over; numpy reads no GPU's memory. It knows nothing of kernels, precisions and times.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
CROSSING = {_aten.copy_.default, _aten._to_copy.default, _aten._copy_from_and_resize.default}
INDEXING = {
    _aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default,
    _aten.index_fill_.int_Scalar,  # a list in brackets, which torch brings to the tensor's device
}  # fmt: skip


class PretendedGpu:
    """A context in which `to("cuda")` and `device="cuda"` work. RuntimeError where an operation mixes devices."""

    def __init__(self):
        self.storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being given anew
        self.modes = _Calls(self), _Operations(self)

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *what):
        for mode in reversed(self.modes):
            mode.__exit__(*what)

    def has(self, tensor):
        with torch._C.DisableTorchFunction():
            found = self.storages.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def take(self, found):
        """Everything in `found` lies on the GPU from now on."""
        for tensor in _tensors(found):
            with torch._C.DisableTorchFunction():
                storage = tensor.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage)
        return found


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_device(value):
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "cuda", "cuda:0", "meta"))


class _Calls(TorchFunctionMode):
    """What names a device: it is asked for on the CPU, and the result said to lie where it was wanted."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = kwargs or {}, self.gpu
        own = args[0] if args and isinstance(args[0], torch.Tensor) else None
        mine = own is not None and gpu.has(own)
        if mine and func == torch.Tensor.device.__get__:
            return GPU
        if mine and func == torch.Tensor.is_cuda.__get__:
            return True
        if mine and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("numpy reads no tensor of a GPU: take its cpu() first")
        if func is torch.Tensor.__deepcopy__:
            return gpu.take(func(*args, **kwargs)) if mine else func(*args, **kwargs)
        wanted = None
        if func is torch.Tensor.cpu:
            wanted = torch.device("cpu")
        elif func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            wanted = GPU if gpu.has(args[1]) else torch.device("cpu")
        else:
            named = [a for a in (*args[1:], kwargs.get("device")) if _is_device(a)] if func is not torch.load else []
            wanted = torch.device(named[0]) if named else None
        if wanted is None or wanted.type == "meta":
            return func(*args, **kwargs)

        def here(value):
            return torch.device("cpu") if _is_device(value) else value

        found = func(*map(here, args), **{key: here(value) for key, value in kwargs.items()})
        if wanted.type == "cuda":
            return found if mine else gpu.take(found.clone() if found is own else found)
        if mine or gpu.has(found):
            with torch._C._DisableTorchDispatch():
                return found.clone()
        return found


class _Operations(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        there = [self.gpu.has(tensor) for tensor in given]
        if func in CROSSING:
            found = func(*args, **kwargs)
            return self.gpu.take(found) if there and there[0] else found
        if any(there):
            checked = args[:1] if func in INDEXING else (args, kwargs)
            strangers = [t for t in _tensors(checked) if t.ndim and t.numel() and not self.gpu.has(t)]
            if strangers:
                shapes = ", ".join(str(tuple(t.shape)) for t in strangers)
                raise RuntimeError(f"{func}: tensors of {shapes} on the CPU beside others on the GPU")
            return self.gpu.take(func(*args, **kwargs))
        return func(*args, **kwargs)


def on(device, tree):
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)
