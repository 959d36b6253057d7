"""`python -m prunenet` is the command `prunenet`."""

from prunenet.cli.signals import run


def main() -> None:
    """Run the command; its imports, which take seconds, can be interrupted like its work."""
    run(_command)


def _command() -> None:
    from prunenet.cli.app import main as command

    command()


if __name__ == "__main__":
    main()
