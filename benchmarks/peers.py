"""PyTorch beside apr: on apr's stream, on apr's memory, written as its users write it.

A peer is made (compiled, its forward pass run) by a call that returns its launch, so that one which this PyTorch cannot
do is only left out.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from apr.device import Device

Launch = Callable[[], Any]
EAGER, COMPILED = "torch eager", "torch compile"


def find_torch(dev: Device) -> "Peers | None":
    """PyTorch on the device's stream; None, said once, where this interpreter has none that can use the GPU."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        print("no PyTorch in this interpreter: no peers", file=sys.stderr)
        return None
    if not torch.cuda.is_available():
        print("this PyTorch cannot use the GPU: no peers", file=sys.stderr)
        return None
    return Peers(torch, dev)


class Peers:
    """PyTorch, all of whose work goes to dev.stream from now on; `functional` is torch.nn.functional."""

    def __init__(self, torch: Any, dev: Device) -> None:
        self.torch, self.functional = torch, torch.nn.functional
        torch.cuda.set_device(dev.ordinal)
        self.stream = torch.cuda.ExternalStream(dev.stream.ptr)
        torch.cuda.set_stream(self.stream)

    def tensor(self, array: Any) -> Any:
        """The memory of a device array as a tensor."""
        if array.dtype == np.uint16:
            return self.torch.as_tensor(array.view(np.int16), device="cuda").view(self.torch.bfloat16)
        return self.torch.as_tensor(array, device="cuda")

    def tensors(self, *arrays: Any) -> list[Any]:
        """The same of several."""
        return [self.tensor(a) for a in arrays]

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile for these shapes alone."""
        torch = self.torch
        torch._dynamo.reset()  # else the shapes of earlier cases count towards its limit of recompilations
        importlib.import_module("torch._functorch.config").donated_buffer = False  # a backward that is run repeatedly
        return torch.compile(function, dynamic=False)

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Mapping[str, Callable[[], Launch]]:
        """function(*inputs), eager and compiled."""
        def launch(f: Callable[..., Any]) -> Launch:
            return lambda: f(*inputs)
        return {EAGER: lambda: launch(function), COMPILED: lambda: launch(self.compile(function))}

    def backward(self, function: Callable[..., Any], inputs: Sequence[Any],
                 douts: Sequence[Any]) -> Mapping[str, Callable[[], Launch]]:
        """The gradient of function(*inputs), eager and compiled; its forward pass runs once, untimed."""
        return {EAGER: lambda: self.gradient(function, inputs, douts),
                COMPILED: lambda: self.gradient(self.compile(function), inputs, douts)}

    def gradient(self, function: Callable[..., Any], inputs: Sequence[Any], douts: Sequence[Any]) -> Launch:
        """A launch of the gradient of function(*inputs) with respect to all inputs."""
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return lambda: self.torch.autograd.grad(outputs, leaves, douts, retain_graph=True)
