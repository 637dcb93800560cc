"""Which columns of a batch each part of the decoder sees: index arithmetic on tensors, before the
first layer runs.

Indices depend on the plan and on where images are, never on content, so the whole schedule of a
call is known up front, at the price of one small copy to the host. Nothing here knows of models,
caches or attention.

Legend: B rows; S columns of the call; K drops; Q columns left in a segment (the layers between two
drops); N vision tokens of the whole batch, row by row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adsc.dropping.memo import remembered
from adsc.dropping.pooling import with_pooling
from adsc.dropping.segment import Segment
from adsc.errors import VisionTokenError
from adsc.families.family import Image, Images
from adsc.method import Method
from adsc.plan import PruningPlan
from adsc.tiles import Region


def survivors(
    vision: list[tuple[Tensor, Images]], valid: Tensor | None, plan: PruningPlan | Method
) -> list[Segment]:
    """The segments after each drop of the plan; for a method, stand-ins of the same shapes.

    Rows that keep different numbers of columns are padded again, on the side on which the batch was
    padded. Padding of the original batch goes with the first drop, as far as the longest row
    allows.

    Args:
        vision: for each kind of vision token (B, S) bool, where they are, and their images in
            order.
        valid: (B, S) bool, False for padding; None if there is none.
        plan: where and how much to drop.

    Raises:
        VisionTokenError: a row's vision tokens are not those of a whole number of the next images,
            or an exit leaves a row nothing.
    """
    keep = torch.stack([_kept(columns, images, plan) for columns, images in vision]).all(0)
    if is_captured():
        return _evenly(keep, valid, vision, plan)
    ends_padded = torch.zeros_like(keep[0, :, 0])
    if valid is not None:
        keep, ends_padded = keep & valid, ~valid[:, -1]
    pooled = isinstance(plan, PruningPlan) and plan.pool is not None
    if pooled and valid is not None:
        # A masked vision token shows as one too few.
        vision = [(columns & valid, images) for columns, images in vision]
    tokens = [columns.sum(1) for columns, _ in vision]
    # The one copy to the host: a few integers for each row.
    counts = torch.stack([*tokens, ends_padded, *keep.sum(2)], dim=1).tolist()
    for kind, (_, images) in enumerate(vision):
        _check_images([row[kind] for row in counts], images)
    left = not any(row[len(vision)] for row in counts)

    segments: list[Segment] = []
    for stage, kept in enumerate(keep):
        lengths = [row[len(vision) + 1 + stage] for row in counts]
        _check_left(lengths, plan)
        segments.append(_compact(kept, segments[-1] if segments else None, lengths, left))
    if isinstance(plan, PruningPlan) and plan.pool is not None:
        for kind, (columns, images) in enumerate(vision):
            if isinstance(images, Image):
                total = sum(row[kind] for row in counts)
                images = [images] * (total // images.tokens)
            segments = with_pooling(segments, columns, images, plan)
    return segments


def _check_left(lengths: list[int], plan: PruningPlan | Method) -> None:
    """Raise VisionTokenError if an exit leaves a row nothing. lengths: columns that each row keeps.

    Without an exit only a row that is all padding has none, and that harms nothing.
    """
    if 0 in lengths and plan.stages[-1][1] == 0:
        raise VisionTokenError(
            f"row {lengths.index(0)} has only vision tokens, and plan {str(plan)!r} leaves none "
            "of them: pass images together with the text after them, or take out the exit (keep 0)"
        )


def is_captured() -> bool:
    """Whether this runs where nothing can be read back: in torch.compile or a CUDA graph."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def _evenly(
    keep: Tensor,
    valid: Tensor | None,
    vision: list[tuple[Tensor, Images]],
    plan: PruningPlan | Method,
) -> list[Segment]:
    """The segments by shapes alone: all rows have as many images, and padding stays where it is.

    Raises:
        VisionTokenError: the images can't be dealt out evenly.
    """
    _, rows, width = keep.shape
    lengths = [width] * len(plan.stages)
    for _, images in vision:
        if isinstance(images, Image) or len(images) % rows:
            raise VisionTokenError(
                "where nothing can be read back (torch.compile, CUDA graphs), each of the "
                f"{rows} rows must have as many images, of shapes that tell their tokens"
            )
        share = len(images) // rows
        gone = [_dropped(image, plan) for image in images]
        dropped = [
            [sum(one[k] for one in gone[start : start + share]) for k in range(len(lengths))]
            for start in range(0, len(gone), share)
        ]
        if any(row != dropped[0] for row in dropped):
            raise VisionTokenError(
                f"where nothing can be read back, all rows must drop as many tokens: {dropped}"
            )
        lengths = [length - less for length, less in zip(lengths, dropped[0], strict=True)]
    _check_left([min(lengths)] * rows, plan)
    segments: list[Segment] = []
    for kept, length in zip(keep, lengths, strict=True):
        torch._assert_async((kept.sum(1) == length).all(), "vision tokens and images don't match")
        before = segments[-1] if segments else None
        segment = _compact(kept, before, [length] * rows, left=True)
        if valid is not None:
            segment = replace(segment, valid=valid.gather(1, segment.columns))
        segments.append(segment)
    if isinstance(plan, PruningPlan) and plan.pool is not None:
        for columns, images in vision:
            assert not isinstance(images, Image)
            segments = with_pooling(segments, columns, images, plan)
    return segments


