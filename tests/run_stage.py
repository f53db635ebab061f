"""
`sailvit train`, ended by kill -9 in a moment of its own.

    python tests/run_stage.py MOMENT STAGE KEY=VALUE ...

MOMENT is "step N" (after the optimizer's step N), "save N" (the files of checkpoint-N are written, its marker is not),
"result" (the weights of the result are written, its record is not) or "never".
"""

import os
import signal
import sys
from pathlib import Path

from run_trainer import allow_fsdp_on_cpu
from transformers import TrainerCallback

import sailvit.train.handover
import sailvit.train.run
import sailvit_cli


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            die()


def arrange(moment: str) -> None:
    kind, _, number = moment.partition(" ")
    if kind == "step":
        make = sailvit.train.run.Stage._make_trainer

        def make_mortal(stage):
            trainer = make(stage)
            trainer.add_callback(DieAfter(int(number)))
            return trainer

        sailvit.train.run.Stage._make_trainer = make_mortal
    if kind == "save":
        mark = sailvit.train.run.mark_complete

        def die_or_mark(folder: Path) -> None:
            die() if folder.name == f"checkpoint-{number}" else mark(folder)

        sailvit.train.run.mark_complete = die_or_mark
    if kind == "result":
        sailvit.train.handover.write_training = lambda *arguments: die()


def allow_fsdp() -> None:
    """FSDP on a CPU would become DDP in accelerate."""
    make = sailvit.train.run.training_arguments

    def make_arguments(*arguments, **options):
        made = make(*arguments, **options)
        allow_fsdp_on_cpu(made)
        return made

    sailvit.train.run.training_arguments = make_arguments


if __name__ == "__main__":
    arrange(sys.argv[1])
    if "engine=fsdp2" in sys.argv:
        allow_fsdp()
    sys.exit(sailvit_cli.main(["train", *sys.argv[2:]]))
