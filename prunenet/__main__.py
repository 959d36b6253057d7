"""`python -m prunenet` is the command `prunenet`."""

from prunenet.cli import main

if __name__ == "__main__":
    main()
