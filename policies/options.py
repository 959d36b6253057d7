"""How much to cut from a model, and how: the options of `prune`, in Python and in the CLI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypedDict

from prunenet.evaluation.choices import STRUCTURES, Cost, Cuttable, Structure
from prunenet.runtime.choices import RoundTo, check_choice, check_fields, check_ratio

if TYPE_CHECKING:
    from prunenet.policies.artifact import Policy

Widths = Literal["auto", "uniform", "per-layer", "refined"]
Channels = Literal["policy", "blend", "elimination"]
Refit = Literal["off", "layerwise", "sequential", "blocks"]
ExpertsBy = Literal["aimer", "reap", "random"]


class PruneChoices(TypedDict, total=False):
    """The fields of `PruneOptions`, for functions that take them by name."""

    ratio: float | None
    params: float | None
    active: float | None
    experts: int | None
    experts_by: ExpertsBy | None
    round_to: RoundTo
    widths: Widths
    structures: str
    budget: Cost
    channels: Channels | None
    refit: Refit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """How much to cut from a model, and how.

    Attributes:
        ratio: share of FFN channels removed, in [0, 1).
        params: share of *all* parameters removed, in [0, 1), as nearly as rounded widths allow.
        active: share of the *active* parameters removed, in [0, 1): those that one token uses, an
            expert's by the share of experts that a token passes through. Exactly one of the three
            is given; or none, where experts alone are removed.
        experts: experts that stay in each layer of a mixture, chosen before channels; None: all.
        experts_by: "aimer" (from weights), "reap" (measured on text) or "random"; see
            `prunenet.policies.experts`. None: where experts share a budget reap, if the text has
            tokens enough (`prunenet.policies.mixture`); else aimer.
        round_to: widths are multiples of this; "auto": 64 where that moves a uniform width by less
            than 1 % of its channels, else 32, and less in experts and narrow FFNs; see
            `prunenet.models.knobs.rounding`.
        widths: "uniform" (one width for all layers), "per-layer" (the policy's allocation, as many
            channels in all), "auto": per-layer where that is predicted to lower perplexity by more
            than 5 % (`prunenet.policies.apply.AUTO_GAIN`), or "refined": per-layer, changed on
            calibration text (`prunenet.policies.refine`).
        structures: what refined widths cut: one or more of "channels", "heads" (groups of them),
            "attention" (heads, and of a layer all of them) and "layers" (whole ones), with commas;
            as many parameters in all as the ratio takes from channels. Of a mixture
            "channels,experts" or "experts": how many experts stay, all of one width, is measured
            on text (`prunenet.policies.mixture`).
        budget: what refined widths save: "params", "active" (of dense models the same), "flops",
            "kv-bytes" or "latency" (`prunenet.evaluation.latency`). The ratio then is a share of
            what FFN channels cost in it, or of everything where they cost nothing; `params` is a
            share of what all decoder layers cost.
        channels: "policy" (its scores), "blend" (two thirds of their ranks and one third of the
            ranks by measured energy) or "elimination" (greedy, by activations). On self-written
            text elimination fits that text more and others less. None: without calibration text the
            policy; with text the blend, or the policy where it reads moments itself; without a
            policy elimination.
        refit: least squares of the down matrices on calibration text: "off", "layerwise",
            "sequential" (each layer behind the layers cut before it) or "blocks" (layerwise, then
            each FFN trained as a whole, see `prunenet.refit.blocks`). None: layerwise where there
            is text, else off.

    Raises:
        ValueError: none or several of ratio, params and active, one out of range, or an unknown
            choice.
    """

    ratio: float | None = None
    params: float | None = None
    active: float | None = None
    experts: int | None = None
    experts_by: ExpertsBy | None = None
    round_to: RoundTo = "auto"
    widths: Widths = "auto"
    structures: str = "channels"
    budget: Cost = "params"
    channels: Channels | None = None
    refit: Refit | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ratio is None and self.params is None and self.active is None and self.experts:
            object.__setattr__(self, "ratio", 0.0)  # experts alone
        shares = (self.ratio, self.params, self.active)
        if sum(share is not None for share in shares) != 1:
            count = sum(share is not None for share in shares)
            given = "neither" if count == 0 else "both" if self.active is None else f"{count}"
            raise ValueError(
                "give one of `ratio` (share of FFN channels), `params` (share of all parameters)"
                f" and `active` (share of the active ones), got {given}"
            )
        if self.ratio is not None:
            check_ratio(self.ratio)
        for name, share in (("params", self.params), ("active", self.active)):
            if not 0 <= (share or 0) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {share}")
        _check_structures(self)
        if self.active is not None and self.budget not in ("params", "active"):
            raise ValueError(
                f"`active` is a share of parameters, and the budget is {self.budget!r}; give"
                " `ratio` or `params`"
            )

    @property
    def parts(self) -> tuple[Structure, ...]:
        """The structures that are cut, in the order of `prunenet.evaluation.interaction`; attention
        goes by its heads.
        """
        given = {name.strip() for name in self.structures.split(",")}
        given |= {"heads"} if "attention" in given else set()
        return tuple(name for name in STRUCTURES if name in given)

    @property
    def shares_experts(self) -> bool:
        """Whether whole experts pay for the budget too."""
        return "experts" in self.structures

    @property
    def counts_active(self) -> bool:
        """Whether the budget counts active parameters, and not all."""
        return self.active is not None or self.budget == "active"

    @property
    def exact(self) -> bool:
        """Whether the number of parameters is met to a multiple of a channel's."""
        return self.budget == "params" and {"channels"} <= {*self.parts} <= {"channels", "heads"}

    @property
    def of_all(self) -> bool:
        """Whether the amount is a share of what all layers cost, and not FFN channels alone."""
        return self.params is not None and self.budget not in ("params", "active")

    def filled(self, policy: Policy | None, measured: bool) -> PruneOptions:
        """These options with the defaults of `channels` and `refit` filled in.

        Args:
            policy: the policy that is applied, if any.
            measured: whether there is calibration text to measure activations on.

        Raises:
            ValueError: a choice needs a policy or text, and there is none.
        """
        if self.experts is not None and self.ratio == 0:  # no channels are chosen
            return replace(self, channels="policy", refit="off")
        default: Channels = (
            "elimination" if policy is None else "policy" if policy.config.moments else "blend"
        )
        channels = self.channels or (default if measured else "policy")
        refit = self.refit or ("layerwise" if measured else "off")
        if policy is not None:
            policy.check_measured(measured)
        if not measured and (channels != "policy" or refit != "off"):
            raise ValueError(
                "blend, elimination and refit measure activations: give text (`blocks`), or switch"
                " them off"
            )
        if policy is None and channels != "elimination":
            raise ValueError(
                "no policy to choose the channels; give one (`policy`), or text to choose them by"
                " (`blocks`)"
            )
        refined = self.widths == "refined" and not self.shares_experts
        if policy is None and (refined or self.widths == "per-layer"):
            raise ValueError(
                "no policy to allocate widths; give one (`policy`), or take uniform `widths`"
            )
        if self.widths == "refined":
            if not measured:
                instead = "a number of `experts`" if self.shares_experts else "per-layer `widths`"
                raise ValueError(
                    f"refined widths are measured on text: give it (`blocks`), or take {instead}"
                )
            if refined and (channels == "elimination" or refit == "sequential"):
                raise ValueError(
                    "refined widths need the policy's scores and a refit on dense activations: no"
                    " elimination and no sequential refit"
                )
        return replace(self, channels=channels, refit=refit)


