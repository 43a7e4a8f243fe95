"""Adapters on their way out, and in: merged into the base, as PEFT LoRAs, as folders that need no install.

Decision: what leaves here is read by other programs, so nothing is written that was not checked first, a
folder appears whole or not at all, and an adapter that a form cannot hold is refused by name.
"""
