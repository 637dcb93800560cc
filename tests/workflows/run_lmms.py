"""lmms-eval's command line on a CPU-only torch, whose torchvision lacks its compiled operators.

Nothing that runs here calls them; without their declaration torchvision can't be imported at all.
"""

import runpy

import torch

if not torch.cuda.is_available():
    LIBRARY = torch.library.Library("torchvision", "DEF")
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
