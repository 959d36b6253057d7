"""`prunenet prune --recover`: the cut waits beside the result until it is trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunenet.checkpoints.options import AUTO
from prunenet.cli import tables
from prunenet.cli.console import errors
from prunenet.cli.inputs import Checkpoint
from prunenet.cli.options import Calibration, Reading, Resume
from prunenet.policies.options import PruneOptions
from prunenet.recover.options import FAST, RecoverText, Tuning

if TYPE_CHECKING:
    from prunenet.recover.estimate import Estimate

_CUT, _ASKED = "pruned", "asked.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovering:
    """Whether a cut is trained before it is written."""

    recover: Annotated[
        Literal["off", "fast"],
        typer.Option(
            help="fast: train the cut to predict what the dense model does, in about a quarter of"
            " an hour of two cores for 135 million parameters ('prunenet recover' has more)."
        ),
    ] = "off"
    resume: Resume = False


def check_recoverable(
    recovering: Recovering, reading: Reading, source: Checkpoint, calibration: Calibration
) -> None:
    """Raises ValueError or ImportError for a training that could not be done behind the cut."""
    if recovering.recover == "off":
        if recovering.resume:
            raise ValueError(
                "--resume goes on with a training: say --recover fast too, or leave it out"
            )
        return
    if reading.stream or reading.device == AUTO:
        raise ValueError(
            "--recover trains the model in memory on one device: leave --stream and --device auto"
            " out, or recover the result on a larger machine"
        )
    from prunenet.checkpoints.streaming import StreamedCheckpoint
    from prunenet.recover.lora import load_peft
    from prunenet.text.generate import document_start

    tokenizer = source.tokenizer
    if calibration.moments != "data":
        document_start(tokenizer, calibration.bos)
    dense = StreamedCheckpoint.open(source.source).skeleton
    if Tuning().chosen(dense.num_parameters()).updates == "lora":
        load_peft()


def say_estimate(found: Estimate) -> None:
    """Prints what a training is going to take."""
    errors.print(f"training: {found}")


@dataclass(frozen=True)
class Unfinished:
    """The folder beside a result that holds what a killed command leaves: what was asked for, the
    cut, and the state of its training.

    Attributes:
        out: what the command makes.
        dense: folder or hub id of the dense model.
        folder: beside `out`.
    """

    out: Path
    dense: str
    folder: Path

    @classmethod
    def beside(cls, out: Path, dense: str) -> Unfinished:
        """Names the folder beside `out`; touches nothing."""
        from prunenet.recover.record import run_folder

        return cls(out, dense, run_folder(out))

    @classmethod
    def of(
        cls,
        out: Path,
        source: Checkpoint,
        options: PruneOptions,
        calibration: Calibration,
        recovering: Recovering,
        policy: str | None,
    ) -> Unfinished:
        """Makes the folder, or goes on with what is there.

        Raises:
            ValueError: an unfinished run is there and --resume is not given, or none and it is, or
                what is there was asked for with other options.
        """
        from prunenet.checkpoints.identity import identify
        from prunenet.runtime import parallel

        found = cls.beside(out, source.source)
        asked = {
            "model": list(identify(source.source)),
            "policy": policy,
            "recover": recovering.recover,
            **asdict(options),
            **{name: value for name, value in asdict(calibration).items() if name != "policy"},
        }
        if parallel.is_first():
            found.start(asked, recovering.resume)
        return found

    def start(self, asked: dict[str, Any], resume: bool) -> None:
        """See `of`."""
        from prunenet.policies.training.state import check_run
        from prunenet.recover.state import STATE
        from prunenet.runtime.files import check_home, make_folders, write_atomic
        from prunenet.runtime.json_files import read_json

        check_home(self.folder)
        note, asked = self.folder / _ASKED, json.loads(json.dumps(asked))
        if (note.exists() or (self.folder / STATE).exists()) and not resume:
            raise ValueError(
                f"{self.folder} holds an unfinished run; say `resume`, remove it, or give another"
                " `out`"
            )
        if resume and not note.exists():
            raise ValueError(f"nothing to resume in {self.folder}; start without `resume`")
        if resume:
            check_run(note, read_json(note, dict, remedy="remove its folder"), asked)
        else:
            make_folders(self.folder)
            write_atomic(note, json.dumps(asked).encode())

    def forget_made(self) -> None:
        """Removes what is left where it has made `out`: a kill behind the last step left it."""
        from prunenet.checkpoints.records import find_provenance
        from prunenet.runtime.paths import CheckpointError

        if not (self.out.is_dir() and self.cut.is_dir()):
            return
        try:
            made, cut = find_provenance(self.out), find_provenance(self.cut)
        except CheckpointError:
            return
        if made and cut and made.recovered and replace(made, recovered=cut.recovered) == cut:
            self.remove()

    def remove(self) -> None:
        """Removes the cut and what was asked for; the log of the training stays."""
        (self.folder / _ASKED).unlink(missing_ok=True)
        shutil.rmtree(self.cut)

    @property
    def cut(self) -> Path:
        """The pruned checkpoint that is to be trained."""
        return self.folder / _CUT

    def has_cut(self) -> bool:
        """Whether a run before has made it; the same on every process."""
        from prunenet.runtime import parallel

        return bool(parallel.broadcast_object(0, self.cut.exists))

    def train(self, calibration: Calibration, device: str, dtype: str) -> dict[str, Any]:
        """Trains the cut into the result, and removes what was left for it.

        Returns:
            What is shown of the training.
        """
        from prunenet.checkpoints.options import LoadOptions
        from prunenet.recover.record import Watch, recover
        from prunenet.recover.state import STATE
        from prunenet.runtime import parallel
        from prunenet.text.generate import BLOCK

        external = calibration.moments == "data"
        # Of external text as much, or again and again what there is.
        steps = FAST // BLOCK if external else None
        tuning = Tuning(seed=calibration.seed, steps=steps)
        text = RecoverText(
            moments="data" if external else "self",
            text=calibration.text,
            column=calibration.text_column,
            bos=calibration.bos,
            tokens=None if external else FAST,
        )
        resume = parallel.broadcast_object(0, (self.folder / STATE).exists)
        with tables.stages(errors) as advance:
            found = recover(
                self.cut,
                self.out,
                tuning,
                teacher=self.dense,
                text=text,
                resume=resume,
                loading=LoadOptions(device=device, dtype=dtype),
                watch=Watch(estimate=say_estimate, progress=advance),
            )
        if parallel.is_first():
            self.remove()
        return {"loss_before": found.before, "loss_after": found.after}
