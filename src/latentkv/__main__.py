"""`python -m latentkv`: the command, where the environment's programs are not on the path."""

from latentkv.cli.app import main

if __name__ == "__main__":
    main()
