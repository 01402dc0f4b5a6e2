"""The audit of a data set: every row read, every fault named with its class, file, line, byte, reason and advice."""
