"""A trained policy on disk: `config.json` and `model.safetensors`. Applying one needs no
reinforcement learning library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from prunenet.checkpoints.regimes import Regime
from prunenet.features.from_activations import (
    MOMENT_STATISTICS,
    MOMENT_STATISTICS_VERSION,
    channel_features,
)
from prunenet.features.from_weights import (
    CONTEXT,
    STATISTICS,
    STATISTICS_VERSION,
    layer_context,
    observe,
)
from prunenet.models.anatomy import Anatomy
from prunenet.models.knobs import step_of
from prunenet.models.layers import Weights, ffn_widths
from prunenet.models.masks import top_channels, widths_for_budget
from prunenet.policies.scorer import ChannelScorer
from prunenet.runtime.choices import ROUND_TO, RoundTo
from prunenet.runtime.files import expanded, make_folders, write_atomic
from prunenet.runtime.json_files import JsonError, Within, convert, read_json
from prunenet.runtime.own_files import ContentError, check_layout, layout_of, packed, unpacked
from prunenet.runtime.paths import named
from prunenet.text.calibration import CalibrationSet

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ZOO = Path(__file__).parent / "zoo"
FALLBACK = "universal"
"""The policy for families that have none of their own, and gated dense FFNs."""
FORMAT_VERSION = 3  # 3: the scorer has the layers' log-odds


class PolicyError(ValueError):
    """The folder is not a policy that this version can apply; the message says why."""


_Hidden = Annotated[tuple[Annotated[int, Within(1, 4096)], ...], Within(0, 8)]


class _Versions(TypedDict, total=False):
    format_version: int


class _Recipe(TypedDict, total=False):
    """What is read of a recipe; the rest is for the record."""

    seed: int


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What a policy needs besides its weights, and where it comes from.

    Attributes:
        statistics, statistics_version, context: what the scorer reads, in order.
        moments, moments_version: statistics of activations on token blocks that it reads behind the
            others; () reads none.
        hidden: widths of the scorer's hidden layers.
        prior: the closed-form score that the scorer starts from.
        regime: what training was allowed to look at: weights, self or data.
        trained_on: name and model type of the training model.
        recipe: how it was trained.
        text: what the reward was measured on; None in the weights regime.
        gain: by which share learned widths lowered exp(KL) against uniform ones, on that text, or
            as matrices predict (`prunenet.policies.training.matrices`); None if none were learned.
    """

    statistics: tuple[str, ...] = STATISTICS
    statistics_version: int = STATISTICS_VERSION
    context: tuple[str, ...] = CONTEXT
    moments: tuple[str, ...] = ()
    moments_version: int = MOMENT_STATISTICS_VERSION
    hidden: _Hidden = (32, 32)
    prior: Mapping[str, float] = field(default_factory=dict)
    regime: str = "weights"
    trained_on: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] | None = None
    gain: Annotated[float, Within(high=1)] | None = None
    format_version: int = FORMAT_VERSION


