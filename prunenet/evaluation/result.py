"""Puts what was measured on one model into one record: perplexity, parameters, bytes, tokens per
second.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunenet.checkpoints.contents import weight_names
from prunenet.evaluation.perplexity import Perplexity
from prunenet.evaluation.repetition import Repetition
from prunenet.evaluation.speed import Speed
from prunenet.models.architectures import architecture_for
from prunenet.models.heads import attentions
from prunenet.models.layers import count_parameters
from prunenet.runtime.floats import dtype_name
from prunenet.runtime.placement import parameters, where

JsonValue = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Result:
    """Everything measured on one model. Fields of what was not measured are None.

    Attributes:
        parameters: all of them, tied tensors once.
        non_embedding_parameters: without token embedding and LM head.
        bytes: of the safetensors files on disk when a folder was given, else of the parameters in
            memory.
        kv_bytes_per_token: of the KV cache, a sequence, in the model's dtype; None where heads of
            the family are not known.
        dtype, device: of the parameters; several devices as in `cuda:0+cpu+disk`.
        threads: CPU threads that torch uses.
        perplexity: value of `Perplexity`; perplexity_low, perplexity_high: its interval; loss,
            tokens, windows, window, stride, text, text_sha256, bos: its fields.
        prefill_tokens_per_second, decode_tokens_per_second: prefill and decode of `Speed`;
            prefill_spread, decode_spread, prompt, new_tokens, batch, repeats, compiled,
            forward_bytes: its fields.
        peak_bytes: parameters in memory and `forward_bytes`.
        distinct_4, repetition_rate: of greedy texts, see `prunenet.evaluation.repetition`.
        served_...: of llama.cpp with the model as a GGUF file; the fields of
            `prunenet.evaluation.serving.Served`.
    """

    parameters: int
    non_embedding_parameters: int
    bytes: int
    dtype: str
    device: str
    threads: int
    perplexity: float | None = None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    windows: int | None = None
    loss: float | None = None
    tokens: int | None = None
    window: int | None = None
    stride: int | None = None
    text: str | None = None
    text_sha256: str | None = None
    bos: bool | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prefill_spread: float | None = None
    decode_spread: float | None = None
    prompt: int | None = None
    new_tokens: int | None = None
    batch: int | None = None
    repeats: int | None = None
    compiled: bool | None = None
    kv_bytes_per_token: int | None = None
    forward_bytes: int | None = None
    peak_bytes: int | None = None
    distinct_4: float | None = None
    repetition_rate: float | None = None
    served_type: str | None = None
    served_bytes: int | None = None
    served_prefill_tokens_per_second: float | None = None
    served_decode_tokens_per_second: float | None = None
    served_prefill_spread: float | None = None
    served_decode_spread: float | None = None

    def as_dict(self) -> dict[str, JsonValue]:
        """Gives all fields for one JSON line; a value that JSON cannot hold (an infinite
        perplexity) becomes None.
        """
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(self).items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResult(Result):
    """A `Result` and whose it is: a row of `prunenet.evaluation.side_by_side.evaluate`.

    Attributes:
        name: last part of the folder or hub id.
        folder: the folder or hub id as it was given.
        ratio: share of FFN channels that pruning removed; 0 for a dense model.
    """

    name: str
    folder: str
    ratio: float | None

    def as_dict(self) -> dict[str, JsonValue]:
        """Gives all fields for one JSON line, as `Result.as_dict`; these first."""
        first = ("name", "folder", "ratio")
        found = Result.as_dict(self)
        return {name: found[name] for name in first} | found


def summarise(
    model: PreTrainedModel,
    *,
    perplexity: Perplexity | None = None,
    speed: Speed | None = None,
    repetition: Repetition | None = None,
    folder: str | Path | None = None,
) -> Result:
    """Puts measurements, parameter counts and size together.

    Args:
        model: the model measured.
        perplexity, speed, repetition: of this model, where measured.
        folder: the checkpoint's folder, to count bytes on disk.

    Raises:
        ValueError: the folder holds no safetensors file.
    """
    parameters, non_embedding = count_parameters(model)
    quality = {} if perplexity is None else asdict(perplexity)
    pace = {} if speed is None else asdict(speed)
    for fields, old, new in (
        (quality, "value", "perplexity"),
        (quality, "low", "perplexity_low"),
        (quality, "high", "perplexity_high"),
        (pace, "prefill", "prefill_tokens_per_second"),
        (pace, "decode", "decode_tokens_per_second"),
    ):
        if fields:
            fields[new] = fields.pop(old)
    own = _bytes_in_memory(model)
    forward = None if speed is None else speed.forward_bytes
    return Result(
        parameters=parameters,
        non_embedding_parameters=non_embedding,
        bytes=own if folder is None else bytes_on_disk(folder),
        dtype=dtype_name(model.dtype),
        device=where(model),
        threads=torch.get_num_threads(),
        kv_bytes_per_token=_kv_bytes(model),
        peak_bytes=None if forward is None else own + forward,
        **quality,
        **pace,
        **({} if repetition is None else asdict(repetition)),
    )


def bytes_on_disk(folder: str | Path) -> int:
    """Counts the bytes of the safetensors files that a checkpoint's model is read from.

    Raises:
        ValueError: there is none, or one is missing.
    """
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} holds no .safetensors file; give the folder of a saved model"
        )
    return sum((Path(folder) / name).stat().st_size for name in weight_names(Path(folder)))


def _kv_bytes(model: PreTrainedModel) -> int | None:
    """A key and a value of each group of heads, in each layer."""
    if not architecture_for(model.config).attention_in:
        return None
    rows = sum(len(layer.key) + len(layer.value) for layer in attentions(model))
    return rows * model.dtype.itemsize


def _bytes_in_memory(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for _, p in parameters(model))
