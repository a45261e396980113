# SPDX-License-Identifier: Apache-2.0
"""Hub layouts as data, for checks and exports: families, stacked experts, differences of names."""
