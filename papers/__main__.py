"""`python -m papers VERB`: hands this folder to the command line that all papers share."""

from pathlib import Path

from shared.cli import main

if __name__ == "__main__":
    main(Path(__file__).parent, __package__)
