"""A record to token ids and labels: validation, pictures, template and tokenizer put together.

The whole text is tokenised at once, exactly as the checkpoint's processor would at inference, and
the label mask follows from where the template's segments lie in it. Batching is the trainer's.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.conversations import (
    IGNORED,
    MARKER,
    BadRecord,
    check_markers,
    parse_turns,
    picture_sources,
    question_kinds,
    record_id,
)
from pipeline.data.pictures import PictureLimits, Pictures, check_picture
from pipeline.data.templates import Segments, Template, find_template, place_marker


class ProcessorError(ValueError):
    """The checkpoint's processor can't be used; why, and the way out."""


@lru_cache(maxsize=2)
def load_processor(folder: str) -> Any:
    """The processor of a checkpoint's folder; what old ones left in config.json is filled in.

    Raises:
        ProcessorError: there is none, or it lacks what is needed.
    """
    from transformers import AutoProcessor

    if not Path(folder).is_dir():
        raise ProcessorError(f"there is no checkpoint folder {folder!r}")
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ProcessorError(f"no processor can be loaded from {folder}: {first}") from None
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ProcessorError(
            f"{folder} is not a vision-language checkpoint: its processor is a "
            f"{type(processor).__name__}, without an image processor"
        )
    if not processor.tokenizer.is_fast:
        raise ProcessorError(f"the tokenizer in {folder} has no fast form (tokenizer.json)")
    config = Path(folder) / "config.json"
    if getattr(processor, "patch_size", 0) is None and config.is_file():
        model = json.loads(config.read_text())
        processor.patch_size = model["vision_config"]["patch_size"]
        processor.vision_feature_select_strategy = model.get(
            "vision_feature_select_strategy", "default"
        )
    return processor


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """What renders records for one checkpoint."""

    processor: Any
    template: Template
    context: int
    """Longest rendered conversation in tokens, vision tokens included."""
    pictures: PictureLimits

    @classmethod
    def load(cls, folder: Path, template: str, context: int, pictures: PictureLimits) -> "Renderer":
        """Raises ProcessorError and TemplateError."""
        processor = load_processor(str(folder))
        found = find_template(template, processor)
        return cls(processor=processor, template=found, context=context, pictures=pictures)

    @property
    def image_token(self) -> str:
        return getattr(self.processor, "image_token", MARKER)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Texts that the tokenizer would take for control tokens."""
        added = self.processor.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special} | {self.image_token}
        return re.compile("|".join(map(re.escape, sorted(tokens - {MARKER}))) or r"(?!)")

    def render(self, record: Any, roots: Pictures) -> dict[str, Any]:
        """A row of a shard, less its id's default; with `key`, a hash of pictures and turns.

        Raises BadRecord.
        """
        turns = parse_turns(record)
        name = record_id(record)
        kinds = question_kinds(record, len(turns) // 2)
        sources = picture_sources(record)
        check_markers(turns, len(sources))
        self.check_text(turns)
        pictures, sizes = [], []
        for number, source in enumerate(sources):
            shown = source if isinstance(source, str) else f"picture {number} of the row"
            encoded = roots.read(source, self.pictures) if isinstance(source, str) else source
            if len(encoded) > self.pictures.max_bytes:
                raise BadRecord("picture_size", f"{shown!r} has {len(encoded)} bytes")
            sizes.append(check_picture(encoded, shown, self.pictures))
            pictures.append(encoded)
        vision = self.vision_tokens(sizes)
        ids, labels = self.tokenise(self.template.render(turns), vision)
        if len(ids) > self.context:
            raise BadRecord("too_long", f"{len(ids)} tokens, {self.context} allowed")
        text = json.dumps(turns)
        return {
            "id": name,
            "pictures": pictures,
            "input_ids": ids,
            "labels": labels,
            "kinds": kinds,
            "turns": text,
            "length": len(ids),
            "supervised": int((labels != IGNORED).sum()),
            "vision_tokens": sum(vision),
            "key": _content_key(text, pictures),
        }

    def check_text(self, turns: list[tuple[str, str]]) -> None:
        """No control token in what people wrote. Raises BadRecord: control_token."""
        for position, (_, text) in enumerate(turns):
            # Moving a picture to the front can put together what stood on both sides of it.
            found = self._control.search(place_marker(text))
            if found:
                raise BadRecord("control_token", f"turn {position} holds {found.group()!r}")

    def vision_tokens(self, sizes: list[tuple[int, int]]) -> list[int]:
        """How many vision tokens pictures of these (height, width) become."""
        if not sizes:
            return []
        return list(
            self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        )

    def tokenise(self, segments: Segments, vision: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels, int32, of rendered segments; picture i takes vision[i] positions.

        Labels equal the ids where a token lies wholly in supervised segments, and are IGNORED
        (-100) elsewhere, at vision positions always.
        """
        tokenizer, token = self.processor.tokenizer, self.image_token
        texts = [text.replace(MARKER, token) for text, _ in segments]
        whole = "".join(texts)
        begins = bool(tokenizer.bos_token) and whole.startswith(tokenizer.bos_token)
        encoded = tokenizer(
            whole, return_offsets_mapping=True, add_special_tokens=not begins, verbose=False
        )
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        supervised = np.zeros(len(whole) + 1, dtype=np.int64)
        at = 0
        for text, (_, on) in zip(texts, segments, strict=True):
            supervised[at + 1 : at + len(text) + 1] = on
            at += len(text)
        inside = np.cumsum(supervised)
        covered = inside[offsets[:, 1]] - inside[offsets[:, 0]]
        width = offsets[:, 1] - offsets[:, 0]
        labels = np.where((width > 0) & (covered == width), ids, IGNORED).astype(np.int32)
        places = np.flatnonzero(ids == tokenizer.convert_tokens_to_ids(token))
        if len(places) != len(vision):
            raise BadRecord("markers", f"{len(places)} picture tokens, {len(vision)} pictures")
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[places] = vision
        return np.repeat(ids, repeats), np.repeat(labels, repeats)

    def check(self) -> None:
        """Compare with what the processor makes of a text and a picture.

        Raises:
            ProcessorError: they differ.
        """
        picture = Image.new("RGB", (61, 47), (90, 120, 150))
        turns = [("human", f"{MARKER}\nwhat?"), ("gpt", "that"), ("human", "so?"), ("gpt", "so.")]
        segments = self.template.render(turns)
        whole = "".join(text for text, _ in segments).replace(MARKER, self.image_token)
        bos = self.processor.tokenizer.bos_token
        special = not (bool(bos) and whole.startswith(bos))
        try:
            ids, labels = self.tokenise(segments, self.vision_tokens([(47, 61)]))
            theirs = self.processor(text=[whole], images=[picture], add_special_tokens=special)
            expected = np.array(theirs["input_ids"][0])
        except (BadRecord, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProcessorError(
                f"the checkpoint's {type(self.processor).__name__} does not expand pictures as "
                f"LLaVA's does ({error}); only checkpoints of that kind can be prepared for"
            ) from None
        if not np.array_equal(ids, expected):
            raise ProcessorError(
                f"the checkpoint's {type(self.processor).__name__} makes {len(expected)} tokens of "
                f"a conversation that has {len(ids)} here: it does not expand pictures as LLaVA's "
                "does; only checkpoints of that kind can be prepared for"
            )
        if not (labels != IGNORED).any():
            raise ProcessorError("the template supervises no token")


def _content_key(turns: str, pictures: list[bytes]) -> bytes:
    content = hashlib.blake2b(turns.encode(), digest_size=16)
    for picture in pictures:
        content.update(hashlib.blake2b(picture, digest_size=16).digest())
    return content.digest()