def _dropped(image: Image, plan: PruningPlan | Method) -> list[int]:
    """How many tokens of an image are gone after each drop."""
    if torch.compiler.is_compiling():
        assert isinstance(plan, PruningPlan)  # methods are refused there
        flags = _constant_kept(plan.text, image.tokens, image.lattice, image.regions)
    else:
        flags = _flags(plan, image)
    return [sum(not flag for flag in one) for one in flags]


def _kept(columns: Tensor, images: Images, plan: PruningPlan | Method) -> Tensor:
    """(K, B, S) bool: False where a vision token of this kind is dropped by then."""
    rows, width = columns.shape
    if isinstance(images, Image):
        table = _keep_table((images,), plan, columns.device)
        ordinal = (columns.cumsum(1) - 1) % images.tokens
    else:
        table = _keep_table(tuple(images), plan, columns.device)
        ordinal = columns.flatten().cumsum(0).view(rows, width) - 1
    return ~columns | table[:, ordinal.clamp(0, table.shape[1] - 1)]


def _compact(keep: Tensor, before: Segment | None, lengths: list[int], left: bool) -> Segment:
    """Move kept columns together. keep: (B, S) bool; lengths: how many each row keeps."""
    keep = _within(keep, before)
    size = max(1, *lengths)
    ragged = min(lengths) < size
    slot = keep.cumsum(1) - 1
    if ragged and left:
        slot = slot + (size - keep.sum(1, keepdim=True))
    segment, slot = _moved(keep, slot, size, before)
    if ragged:
        valid = torch.zeros_like(keep[:, :1]).expand(len(keep), size + 1)
        segment = replace(segment, valid=valid.scatter(1, slot, keep)[:, :size])
    return segment


def substituted(keep: Tensor, before: Segment | None, stand_in: Segment) -> Segment:
    """A segment with other columns than `stand_in`, as many in each row and in the same slots."""
    keep = _within(keep, before)
    slot = keep.cumsum(1) - 1
    if stand_in.valid is not None:
        slot = slot + stand_in.valid.int().argmax(1, keepdim=True)
    segment, _ = _moved(keep, slot, stand_in.columns.shape[1], before)
    return replace(segment, valid=stand_in.valid)


def _within(keep: Tensor, before: Segment | None) -> Tensor:
    """(B, S) bool -> (B, Q): of the columns that the segment before has."""
    if before is None:
        return keep
    keep = keep.gather(1, before.columns)
    return keep if before.valid is None or is_captured() else keep & before.valid


