# SPDX-License-Identifier: Apache-2.0
"""The mutation score: seeded harmful edits of clean checkpoints, and how many of them a check tells
(KINDS.md).
"""
