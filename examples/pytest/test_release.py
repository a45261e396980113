# SPDX-License-Identifier: Apache-2.0
"""Tests of a release, with the fixtures of ckptgate's pytest plugin."""


def test_no_warnings(ckptgate_report):
    assert ckptgate_report.count("warning") == 0


def test_layout_matches_the_last_release(assert_same_layout):
    assert_same_layout("models/m3-nvfp4", "releases/last")
