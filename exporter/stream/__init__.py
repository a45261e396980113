# SPDX-License-Identifier: Apache-2.0
"""From file to file: shard tasks and the writer."""

from exporter.stream.load import load, load_stack
from exporter.stream.shards import SHARD_BYTES, Task, tasks
from exporter.stream.shared import Writers, sharing
from exporter.stream.write import RESULT, Written, fingerprint, finish, working, write

__all__ = [
    "RESULT",
    "SHARD_BYTES",
    "Task",
    "Writers",
    "Written",
    "fingerprint",
    "finish",
    "load",
    "load_stack",
    "sharing",
    "tasks",
    "working",
    "write",
]
