"""`python -m prunenet` is the command `prunenet`."""

import os

from prunenet.cli.signals import run


def main() -> None:
    """Run the command; its imports, which take seconds, can be interrupted like its work."""
    run(_command)


def _command() -> None:
    # read by torch as it is imported: a peer that has gone is said in one sentence, not in frames
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from prunenet.cli.app import main as command

    command()


if __name__ == "__main__":
    main()
