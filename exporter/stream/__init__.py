# SPDX-License-Identifier: Apache-2.0
"""From file to file: shard tasks and the writer."""

from exporter.stream.shards import SHARD_BYTES, Made, Task, load, region, tasks
from exporter.stream.stacks import load_stack
from exporter.stream.write import Written, check_out, fingerprint, finish, working, write

__all__ = [
    "SHARD_BYTES",
    "Made",
    "Task",
    "Written",
    "check_out",
    "fingerprint",
    "finish",
    "load",
    "load_stack",
    "region",
    "tasks",
    "working",
    "write",
]
