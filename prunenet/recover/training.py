"""Trains the updates on token blocks, against the next tokens or the dense model's predictions, and
keeps the best.

Every draw depends on the seed and on the number of the step alone, so that a run that is killed and
resumed ends with the same weights, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.evaluation.losses import next_token_loss
from prunenet.models.layers import check_tokens
from prunenet.policies.training.state import Progress, load_state, save_state
from prunenet.recover.lora import adapted, merged, updates_of
from prunenet.recover.options import Tuning
from prunenet.runtime import parallel
from prunenet.runtime.files import make_folders
from prunenet.runtime.placement import home
from prunenet.runtime.tracking import Track, Tracker, tracking
from prunenet.text.calibration import CalibrationSet

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STATE = "state.safetensors"
"""File of an unfinished run, in its folder."""
_HELD = 32  # blocks held back, at most: a fifth of all


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """What training gives.

    Attributes:
        model: an ordinary model of the same shapes; the given one where no state was better.
        before, after: loss on the blocks held back of the given model and of this one, as it is
            saved; nats per token.
        best_step: after which the best state was seen; 0 where no state was better.
        history: (steps, loss on the blocks held back) at each evaluation.
    """

    model: PreTrainedModel
    before: float
    after: float
    best_step: int
    history: list[tuple[int, float]]


def tuned(
    model: PreTrainedModel,
    blocks: CalibrationSet,
    tuning: Tuning,
    *,
    teacher: PreTrainedModel | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    report_to: Sequence[Tracker] = (),
) -> Recovered:
    """Trains low-rank updates of all linears of the decoder layers and merges the best ones seen
    into the weights.

    The given models stay as they are. Of several processes (`prunenet.runtime.parallel`) each takes
    its share of every batch: the same result, with the same number of threads each.

    Args:
        model: usually a narrow one; in eval mode.
        blocks: of text, never test text. A fifth, at most 32, is held back to choose by.
        tuning: how.
        teacher: of the same vocabulary. The loss is KL(teacher || model) with one, that of the next
            token without.
        folder: for the run's state and its TensorBoard log; None keeps all in memory.
        resume: go on with the run in `folder`.
        progress: called with (steps done, steps in all, loss on the blocks held back).
        report_to: trackers that are told what is logged, as one run.

    Raises:
        ValueError: too few blocks, blocks that the model cannot read, a teacher of another
            vocabulary, or a loss that is not finite.
        PolicyError: nothing to resume, or another run in `folder`.
        ImportError: peft, or a tracker, is not installed.
    """
    _check_asked(model, blocks, teacher)
    settings = {"tuning": asdict(tuning), "text": dict(blocks.source)}
    called = "recovery" if folder is None else folder.name
    with tracking(report_to, called, settings) as track:
        run = _Run(model, teacher, blocks, tuning, folder, progress, track)
        before, best_step = run.play(resume)
        narrow = merged(run.student)
        after = run.held_loss(narrow)
        track.results({"loss_before": before, "loss_after": min(before, after)})
    if not after < before:
        return Recovered(model, before, before, 0, run.history)
    return Recovered(narrow, before, after, best_step, run.history)


def teaching_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Int[Tensor, "n tokens"],
    *,
    unscored: int = 0,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of next-token distributions, in nats per token; differentiable in the
    student. `unscored`: as for `prunenet.evaluation.losses.next_token_loss`.
    """
    with torch.no_grad():
        expected = _log_probabilities(teacher, ids, unscored)
    found = _log_probabilities(student, ids, unscored)
    return F.kl_div(
        found.flatten(0, 1), expected.flatten(0, 1), reduction="batchmean", log_target=True
    )


