"""Features of a frozen image encoder on disk, so that later epochs and later runs skip the encoder.

A cache folder holds one folder per key. The key is a hash of everything that decides a feature: the encoder's weights
and config, the image preprocessing, the storage type and the compute precision. Inside, images are found by a hash of
their file's content, so a file that changes is another image, and the same picture under two names is stored once.

Every process that adds features writes a shard of its own: `<name>.features`, raw rows, and `<name>.index`, one fixed
entry an image, written only after its row is on the disk and carrying a checksum of row and entry. A process killed at
any moment leaves at most rows without an entry, which nobody sees; two runs may fill one cache at the same time.

Features are computed in groups of `GROUP` images that depend on the data alone, not on what is cached already or on
the number of processes: an interrupted and an unbroken run get the same bits.
"""

import bisect
import hashlib
import itertools
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hf_vlp.data import BadRecord, CaptioningCollator, ImageTextCollator, RecordLimits, decode_image
from hf_vlp.data.pairs import problem_of
from hf_vlp.data.records import usable_text
from hf_vlp.models.pretraining import PreTrainingMixin

GROUP = 32
_DIGEST = 16
# Digest of the image, row in the shard, checksum of the row; then a checksum of these.
_ENTRY = np.dtype([("image", f"V{_DIGEST}"), ("row", "<u8"), ("row_crc", "<u4"), ("entry_crc", "<u4")])
_CHECKED = _ENTRY.itemsize - 4
DTYPES: dict[str, tuple[torch.dtype, np.dtype]] = {
    "float32": (torch.float32, np.dtype("<f4")),
    "float16": (torch.float16, np.dtype("<f2")),
    # numpy has no bfloat16: its bits are kept as integers.
    "bfloat16": (torch.bfloat16, np.dtype("<u2")),
}


class StaleCacheError(ValueError):
    """A cache folder does not hold what its name says."""


@dataclass(frozen=True)
class FrozenEncoder:
    """The part of a model whose output can be cached.

    Attributes:
        encode: `(B, 3, H, W)` to features, one row an image.
        parts: the modules that it runs through, all frozen.
        config: of the vision tower.
    """

    encode: Callable[[Tensor], Tensor]
    parts: Mapping[str, nn.Module]
    config: Mapping[str, Any]

    def fingerprint(self) -> str:
        """Hash of the weights and the config."""
        digest = hashlib.sha256(json.dumps(_plain(self.config), sort_keys=True).encode())
        for prefix in sorted(self.parts):
            for name, value in sorted(self.parts[prefix].state_dict().items()):
                digest.update(f"{prefix}.{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def frozen_encoder(model: nn.Module) -> FrozenEncoder:
    """The frozen image encoder of a BLIP-2 (up to the LayerNorm that trains) or of a dual encoder (pooled output).

    Raises:
        ValueError: the model has no image encoder, or parts of it train, so that its features change.
    """
    inner = model.inference_model if isinstance(model, PreTrainingMixin) else model
    tower = getattr(inner, "vision_model", None)
    if tower is None:
        raise ValueError(f"{type(model).__name__} has no vision_model whose features could be cached")
    if hasattr(inner, "tower_states"):
        parts = {"embeddings": tower.embeddings, "encoder": tower.encoder}
        encode = inner.tower_states
    else:
        parts, encode = {"vision_model": tower}, inner.pooled_states

    trained = [name for key, part in parts.items() for name, p in part.named_parameters(key) if p.requires_grad]
    if trained:
        raise ValueError(
            f"--feature_cache needs a frozen image encoder, but {len(trained)} of its parameters train, e.g. "
            f"{trained[0]!r}; choose a stage that freezes it, or leave the cache out"
        )
    return FrozenEncoder(encode, parts, tower.config.to_dict())


def image_digest(image: Any) -> bytes | None:
    """16-byte hash of an image file's content, or of a picture's pixels; None if it cannot be read."""
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str | os.PathLike):
        try:
            image = Path(image).read_bytes()
        except (OSError, ValueError):
            return None
    digest = hashlib.blake2b(digest_size=_DIGEST)
    if isinstance(image, bytes | bytearray | memoryview):
        digest.update(image)
    elif hasattr(image, "tobytes"):
        digest.update(f"{getattr(image, 'mode', '')} {getattr(image, 'size', '')}".encode())
        digest.update(image.tobytes())
    else:
        return None
    return digest.digest()


