"""How a way to prune is named:
`method[:allocation][@moments][+heads][+refit][+recovered]`.

    wanda_sp                              as published, on text that the model samples
    flap:uniform                          another allocation
    llm_pruner_element1:owl@ptb           other text
    wanda_sp:learned@seed:ptb+layerwise   the policy's allocation, document prefixes of a text, and
                                          a refit
    flap@ptb+heads                        attention heads are cut too; the size stays the same
    prunenet                              what `prunenet prune` does by default

What is left out is the method's own: its allocation, its compensation, and text that the model
writes by itself where any part reads text. Names come from `METHODS` and `Allocation`; nothing is
listed twice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from prunenet.policies.methods import METHODS, WITH_HEADS, Allocation

REFITS = ("off", "mean_bias", "layerwise", "sequential", "blocks")
"""What is done about the channels removed: nothing, a bias (FLAP), least squares of each layer
alone, or behind cut layers, or each FFN trained.
"""
WITHOUT_TEXT = ("uniform", "global", "protected", "learned")
"""Allocations that need no text of their own; every other one reads some."""
RESERVED = ("self", "random", "seed", "builtin", "none")
"""Words that cannot name a calibration text."""
WITHOUT_SCORES = ("uniform", "protected", "owl", "influence", "learned")
"""Allocations that look at no method's scores, so that a merge can have them."""
_FORM = "method[:allocation][@moments][+heads][+refit][+recovered]"
_HEADS = "heads"
_RECOVERED = "+recovered"
# (allocation, refit) of the methods that are ours.
_OWN = {
    "prunenet": ("auto", "layerwise"),
    "prunenet-weights": ("learned", "off"),
    "elimination": ("uniform", "layerwise"),
}
_PRODUCT = ("auto", "uniform", "learned")


@dataclass(frozen=True, slots=True)
class Spec:
    """A way to prune, every choice filled in.

    Attributes:
        method: one of `methods()`.
        allocation: one of `allocations()`, or "auto" (of `prunenet`: uniform or learned, whichever
            is predicted to be better).
        moments: where activations and gradients are measured: "self", "random", "seed:TEXT" or
            TEXT, with TEXT a name, "builtin", a file or a dataset; None where nothing reads text.
        refit: one of `REFITS`.
        heads: whether attention heads are cut as well as FFN channels.
        recovered: whether the cut is trained behind it, see `prunenet.compare.recovered`.
    """

    method: str
    allocation: str
    moments: str | None
    refit: str
    heads: bool = False
    recovered: bool = False

    @property
    def name(self) -> str:
        """The shortest text that means this."""
        allocation, refit = _defaults(self.method)
        return (
            self.method
            + ("" if self.allocation == allocation else f":{self.allocation}")
            + ("" if self.moments in (None, "self") else f"@{self.moments}")
            + ("+heads" if self.heads else "")
            + ("" if self.refit == refit else f"+{self.refit}")
            + (_RECOVERED if self.recovered else "")
        )

    @property
    def product(self) -> bool:
        """Whether `prunenet.policies.apply.prune` makes it, as `prunenet prune` does."""
        return (
            self.method in _OWN
            and self.method != "elimination"
            and self.allocation in _PRODUCT
            and self.refit != "mean_bias"
        )

    @property
    def asks_policy(self) -> bool:
        """Whether a policy is looked at, if there is one."""
        return self.method in ("prunenet", "prunenet-weights") or self.allocation == "learned"

    @property
    def needs_policy(self) -> bool:
        """Whether it cannot be done without one. (Without one, `prunenet` cuts uniformly and by
        elimination.)
        """
        return self.asks_policy and not (
            self.method == "prunenet" and self.product and self.allocation != "learned"
        )

    @property
    def text(self) -> str | None:
        """The name of the external text that is read, if any."""
        if self.moments is None or self.moments in ("self", "random"):
            return None
        return self.moments.removeprefix("seed:")


def methods() -> list[str]:
    """Every method that a spec can name: ours, then those of the table."""
    return [*_OWN, *METHODS]


def allocations() -> list[str]:
    """Every allocation that a spec can name, but for "auto", which is `prunenet`'s."""
    return [*get_args(Allocation), "learned"]


def parse(text: str, calibration: Collection[str] = ()) -> Spec:
    """Reads a spec.

    Args:
        text: `method[:allocation][@moments][+heads][+refit][+recovered]`.
        calibration: names given to calibration texts.

    Raises:
        ValueError: a part that is unknown (the choices are listed), or parts that make no sense
            together.
    """
    cut = text.removesuffix(_RECOVERED)
    if cut.endswith(_RECOVERED):
        raise ValueError(f"{text!r} is recovered twice: say {_RECOVERED} once")
    head, at, tail = cut.partition("@")
    rest = tail if at else head
    before, plus, refit = rest.rpartition("+")
    # A plus may be part of a file's name.
    if plus and (refit == _HEADS or (refit not in REFITS and at and set(refit) & set("./"))):
        plus = ""
    rest = before if plus else rest
    heads = rest.endswith(f"+{_HEADS}")
    rest = rest.removesuffix(f"+{_HEADS}")
    head, tail = (head, rest) if at else (rest, tail)
    method, colon, allocation = head.partition(":")
    _known(text, "method", method, methods())
    own_allocation, own_refit = _defaults(method)
    if colon:
        choices = [*allocations(), *(["auto"] if method == "prunenet" else [])]
        _known(text, "allocation", allocation, choices)
    if plus:
        _known(text, "refit", refit, REFITS)
    if at:
        _check_moments(text, tail, calibration)
    if heads:
        _check_heads(text, method, allocation or own_allocation, refit if plus else own_refit)
    spec = _sensible(
        text,
        method,
        allocation or own_allocation,
        tail if at else None,
        refit if plus else own_refit,
    )
    return replace(spec, heads=heads, recovered=cut != text)


