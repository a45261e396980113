# SPDX-License-Identifier: Apache-2.0
"""Two states of one thing side by side: two checkpoints, findings now and in a baseline; and one
checkpoint in numbers.
"""