class FeatureCache:
    """The features of one encoder with one preprocessing.

    Args:
        folder: of all caches.
        key: what decides a feature, as JSON-able values; its hash names the sub-folder.
        shape: of one image's features.
        dtype: storage type: float32, float16 or bfloat16.

    Raises:
        StaleCacheError: the sub-folder says that it holds something else.
        ValueError: unknown dtype.
    """

    def __init__(
        self, folder: str | Path, key: Mapping[str, Any], shape: Sequence[int], dtype: str = "float16"
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"--feature_dtype may be one of {sorted(DTYPES)}, not {dtype!r}")
        self.shape = tuple(shape)
        self.dtype = dtype
        self.meta = {"key": _plain(key), "shape": list(self.shape), "dtype": dtype, "version": 1}
        text = json.dumps(self.meta, sort_keys=True)
        self.folder = Path(folder) / f"features-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        meta_file = self.folder / "meta.json"
        if not meta_file.is_file():
            draft = self.folder / f".meta-{uuid.uuid4().hex}"
            draft.write_text(text)
            os.replace(draft, meta_file)
        if json.loads(meta_file.read_text()) != self.meta:
            raise StaleCacheError(
                f"{meta_file} describes other features than its folder is named for; remove the folder"
            )
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self._maps: dict[str, np.memmap] = {}
        self.refresh()

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * DTYPES[self.dtype][1].itemsize

    def refresh(self) -> None:
        """Reads the index files, which other processes may have extended."""
        for path in sorted(self.folder.glob("*.index")):
            rows = (self.folder / f"{path.stem}.features").stat().st_size // self.row_bytes
            content = path.read_bytes()
            entries = np.frombuffer(content[: len(content) // _ENTRY.itemsize * _ENTRY.itemsize], _ENTRY)
            for entry in entries:
                raw = entry.tobytes()
                if zlib.crc32(raw[:_CHECKED]) != entry["entry_crc"] or entry["row"] >= rows:
                    break
                self._places.setdefault(raw[:_DIGEST], (path.stem, int(entry["row"]), int(entry["row_crc"])))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: bytes | None) -> bool:
        return digest in self._places

    def get(self, digest: bytes) -> Tensor:
        """Features of an image, in the storage type.

        Raises:
            KeyError: they are not cached.
            StaleCacheError: the file has been damaged since it was written.
        """
        shard, row, crc = self._places[digest]
        rows = self._maps.get(shard)
        if rows is None or row >= len(rows):
            path = self.folder / f"{shard}.features"
            # A process that was killed may have left part of a row at the end.
            whole = path.stat().st_size // self.row_bytes
            rows = np.memmap(path, np.uint8, "r", shape=(whole, self.row_bytes))
            self._maps[shard] = rows
        raw = rows[row].tobytes()
        if zlib.crc32(raw) != crc:
            raise StaleCacheError(f"row {row} of {self.folder / shard}.features is damaged; remove the folder")
        torch_dtype, numpy_dtype = DTYPES[self.dtype]
        values = torch.from_numpy(np.frombuffer(raw, numpy_dtype).copy())
        return (values.view(torch_dtype) if self.dtype == "bfloat16" else values).reshape(self.shape)

    def writer(self) -> "FeatureWriter":
        """A new shard to add features to."""
        return FeatureWriter(self)

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps do not travel to workers; each opens its own.
        return {**self.__dict__, "_maps": {}}


class FeatureWriter:
    """Adds features to a cache; see `FeatureCache.writer`. Use as a context manager."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._features = open(cache.folder / f"{name}.features", "wb")  # noqa: SIM115  (closed by __exit__)
        self._index = open(cache.folder / f"{name}.index", "wb")  # noqa: SIM115
        self._rows = 0

    def add(self, digests: Sequence[bytes], features: Tensor) -> None:
        """Writes one row a digest; when it returns, they are on the disk.

        Raises:
            ValueError: a feature is not finite in the storage type, or the shape is not the cache's.
        """
        torch_dtype, _ = DTYPES[self.cache.dtype]
        if tuple(features.shape) != (len(digests), *self.cache.shape):
            raise ValueError(f"features have shape {tuple(features.shape)}, not {(len(digests), *self.cache.shape)}")
        stored = features.detach().to("cpu", torch_dtype).contiguous()
        if not bool(torch.isfinite(stored.float()).all()):
            raise ValueError(
                f"the encoder's features do not fit into {self.cache.dtype} (largest magnitude "
                f"{features.abs().max().item():.3g}); use --feature_dtype bfloat16 or float32"
            )
        rows = [row.flatten().view(torch.uint8).numpy().tobytes() for row in stored]
        self._features.write(b"".join(rows))
        _to_disk(self._features)
        for offset, (digest, row) in enumerate(zip(digests, rows, strict=True)):
            entry = np.zeros(1, _ENTRY)
            entry["image"], entry["row"], entry["row_crc"] = np.void(digest), self._rows + offset, zlib.crc32(row)
            entry["entry_crc"] = zlib.crc32(entry.tobytes()[:_CHECKED])
            self._index.write(entry.tobytes())
        _to_disk(self._index)
        self._rows += len(rows)

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        names = (self._features.name, self._index.name)
        self._features.close()
        self._index.close()
        if not self._rows:
            for name in names:
                os.unlink(name)


def fill(
    cache: FeatureCache,
    images: Sequence[Any],
    encoder: FrozenEncoder,
    preprocess: Callable[[Any], Tensor],
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    progress: bool = True,
) -> int:
    """Computes and stores the features of the images that the cache lacks. Each rank does its share of the groups.

    Args:
        cache: to fill.
        images: as rows hold them, in the order of the data; repeated ones are encoded once.
        encoder: of the features.
        preprocess: from an image to `(3, H, W)`; raises `BadRecord` for an unusable one, which gets no features.
        device: to encode on.
        rank, world_size: of this process.
        workers: processes that decode.
        progress: show a bar.

    Returns:
        Number of images stored by this process.
    """
    unique: dict[bytes, int] = {}
    for index in tqdm(range(len(images)), desc="looking for new images", disable=not progress):
        digest = image_digest(images[index])
        if digest is not None:
            unique.setdefault(digest, index)
    digests = list(unique)
    groups = [digests[start : start + GROUP] for start in range(0, len(digests), GROUP)]
    wanted = [
        index
        for index in range(len(groups))
        if index % world_size == rank and any(digest not in cache for digest in groups[index])
    ]
    if not wanted:
        return 0
    rows = _Groups(images, [[(digest, unique[digest]) for digest in groups[index]] for index in wanted], preprocess)
    loader = DataLoader(rows, batch_size=None, num_workers=workers, generator=torch.Generator())
    stored = 0
    with cache.writer() as writer, torch.no_grad():
        for kept, pixels in tqdm(loader, desc="caching image features", disable=not progress):
            if kept:
                features = encoder.encode(pixels.to(device))
                missing = [position for position, digest in enumerate(kept) if digest not in cache]
                writer.add([kept[position] for position in missing], features[missing])
                stored += len(missing)
    return stored


class _Groups(Dataset):
    """Decoded groups of images: digests of the usable ones, and their pixels."""

    def __init__(
        self, images: Sequence[Any], groups: list[list[tuple[bytes, int]]], preprocess: Callable[[Any], Tensor]
    ) -> None:
        self.images = images
        self.groups = groups
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> tuple[list[bytes], Tensor | None]:
        kept, pixels = [], []
        for digest, position in self.groups[index]:
            try:
                pixels.append(self.preprocess(self.images[position]))
            except BadRecord:
                # The collator will count it when training comes across it.
                continue
            kept.append(digest)
        return kept, torch.stack(pixels) if pixels else None


@dataclass
class ImagePreprocessor:
    """From an image as rows hold it to `(3, H, W)`, as the collators do it."""

    image_processor: Any
    limits: RecordLimits
    background: tuple[int, int, int] | None

    def __call__(self, image: Any) -> Tensor:
        decoded = decode_image(image, self.limits, self.background)
        return self.image_processor(images=[decoded], return_tensors="pt")["pixel_values"][0]

    def settings(self) -> dict[str, Any]:
        """What decides the pixels."""
        return {
            "class": type(self.image_processor).__name__,
            "settings": json.loads(self.image_processor.to_json_string()),
            "background": self.background,
            # An image beyond a limit has no features, so another limit is another cache.
            "limits": [self.limits.max_pixels, self.limits.max_bytes, self.limits.max_aspect_ratio],
        }


class _CachedFeatures:
    """Mixed into a collator: takes an image's features from the cache instead of decoding it."""

    def __init__(self, *args: Any, cache: FeatureCache, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cache = cache
        self.keys = (self.keys - {"pixel_values"}) | {"image_embeds"}

    def _read(self, record: dict[str, Any]) -> tuple[Any, str]:
        if record.get("transform") or self.transform:
            raise ValueError(
                "--feature_cache and random augmentation exclude each other: a cached image looks the same in every "
                "epoch; leave out --crop_scale, --flip and --color_jitter, or the cache"
            )
        problem = problem_of(record)
        if problem is not None:
            raise problem
        text = usable_text(record.get("text"))
        digest = image_digest(record.get("image"))
        if digest is None or digest not in self.cache:
            # Says why the image is unusable; if it is usable, the cache was not filled with it.
            super()._read(record)
            raise KeyError(
                f"the features of {record.get('source')} [{record.get('key')}] are not in {self.cache.folder}; fill "
                "the cache with the data that is trained on (hf_vlp.training.feature_cache.use_cache)"
            )
        return self.cache.get(digest), text

    def _encode(self, images: list[Tensor], texts: list[str]) -> dict[str, Any]:
        return {**super()._encode(None, texts), "image_embeds": torch.stack(images)}


class CachedImageTextCollator(_CachedFeatures, ImageTextCollator):
    """`ImageTextCollator` with `image_embeds` from a cache in the place of `pixel_values`."""


class CachedCaptioningCollator(_CachedFeatures, CaptioningCollator):
    """`CaptioningCollator` with `image_embeds` from a cache in the place of `pixel_values`."""


def use_cache(
    model: nn.Module,
    collator: ImageTextCollator | CaptioningCollator,
    datasets: Iterable[Any],
    folder: str | Path | None,
    *,
    dtype: str = "float16",
    args: Any = None,
) -> ImageTextCollator | CaptioningCollator:
    """Fills a cache with all images of the datasets and gives the collator that reads from it.

    With `dtype="float32"`, training is that without a cache, up to the encoder's rounding in groups of other sizes.

    Args:
        model: its image encoder is frozen (stage applied).
        collator: of the uncached run.
        datasets: `PairDataset`s of training and evaluation; None entries are skipped.
        folder: of all caches; None gives the collator back as it is.
        dtype: storage type.
        args: training arguments: device, rank, workers, precision; None for one process on the model's device.

    Raises:
        ValueError: the encoder trains, an image is augmented at random, or a dataset is a stream.
    """
    if folder is None:
        return collator
    encoder = frozen_encoder(model)
    datasets = [dataset for dataset in datasets if dataset is not None]
    for dataset in datasets:
        if not hasattr(dataset, "rows") or not hasattr(dataset, "__len__"):
            raise ValueError("--feature_cache needs data with an index; leave out --streaming, or the cache")
        if getattr(dataset, "transform", None) is not None or collator.transform is not None:
            raise ValueError(
                "--feature_cache and random augmentation exclude each other: a cached image looks the same in every "
                "epoch; leave out --crop_scale, --flip and --color_jitter, or the cache"
            )
    preprocess = ImagePreprocessor(collator.processor.image_processor, collator.limits, collator.background)
    precision = "bf16" if getattr(args, "bf16", False) else "fp16" if getattr(args, "fp16", False) else "no"
    key = {"encoder": encoder.fingerprint(), "preprocessing": preprocess.settings(), "precision": precision}
    device = args.device if args is not None else next(model.parameters()).device
    model.to(device)
    was_training = model.training
    model.eval()
    autocast = torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)) if (
        precision != "no"
    ) else torch.autocast(device.type, enabled=False)  # fmt: skip
    with autocast:
        shape = _feature_shape(encoder, preprocess, datasets, device)
        cache = FeatureCache(folder, key, shape, dtype)
        fill(
            cache,
            _Images(datasets),
            encoder,
            preprocess,
            device=device,
            rank=getattr(args, "process_index", 0),
            world_size=getattr(args, "world_size", 1),
            workers=getattr(args, "dataloader_num_workers", 0),
            progress=getattr(args, "process_index", 0) == 0,
        )
    model.train(was_training)
    if getattr(args, "world_size", 1) > 1:
        torch.distributed.barrier()
    cache.refresh()
    kind = CachedCaptioningCollator if isinstance(collator, CaptioningCollator) else CachedImageTextCollator
    options = {"prompt": collator.prompt} if isinstance(collator, CaptioningCollator) else {}
    return kind(
        collator.processor,
        cache=cache,
        max_length=collator.max_length,
        limits=collator.limits,
        prepare=collator.prepare,
        background=collator.background,
        **options,
    )


class _Images(Sequence[Any]):
    """The images of several datasets by position, read when they are asked for."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.rows = [
            dataset.rows.select_columns(["image"]) if hasattr(dataset.rows, "select_columns") else dataset.rows
            for dataset in datasets
        ]
        self.ends = list(itertools.accumulate(map(len, self.rows)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Any:
        which = bisect.bisect_right(self.ends, index)
        return self.rows[which][index - (self.ends[which - 1] if which else 0)]["image"]


@torch.no_grad()
def _feature_shape(
    encoder: FrozenEncoder, preprocess: ImagePreprocessor, datasets: Sequence[Any], device: torch.device
) -> tuple[int, ...]:
    images = _Images(datasets)
    for index in range(len(images)):
        try:
            pixels = preprocess(images[index])
        except BadRecord:
            continue
        return tuple(encoder.encode(pixels[None].to(device)).shape[1:])
    raise ValueError("no image of the data can be read, so there are no features to cache")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
