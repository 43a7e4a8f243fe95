"""What looks at a run, one file each; `docs/one_batch.md` has their order, CONTRIBUTING.md how to add one."""
