# SPDX-License-Identifier: Apache-2.0
"""What scoring text shows, from an `Evaluation` that depth eval measured."""
