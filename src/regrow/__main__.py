"""Run the command line: ``python -m regrow``."""

from regrow.cli import main

if __name__ == "__main__":
    main()
