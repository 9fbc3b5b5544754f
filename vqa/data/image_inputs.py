"""How a model's processor takes images at a pixel budget: resized here, or by the processor's own rule.

Processors like Qwen's take images of any size in whole image tokens; then an image is resized here, once. Others cut
images into tiles, pad them, or bring all to one size. They get the image at the budget, and do what they do.
"""

from collections.abc import Iterable

from vqa.core.compat import count_image_tokens
from vqa.data.images import ShownImage, image_item, image_tokens, on_white, open_image, target_size

VIT_PATCH = 14  # pixels: the patches of the vision towers (SigLIP, InternViT) behind processors with their own rule


class ImageInputs:
    """The images of one processor at one pixel budget.

    resized_here: whether images are resized here. Otherwise `image_size` bounds the pixels that the processor gets;
        the tokens that it makes of them follow its own rule, and `options`, its settings that depend on the budget.
    patches_per_token: patches of the vision tower that make an image token.
    """

    def __init__(self, processor, image_size: int):
        images = processor.image_processor
        self.processor, self.image_size = processor, image_size
        self.resized_here = hasattr(images, "merge_size")
        self.options: dict = {}
        if self.resized_here:
            self.patch, self.patches_per_token = images.patch_size, images.merge_size**2
            return
        side = getattr(images, "max_image_size", None) or images.size
        tile = side.get("height") or side.get("longest_edge") or side.get("shortest_edge")
        tokens = getattr(processor, "image_seq_length", None) or getattr(processor, "image_seq_len", None) or tile**2
        self.patches_per_token = max(1, (tile // VIT_PATCH) ** 2 // tokens)
        if hasattr(images, "crop_to_patches"):  # as many tiles as the budget pays for
            self.options = {"crop_to_patches": True, "max_patches": max(1, image_size**2 // tile**2)}
        elif hasattr(images, "max_image_size"):  # tiles along the longer side
            self.options = {"size": {"longest_edge": max(1, image_size // tile) * tile}}

    def size(self, width: int, height: int, scale: float = 1.0) -> tuple[int, int]:
        """(width, height) in pixels at which an upright image is given to the processor."""
        if self.resized_here:
            return target_size(width, height, self.image_size, scale, self.patch)
        factor = scale * min(1.0, self.image_size / (width * height) ** 0.5)
        return max(1, round(width * factor)), max(1, round(height * factor))

    def shown_size(self, shown: ShownImage, width: int, height: int) -> tuple[int, int]:
        """`size` of what is shown of an upright image of this (width, height): of a part, after it was enlarged."""
        if self.resized_here:
            return shown.size(width, height, self.image_size, self.patch)
        if shown.crop is None:
            return self.size(width, height, shown.scale)
        left, top, right, bottom = shown.box(width, height)
        factor = shown.scale * self.image_size / ((right - left) * (bottom - top)) ** 0.5
        return max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor))

    def tokens(self, sizes: Iterable[tuple[int, int]]) -> list[int]:
        """Image tokens of images of these `size`s."""
        if self.resized_here:
            return [image_tokens(*size, self.patch) for size in sizes]
        return count_image_tokens(self.processor, list(sizes), self.options)

    def item(self, shown: ShownImage) -> dict:
        """The decoded image as an item of a chat, in the form of `qwen_vl_utils` where it is resized later on."""
        if self.resized_here:
            return image_item(shown, self.image_size, self.patch)
        image = on_white(open_image(shown.path), shown.flip)
        size = self.shown_size(shown, *image.size)
        if shown.crop is not None:
            image = image.crop(shown.box(*image.size))
        return {"type": "image", "image": image if size == image.size else image.resize(size)}
