"""Puts a checkpoint on the Hugging Face hub, and results into its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prunenet.checkpoints.contents import CONFIG
from prunenet.checkpoints.model_card import CARD, card_of, inherited_fields
from prunenet.checkpoints.records import how_to_load, load_provenance
from prunenet.checkpoints.sources import in_short
from prunenet.runtime.files import CheckpointError, write_atomic
from prunenet.runtime.paths import named


def write_card(
    folder: str | Path, results: Sequence[Mapping[str, Any]] = (), base: str | Path | None = None
) -> Path:
    """Writes a checkpoint's model card anew, with results as `model-index`.

    Args:
        folder: that prunenet wrote.
        results: rows of `prunenet eval`; those of this folder are taken, by its place or, where
            none is, by its name.
        base: folder of the base model, whose card states licence and languages. None, or where it
            states neither: what the card says already stays.

    Returns:
        The card.

    Raises:
        CheckpointError: no such checkpoint, or no card in `base`.
        ValueError: there are results, and none of this folder, or of several of its name.
    """
    folder = Path(folder).expanduser()
    made = load_provenance(folder)
    own = _of(folder, results)
    inherited = inherited_fields(folder)
    if base is not None:
        base = Path(base).expanduser()
        if not (base / CARD).is_file():
            raise CheckpointError(
                f"base {base} has no model card ({CARD}) to take licence and languages from; give"
                " the folder of the base model, or leave it out"
            )
        inherited = inherited_fields(base) or inherited
    text = card_of(
        made,
        code=any(folder.glob("*.py")),
        loading=how_to_load(folder),
        inherited=inherited,
        results=own,
    )
    write_atomic(folder / CARD, text.encode())
    return folder / CARD


def _of(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a folder. Raises ValueError as `write_card`."""
    measured = [(row, Path(str(row.get("folder", ""))).expanduser()) for row in results]
    here = folder.resolve()
    own = [row for row, place in measured if place.resolve() == here]
    # the results may be of another machine, or of another working directory
    alike = [(row, place) for row, place in measured if named(place) == here.name]
    if len({place for _, place in alike}) > 1 and not own:
        raise ValueError(
            f"the results are of several folders that are called {here.name}: run it where they"
            " were measured, or measure this one alone"
        )
    own = own or [row for row, _ in alike]
    if results and not own:
        others = ", ".join(str(row.get("folder"))[:60] for row in results[:5])
        raise ValueError(f"the results are of {others}, and none is of {folder}: measure it first")
    return own


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Uploads a folder to the hub as one commit; the repository is made if it is missing.

    The account is the one that `hf auth login` has stored, or of the token in `HF_TOKEN`.

    Args:
        folder: a checkpoint, or a folder with a GGUF file.
        repo: `owner/name`.
        private: whether a new repository is closed to others.

    Returns:
        Where it is now.

    Raises:
        CheckpointError: nothing there to upload, no such name, or the hub refuses.
    """
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file() and not any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} holds neither {CONFIG} nor a .gguf file: give a checkpoint"
        )
    try:
        api = HfApi()
        if (folder / CARD).is_file():
            ModelCard((folder / CARD).read_text(encoding="utf-8")).validate()
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=f"Upload {folder.resolve().name}",
            ignore_patterns=[".*", "*.lock"],
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} was not uploaded to {repo!r}: {in_short(error)}; log in with 'hf auth login'"
        ) from error
    return str(made)
