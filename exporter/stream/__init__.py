# SPDX-License-Identifier: Apache-2.0
"""From file to file: shard tasks and the writer."""

from exporter.stream.shards import Task, tasks
from exporter.stream.write import Written, check_out, finish, working, write

__all__ = ["Task", "Written", "check_out", "finish", "tasks", "working", "write"]
