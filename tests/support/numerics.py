"""One table of limits: largest deviation of a logit over the largest logit."""

from __future__ import annotations

import torch

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}
