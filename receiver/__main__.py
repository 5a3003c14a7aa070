"""Entry point of `python -m receiver`: runs the command line.

Must not do anything else.
"""

from receiver.cli import main

if __name__ == "__main__":
    main(prog_name="redox-receiver")
