# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint with transformers; needs the extra ``load``."""
