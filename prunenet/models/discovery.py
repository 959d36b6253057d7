"""Discovers where the channels of an unknown model type are, and proves it.

1. A tiny model of the same class is built (`prunenet.models.twin`).
2. Matrices are proposed by shape and tested by number (`prunenet.models.candidates`).
3. The configuration fields that hold their widths are found (`prunenet.models.knob_search`).
4. The tiny model is cut with other channels in each group and expert, built anew from the patched
   configuration, filled strictly, saved, and reloaded. Its logits must equal those of the dense
   model with these channels masked.

The result is a row as in `prunenet.models.architectures`, or the reason why there is none.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import Architecture
from prunenet.models.around import described
from prunenet.models.candidates import Found, find, matrices
from prunenet.models.groups import Group, Pattern
from prunenet.models.knob_search import list_that_separates, with_knobs
from prunenet.models.knobs import uniform_widths
from prunenet.models.surgery import cut, masking
from prunenet.models.twin import D_MODEL, NoTwin, in_float64, logits_of, twin
from prunenet.runtime.passing import passing_folder

TOLERANCE = 1e-9
"""Largest relative difference of logits in float64 that counts as none."""
TOLERANCE_32 = 1e-5
"""The same in float32, for classes whose code does not run in float64."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What is known of a model type.

    Attributes:
        architecture: where its channels are; None where it is refused.
        reason: why it is refused; empty where it is not.
        left: FFNs that are left whole, and why.
    """

    architecture: Architecture | None
    reason: str = ""
    left: tuple[str, ...] = ()


def discover(
    model_type: str, kind: type[PreTrainedModel], config: type[PretrainedConfig]
) -> Discovery:
    """Finds and proves where a class's channels are.

    Args:
        model_type: `config.model_type`.
        kind: class of the model.
        config: class of its configuration.
    """
    with _quiet():
        return _discovered(model_type, kind, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers says nothing of the tiny models."""
    said: Any = transformers.logging
    level, bars = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity(said.CRITICAL)
    said.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        said.set_verbosity(level)
        if bars:
            said.enable_progress_bar()


def _discovered(
    model_type: str, kind: type[PreTrainedModel], config: type[PretrainedConfig]
) -> Discovery:
    try:
        model, ids = twin(kind, config)
        found = find(model, ids)
    except NoTwin as error:
        return Discovery(None, f"it could not be tried: {error}")
    except Exception as error:  # whatever a class's code raises on a tiny model
        return Discovery(None, f"it could not be tried: {type(error).__name__}: {error}"[:240])
    if not found:
        return Discovery(None, _why_none(model))
    held, left = with_knobs(kind, model.config, found)
    if not held:
        return Discovery(None, "; ".join(left))
    separated, unheld = _separated(model.config, held)
    left = [*left, *unheld, *_other_experts(model, ids, found)]
    if not separated:
        return Discovery(None, "; ".join(left))
    try:
        row = described(_row(model_type, separated), model, ids)
        check(model, row, ids)
    except Exception as error:  # the last word: whatever goes wrong here refuses the type
        return Discovery(None, f"the cut was not proved: {type(error).__name__}: {error}"[:300])
    return Discovery(row, left=tuple(left))


@torch.no_grad()
def check(model: PreTrainedModel, row: Architecture, ids: Tensor) -> None:
    """Cuts, builds, saves and reloads a tiny model.

    Raises:
        ValueError: logits differ.
    """
    anatomy = Anatomy.of(model, row)
    widths = uniform_widths(anatomy.groups, 0.4, 8)
    keep = _random_masks(anatomy.groups, widths)
    if widths == anatomy.widths:
        raise ValueError("the tiny model has nothing to cut")
    with masking(model, keep, anatomy=anatomy):
        expected = logits_of(model, ids)
    narrow = cut(anatomy, keep)
    _compare("narrow", logits_of(narrow, ids), expected)
    kind: Any = type(narrow)
    fresh = kind._from_config(
        copy.deepcopy(narrow.config), dtype=model.dtype, attn_implementation="eager"
    )
    fresh.load_state_dict(narrow.state_dict(), strict=True)
    fresh.to(model.dtype).eval()
    with passing_folder() as folder, in_float64(model.dtype):
        fresh.save_pretrained(folder)
        reloaded = kind.from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    reloaded.to(model.dtype)  # what a class makes again by itself
    if reloaded._can_set_experts_implementation():
        reloaded.set_experts_implementation("eager")
    _compare("reloaded", logits_of(reloaded, ids), expected)
    if Anatomy.of(reloaded, row).widths != widths:
        raise ValueError("the reloaded model has other widths")


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < (TOLERANCE if expected.dtype == torch.float64 else TOLERANCE_32):
        raise ValueError(
            f"the {what} model's logits differ by {difference:.2g} from the masked one's"
        )


def _random_masks(groups: Sequence[Group], widths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = []
    for group, width in zip(groups, widths, strict=True):
        mask = torch.zeros(group.width, dtype=torch.bool)
        mask[torch.randperm(group.width, generator=generator)[:width]] = True
        masks.append(mask)
    return masks


def _separated(config: PretrainedConfig, held: Sequence[Found]) -> tuple[list[Pattern], list[str]]:
    """The patterns, with the field that says which layers have no such group; and those for which
    none does.
    """
    made, left = [], []
    for one in held:
        if not one.failed:
            made.append(one.pattern)
        elif (field := list_that_separates(config, one)) is not None:
            made.append(replace(one.pattern, unless=field))
        else:
            left.append(f"{one.pattern.down.tensor} passes in some layers and not in others")
    return made, left


def _other_experts(model: PreTrainedModel, ids: Tensor, found: Sequence[Found]) -> Iterator[str]:
    """Which banks of experts pass no test, and so are left whole."""
    known = {part.tensor for one in found for part in one.pattern.parts}
    banks = {matrix.star for matrix in matrices(model, ids) if matrix.experts}
    yield from (f"{name}: no test shows its channels" for name in sorted(banks - known))


def _row(model_type: str, patterns: Sequence[Pattern]) -> Architecture:
    stacks = Counter(pattern.down.tensor.partition(".*.")[0] for pattern in patterns)
    return Architecture(
        model_type,
        layers=stacks.most_common(1)[0][0],
        up="",
        down="",
        gate=None,
        width=patterns[0].knob,
        norms=(),
        attention_out="",
        found=tuple(patterns),
    )


def _why_none(model: PreTrainedModel) -> str:
    """Why no FFN was found."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in path.rpartition(".")[2] and isinstance(weight, Tensor) and weight.dim() == 1:
            parent = path.rpartition(".")[0]
            around = model.get_submodule(parent).named_parameters()
            widths = {tensor.shape[-1] for name, tensor in around if tensor.dim() == 2}
            inner = any(word in path for word in ("ffn", "mlp", "fc"))
            if inner and weight.numel() in widths - {D_MODEL}:
                return f"a norm stands between up and down ({path})"
    return "no matrix takes what one or two others of its layer give: it has no FFN of a known form"
