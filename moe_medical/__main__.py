"""`python -m moe_medical` and `deepspeed --module moe_medical`: the same verbs as the command."""

from moe_medical.cli import run

if __name__ == "__main__":
    run()
