"""The operations of a function of tensors, recorded once and repeated without the function's Python."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class _Tape(TorchDispatchMode):
    """Adds each operation to a graph; `torch.func` transforms are already resolved where it listens."""

    def __init__(self, arguments: tuple[Tensor | None, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.constants = fx.Graph(), nn.Module()
        self._alive: list[Tensor] = []  # an id names a tensor only while the tensor exists
        self._nodes: dict[int, fx.Node] = {}
        for k, argument in enumerate(arguments):
            self._note(argument, self.graph.placeholder(f"argument_{k}"))

    def _note(self, value: object, node: fx.Node) -> None:
        if isinstance(value, Tensor):
            self._alive.append(value)
            self._nodes[id(value)] = node
        elif isinstance(value, (tuple, list)):
            for k, part in enumerate(value):
                self._note(part, self.graph.call_function(operator.getitem, (node, k)))

    def node(self, value: Any) -> Any:
        """Where a tensor comes from; one that no operation made is a constant, and other values are themselves."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            name = f"constant_{len(self._alive)}"
            self.constants.register_buffer(name, value.detach())
            self._note(value, self.graph.get_attr(name))
        return self._nodes[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the operations cannot be repeated: they depend on the value of a tensor")
        if func is torch.ops.aten.lift_fresh.default:  # an alias: what is then done in place would change the constant
            func = torch.ops.aten.lift_fresh_copy.default
        kwargs = kwargs or {}
        node = self.graph.call_function(func, tree_map(self.node, args), tree_map(self.node, kwargs))
        result = func(*args, **kwargs)
        self._note(result, node)
        return result


def recorded(function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...]) -> Callable[..., Tensor]:
    """The operations of `function` on tensors like these, as a function of such tensors.

    The operations must depend on shapes alone.

    Raises:
        RuntimeError: the function reads the value of a tensor.
    """
    tape = _Tape(arguments)
    with tape:
        result = function(*arguments)
    tape.graph.output(tape.node(result))
    tape.graph.eliminate_dead_code()
    return fx.GraphModule(tape.constants, tape.graph)