def parse_all(texts: Collection[str], calibration: Collection[str] = ()) -> list[Spec]:
    """`parse` of each, or of the one, every spec once; `all` stands for every method as it is
    published.

    Raises:
        ValueError: as `parse`; or none given.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if not texts:
        raise ValueError(
            f"nothing to compare: give methods as {_FORM}, or all; methods: {', '.join(methods())}"
        )
    named = [name for text in texts for name in (methods() if text == "all" else [text])]
    return list(dict.fromkeys(parse(name, calibration) for name in named))


def _sensible(text: str, method: str, allocation: str, moments: str | None, refit: str) -> Spec:
    """The spec, unless its parts contradict each other."""
    row = METHODS.get(method)
    if row is not None and row.merge is not None:
        if allocation not in WITHOUT_SCORES:
            choices = ", ".join(name for name in allocations() if name in WITHOUT_SCORES)
            raise ValueError(
                f"{text!r}: {method} merges channels and has no scores for {allocation}; choose one"
                f" of {choices}"
            )
        if refit != "off":
            raise ValueError(
                f"{text!r}: {method} merges channels, and merged ones are not refitted; leave"
                f" +{refit} out"
            )
    if row is not None and row.rebuild is not None and (allocation, refit) != ("uniform", "off"):
        raise ValueError(
            f"{text!r}: {method} cuts no FFN channels, so there is nothing to allocate or to refit;"
            f" say {method}"
        )
    if allocation == "auto" and refit == "mean_bias":
        raise ValueError(
            f"{text!r}: mean_bias goes with one allocation; say prunenet:learned or"
            " prunenet:uniform"
        )
    looks = row is not None and row.needs != "weights"
    looks = (
        looks
        or method in ("prunenet", "elimination")
        or allocation not in WITHOUT_TEXT
        or refit != "off"
    )
    if method == "prunenet-weights" and looks:
        raise ValueError(
            f"{text!r}: prunenet-weights reads the weights alone; say prunenet where text is read"
        )
    if moments is not None and not looks:
        raise ValueError(f"{text!r}: no part of it reads text; leave @{moments} out")
    return Spec(method, allocation, (moments or "self") if looks else None, refit)


def _check_heads(text: str, method: str, allocation: str, refit: str) -> None:
    able = [name for name, row in METHODS.items() if row.with_heads is not None]
    if method not in able:
        raise ValueError(
            f"{text!r}: {method} scores no attention heads; +heads goes with {', '.join(able)}"
        )
    if allocation not in WITH_HEADS:
        raise ValueError(
            f"{text!r}: +heads goes with the allocations {', '.join(WITH_HEADS)}, got {allocation}"
        )
    if refit == "sequential":
        raise ValueError(
            f"{text!r}: a sequential refit is for FFN channels alone; +heads goes with +off,"
            " +mean_bias, +layerwise or +blocks"
        )


def _check_moments(text: str, moments: str, calibration: Collection[str]) -> None:
    kind, colon, inner = moments.partition(":")
    if moments in ("self", "random"):
        return
    if moments == "seed" or (kind == "seed" and not inner):
        raise ValueError(
            f"{text!r}: seed needs the text whose documents' first tokens are taken; say"
            " @seed:builtin or @seed:TEXT"
        )
    source = inner if kind == "seed" and colon else moments
    if (
        source in calibration
        or source == "builtin"
        or Path(source).expanduser().is_file()
        or set(source) & set("/:")
    ):
        return
    names = "".join(f"{name}, " for name in calibration)
    raise ValueError(
        f"{text!r}: unknown moments {source!r}; it is one of self, random, seed:TEXT or TEXT, with"
        f" TEXT one of {names}builtin, a file or a dataset as id:config:split (`calibration`"
        " gives a text a short name)"
    )


def _known(text: str, what: str, given: str, choices: Collection[str]) -> None:
    if given not in choices:
        raise ValueError(
            f"{text!r}: unknown {what} {given!r}; it is one of {', '.join(choices)} (the form is"
            f" {_FORM})"
        )


def _defaults(method: str) -> tuple[str, str]:
    """The method's own allocation and refit."""
    if method in _OWN:
        return _OWN[method]
    row = METHODS[method]
    return row.allocation, row.refit
