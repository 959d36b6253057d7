"""Starts a forward pass in the middle of a model, from the hidden states that a whole one left
(docs/methods.md, section 12).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.hooks import calling


class Prefixes:
    """Holds the hidden states in front of each layer, from which a forward pass starts.

    They are those of the model as it computes when this is made, hooks included. Where a hook
    changes in a layer, start in front of that layer or an earlier one.

    Args:
        model: a causal LM in eval mode.
        ids: on its device, without padding.

    Attributes:
        whole: logits of the pass from the first layer.
    """

    def __init__(self, model: PreTrainedModel, ids: Int[Tensor, "n tokens"]) -> None:
        self._layers = [layer.module for layer in Anatomy.of(model).layers]
        self._model, self._ids = model, ids
        self._inputs: list[Tensor] = []
        self._tuples = False
        with ExitStack() as hooks:
            for layer in self._layers:
                hook = layer.register_forward_pre_hook(self._see, with_kwargs=True)
                hooks.callback(hook.remove)
            hook = self._layers[0].register_forward_hook(self._kind)
            hooks.callback(hook.remove)
            self.whole = self._run()

    @torch.no_grad()
    def logits(self, start: int, *, skipped: bool = False) -> Float[Tensor, "n tokens vocabulary"]:
        """Logits of a pass that starts in front of a layer, or behind it where it is skipped."""
        last = start if skipped else start - 1
        hidden = self._inputs[start]

        def passed(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._tuples else hidden

        with calling(dict.fromkeys(self._layers[: last + 1], passed)):
            return self._run()

    @torch.no_grad()
    def _run(self) -> Tensor:
        logits: Tensor = self._model(input_ids=self._ids, use_cache=False).logits
        return logits.float()

    def _see(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

    def _kind(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._tuples = isinstance(output, tuple)
