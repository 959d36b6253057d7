"""Says in words which model types are known and what can be cut of a model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CONFIG_MAPPING, PreTrainedModel

from prunenet.models.anatomy import Anatomy
from prunenet.models.architectures import ARCHITECTURES, Architecture
from prunenet.models.groups import Group, Pattern
from prunenet.models.knobs import field_of
from prunenet.models.known import all_types, class_names, recorded
from prunenet.models.layers import count_parameters


@dataclass(frozen=True, slots=True)
class KnownType:
    """A model type, or why it is refused.

    Attributes:
        model_type, kind: `config.model_type` and the name of its class.
        forms: of its FFNs, such as "gated, experts gated"; the reason where it is refused.
        fields: of the configuration that hold the widths; empty where it is refused.
        widths: "per-layer" where layers may differ (by `prunenet.models.modeling`, or a list of the
            family's own), else "uniform"; empty where it is refused.
        by_hand: whether it has a row.
    """

    model_type: str
    kind: str
    forms: str
    fields: str
    widths: str = ""
    by_hand: bool = False


@dataclass(frozen=True, slots=True)
class Structure:
    """The FFNs of one pattern in a model.

    Attributes:
        path: of their output matrices, `*` for numbers.
        form: see `form_of`.
        knob: configuration field of the width.
        groups: how many, each expert counted.
        widths: channels of each, the least and the most where they differ.
        parameters: of all their channels.
        share: of all parameters of the model, in percent.
    """

    path: str
    form: str
    knob: str
    groups: int
    widths: str
    parameters: int
    share: str


def form_of(pattern: Pattern) -> str:
    """Returns the form of an FFN: "gated", "ungated" or "fused", of experts "experts, ..."."""
    roles = {part.role: part.layout for part in pattern.matrices}
    form = "gated" if "gate" in roles else "ungated"
    if "gate_up" in roles:
        form = "fused" if roles["gate_up"] == "concat" else "interleaved"
    return f"experts, {form}" if pattern.experts else form


def known_types(*, cached: bool = True) -> list[KnownType]:
    """Returns rows by hand and what was discovered, in alphabetical order of types.

    Args:
        cached: with what was discovered on this machine; else what ships.
    """
    found = [
        _described(name, row, class_names(name)[0], True) for name, row in ARCHITECTURES.items()
    ]
    for model_type, kind, known in recorded(cached=cached):
        if known.architecture is None:
            found.append(KnownType(model_type, kind, f"refused: {known.reason}", ""))
        elif model_type not in ARCHITECTURES:
            found.append(_described(model_type, known.architecture.spelled(), kind, False))
    return sorted(found, key=lambda one: (one.model_type, one.kind))


def structures(model: PreTrainedModel) -> list[Structure]:
    """Returns what can be cut of a model; reads shapes alone.

    Raises:
        UnsupportedArchitecture: see `prunenet.models.anatomy.Anatomy.of`.
    """
    total, _ = count_parameters(model)
    sets: dict[Pattern, list[Group]] = {}
    for group in Anatomy.of(model).groups:
        sets.setdefault(group.pattern, []).append(group)
    return [_structure(pattern, groups, total) for pattern, groups in sets.items()]


def _structure(pattern: Pattern, groups: list[Group], total: int) -> Structure:
    widths = sorted({group.width for group in groups})
    parameters = sum(group.channel_parameters * group.width for group in groups)
    return Structure(
        path=pattern.down.tensor.removesuffix(".weight"),
        form=form_of(pattern),
        knob=pattern.knob,
        groups=len(groups),
        widths=str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}",
        parameters=parameters,
        share=f"{parameters / total:.1%}",
    )


def table_of(types: list[KnownType]) -> str:
    """Returns a Markdown table of all types, refused ones with the reason."""
    lines = ["|type|class|channels of|fields of their width|widths|", "|---|---|---|---|---|"]
    for one in types:
        cells = [one.model_type, one.kind, one.forms, one.fields, one.widths]
        lines.append("|" + "|".join(cell.replace("|", "\\|") for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def summary_of(types: list[KnownType]) -> str:
    """Returns in Markdown how many types are cut, by what is cut and by whether layers may differ,
    with some that many people run.
    """
    named = {one.model_type for one in types if one.widths}
    lines = [f"{len(named)} of transformers' {len(all_types())} decoder types are cut:", ""]
    lines += ["|FFNs|`--widths`|types|such as|", "|---|---|---|---|"]
    cut: dict[tuple[str, str], set[str]] = {}
    for one in types:
        if one.widths:
            what = "experts" if "experts" in one.forms else "dense"
            cut.setdefault((what, one.widths), set()).add(one.model_type)
    for (what, widths), names in sorted(cut.items()):
        known = ",".join(name for name in _MUCH_USED if name in names)
        lines.append(f"|{what}|{widths}|{len(names)}|{known}|")
    return "\n".join(lines) + "\n"


_MUCH_USED = (
    *("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "qwen3_5_text", "qwen3_vl", "mistral3"),
    *("gemma4", "gemma3n", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "glm4_moe"),
    *("falcon_h1", "cohere2", "mixtral"),
)


def _described(model_type: str, row: Architecture, kind: str, by_hand: bool) -> KnownType:
    forms = dict.fromkeys(form_of(pattern) for pattern in row.patterns)
    fields = dict.fromkeys(pattern.knob for pattern in row.patterns)
    widths = "per-layer" if row.per_layer or _is_list(model_type, row) else "uniform"
    return KnownType(model_type, kind, "; ".join(forms), " ".join(fields), widths, by_hand)


def _is_list(model_type: str, row: Architecture) -> bool:
    """Whether the family's own configuration holds a width for each layer."""
    try:
        return isinstance(field_of(CONFIG_MAPPING[model_type](), row.width), list | tuple)
    except Exception:  # each class has its own checks; some cannot be made without arguments
        return False
