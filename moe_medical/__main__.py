"""`python -m moe_medical` and `deepspeed --module moe_medical`: the same verbs as the command."""

import sys

from moe_medical.cli import main

if __name__ == "__main__":
    sys.exit(main())
