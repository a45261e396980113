# SPDX-License-Identifier: Apache-2.0
"""Container, index, files."""
