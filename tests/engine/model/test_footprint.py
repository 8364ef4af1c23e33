"""The decoder's memory by headers: what loading it really takes, and what the published model is known to have."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import hub_files
import pytest
import torch
from test_model_config import MODEL
from torch import Tensor

from services.engine.footprint import cache_bytes, decoder_shapes, weight_bytes
from services.engine.model import weights as loader
from services.engine.model.inputs import KVCache
from services.engine.model.weights import load_weights
from services.mm_encoder.footprint import weight_bytes as vision_bytes
from shared.checkpoint import Checkpoint
from shared.model_config import Quantization, load_model_config
