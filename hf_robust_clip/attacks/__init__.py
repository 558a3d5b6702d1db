"""The published backdoor and poisoning attacks, to measure a defence against."""