def _moved(keep: Tensor, slot: Tensor, size: int, before: Segment | None) -> tuple[Segment, Tensor]:
    """The segment in which what is kept goes to its slot, and these slots; nothing pads in it."""
    rows, width = keep.shape
    slot = torch.where(keep, slot, size)  # what is dropped goes to one slot too many, cut off below
    place = torch.arange(width, device=keep.device).expand(rows, width)
    local = place.new_zeros(rows, size + 1).scatter_(1, slot, place)[:, :size]
    columns = local if before is None else before.columns.gather(1, local)
    offset = torch.arange(0, rows * width, width, device=keep.device).unsqueeze(1)
    return Segment(columns, (local + offset).flatten(), None), slot


def _keep_table(
    images: tuple[Image, ...], plan: PruningPlan | Method, device: torch.device
) -> Tensor:
    """(K, N) bool: which vision tokens are left after each drop."""
    if torch.compiler.is_compiling():
        assert isinstance(plan, PruningPlan)
        stages = [
            _constant_kept(plan.text, image.tokens, image.lattice, image.regions)
            for image in images
        ]
        return torch.tensor(
            [[flag for one in stages for flag in one[k]] for k in range(len(plan.stages))],
            dtype=torch.bool,
            device=device,
        )
    return _kept_table(images, plan, device)


@torch._dynamo.assume_constant_result
def _constant_kept(
    plan: str, tokens: int, lattice: tuple[int, int] | None, regions: tuple[Region, ...]
) -> tuple[tuple[bool, ...], ...]:
    """For each drop, which tokens of an image are left: worked out outside of the trace, in which a
    second plan's numbers would become symbols."""
    return _flags(PruningPlan.parse(plan), Image(tokens, lattice, regions))


def _make_table(
    images: tuple[Image, ...], plan: PruningPlan | Method, device: torch.device
) -> Tensor:
    each = [_flags(plan, image) for image in images]
    stages = [[flag for one in each for flag in one[k]] for k in range(len(plan.stages))]
    return torch.tensor(stages, dtype=torch.bool, device=device)


def _flags(plan: PruningPlan | Method, image: Image) -> tuple[tuple[bool, ...], ...]:
    """For each drop, which tokens of an image are left."""
    kept = map(set, plan.kept_indices(image.tokens, image.lattice, image.regions))
    return tuple(tuple(index in one for index in range(image.tokens)) for one in kept)


_kept_table = remembered(_make_table, 256)  # saves the copy to the device, too


def _check_images(tokens: list[int], images: Images) -> None:
    """Deal the images out to the rows in order. tokens: vision tokens of each row."""
    if isinstance(images, Image):
        for row, wanted in enumerate(tokens):
            if wanted % images.tokens:
                raise VisionTokenError(
                    f"row {row} has {wanted} vision tokens, which is not a multiple of the "
                    f"{images.tokens} that an image of this model has; {_REMEDY}"
                )
        return
    following = iter(images)
    for row, wanted in enumerate(tokens):
        found = 0
        while found < wanted:
            image = next(following, None)
            if image is None:
                raise _mismatch(tokens, images, f"row {row} needs more images than were given")
            found += image.tokens
        if found > wanted:
            what = f"row {row} has {wanted}, and its images would bring {found}"
            raise _mismatch(tokens, images, what)
    if left_over := len(list(following)):
        raise _mismatch(tokens, images, f"{left_over} images belong to no row")


_REMEDY = "the processor that wrote the image tokens must match the model and the images of a call"


def _mismatch(tokens: list[int], images: list[Image], what: str) -> VisionTokenError:
    return VisionTokenError(
        f"the rows hold {tokens} vision tokens, the {len(images)} images make "
        f"{[image.tokens for image in images]}: {what}; {_REMEDY}"
    )