def _check_structures(options: PruneOptions) -> None:
    """Raises ValueError for structures that are not known, or that nothing here can cut."""
    given = [name.strip() for name in options.structures.split(",")]
    for name in given:
        check_choice("structures", name, Cuttable)
    if options.shares_experts:
        _check_shared_experts(options)
    elif options.experts_by is not None and options.experts is None:
        raise ValueError(
            f"`experts_by` {options.experts_by} says which whole experts go: give `experts`, how"
            " many stay, or `structures` channels,experts, or leave it out"
        )
    if options.parts == ("channels",) and options.budget == "kv-bytes":
        raise ValueError("FFN channels hold nothing of the KV cache; say heads too, or layers")
    plain = (*options.parts, options.budget) == ("channels", "params")
    if not (plain and not options.shares_experts) and options.widths != "refined":
        what = "" if options.structures == "channels" else f" {options.structures}"
        by = "" if options.budget == "params" else f" by {options.budget}"
        raise ValueError(
            f"only refined widths cut{what}{by}; say widths='refined', or cut channels alone"
        )


def _check_shared_experts(options: PruneOptions) -> None:
    """Raises ValueError for what does not go together with experts that pay for a budget."""
    beside = [name for name in options.parts if name != "channels"]
    if beside:
        raise ValueError(
            f"experts share a budget with channels alone, got {', '.join(beside)} too; say"
            " structures='channels,experts'"
        )
    if options.experts is not None:
        raise ValueError(
            "`experts` says how many stay, and `structures` asks which number is best; give one of"
            " the two"
        )
    if options.budget not in ("params", "active"):
        raise ValueError(
            f"whole experts are counted in parameters, and the budget is {options.budget!r}; give"
            " params or active"
        )
    if options.params is not None and options.budget == "active":
        raise ValueError(
            "`params` is a share of all parameters, and the budget is 'active'; give `active`"
        )
    if options.counts_active and not options.parts:
        raise ValueError(
            "a token passes through as many experts when some are gone, so they alone leave the"
            " active parameters as they are; say structures='channels,experts', or give `params`"
        )


def options_of(options: PruneOptions | None, choices: PruneChoices) -> PruneOptions:
    """Options given as an object or by name.

    Raises:
        ValueError: given both ways; or as `PruneOptions`.
    """
    if options is None:
        return PruneOptions(**choices)
    if choices:
        raise ValueError(f"give options, or {', '.join(choices)} by name, not both")
    return options
