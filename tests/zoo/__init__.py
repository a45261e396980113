# SPDX-License-Identifier: Apache-2.0
"""Small models of every family of transformers with fused experts, exported and held to what
transformers itself says.
"""
