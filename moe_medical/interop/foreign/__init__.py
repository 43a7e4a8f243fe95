"""Adapter folders of other programs, read into ours: PEFT, MING, MOELoRA-peft, MixLoRA and MoE-PEFT.

Decisions: the file formats are facts, read from what their programs write; no code of theirs is used or run.
Strict: every tensor of the folder is used, or named as one that its own program never uses; every tensor
that the folder's settings promise must be there; a setting that would change the numbers and that we do not
have is refused by its name. Modules are those of the real base model, which is built without memory.
"""
