# SPDX-License-Identifier: Apache-2.0
"""Tests of ckptgate; a package so that `tests.oracle` and `tests.sparse` can be imported by
name.
"""
