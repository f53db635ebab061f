"""
`sailvit train`, ended in a moment of its own.

    python tests/run_stage.py MOMENT STAGE KEY=VALUE ...

MOMENT is "step N" (kill -9 after the optimizer's step N), "save N" (the files of checkpoint-N are written, its marker
is not), "result" (the weights of the result are written, its record is not) or "never". After step N, rank 1 alone:
"lone N" (kill -9), "stuck N" (never goes on), "broken N" (an error). "all broken N" is the error on all ranks.
"launcher N": rank 0 sends SIGTERM to its launcher.
"""

import os
import signal
import sys
import time
from pathlib import Path

from run_trainer import allow_fsdp_on_cpu
from transformers import TrainerCallback

import sailvit.train.handover
import sailvit.train.run
import sailvit_cli


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError("broken: unreadable")


AFTER_STEP = {
    "step": die,
    "lone": lambda: os.environ["RANK"] == "1" and die(),
    "stuck": lambda: os.environ["RANK"] == "1" and time.sleep(600),
    "broken": lambda: os.environ["RANK"] == "1" and fail(),
    "all broken": fail,
    "launcher": lambda: os.environ["RANK"] == "0" and os.kill(os.getppid(), signal.SIGTERM),
}


class Do(TrainerCallback):
    """Calls a function after a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.action()


def arrange(moment: str) -> None:
    kind, _, number = moment.rpartition(" ")
    if kind in AFTER_STEP:
        make = sailvit.train.run.Stage._make_trainer

        def make_trainer(stage):
            trainer = make(stage)
            trainer.add_callback(Do(int(number), AFTER_STEP[kind]))
            return trainer

        sailvit.train.run.Stage._make_trainer = make_trainer
    if kind == "save":
        mark = sailvit.train.run.mark_complete

        def die_or_mark(folder: Path) -> None:
            die() if folder.name == f"checkpoint-{number}" else mark(folder)

        sailvit.train.run.mark_complete = die_or_mark
    if moment == "result":
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
