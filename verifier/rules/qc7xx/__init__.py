# SPDX-License-Identifier: Apache-2.0
"""What text shows: judged from an `Evaluation`, which another room measures."""
