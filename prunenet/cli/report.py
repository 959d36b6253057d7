"""The command `prunenet report`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunenet.cli.console import errors, one_process, path, show
from prunenet.cli.inputs import printed_rows
from prunenet.cli.options import Json

if TYPE_CHECKING:
    from prunenet.evaluation.page import Curve, Size

_STEPS = 15
"""Ratios of the slider: 0, 0.05, ..., 0.7."""
_LOGGED = "prunenet/reward_of_mode"


def report(
    results: Annotated[
        Path, typer.Argument(parser=path, help="JSON written by 'prunenet eval --json'.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", parser=path, help="File to write: .html, .png, .svg or .pdf."),
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            help="HTML: policy whose allocation the slider shows at every ratio (of the first"
            " model), and whose training is drawn; a name or a folder."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="HTML: text that every model continues, side by side; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw quality and speed against size; as HTML also where it was cut, texts and provenance."""
    with one_process():
        rows = printed_rows(results)
        if out.suffix.lower() in (".html", ".htm"):
            from prunenet.evaluation.page import Extras, write_page

            extras = Extras(
                sizes=() if policy is None or not rows else tuple(slider(policy, rows[0])),
                curves=() if policy is None else tuple(reward_curves(policy)),
                texts=tuple(_texts(rows, text) for text in prompt or ()),
            )
            write_page(rows, out, extras)
            show({"page": str(out)}, as_json, lambda: f"wrote {out}")
            return
        if policy is not None or prompt:
            raise ValueError("--policy and --prompt belong to a page: give --out report.html")
        from prunenet.evaluation.report import draw_report

        draw_report(rows, out)
        show({"figure": str(out)}, as_json, lambda: f"drew {out}")


def slider(policy: str, dense: dict[str, Any]) -> list[Size]:
    """Returns what a policy keeps of the dense model at every ratio, by its weights alone.

    Args:
        policy: a name in the zoo or a folder.
        dense: row of the dense model; its `folder` is read.
    """
    from prunenet.checkpoints.streaming import StreamedCheckpoint
    from prunenet.evaluation.page import Size
    from prunenet.models.layers import ffn_widths
    from prunenet.models.masks import width_at, widths_for_budget
    from prunenet.policies.artifact import policy_for

    source = StreamedCheckpoint.open(str(dense["folder"]))
    trained, _ = policy_for(policy, source.skeleton.config.model_type)
    if trained is None:
        raise ValueError("--policy none allocates no widths: leave it out")
    whole, offsets = ffn_widths(source), trained.offsets(source)
    found = []
    for step in range(_STEPS):
        ratio = step / 20
        kept = widths_for_budget(whole, offsets, ratio)
        uniform = width_at(whole[0], ratio)
        label = "dense" if step == 0 else f"ratio {ratio:.2f} (uniform: {uniform})"
        found.append(Size(label, ratio, tuple(kept), tuple(whole)))
    return found


def reward_curves(policy: str | Path) -> list[Curve]:
    """Returns the reward of the deterministic masks over each training that a policy's folder logs.

    Args:
        policy: folder; of a name in the zoo there is no log.
    """
    from prunenet.evaluation.page import Curve

    logs = sorted({log.parent for log in Path(policy).expanduser().rglob("events.out.tfevents.*")})
    if not logs:
        return []
    # a module without types
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    found = []
    for log in logs:
        events = accumulator.EventAccumulator(str(log))
        events.Reload()
        if _LOGGED in events.Tags()["scalars"]:
            points = tuple((event.step, event.value) for event in events.Scalars(_LOGGED))
            found.append(Curve(f"Reward: {log.parent.name}", "environment steps", points))
    return found


def _texts(rows: Sequence[dict[str, Any]], prompt: str) -> tuple[tuple[str, str], ...]:
    """What each model writes behind a prompt, greedily."""
    from prunenet.checkpoints.load import load_model, load_tokenizer
    from prunenet.evaluation.speed import generate_sentence

    found = []
    for row in rows:
        folder, name = str(row["folder"]), str(row["name"])
        errors.print(f"{name} continues the prompt", markup=False)
        text = generate_sentence(load_model(folder), load_tokenizer(folder), prompt, new_tokens=40)
        found.append(("dense" if row.get("ratio") == 0 else name, text))
    return tuple(found)
