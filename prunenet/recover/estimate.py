"""What a training is going to take, said before it starts: from one timed micro-batch here, and the
sizes of the models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.models.layers import decoder_layers, text_config
from prunenet.recover.options import Tuning
from prunenet.runtime.placement import home
from prunenet.runtime.products import fast_products, lacks
from prunenet.text.calibration import SEQUENCES
from prunenet.text.choices import Bos
from prunenet.text.generate import BLOCK, KEEP, SamplingOptions, document_start, generate_blocks

JUDGED = 0.5
"""Time of a token that is judged, of one that is learned from: no gradients."""
_SAMPLED = 8  # tokens of the sequences that are timed
_COPIES = 5  # of the logits of a micro-batch: two models' log-probabilities, and gradients
_KEPT = 16  # tensors of d_model that a layer keeps for its gradient, and 4 of its widest linear


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a training takes on this machine.

    Attributes:
        tokens: that are learned from, in all steps.
        tokens_per_second: of learning.
        seconds: of learning and judging; text not included.
        bytes: the most memory of models, optimiser and activations, by their sizes.
        text_seconds: of writing the text where none of it is cached; None for external text.
    """

    tokens: int
    tokens_per_second: float
    seconds: float
    bytes: int
    text_seconds: float | None = None

    def __str__(self) -> str:
        said = f"{self.tokens:,} tokens at about {self.tokens_per_second:,.0f} a second,"
        said += f" {_duration(self.seconds)}; about {self.bytes / 1e9:.1f} GB of memory"
        if self.text_seconds is not None:
            said += f"; {_duration(self.text_seconds)} more where the text is not cached"
        return said


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; on CUDA, where kernels are loaded first, of the second one."""
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - start, 1e-9)


def memory(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    learned: list[Tensor],
    ids: Int[Tensor, "n tokens"],
    tuning: Tuning,
) -> int:
    """The most bytes of models, optimiser and activations.

    Args:
        model: the student.
        teacher: None without one.
        learned: what is trained.
        ids: of a micro-batch.
        tuning: whether there is an average.
    """
    sizes = {
        parameter.data_ptr(): parameter.numel() * parameter.element_size()
        for found in (model, teacher)
        if found is not None
        for parameter in found.parameters()
    }
    trained = sum(tensor.numel() * tensor.element_size() for tensor in learned)
    # it, its gradient, the sum of those, two moments and the best state
    states = trained * (6 + (tuning.average > 0))
    config, item = text_config(model), torch.finfo(torch.float32).bits // 8
    layers = decoder_layers(model)
    widest = max(max(p.shape) for p in layers.parameters())
    activations = ids.numel() * item * len(layers) * (_KEPT * config.hidden_size + 4 * widest)
    logits = ids.numel() * item * config.vocab_size * _COPIES
    # gradients that pass frozen weights keep them as they are multiplied, in float32
    widened = tuning.updates == "lora" and home(model).type == "cpu" and lacks(model.dtype)
    frozen = model.num_parameters() * item * widened
    return int(sum(sizes.values()) + states + activations + logits + frozen)


def writing(
    writer: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: int,
    tokens: int,
    bos: Bos,
) -> float:
    """Seconds that so many blocks of self-written text take, where none of it is cached.

    Args:
        writer, tokenizer: of the dense model.
        blocks: behind the filter.
        tokens: of a block.
        bos: as for `prunenet.text.calibration.self_blocks`.
    """
    many = max(1, min(SEQUENCES * BLOCK // tokens // 2, round(blocks / KEEP)))
    options = SamplingOptions(sequences=many, batch=many, tokens=min(_SAMPLED, tokens))
    start = document_start(tokenizer, bos)
    with fast_products(writer, unchanged=True):
        seconds = timed(lambda: generate_blocks(writer, start, options), home(writer))
    return seconds * tokens / options.tokens * (blocks / KEEP) / many


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