class Policy:
    """Scores FFN channels from a model's weights and turns scores into keep masks at any ratio.
    Deterministic.

    A policy whose configuration names `moments` reads activations as well, and needs token blocks
    wherever it scores.

    Args:
        scorer: the network.
        config: must describe the scorer.
    """

    def __init__(self, scorer: ChannelScorer, config: PolicyConfig) -> None:
        self.scorer = scorer.eval()
        self.config = config

    @classmethod
    def untrained(cls, config: PolicyConfig, *, seed: int = 0) -> Policy:
        """A fresh policy: its score is the closed-form prior."""
        generator = torch.Generator().manual_seed(seed)
        read = (*config.statistics, *config.moments)
        scorer = ChannelScorer(
            read, config.context, hidden=config.hidden, prior=config.prior, generator=generator
        )
        return cls(scorer, config)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Policy:
        """Loads a policy from its folder.

        Raises:
            PolicyError: missing or damaged files, another format, or another set of statistics.
        """
        folder = _find(source)
        config = _read_config(folder / CONFIG)
        try:
            weights, facts = unpacked(folder / WEIGHTS)
            # before a network of another's size is made; older policies say nothing of it
            known = _sha256_of(config)
            if facts.get("config", known) != known:
                raise ContentError(f"it was not written with this {CONFIG}")
            policy = cls.untrained(config)
            check_layout(weights, layout_of(policy.scorer.state_dict()))
        except FileNotFoundError:
            raise PolicyError(
                f"policy {str(source)!r} has no {WEIGHTS}; train it again or copy the whole folder"
            ) from None
        except ContentError as error:
            raise PolicyError(
                f"{folder / WEIGHTS} is damaged ({error}); train it again or copy it anew"
            ) from None
        policy.scorer.load_state_dict(weights)
        return policy

    def check_measured(self, measured: bool) -> None:
        """Raises ValueError where this policy reads activations and there is no calibration text
        to measure them on.
        """
        if self.config.moments and not measured:
            raise ValueError(
                "this policy scores channels by their activations: give it text to measure"
                " them on (`blocks`), or take a policy that reads weights alone"
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `config.json` and `model.safetensors`; an existing policy in the folder is
        replaced file by file.

        Raises:
            PolicyError: the folder holds a model, or something else that is not a policy.
        """
        folder = expanded(folder)
        _check_free(folder)
        make_folders(folder)
        config = json.dumps(_fields(self.config), indent=2, sort_keys=True) + "\n"
        facts = {"config": _sha256_of(self.config)}
        write_atomic(folder / WEIGHTS, packed(self.scorer.state_dict(), facts))
        write_atomic(folder / CONFIG, config.encode())
        return folder

    def _weights(self) -> bytes:
        return save(
            {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in self.scorer.state_dict().items()
            }
        )

    @property
    def sha256(self) -> str:
        """Hash of the weights and of the configuration: what provenance records."""
        return hashlib.sha256(self._weights() + _stated(self.config)).hexdigest()

    @torch.no_grad()
    def scores(
        self,
        model: PreTrainedModel,
        blocks: CalibrationSet | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Float[Tensor, " _"]]:
        """One score per channel of each layer, higher stays longer; comparable within a layer only.

        Args:
            model: any model of a supported family.
            blocks: token blocks to measure activations on, one layer at a time. A policy from
                weights alone leaves them unread.
            progress: of that, called with (layers done, layers in all).

        Raises:
            ValueError: the policy reads activations, and no blocks are given; or as
                `prunenet.features.from_activations`.
            UnsupportedArchitecture: see `prunenet.models.architectures`.
        """
        self.check_measured(blocks is not None)
        if blocks is None or not self.config.moments:
            return self.read(model)[0]
        statistics = channel_features(model, blocks.ids, progress=progress)
        scorer = self.scorer.to(statistics[0].device)
        return [
            scorer(rows, context)
            for rows, context in zip(statistics, layer_context(model), strict=True)
        ]

    @torch.no_grad()
    def read(
        self, model: Weights, *, progress: Callable[[int, int], None] | None = None
    ) -> tuple[list[Float[Tensor, " _"]], list[float]]:
        """(`scores`, `offsets`) from weights alone, in one pass over them: memory holds one layer
        of a streamed checkpoint.

        Args:
            model: any model of a supported family, in memory or streamed.
            progress: called with (layers done, layers in all).

        Raises:
            ValueError, UnsupportedArchitecture: as `scores`.
        """
        self.check_measured(False)
        scores, rows, layers = [], [], len(ffn_widths(model))
        for statistics, row in observe(model):
            scores.append(self.scorer.to(row.device)(statistics, row))
            rows.append(row)
            if progress is not None:
                progress(len(rows), layers)
        context = torch.stack([row.to(rows[0].device) for row in rows])
        return scores, [float(offset) for offset in self.scorer.to(context.device).offsets(context)]

    @torch.no_grad()
    def offsets(self, model: Weights) -> list[float]:
        """Log-odds of each layer's share of channels kept, see `ChannelScorer.offsets`. All 0:
        uniform widths.
        """
        context = layer_context(model)
        return [float(offset) for offset in self.scorer.to(context.device).offsets(context)]

    def widths(
        self,
        model: PreTrainedModel,
        ratio: float,
        *,
        per_layer: bool = False,
        round_to: RoundTo = ROUND_TO,
    ) -> list[int]:
        """Width of each layer when `ratio` of all channels is removed: the same share everywhere,
        or as learned.

        Args:
            model: any model of a supported family.
            ratio: share of FFN channels removed, in [0, 1).
            per_layer: as learned; as many channels in all.
            round_to: widths are multiples of this.

        Raises:
            ValueError: ratio out of range.
        """
        anatomy = Anatomy.of(model)
        if not per_layer:
            return anatomy.uniform_widths(ratio, round_to)
        step = step_of(anatomy.groups, ratio, round_to)
        return widths_for_budget(anatomy.widths, self.offsets(model), ratio, step)

    def masks(
        self,
        model: PreTrainedModel,
        ratio: float,
        *,
        blocks: CalibrationSet | None = None,
        per_layer: bool = False,
        round_to: RoundTo = ROUND_TO,
    ) -> list[Bool[Tensor, " _"]]:
        """Keep masks that remove `ratio` of all channels; masks at a higher ratio are subsets.

        Args:
            model: any model of a supported family.
            ratio: share of FFN channels removed, in [0, 1).
            blocks: as for `scores`.
            per_layer: widths as learned, in place of the same share everywhere; as many channels in
                all.
            round_to: widths are multiples of this.

        Raises:
            ValueError: ratio out of range, or as `scores`.
        """
        widths = self.widths(model, ratio, per_layer=per_layer, round_to=round_to)
        return [
            top_channels(scores, width)
            for scores, width in zip(self.scores(model, blocks), widths, strict=True)
        ]


def zoo() -> dict[str, Path]:
    """The policies that ship with the package: folder by name, which is the `config.model_type`
    that it was trained for, or `FALLBACK`.
    """
    return {path.parent.name: path.parent for path in sorted(ZOO.glob("*/config.json"))}


def policy_for(
    choice: str | None, model_type: str, *, gated: bool = False
) -> tuple[Policy | None, str]:
    """The policy that a user means, and its name for the record.

    Args:
        choice: a name in the zoo, a folder, "none", or None for the zoo's of this family, else
            `FALLBACK`, else none.
        model_type: of the model to be cut.
        gated: whether its FFNs are such as `FALLBACK` knows
            (`prunenet.models.architectures.Architecture.gated`).

    Raises:
        PolicyError: neither in the zoo nor a folder with a policy.
    """
    if choice is None:
        shipped = zoo()
        names = (model_type, FALLBACK) if gated else (model_type,)
        choice = next((name for name in names if name in shipped), "none")
        if choice != "none":  # not by name: a folder may be called so
            return Policy.from_pretrained(shipped[choice]), choice
    if choice == "none":
        return None, "none"
    shipped, name = zoo(), named(choice)
    # one's own policy is not called as the one that ships
    own = name in shipped and _find(choice).resolve() != shipped[name].resolve()
    return Policy.from_pretrained(choice), f"./{name}" if own else name


def _check_free(folder: Path) -> None:
    """Raises PolicyError where a policy would replace other files of the same names."""
    try:
        said: dict[str, Any] = read_json(folder / CONFIG, dict, remedy="")
        free = "statistics" in said
    except FileNotFoundError:
        free = not (folder / WEIGHTS).exists()
    except (OSError, ValueError):
        free = True  # a damaged policy's, as far as anything says
    if not free:
        raise PolicyError(
            f"{folder} holds files that are no policy ({CONFIG} or {WEIGHTS}), which would be"
            " replaced; give another folder"
        )


def _find(source: str | Path) -> Path:
    folder = expanded(source)
    if (folder / "config.json").is_file():
        return folder
    shipped = zoo()
    if str(source) in shipped:
        return shipped[str(source)]
    what = "holds no policy (no config.json)" if folder.is_dir() else "does not exist"
    names = f" (or take one that ships: {', '.join(shipped)})" if shipped else ""
    raise PolicyError(f"policy {str(source)!r} {what}; make one with 'prunenet train'{names}")


def _fields(config: PolicyConfig) -> dict[str, Any]:
    fields = asdict(config)
    if not config.moments:  # as it was before policies read any, hash included
        del fields["moments"], fields["moments_version"]
    return fields


def _stated(config: PolicyConfig) -> bytes:
    return json.dumps(_fields(config), sort_keys=True).encode()


def _sha256_of(config: PolicyConfig) -> str:
    return hashlib.sha256(_stated(config)).hexdigest()


def _read_config(path: Path) -> PolicyConfig:
    fields: Any = read_json(
        path,
        _Versions,
        error=PolicyError,
        remedy="it cannot be read, so train the policy again or copy it anew",
    )
    if "statistics" not in fields:
        raise PolicyError(
            f"{path} is not the configuration of a policy; give a folder written by 'prunenet"
            " train'"
        )
    if fields.get("format_version") != FORMAT_VERSION:
        raise PolicyError(
            f"{path} has format {fields.get('format_version')}, this version reads"
            f" {FORMAT_VERSION}; train again"
        )
    try:
        config: PolicyConfig = convert(fields, PolicyConfig)
        convert(config.recipe, _Recipe, "recipe")
        convert(config.regime, Regime, "regime")
    except JsonError as error:
        raise PolicyError(
            f"{path} has fields that this version cannot read ({error}); train the policy again"
        ) from None
    expected = (STATISTICS, STATISTICS_VERSION, CONTEXT)
    if (config.statistics, config.statistics_version, config.context) != expected:
        raise PolicyError(
            f"{path.parent} reads statistics version {config.statistics_version}"
            f" ({len(config.statistics)} per channel), this prunenet computes version"
            f" {STATISTICS_VERSION} ({len(STATISTICS)}); train the policy again"
        )
    if config.moments and (config.moments, config.moments_version) != (
        MOMENT_STATISTICS,
        MOMENT_STATISTICS_VERSION,
    ):
        raise PolicyError(
            f"{path.parent} reads moment statistics version {config.moments_version}"
            f" ({len(config.moments)} per channel), this prunenet computes version"
            f" {MOMENT_STATISTICS_VERSION} ({len(MOMENT_STATISTICS)}); train the policy again"
        )
    return config
