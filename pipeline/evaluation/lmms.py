"""Model class `adsc` for lmms-eval 0.7: the field's tasks and scoring for compressed checkpoints.

Runs in an environment of its own (`make lmms-eval`), in which lmms-eval finds it by an entry point:

    python -m lmms_eval --model adsc --model_args pretrained=FOLDER --tasks gqa,pope --batch_size 16

Left as it is, a checkpoint runs with its own plan. `method` sets another one; lmms-eval splits its
arguments at commas, so write `+` for them: `method=plan:8:1/2+16:1/2`, `method=fastv:192`,
`method=own:64` (the checkpoint's plan of that name), `method=dense`. Nothing is caught here: a
sample that can't be answered ends the run, naming it. Pictures only; video and sampling are
refused.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor

import adsc
from adsc.named import plan_named
from pipeline.data.conversations import MARKER
from pipeline.data.templates import message_parts
from pipeline.evaluation.generation import (
    GenerationError,
    append_text,
    encode,
    generate_tokens,
    to_device,
)
from pipeline.evaluation.methods import OWN, build_method, parse_method

MANIFEST = ModelManifest(model_id="adsc", simple_class_path="pipeline.evaluation.lmms.Adsc")
GREEDY = {"temperature": (0, 0.0, None), "num_beams": (1, None), "do_sample": (False, None)}
"""Arguments of generation, and the values of them that mean greedy decoding."""


class Adsc(lmms):  # type: ignore[misc]
    """A checkpoint, with a method.

    Args:
        pretrained: folder or hub id.
        method: as `adsc eval --methods` has it, `+` for `,`; empty is the checkpoint's own plan.
        dtype: of the weights; auto is the checkpoint's.
        device: empty is this process's GPU, or the CPU where there is none.
        batch_size: prompts at a time.
        image_backend: of transformers' image processor, `pil` or `torchvision`; empty is its own
            choice. What a checkpoint was trained with gives the same pixels.
        max_new_tokens: of tasks that don't say.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        image_backend: str = "",
        max_new_tokens: int = 1024,
    ) -> None:
        super().__init__()
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if not device or device == "cuda":
            device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        self.batch_size, self._max_new_tokens = int(batch_size), int(max_new_tokens)
        self._model = adsc.from_pretrained(pretrained, dtype=dtype).to(device).eval()
        if method:
            adsc.attach(self._model, self._method(method.replace("+", ",")))
        backend = {"backend": image_backend} if image_backend else {}
        self._processor: Any = AutoProcessor.from_pretrained(pretrained, **backend)
        if self._world_size > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()

    def _method(self, text: str) -> Any:
        """What adsc.attach takes: the name of a plan of the checkpoint, or a method."""
        own, colon, name = text.partition(":")
        if own == OWN and colon:
            return plan_named(name, self._model.config)
        return build_method(parse_method(text), self._model)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy answers, cut at the task's stop strings; in the order of the requests."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        bar = tqdm(total=len(requests), disable=self._rank != 0, desc="adsc")
        for numbers in groups.values():
            # The longest first: padding is small, and a batch that is too large fails at once.
            numbers.sort(key=lambda number: (-len(requests[number].args[0]), number))
            for start in range(0, len(numbers), self.batch_size):
                chosen = numbers[start : start + self.batch_size]
                texts = self._generate([requests[number] for number in chosen])
                for number, text in zip(chosen, texts, strict=True):
                    answers[number] = text
                    request = requests[number].args
                    self.cache_hook.add_partial("generate_until", (request[0], request[1]), text)
                bar.update(len(chosen))
        bar.close()
        return answers

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        settings = dict(requests[0].args[1])
        until = settings.pop("until", [])
        stops = [until] if isinstance(until, str) else list(until)
        wanted = {k: v for k, v in settings.items() if k in GREEDY and v not in GREEDY[k]}
        if wanted:
            task = requests[0].args[4]
            raise ValueError(f"task {task} asks for {wanted}: only greedy decoding is offered")
        longest = settings.get("max_new_tokens") or self._max_new_tokens
        names = [f"{args[4]}/{args[5]}/{args[3]}" for args in (r.args for r in requests)]
        try:
            pairs = [self._prompt(request.args[0], self._visuals(request)) for request in requests]
            prompts, pictures = zip(*pairs, strict=True)
            inputs = encode(prompts, pictures, self._processor)
            new = generate_tokens(self._model, to_device(inputs, self._model), longest)
        except Exception as error:
            raise GenerationError(f"no answers to {', '.join(names)}: {error}") from error
        texts = self._processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [_cut(text, stops) for text in texts]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Mean loss of each continuation (lmms-eval takes the smallest), and whether greedy
        decoding says it; one row at a time."""
        found = []
        for request in tqdm(requests, disable=self._rank != 0, desc="adsc"):
            context, target, _, number, task, split = request.args
            if not isinstance(target, str):
                target = target(self.task_dict[task][split][number])
            prompt, pictures = self._prompt(context, self._visuals(request))
            inputs = to_device(encode([prompt], [pictures], self._processor), self._model)
            tokens = self._processor.tokenizer(f" {target.strip()}", add_special_tokens=False)
            ids = torch.tensor([tokens["input_ids"]], device=self._model.device)
            whole = append_text(inputs, ids)
            with torch.inference_mode():
                logits = self._model(**whole, logits_to_keep=ids.shape[1] + 1).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[0])
            found.append((float(loss), bool((logits.argmax(dim=1) == ids[0]).all())))
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not offered")

    def _visuals(self, request: Instance) -> list[Image.Image]:
        _, _, doc_to_visual, number, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][number]) or []
        strange = {type(it).__name__ for it in visuals if not isinstance(it, Image.Image)}
        if strange:
            raise ValueError(f"{', '.join(strange)} are not pictures, and nothing else is offered")
        return [visual.convert("RGB") for visual in visuals]

    def _prompt(self, context: str, pictures: list[Image.Image]) -> tuple[str, list[Image.Image]]:
        """The rendered prompt: pictures where the context marks them, or else before it."""
        marked = context.count(MARKER)
        if marked not in (0, len(pictures)):
            raise ValueError(f"{marked} {MARKER} marks for {len(pictures)} pictures")
        parts = message_parts(context, 0 if marked else len(pictures))
        if marked:  # what stands between two pictures may be a line break of the task's
            parts = [part for part in parts if part.get("text", "...").strip()]
        message = {"role": "user", "content": parts}
        return self._processor.apply_chat_template([message], add_generation_prompt=True), pictures


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text.strip()
