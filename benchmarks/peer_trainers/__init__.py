"""The trainers that benchmarks.peers compares, one file each: `python -m benchmarks.peer_trainers.NAME TASK`,
or the same under torchrun. Each reads a task, trains, and leaves a row for every step in its directory.
"""
