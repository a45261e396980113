# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in every format that engines read, clean and broken, made by an encoder that
shares nothing with the packages under test.

``python -m tests.formats`` checks all of them and prints the matrix of formats and corruptions;
docs/formats.md is rendered from it.
"""
