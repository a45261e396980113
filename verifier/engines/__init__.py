# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint with an inference engine's own loader, under the engine's own interpreter."""
