"""diffusers imported without what drawing pictures never runs: torch's compiler, statistics of scipy, models split over machines.

What is stood for is loaded when somebody looks into it, so whatever needs it works as ever. Together they are half of the time
of importing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
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
#: Packages that import all their files, or read them, when one is wanted.
FOLDERS = {"transformers.models", "diffusers.models.autoencoders", "diffusers.models.transformers"}
#: What transformers asks before it imports what language models alone use. Tensors split over processes are theirs as well, but a
#: process that was started as one of several keeps them.
OF_LANGUAGE_MODELS = ("is_torch_distributed_available", "is_torch_flex_attn_available")


def import_diffusers() -> Any:
    """diffusers, with torch and transformers behind it."""
    if "diffusers" not in sys.modules:
        names = ("scipy.integrate", "scipy.stats", "torch.nn.attention.flex_attention", *FUNCTIONS)
        stand_ins = [_Compiler(COMPILER), *map(_StandIn, names)]
        for stand_in in stand_ins:
            sys.modules.setdefault(stand_in.__name__, stand_in)
        sys.meta_path.insert(0, _Files())
        _do_without_language_models()
        slow = importlib.metadata.packages_distributions
        try:  # who installed what: diffusers reads the list of files of every package, and then uses none
            importlib.metadata.packages_distributions = dict  # type: ignore[assignment]
            importlib.import_module("diffusers")
        finally:
            importlib.metadata.packages_distributions = slow
    return sys.modules["diffusers"]


def _do_without_language_models() -> None:
    utils = importlib.import_module("transformers.utils")
    for question in OF_LANGUAGE_MODELS[1 if "WORLD_SIZE" in os.environ else 0 :]:
        for module in (utils, utils.import_utils):
            setattr(module, question, bool)  # False


class _StandIn(ModuleType):
    """Stands for a module until anything is asked of it; one of FUNCTIONS loads it when it is called."""

    def __init__(self, name: str, *path: str) -> None:
        super().__init__(name)
        self.__path__ = list(path)  # without one, its files are found by _Files

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
    """Finds FOLDERS, and files of what a module stands for, after having loaded that."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        parent, _, last = name.rpartition(".")
        if name in FOLDERS:
            spec = ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = [os.path.join(folder, last) for folder in path]
            return spec
        return ModuleSpec(name, self) if isinstance(sys.modules.get(parent), _StandIn) and not path else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.submodule_search_locations is not None:
            return _StandIn(spec.name, *spec.submodule_search_locations)
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
        FOLDERS.discard(name)
        del sys.modules[name]
    return importlib.import_module(name)
