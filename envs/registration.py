"""Registers the environments in Gymnasium, and imports Gymnasium for nobody who does not want it.

Gymnasium has no entry points for packages: an environment is known once its package is imported.
`import prunenet` must stay light. So where Gymnasium is not imported yet, an import hook registers
the environments behind its import.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ENV_ID = "prunenet/LayerwisePruning-v0"
BUDGET_ENV_ID = "prunenet/BudgetPruning-v0"
_CLASSES = {
    ENV_ID: ("layerwise:LayerwisePruningEnv", "vector:LayerwisePruningVectorEnv"),
    BUDGET_ENV_ID: ("budget:BudgetPruningEnv", "budget:BudgetPruningVectorEnv"),
}


def register() -> None:
    """Registers each environment that the registry does not know yet."""
    import gymnasium

    for name, (single, batched) in _CLASSES.items():
        if name not in gymnasium.registry:
            gymnasium.register(
                id=name,
                entry_point=f"prunenet.envs.{single}",
                vector_entry_point=f"prunenet.envs.{batched}",
            )


def register_when_imported() -> None:
    """Registers the environments now, or as soon as Gymnasium is imported."""
    if "gymnasium" in sys.modules:
        register()
    elif not any(isinstance(finder, _Behind) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Behind())


class _Behind(MetaPathFinder):
    """Leaves the import of Gymnasium as it is, and registers behind it. Serves once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "gymnasium":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec
