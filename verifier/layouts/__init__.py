# SPDX-License-Identifier: Apache-2.0
"""Hub layouts as data, for judge and maker: families, stacked experts, differences of names."""
