"""The decode forward of a model as one compiled graph.

The forward is traced once, on fake tensors, for any number of tokens, and lowered by torch's inductor, which fuses the
small operators between products and attention: norms, rotations, activations, residuals. Attention and packed products
stay what they are outside, as operators that the graph calls. Weights are inputs, so that a graph survives an update.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from burnish.errors import ConfigError
from burnish.model.attention import AttentionCall, Layout, use_layout
from burnish.model.self_test import supports_prefix
from burnish.progress import phase
from burnish.rollout.packed_linears import num_products

__all__ = ["CompiledForward", "Lower", "check_compiler", "compiling_pays"]

_logger = logging.getLogger(__name__)

_PAYING_FORWARDS = 5_000
"""Decode forwards that save what a compilation takes: 44 s, against 10 to 20 ms of a forward of 30 unfused layers."""
_TRACED_TOKENS = 29
"""Tokens of the traced forward: a number that no model compares its length with."""

Lower = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]
"""Turn a graph and its fake inputs into a function of the inputs, which returns a sequence of outputs."""


@dataclass(frozen=True, slots=True)
class _Attending:
    """The layout of the forward that runs, and the attention calls of the traced one."""

    layout: Layout
    calls: Sequence[AttentionCall]


_attending: ContextVar[_Attending] = ContextVar("burnish_compiled_attention")
_library = torch.library.Library("burnish", "FRAGMENT")
_library.define("cached_attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, int call) -> Tensor")


def _cached_attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: int) -> Tensor:
    """Attend by the layout of the forward that runs."""
    now = _attending.get()
    return now.layout.attend(replace(now.calls[call], query=query, key=key, value=value, sinks=sinks))


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: int) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_library.impl("cached_attention", _cached_attention, "CompositeExplicitAutograd")
torch.library.register_fake("burnish::cached_attention", _fake_attention, lib=_library)


class _Recorder:
    """A layout that records the calls of a traced forward, and puts an operator for each into its graph."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the [1, T, heads, D] output of the operator."""
        self.calls.append(call)
        operator = torch.ops.burnish.cached_attention
        return operator(call.query, call.key, call.value, call.sinks, len(self.calls) - 1)


@dataclass(slots=True)
class _Graph:
    """A compiled forward; `run` is None where the model cannot be traced or compiled.

    Attributes:
        run: weights, tokens, positions -> hidden states.
        calls: what each attention was called with, but for its tensors.
        admits: whether a number of tokens meets the conditions that tracing has found.
    """

    run: Callable[..., Any] | None = None
    calls: Sequence[AttentionCall] = ()
    admits: Callable[[int], bool] = bool
    admitted: dict[int, bool] = field(default_factory=dict[int, bool])

    def takes(self, tokens: int) -> bool:
        if tokens not in self.admitted:
            self.admitted[tokens] = tokens > 1 and self.admits(tokens)
        return self.admitted[tokens]


