"""Jobs of two processes under torchrun's agent, one of them killed; then the same job again.

The agent is torchrun's own (`torch.distributed.launcher`), with forks in place of new interpreters.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .children import Ended, outcome, start
from .commands import COMMANDS, Reference, Yard, judged, torn
from .kinds import Kind, Outcome

_SHARED = ("prune self", "train", "compare", "recover")


def kinds(yard: Yard) -> Iterator[Kind]:
    """One of each command that shares its work."""
    for command in COMMANDS:
        if command.name in _SHARED:
            yield Kind("ranks", command.name, partial(_killed, yard, yard.reference(command)))
