"""Devices that are not there, with numbers: tensors of the CPU that say they lie on ``cuda:1``.

An operation that mixes devices is an error, as on real ones: only a number of the CPU may come with
tensors of another device, and a copy goes from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from functorch_opt import tree
from functorch_opt._core import numerics, sharding
from functorch_opt._execution import together
from functorch_opt.optim import counts, plan

COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten._foreach_copy_)
CPU = torch.device("cpu")


class Placed(Tensor):
    """A tensor that lies on `device`; its numbers are in `here`."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, device: Any) -> Placed:
        placed: Any = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=device,
        )
        placed.here = here
        return placed  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def untyped_storage(self) -> Any:
        return self.here.untyped_storage()

    def __getitem__(self, index: Any) -> Any:  # torch's own asks for a driver
        found: Tensor = self
        dim = 0
        many = index if isinstance(index, tuple) else (index,)
        for k, i in enumerate(many):
            if i is Ellipsis:
                dim = found.dim() - (len(many) - k - 1)
            elif isinstance(i, int):
                found = torch.select(found, dim, i)
            else:
                found = torch.ops.aten.slice(found, dim, i.start, i.stop, i.step or 1)
                dim += 1
        return found

    @classmethod
    def __torch_dispatch__(
        cls, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with Devices():
            return f(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.here}, {self.device})"


class Devices(TorchDispatchMode):
    """Runs operations on the numbers, and says where the result lies."""

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = CPU
        device = self._device(f, args, kwargs) if wanted is None else wanted
        given = [x for x in tree.leaves((args, kwargs)) if isinstance(x, Placed)]
        known = {id(x.here): x for x in given}
        mine = tree_map_only(Placed, lambda x: x.here, (args, kwargs))
        made = f(*mine[0], **mine[1])

        def placed(x: Tensor) -> Tensor:
            if id(x) in known:
                return known[id(x)]
            return x if torch.device(device).type == "cpu" else Placed(x, device)

        return tree_map_only(Tensor, placed, made)

    def _device(self, f: Any, args: Any, kwargs: Any) -> torch.device:
        """Where the result lies."""
        tensors = [x for x in tree.leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = {x.device for x in tensors if x.dim() or x.device != CPU}
        one_for_each = "foreach" in str(f) and not isinstance(args[1:2], Tensor)
        if f.overloadpacket in COPIES or not found or one_for_each:
            return tensors[0].device if tensors else CPU
        if len(found) > 1:
            raise RuntimeError(f"{f}: tensors are on several devices: {found}")
        return found.pop()


def _copied(x: Tensor, y: Tensor, non_blocking: bool = False) -> Tensor:
    copied: Tensor = torch.ops.aten.copy_.default(x, y, non_blocking)
    return copied


@contextmanager
def several() -> Iterator[None]:
    """Such tensors pass for real ones."""
    plain = (*sharding.PLAIN, Placed)
    of_package = (sharding, numerics, together)
    patches = [mock.patch.object(of, "PLAIN", plain) for of in of_package]
    patches += [
        mock.patch.object(of, "is_in_torch_dispatch_mode", return_value=False)
        for of in (counts, plan)
    ]
    # These ask for a driver.
    patches.append(mock.patch.object(torch.cuda, "_lazy_init"))
    patches.append(
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False)
    )
    patches.append(mock.patch.object(Tensor, "copy_", _copied))
    for patch in patches:
        patch.start()
    sharding._NOT_SHARDED.add(Placed)
    try:
        with Devices():
            yield
    finally:
        sharding._NOT_SHARDED.discard(Placed)
        for patch in patches:
            patch.stop()


def placed(x: Tensor, device: str) -> Tensor:
    return x.clone() if device == "cpu" else Placed(x.clone(), device)


def numbers(x: Tensor) -> Tensor:
    return x.here if isinstance(x, Placed) else x
