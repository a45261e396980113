# SPDX-License-Identifier: Apache-2.0
"""Look at checkpoints without checking them: differences, statistics, one block, quantization
noise.
"""
