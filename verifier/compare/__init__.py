# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints side by side, and one in numbers: what a person asks before or after a check."""
