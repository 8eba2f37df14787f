"""What an operator is: a schema, and functions that its folder declares and that are called by argument name.

A folder declares its operator with :class:`Operator`. From the schema, which exists without a compiler, follow two
private operators of PyTorch, one for each family of kernels: ``mirage::{name}_compiled``, which the C++ and CUDA
modules implement (``STABLE_TORCH_LIBRARY_IMPL``), and ``mirage::{name}_triton``, which the folder's ``triton.py`` does.
The schema's order of arguments is known here and to the kernels only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choose_backend
from ..environment import triton_interpreted

NAMESPACE = "mirage"
FAMILIES = ("compiled", "triton")
OPERATORS: dict[str, Operator] = {}
"""Every operator by its name, as its folder declared it."""

_FAMILY = {"cpu": "compiled", "cuda": "compiled", "triton": "triton"}
_definitions = torch.library.Library(NAMESPACE, "DEF")
_implementations = torch.library.Library(NAMESPACE, "IMPL")


class Autograd(NamedTuple):
    """The derivative of an operator.

    ``differentiable`` names the arguments that may get a gradient. ``setup(ctx, output, **arguments)`` saves what the
    backward pass needs. ``backward(ctx, family, needed, *grad_outputs)`` returns gradients by argument name; ``needed``
    holds the names of the arguments that want one, ``family`` that of the kernels that computed the output.
    """

    differentiable: tuple[str, ...]
    setup: Callable[..., None]
    backward: Callable[..., dict[str, Any]]


class Operator:
    """One operator, from the schema to the choice of who computes it.

    Args:
        name: of the operator, and of the function that implements it in the folder's ``triton.py``.
        schema: its arguments and results, in PyTorch's language, without a name.
        fake: shapes and dtypes of the results without data, from the arguments that it names.
        reference: the definition; without one PyTorch differentiates that of another operator.
        device: the argument on whose device the operator runs.
        precision: arguments, tensors or dtypes: where one is float64, the definition computes.
        autograd: its derivative; the definition's own is PyTorch's.
        result: what :meth:`launch` makes of the results.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any] | None = None,
        device: str,
        precision: tuple[str, ...] = (),
        autograd: Autograd | None = None,
        result: Callable[[Any], Any] | None = None,
    ) -> None:
        self.name, self.schema, self.reference = name, schema, reference
        self._autograd = autograd
        self._device, self._precision, self._result = device, precision, result
        self._folder = fake.__module__
        self.overloads: dict[str, Callable[..., Any]] = {}
        """The private operators, by family. Looked up once: ``torch.ops`` resolves names in Python."""
        for family in FAMILIES:
            qualified = f"{name}_{family}"
            _definitions.define(f"{qualified}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            self.overloads[family] = getattr(getattr(torch.ops, NAMESPACE), qualified).default
        arguments = self.overloads["compiled"]._schema.arguments  # type: ignore[attr-defined]
        self.arguments = tuple(argument.name for argument in arguments)
        """Names, in the schema's order."""
        self._defaults = {argument.name: None for argument in arguments if argument.has_default_value()}
        self._written = tuple(one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write)
        self._ordered = itemgetter(*self.arguments)
        for family in FAMILIES:
            qualified = f"{NAMESPACE}::{name}_{family}"
            torch.library.register_fake(qualified, self.by_name(fake))
            self.register_autograd(qualified, family)
        self._differentiable = () if autograd is None else autograd.differentiable
        OPERATORS[name] = self

    def launch(self, **arguments: Any) -> Any:
        """Compute on the schema's arguments, given by name as the public function normalises them: no check.

        Raises:
            RuntimeError: the forced backend cannot take them.
        """
        if len(arguments) < len(self.arguments):
            arguments = {**self._defaults, **arguments}
        double = False
        for name in self._precision:
            value = arguments[name]
            double = double or (value if isinstance(value, torch.dtype) else value.dtype) == torch.float64
        compiling = torch.compiler.is_compiling()
        dtype = torch.float64 if double else torch.float32
        backend = choose_backend(arguments[self._device].device, dtype, compiling)
        if backend == "reference":
            assert self.reference is not None
            results = self.reference(**arguments)
        elif compiling:
            results = self.overloads[_FAMILY[backend]](*[arguments[name] for name in self.arguments])
        elif self._is_inference(arguments):
            # Without the autograd layer, which is Python: half of the 36 microseconds of an empty call.
            with torch._C._AutoDispatchBelowAutograd():
                results = self.overloads[_FAMILY[backend]](*self._ordered(arguments))
        else:
            results = self.overloads[_FAMILY[backend]](*self._ordered(arguments))
        if self._written and not torch.compiler.is_compiling():  # a compiled graph does so itself
            # Kernels write behind PyTorch's back. It must know, or a backward pass takes what it saved for unchanged.
            written = [arguments[name] for name in self._written if arguments[name] is not None]
            torch.autograd.graph.increment_version(written)
        return results if self._result is None else self._result(results)

    def by_name(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function of named arguments one of the schema's order; defaults are the schema's."""

        def positional(*values: Any) -> Any:
            return function(**{**self._defaults, **dict(zip(self.arguments, values, strict=False))})

        return positional

    def _is_inference(self, arguments: dict[str, Any]) -> bool:
        """Return whether nothing asks for a gradient that the operator could give."""
        if not self._differentiable or not torch.is_grad_enabled():
            return bool(self._differentiable)
        return not any(arguments[name].requires_grad for name in self._differentiable)

    def register_autograd(self, qualified: str, family: str) -> None:
        """Register the derivative, where there is one, of a private operator of this schema: ``namespace::name``."""
        autograd = self._autograd
        if autograd is None:
            return

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            autograd.setup(ctx, output, **dict(zip(self.arguments, inputs, strict=True)))

        def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
            wanted = ctx.needs_input_grad
            needed = {name for name, needs in zip(self.arguments, wanted, strict=False) if needs}
            with torch.no_grad():
                gradients = autograd.backward(ctx, family, needed, *grad_outputs)
            if torch.is_grad_enabled():  # with create_graph=True
                of = [x for x in (*grad_outputs, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
                gradients = {key: _OnlyOnce.apply(gradient, self.name, *of) for key, gradient in gradients.items()}
            given = [gradients.get(name) for name in self.arguments[: len(wanted)]]
            return (*given, *[None] * (len(wanted) - len(given)))

        torch.library.register_autograd(qualified, backward, setup_context=setup_context)


class _OnlyOnce(torch.autograd.Function):
    """Pass a gradient on, and refuse to differentiate it: silence would read as a second derivative of 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str, *_: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{ctx.name} has no second derivative on this backend: detach its gradient")


def implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as ``mirage::{name}_triton``, for the devices that Triton runs on here."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = OPERATORS[name]
        for key in ("CUDA", "CPU") if triton_interpreted() else ("CUDA",):
            _implementations.impl(f"{name}_triton", operator.by_name(function), key)
        return function

    return register


def import_triton_kernels() -> None:
    """Import the Triton kernels of every operator, which register themselves."""
    for folder in {operator._folder: None for operator in OPERATORS.values()}:
        importlib.import_module(f"{folder}.triton")
