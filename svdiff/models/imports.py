"""diffusers imported without what drawing pictures never runs: torch's compiler, statistics and optimisers of scipy.

Each is loaded when somebody looks into it, so whatever needs it works as ever. Together they are half of the time of importing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")
COMPILER = "torch._dynamo"
#: Functions that transformers and torchvision import by name, and call when somebody compiles or detects objects.
FUNCTIONS = {
    f"{COMPILER}._trace_wrapped_higher_order_op": "TransformGetItemToIndex",
    f"{COMPILER}.utils": "is_compile_supported",
    "scipy.optimize": "linear_sum_assignment",
}


def import_diffusers() -> Any:
    """diffusers, with torch and transformers behind it."""
    if "diffusers" not in sys.modules:
        stand_ins = [_Compiler(COMPILER), _StandIn("scipy.integrate"), _StandIn("scipy.stats")]
        stand_ins += [_StandIn(name) for name in FUNCTIONS]
        for stand_in in stand_ins:
            sys.modules.setdefault(stand_in.__name__, stand_in)
        sys.meta_path.insert(0, _Files())
        slow = importlib.metadata.packages_distributions
        try:  # who installed what: diffusers reads the list of files of every package, and then uses none
            importlib.metadata.packages_distributions = dict  # type: ignore[assignment]
            importlib.import_module("diffusers")
        finally:
            importlib.metadata.packages_distributions = slow
    return sys.modules["diffusers"]


class _StandIn(ModuleType):
    """Stands for a module until anything is asked of it; one of FUNCTIONS loads it when it is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # so that its files are looked for, by _Files

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == FUNCTIONS.get(self.__name__):
            return lambda *given, **options: getattr(_real(self.__name__), name)(*given, **options)
        return getattr(_real(self.__name__), name)


class _Compiler(_StandIn):
    """Stands for torch._dynamo, also where functions are marked for it: it is told of them when it is loaded."""

    eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))  # what nothing is, as yet
    marked: ClassVar[list[tuple[str, Any]]] = []

    def allow_in_graph(self, function: T) -> T:
        self.marked.append(("allow_in_graph", function))
        return function

    def assume_constant_result(self, function: T) -> T:
        self.marked.append(("assume_constant_result", function))
        return function

    def disable(self, function: Any = None, recursive: bool = True, **options: Any) -> Any:
        if function is None:
            return functools.partial(self.disable, recursive=recursive, **options)
        hidden: list[Any] = []

        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            compiler = sys.modules[COMPILER]
            if compiler is self:
                return function(*given, **named)
            if not hidden:
                hidden.append(compiler.disable(function, recursive, **options))
            return hidden[0](*given, **named)

        return call


class _Files(MetaPathFinder, Loader):
    """Finds files of what a module stands for, after having loaded that."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        stands_in = isinstance(sys.modules.get(name.rpartition(".")[0]), _StandIn)
        return ModuleSpec(name, self) if stands_in else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _real(spec.name.rpartition(".")[0])
        return importlib.import_module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It is executed already."""


def _real(name: str) -> ModuleType:
    """What a module stands for, loaded."""
    compiler = sys.modules.get(COMPILER)
    if name.startswith(COMPILER) and isinstance(compiler, _Compiler):
        for loaded in [other for other, module in sys.modules.items() if isinstance(module, _StandIn)]:
            if loaded.startswith(COMPILER):
                del sys.modules[loaded]
        real = importlib.import_module(COMPILER)
        for mark, function in compiler.marked:
            getattr(real, mark)(function)
    elif isinstance(sys.modules.get(name), _StandIn):
        del sys.modules[name]
    return importlib.import_module(name)