class _Run:
    """One training: its student, its optimiser, and the best state seen."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        blocks: CalibrationSet,
        tuning: Tuning,
        folder: Path | None,
        progress: Callable[[int, int, float], None] | None,
        track: Track,
    ) -> None:
        self.track = track
        self.teacher, self.tuning, self.progress = teacher, tuning, progress
        self.front = int(blocks.bos is not None)
        held = min(_HELD, max(1, round(0.2 * len(blocks.ids))))
        self.fit, self.held = blocks.ids[:-held], blocks.ids[-held:]
        self.student = adapted(model, tuning.rank, tuning.seed)
        self.updates = updates_of(self.student)
        self.optimizer = torch.optim.AdamW(self.updates, lr=tuning.learning_rate, weight_decay=0.0)
        self.state = Progress(0, -math.inf, {}, [])
        self.file = None if folder is None else folder / STATE
        self.identity: dict[str, Any] = {"tuning": asdict(tuning), "text": dict(blocks.source)}
        if folder is not None:
            self.identity |= {
                "model": weights_sha256(model),
                "teacher": teacher and weights_sha256(teacher),
            }

    @property
    def history(self) -> list[tuple[int, float]]:
        return [(steps, -value) for steps, value in self.state.history]

    def play(self, resume: bool) -> tuple[float, int]:
        """All steps, or those that are left. Puts the best updates into the student; returns (first
        loss, step of the best).
        """
        if resume and self.file is not None:
            self.state = load_state(
                self.file, self.updates, self.optimizer, self.identity, self.tuning.steps
            )
        log = _log(self.file, self.state.updates)
        if not self.state.history:
            self._judge(log)
        every = min(max(self.tuning.steps // 10, 1), 25)
        while self.state.updates < self.tuning.steps:
            loss = self._step(self.state.updates)
            self.state.updates += 1
            self._log(log, "loss", loss)
            if self.state.updates % every == 0 or self.state.updates == self.tuning.steps:
                self._judge(log)
            if self.progress is not None:
                self.progress(self.state.updates, self.tuning.steps, -self.state.history[-1][1])
        if log is not None:
            log.close()
        self.updates.load_state_dict(self.state.best)
        return self.history[0][1], min(self.history, key=lambda entry: entry[1])[0]

    def _log(self, log: SummaryWriter | None, name: str, value: float) -> None:
        if log is not None:
            log.add_scalar(name, value, self.state.updates)
        self.track.log({name: value}, self.state.updates)

    def held_loss(self, model: PreTrainedModel) -> float:
        """On the blocks held back, nats per token."""
        loss = float(self._summed(model, self.held, [])[-1])
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss on the text held back is {loss}: damaged weights, or {model.dtype}"
                " overflows"
            )
        return loss

    def _step(self, step: int) -> float:
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.tuning.learning_rate * (1 - step / self.tuning.steps)
        learned = list(self.updates)
        *gradients, loss = self._summed(self.student, self._batch(step), learned)
        if not math.isfinite(loss):
            rate = self.tuning.learning_rate
            raise ValueError(
                f"the loss is {float(loss)} at step {step}; give a smaller `learning_rate` than"
                f" {rate}"
            )
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(learned, 1.0)
        self.optimizer.step()
        return float(loss)

    def _batch(self, step: int) -> Int[Tensor, "batch tokens"]:
        """All blocks in a drawn order, then in another one, and so on; the batches go on over the
        seams.
        """
        turns = [
            divmod(step * self.tuning.batch + number, len(self.fit))
            for number in range(self.tuning.batch)
        ]
        orders = {turn: self._order(turn) for turn in {turn for turn, _ in turns}}
        return self.fit[torch.stack([orders[turn][place] for turn, place in turns])]

    def _order(self, turn: int) -> Int[Tensor, " blocks"]:
        seed = int(np.random.SeedSequence([self.tuning.seed, turn]).generate_state(1)[0])
        return torch.randperm(len(self.fit), generator=torch.Generator().manual_seed(seed))

    def _summed(
        self, model: PreTrainedModel, ids: Int[Tensor, "n tokens"], learned: list[nn.Parameter]
    ) -> list[Tensor]:
        """The gradients of the mean loss with respect to what is learned, and the loss, put
        together from micro-batches.
        """
        parts = torch.split(ids, self.tuning.micro_batch)
        own = {
            number: self._part(model, part, learned)
            for number, part in enumerate(parts)
            if parallel.is_owner(number)
        }
        shares = [len(part) / len(ids) for part in parts]
        found = zip(*parallel.gather_from_owners(own, len(parts)), strict=True)
        return [
            reduce(torch.add, [t * share for t, share in zip(column, shares, strict=True)])
            for column in found
        ]

    def _part(
        self, model: PreTrainedModel, ids: Int[Tensor, "n tokens"], learned: list[nn.Parameter]
    ) -> list[Tensor]:
        place = home(model)
        # CUDA's faster kernels add up the gradients of attention in no fixed order.
        exact = sdpa_kernel(SDPBackend.MATH) if place.type == "cuda" else nullcontext()
        with torch.set_grad_enabled(bool(learned)), exact:
            ids = ids.to(place)
            loss = (
                next_token_loss(model, ids, unscored=self.front)
                if self.teacher is None
                else teaching_loss(model, self.teacher, ids, unscored=self.front)
            )
            return [*(torch.autograd.grad(loss, learned) if learned else ()), loss.detach()]

    def _judge(self, log: SummaryWriter | None) -> None:
        """Measures the loss on the blocks held back, keeps the best updates, saves the state."""
        loss = self.held_loss(self.student)
        self.state.history.append((self.state.updates, -loss))
        if -loss > self.state.best_reward:
            self.state.best_reward = -loss
            self.state.best = {
                name: tensor.detach().cpu().clone()
                for name, tensor in self.updates.state_dict().items()
            }
        self._log(log, "loss_held_back", loss)
        if self.file is not None and parallel.is_first():
            save_state(self.file, self.state, self.updates, self.optimizer, self.identity)


def _check_asked(
    model: PreTrainedModel, blocks: CalibrationSet, teacher: PreTrainedModel | None
) -> None:
    count, tokens = blocks.ids.shape
    if count < 2 or tokens < 2:
        raise ValueError(
            "recovery trains on some blocks of text and chooses on others: give 2 blocks or more,"
            f" of 2 tokens or more each, got {count} of {tokens}; give more text, or more `tokens`"
        )
    check_tokens(model, blocks.ids)
    if teacher is None:
        return
    rows: list[Any] = [m.get_input_embeddings() for m in (teacher, model)]
    known, taught = (len(table.weight) for table in rows)
    if known != taught:
        raise ValueError(
            f"the teacher has a vocabulary of {known} tokens and the pruned model one of {taught},"
            " so their predictions cannot be compared; give the dense model that was pruned"
        )
    check_tokens(teacher, blocks.ids)


def _log_probabilities(
    model: PreTrainedModel, ids: Int[Tensor, "n tokens"], unscored: int
) -> Float[Tensor, "n scored vocabulary"]:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, unscored:]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _log(file: Path | None, done: int) -> SummaryWriter | None:
    """The TensorBoard log of the first process, in the folder of the run's state."""
    if file is None or not parallel.is_first():
        return None
    from torch.utils.tensorboard import SummaryWriter

    make_folders(file.parent)
    return SummaryWriter(str(file.parent), purge_step=done + 1)
