"""Answers of trained adapters: from files (`generate`), in a terminal (`chat`), over HTTP (`serve`).

One device, no process group: nothing here imports DeepSpeed.
"""
