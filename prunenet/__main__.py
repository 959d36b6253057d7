"""`python -m prunenet` is the command `prunenet`."""

from prunenet.cli.app import main

if __name__ == "__main__":
    main()
