"""Lets a package be called like the function that it is named after."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, home: str) -> None:
    """Makes `package(...)` call the function of the same name in the module `home`.

    `prunenet.recover(...)` and the package `prunenet.recover` share a name: importing the package
    sets the attribute that the lazy name of `prunenet` would give.
    """
    name = package.rpartition(".")[2]

    class Callable(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return getattr(import_module(home), name)(*args, **options)

    sys.modules[package].__class__ = Callable
