"""Trains a pruned model on token blocks, against the next tokens or the dense model's predictions,
and keeps the best state seen.

Every draw depends on the seed and on the number of the step alone, so that a run that is killed and
resumed ends with the same weights, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from prunenet.checkpoints.identity import weights_sha256
from prunenet.evaluation.losses import next_token_loss
from prunenet.models.layers import check_tokens, decoder_layers
from prunenet.policies.training.state import event_log
from prunenet.recover.estimate import JUDGED, Estimate, memory, timed
from prunenet.recover.full import closed, opened
from prunenet.recover.lora import adapted, merged, updates_of
from prunenet.recover.losses import teaching_loss
from prunenet.recover.options import Tuning
from prunenet.recover.state import STATE as STATE
from prunenet.recover.state import Best, Files, State
from prunenet.recover.text import held_back
from prunenet.runtime import parallel
from prunenet.runtime.batches import batch_of
from prunenet.runtime.placement import home
from prunenet.runtime.products import lacks, with_fast_products
from prunenet.runtime.tracking import NOTHING, Track, Tracker, tracking
from prunenet.text.calibration import CalibrationSet

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOW = (torch.bfloat16, torch.float16)


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


@with_fast_products
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
    """Trains low-rank updates of all linears of the decoder layers, or all their weights, and gives
    the best state seen as an ordinary model.

    The given models stay as they are. Of several processes (`prunenet.runtime.parallel`) each takes
    its share of every batch: the same result, with the same number of threads each.

    Args:
        model: usually a narrow one; in eval mode.
        blocks: of text, never test text. A fifth, at most 4,096 tokens, is held back to choose by.
        tuning: how.
        teacher: of the same vocabulary. The loss is KL(teacher || model) with one, as `tuning`
            says, that of the next token without. States are judged by the KL or that loss alone.
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
    _check_asked(model, blocks, teacher, tuning)
    tuning = _settled(tuning, blocks, model)
    settings = {"tuning": asdict(tuning), "text": dict(blocks.source)}
    called = "recovery" if folder is None else folder.name
    with tracking(report_to, called, settings) as track:
        run = _Run(model, teacher, blocks, tuning, folder, progress, track)
        run.play(resume)
        (_, before), best = run.state.history[0], run.state.best
        narrow = model if best is None else run.finished(best)
        after = before if best is None else run.held_loss(narrow)
        track.results({"loss_before": before, "loss_after": min(before, after)})
    if best is None or not after < before:
        return Recovered(model, before, before, 0, run.state.history)
    return Recovered(narrow, before, after, best.step, run.state.history)


@with_fast_products
def estimated(
    model: PreTrainedModel,
    blocks: CalibrationSet,
    tuning: Tuning,
    *,
    teacher: PreTrainedModel | None = None,
) -> Estimate:
    """What `tuned` with the same arguments takes on this machine; one micro-batch is timed. The
    blocks may be of random tokens: only their number and length count.
    """
    _check_asked(model, blocks, teacher, tuning)
    tuning = _settled(tuning, blocks, model)
    run = _Run(model, teacher, blocks, tuning, None, None, NOTHING)
    learned, ids = list(run.state.learned), run.fit[: tuning.micro_batch]
    seconds = timed(lambda: run._part(run.student, ids, learned), home(model))
    # of a step, micro-batches are split over the processes, and no part of one
    parts = math.ceil(run.batch / tuning.micro_batch)
    turns = math.ceil(parts / parallel.size())
    each = seconds / ids.numel() * turns / parts
    tokens = run.steps * run.batch * ids.shape[1]
    judged = (1 + math.ceil(run.steps / run.every)) * (1 + bool(tuning.average)) * run.held.numel()
    return Estimate(
        tokens=tokens,
        tokens_per_second=1 / each,
        seconds=each * (tokens + JUDGED * judged),
        bytes=memory(model, teacher, list(learned), ids, tuning),
    )


