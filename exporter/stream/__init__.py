# SPDX-License-Identifier: Apache-2.0
"""From file to file: shard tasks and the writer."""

from exporter.stream.load import load, load_stack
from exporter.stream.shards import SHARD_BYTES, Task, tasks
from exporter.stream.write import Written, fingerprint, finish, working, write

__all__ = [
    "SHARD_BYTES",
    "Task",
    "Written",
    "fingerprint",
    "finish",
    "load",
    "load_stack",
    "tasks",
    "working",
    "write",
]
