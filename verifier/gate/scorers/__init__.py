# SPDX-License-Identifier: Apache-2.0
"""What scores text: transformers in this process, vLLM or a server in another."""