def _settled(tuning: Tuning, blocks: CalibrationSet, model: PreTrainedModel) -> Tuning:
    """How a model is trained on these blocks, with nothing left open."""
    learned = len(blocks.ids) - held_back(blocks)
    return tuning.settled(learned, blocks.window, model.num_parameters())


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
        self.track, self.given = track, model
        self.teacher, self.tuning, self.progress = teacher, tuning, progress
        assert tuning.steps is not None, "Tuning.settled"
        assert tuning.batch is not None, "Tuning.settled"
        self.steps, self.batch = tuning.steps, tuning.batch
        # judging costs a third of learning from as many tokens
        self.every = min(math.ceil(self.steps / 5), 200)
        self.front = int(blocks.bos is not None)
        held = held_back(blocks)
        self.fit, self.held = blocks.ids[:-held], blocks.ids[-held:]
        self.student = (
            adapted(model, tuning.rank, tuning.seed)
            if tuning.updates == "lora"
            else opened(model, tuning.embeddings)
        )
        learned = list(updates_of(self.student))
        self.state = State(
            learned,
            [p.detach().clone() for p in learned] if tuning.average else [],
            torch.optim.AdamW(
                learned,
                lr=tuning.rate,
                betas=tuning.betas,
                weight_decay=0.0,
                # in one pass over the memory: a quarter of the time
                fused=home(model).type in ("cpu", "cuda"),
            ),
        )
        self.whole = True  # whether the state is one between two steps
        self.files: Files | None = None
        if folder is not None:
            identity: dict[str, Any] = {"tuning": asdict(tuning), "text": dict(blocks.source)}
            identity |= {
                "model": weights_sha256(model),
                "teacher": teacher and weights_sha256(teacher),
            }
            self.files = Files(folder, identity)

    def play(self, resume: bool) -> None:
        """All steps, or those that are left. What interrupts them finds the last whole step
        saved.
        """
        if resume and self.files is not None:
            self.files.load(self.state, self.steps)
        log = event_log(None if self.files is None else self.files.folder / STATE, self.state.steps)
        try:
            self._steps(log)
        except KeyboardInterrupt:
            if self.whole and self.state.history:
                self._save(now=True)
            raise
        finally:
            if log is not None:
                log.close()

    def _steps(self, log: SummaryWriter | None) -> None:
        state, moved = self.state, False
        while True:
            due = state.steps % self.every == 0 or state.steps == self.steps
            if due and state.steps not in (at for at, _ in state.history[-1:]):
                self._judge(log)
            if moved and self.progress is not None:
                self.progress(state.steps, self.steps, state.history[-1][1])
            if state.steps == self.steps:
                return
            self._log(log, "loss", self._step(state.steps))
            moved = True

    def _log(self, log: SummaryWriter | None, name: str, value: float) -> None:
        if log is not None:
            log.add_scalar(name, value, self.state.steps)
        self.track.log({name: value}, self.state.steps)

    def held_loss(self, model: PreTrainedModel) -> float:
        """On the blocks held back, nats per token."""
        loss = float(self._summed(model, self.held, [])[-1])
        if not math.isfinite(loss) and model is self.student and self.state.steps:
            raise ValueError(
                f"the loss on the text held back is {loss} after step {self.state.steps}; give a"
                f" smaller `learning_rate` than {self.tuning.rate}"
            )
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss on the text held back is {loss}: damaged weights, or {model.dtype}"
                " overflows"
            )
        return loss

    @property
    def before(self) -> float:
        """The KL of the given model on the blocks held back; infinite without a teacher."""
        return math.inf if self.teacher is None else self.state.history[0][1]

    def _step(self, step: int) -> float:
        """Takes one step; returns its loss."""
        tuning, learned = self.tuning, list(self.state.learned)
        for settings in self.state.optimizer.param_groups:
            settings["lr"] = tuning.rate_at(step, self.steps, self.before)
        *gradients, loss = self._summed(
            self.student,
            self.fit[batch_of(step, self.batch, len(self.fit), tuning.seed)],
            learned,
        )
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {float(loss)} at step {step}; give a smaller `learning_rate` than"
                f" {tuning.rate}"
            )
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        self.whole = False
        nn.utils.clip_grad_norm_(learned, 1.0)
        self.state.optimizer.step()
        # at first the average follows quickly, so that it forgets the start
        decay = min(tuning.average, (1 + step) / (10 + step))
        for mean, parameter in zip(self.state.average, learned, strict=bool(tuning.average)):
            mean.lerp_(parameter.detach(), 1 - decay)
        self.state.steps += 1
        self.whole = True
        return float(loss)

    def _summed(
        self, model: PreTrainedModel, ids: Int[Tensor, "n tokens"], learned: list[nn.Parameter]
    ) -> list[Tensor]:
        """The gradients of the mean loss with respect to what is learned, and the loss, put
        together from micro-batches.
        """
        parts = torch.split(ids, self.tuning.micro_batch)
        total: list[Tensor] = []
        # in turns of one part a process, so that few gradients are in memory
        for first in range(0, len(parts), parallel.size()):
            turn = parts[first : first + parallel.size()]
            own = {
                number: self._part(model, part, learned)
                for number, part in enumerate(turn)
                if parallel.is_owner(number)
            }
            for part, found in zip(turn, parallel.gather_from_owners(own, len(turn)), strict=True):
                share = len(part) / len(ids)
                shares = [tensor * share for tensor in found]
                total = list(map(torch.add, total, shares)) if total else shares
        return total

    def _part(
        self, model: PreTrainedModel, ids: Int[Tensor, "n tokens"], learned: list[nn.Parameter]
    ) -> list[Tensor]:
        with torch.set_grad_enabled(bool(learned)), _computing(model, self.given.dtype):
            loss = self._loss(model, ids.to(home(model)), training=bool(learned))
            gradients = (
                torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
                if learned
                else ()
            )
            return [*gradients, loss.detach()]

    def _loss(
        self, model: PreTrainedModel, ids: Int[Tensor, "n tokens"], *, training: bool
    ) -> Float[Tensor, ""]:
        """What is trained on; or what states are judged by, which is the same of all settings."""
        if self.teacher is None:
            return next_token_loss(model, ids, unscored=self.front)
        asked: dict[str, Any] = {}
        if training:
            asked = {"kind": self.tuning.loss, "hidden": self.tuning.hidden}
        return teaching_loss(model, self.teacher, ids, unscored=self.front, **asked)

    def _judge(self, log: SummaryWriter | None) -> None:
        """Measures the loss on the blocks held back, keeps the best state, saves the run."""
        found = [(self.held_loss(self.student), [p.detach() for p in self.state.learned])]
        if self.state.average and self.state.steps:
            with _replaced(self.state.learned, self.state.average):
                found.append((self.held_loss(self.student), self.state.average))
        loss, learned = min(found, key=lambda pair: pair[0])
        self.whole = False
        if self.state.history and loss < min(value for _, value in self.state.history):
            best = [tensor.cpu().clone() for tensor in learned]
            self.state.best = Best(self.state.steps, loss, best)
        self.state.history.append((self.state.steps, loss))
        self.whole = True
        self._log(log, "loss_held_back", loss)
        self._save(now=self.state.steps in (0, self.steps))

    def _save(self, *, now: bool) -> None:
        if self.files is not None and parallel.is_first():
            self.files.save(self.state, now=now)

    @torch.no_grad()
    def finished(self, best: Best) -> PreTrainedModel:
        """The best state as an ordinary model; the student is used up."""
        for parameter, tensor in zip(self.state.learned, best.learned, strict=True):
            parameter.copy_(tensor)
        if self.tuning.updates == "lora":
            return merged(self.student)
        return closed(self.student, self.given)