class CompiledForward:
    """The base model's forward over one row of tokens, compiled when it is first needed.

    Args:
        model: a transformers causal language model.
        lower: compiles a graph; None for inductor.
    """

    def __init__(self, model: Any, lower: Lower | None = None) -> None:
        self._model, self._lower = model, _by_inductor if lower is None else lower
        self._graphs: dict[Any, _Graph] = {}
        self._names: tuple[str, ...] = ()
        self._values: tuple[Tensor, ...] = ()
        self._key: Any = None

    @contextmanager
    def current_weights(self) -> Generator[None]:
        """Run with the weights that the model has now, which must not be replaced inside."""
        base = self._model.base_model
        named = {**dict(base.named_parameters()), **dict(base.named_buffers())}
        self._names, self._values = tuple(named), tuple(value.detach() for value in named.values())
        # What a trace takes for constant, and may differ at the next call.
        shapes = tuple((value.shape, value.dtype) for value in self._values)
        self._key = (num_products(), self._names, shapes, _adapter_state(base))
        try:
            yield
        finally:
            self._names, self._values = (), ()

    def __call__(self, layout: Layout, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Return the [T, H] last hidden states of T tokens; None where the model has to run as it is.

        It has to outside `current_weights`, and where its code cannot be compiled.

        Args:
            layout: computes the attention.
            tokens: [T] token ids.
            positions: [T] true positions.
        """
        if not self._values:
            return None
        if self._key not in self._graphs:
            self._graphs[self._key] = self._compile(tokens.device)
        graph = self._graphs[self._key]
        if graph.run is None or not graph.takes(len(tokens)):
            return None
        token = _attending.set(_Attending(layout, graph.calls))
        try:
            return graph.run(*self._values, tokens, positions)[0]
        finally:
            _attending.reset(token)

    def _compile(self, device: torch.device) -> _Graph:
        name = type(self._model).__name__
        try:
            with phase(f"compiling the decode forward of {name}"), _quiet():
                return self._traced(device)
        # Whatever the model's code or the compiler raises, the model itself runs.
        except Exception as error:
            reason = str(error).strip().splitlines()
            _logger.warning(
                "compile_rollouts: %s runs uncompiled, because %s: %s",
                name, type(error).__name__, reason[0] if reason else "no message",
            )  # fmt: skip
            return _Graph()

    def _traced(self, device: torch.device) -> _Graph:
        # They take seconds to import.
        from torch._dispatch.python import enable_python_dispatcher
        from torch._dynamo.source import ConstantSource
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        shapes, recorder = ShapeEnv(), _Recorder()
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        any_length = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        fakes = [mode.from_tensor(value, static_shapes=True) for value in self._values]
        for name in ("tokens", "positions"):
            example = torch.zeros(_TRACED_TOKENS, dtype=torch.long, device=device)
            fakes.append(mode.from_tensor(example, symbolic_context=any_length, source=ConstantSource(name)))

        def forward(*inputs: Tensor) -> tuple[Tensor]:
            weights, (tokens, positions) = dict(zip(self._names, inputs, strict=False)), inputs[-2:]
            row = {"input_ids": tokens[None], "position_ids": positions[None], "use_cache": False}
            row["attention_mask"] = torch.ones_like(tokens)[None]
            with use_layout(recorder, self._model, checks_mask=False):
                output = torch.func.functional_call(self._model.base_model, weights, kwargs=row)
            return (output.last_hidden_state[0],)

        with mode, enable_python_dispatcher():
            graph = make_fx(forward)(*fakes)
        conditions = shapes.produce_guards_expression(fakes[-2:], ignore_static=False)

        def admits(tokens: int) -> bool:
            examples = [torch.empty(tokens, dtype=torch.long, device="meta")] * 2
            return conditions is None or bool(shapes.evaluate_guards_expression(conditions, examples))

        calls = [_without_tensors(call) for call in recorder.calls]
        return _Graph(self._lower(graph, fakes), calls, admits)


@contextmanager
def _quiet() -> Generator[None]:
    """Silence torch's report of an operator that cannot be traced, which is ours to give, and its deprecations."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _adapter_state(model: nn.Module) -> tuple[Any, ...]:
    """Return which adapters of peft's are active, and their scales."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    return tuple(
        (
            layer.disable_adapters,
            *layer.active_adapters,
            *layer.merged_adapters,
            *sorted(getattr(layer, "scaling", {}).items()),
        )
        for layer in layers
    )


def _without_tensors(call: AttentionCall) -> AttentionCall:
    """Drop the fake tensors of a traced call, which would keep the trace alive."""
    nothing = torch.empty(0)
    return replace(call, query=nothing, key=nothing, value=nothing, sinks=None)


def _by_inductor(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    # In this process: workers would outlive a run that is killed.
    with config.patch(compile_threads=1):
        return compile_fx(graph, list(inputs))  # pyright: ignore[reportReturnType]


def compiling_pays(model: Any, forwards: float) -> bool:
    """Return whether a compilation is likely to save more time than it takes where layers are not fused.

    On devices other than a CPU this is not measured.

    Args:
        model: a transformers causal language model.
        forwards: decode forwards of the run.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or forwards < _PAYING_FORWARDS:
        return False
    if not supports_prefix(model).ok:  # another engine samples from it
        return False
    try:
        check_compiler("cpu")
    except ConfigError:
        return False
    return True


def check_compiler(device: str) -> None:
    """Check that a device's code can be compiled here.

    Raises:
        ConfigError: there is no C++ compiler, or no triton, with the fix.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ConfigError(
                "compile_rollouts = True: there is no C++ compiler; install g++ or clang, or leave the field out."
            ) from error
    elif not has_triton():
        raise ConfigError(
            f"compile_rollouts = True on {device}: triton is missing or does not support it; pip install triton, or "
            "leave the field out."
        )
