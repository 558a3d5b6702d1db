"""The command `hf-robust-clip`: one file a sub-command."""
