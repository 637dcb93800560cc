"""An exported checkpoint as an MLflow model: a picture and a question in, an answer out.

MLflow copies this file into the model ("models from code") and runs it to load one, so here, and
only here, importing has an effect: the last line. `Tracker.model` writes such models. It needs
`adsc` and no other part of this project.
"""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import pandas as pd
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image, ImageOps


def signature() -> ModelSignature:
    """One row a question: `image` is a base64 PNG or JPEG, `question` is text. The parameter `plan`
    names one of the checkpoint's plans, or is `dense`; empty is its default."""
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image"), ColSpec(DataType.string, "question")]),
        outputs=Schema([ColSpec(DataType.string, "answer")]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 64),
                ParamSpec("plan", DataType.string, ""),
            ]
        ),
    )


def example() -> pd.DataFrame:
    """A call as the signature wants it: a grey picture, a question."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "grey").save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    return pd.DataFrame([{"image": image, "question": "what is in the picture?"}])


class VisionLanguageModel(PythonModel):
    """Answers greedily, one row at a time, with a pruning plan that the checkpoint carries."""

    def load_context(self, context: PythonModelContext) -> None:
        import torch
        from transformers import AutoProcessor

        import adsc

        folder = context.artifacts["checkpoint"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = adsc.from_pretrained(folder).eval().to(self.device)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        self.default = adsc.plan_of(self.model)
        self.turn = threading.Lock()  # calls may come with different plans

    def predict(
        self,
        context: PythonModelContext,
        model_input,  # MLflow warns about any hint here but its own kind
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, str]]:
        """Answers of a data frame with the columns `image` and `question`.

        Raises:
            ValueError: an image that isn't a base64 picture; a plan of a name that is unknown.
        """
        import adsc

        params = params or {}
        longest = params.get("max_new_tokens", 64)
        rows = zip(model_input["image"], model_input["question"], strict=True)
        with self.turn:
            adsc.attach(self.model, params.get("plan") or self.default or ())
            return [{"answer": self._answer(*row, longest)} for row in rows]

    def _answer(self, image: str, question: str, max_new_tokens: int) -> str:
        import torch

        try:
            encoded = io.BytesIO(base64.b64decode(image, validate=True))
            picture = ImageOps.exif_transpose(Image.open(encoded)).convert("RGB")
        except (ValueError, OSError) as error:
            raise ValueError(f"image must be a base64 PNG or JPEG: {error}") from None
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        bos = self.processor.tokenizer.bos_token
        special = not (bos and prompt.startswith(bos))  # no second one
        inputs = self.processor(
            text=[prompt], images=[picture], return_tensors="pt", add_special_tokens=special
        )
        inputs = inputs.to(self.device)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


set_model(VisionLanguageModel())
