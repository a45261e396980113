# SPDX-License-Identifier: Apache-2.0
"""One module a dialect: how a family of quantization configs is read."""
