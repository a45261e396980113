# SPDX-License-Identifier: Apache-2.0
"""Two states of one thing beside each other: findings now and in a baseline."""
