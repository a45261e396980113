# SPDX-License-Identifier: Apache-2.0
"""Renderers of one `verifier.findings.Report`. They know nothing about rules."""

from verifier.report.json_ import render_json, schema
from verifier.report.text import printable, render_text

__all__ = ["printable", "render_json", "render_text", "schema"]
