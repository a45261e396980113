# SPDX-License-Identifier: Apache-2.0
"""Job arrays on a Slurm cluster of two nodes on this machine; needs Slurm (``tox -e slurm``)."""
