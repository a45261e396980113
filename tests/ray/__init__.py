# SPDX-License-Identifier: Apache-2.0
"""Jobs on a Ray cluster of two nodes on this machine; needs the extra ``ray`` (``tox -e ray``)."""
