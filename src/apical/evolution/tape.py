"""Record the operations of a function of tensors once and replay them without the function's Python."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class _Tape(TorchDispatchMode):
    """Adds each operation to a graph; at this level `torch.func` transforms are already resolved."""

    def __init__(self, arguments: tuple[Tensor | None, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.constants = fx.Graph(), nn.Module()
        self._alive: list[Tensor] = []  # an id is unique only while the tensor exists
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
        """Return the node that produced a tensor, or a constant node if none did; return other values unchanged."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            name = f"constant_{len(self._alive)}"
            self.constants.register_buffer(name, value.detach())
            self._note(value, self.graph.get_attr(name))
        return self._nodes[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the operations cannot be replayed: they depend on the value of a tensor")
        if func is torch.ops.aten.lift_fresh.default:  # an alias: later in-place operations would change the constant
            func = torch.ops.aten.lift_fresh_copy.default
        kwargs = kwargs or {}
        node = self.graph.call_function(func, tree_map(self.node, args), tree_map(self.node, kwargs))
        result = func(*args, **kwargs)
        self._note(result, node)
        return result


def recorded(function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...]) -> Callable[..., Tensor]:
    """Return the operations of `function` on tensors of these shapes, as a function of such tensors.

    The operations must depend only on shapes.

    Raises:
        RuntimeError: the function reads the value of a tensor.
    """
    tape = _Tape(arguments)
    with tape:
        result = function(*arguments)
    tape.graph.output(tape.node(result))
    tape.graph.eliminate_dead_code()
    return fx.GraphModule(tape.constants, tape.graph)
