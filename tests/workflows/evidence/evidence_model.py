"""The demo's model without weights, and the budgets that the evidence asks of it."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from pipeline.stages.base import resolve
from workflows.demo.workflow import BASE

SHARES = {"667": 1 / 3, "778": 2 / 9, "889": 1 / 9}


def demo_model() -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(resolve(BASE)))