@contextmanager
def _computing(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Inside, attention of CUDA adds up its gradients in a fixed order, and float32 copies of low
    precision compute in that precision, unless the CPU lacks it.
    """
    place = home(model)
    with ExitStack() as stack:
        if place.type == "cuda":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if dtype in _LOW and model.dtype not in _LOW and not (place.type == "cpu" and lacks(dtype)):
            stack.enter_context(torch.autocast(place.type, dtype))
        yield


@contextmanager
def _replaced(learned: Sequence[nn.Parameter], others: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters have other values; nothing is copied."""
    own = [parameter.data for parameter in learned]
    try:
        for parameter, other in zip(learned, others, strict=True):
            parameter.data = other
        yield
    finally:
        for parameter, before in zip(learned, own, strict=True):
            parameter.data = before


def _check_asked(
    model: PreTrainedModel,
    blocks: CalibrationSet,
    teacher: PreTrainedModel | None,
    tuning: Tuning,
) -> None:
    count, tokens = blocks.ids.shape
    if count < 2 or tokens < 2:
        raise ValueError(
            "recovery trains on some blocks of text and chooses on others: give 2 blocks or more,"
            f" of 2 tokens or more each, got {count} of {tokens}; give more text, or more `tokens`"
        )
    check_tokens(model, blocks.ids)
    pair = [model] if teacher is None else [model, teacher]
    unlike = len({len(decoder_layers(one)) for one in pair}) > 1
    sliced = getattr(model.config, "residual_widths", None)
    if tuning.hidden and (teacher is None or unlike or sliced):
        raise ValueError(
            "`hidden` compares hidden states with those of a dense model of the same width and"
            " depth: give one (`teacher`), or leave `hidden` at 0"
        )
    if teacher is None:
        if tuning.loss != "kl":
            raise ValueError(
                f"`loss` {tuning.loss} is of a teacher's predictions: give the dense model"
                " (`teacher`), or leave `loss` out"
            )
        return
    rows: list[Any] = [m.get_input_embeddings() for m in (teacher, model)]
    known, taught = (len(table.weight) for table in rows)
    if known != taught:
        raise ValueError(
            f"the teacher has a vocabulary of {known} tokens and the pruned model one of {taught},"
            " so their predictions cannot be compared; give the dense model that was pruned"
        )
    check_tokens(teacher, blocks.ids)
