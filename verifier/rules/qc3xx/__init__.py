# SPDX-License-Identifier: Apache-2.0
"""Scale keys, dtypes, shapes."""
