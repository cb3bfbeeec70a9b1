"""The `dynamask` command, one module per sub-command."""
