# SPDX-License-Identifier: Apache-2.0
"""A quantized weight against its base: distance, yardstick, cause."""
