# SPDX-License-Identifier: Apache-2.0
"""A checkpoint into transformers, decoded by the verifier; needs the extra ``load``."""

from verifier.load.model import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
