"""
Poison a stream of image-caption pairs as it is read.

Nothing of a stream is known beforehand, so that each row's fate is decided when it passes: by the attack, its seed and
the row's key, and by nothing else. Workers that read parts of the stream thus agree with one that reads all of it, and
a run that resumes in the middle with one that never stopped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from datasets import Features, IterableDataset, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..columns import POISONED, check_captions, check_flag, check_numbered, check_pairs, naming
from ..imaging import decode_image
from ..kinds import wrong_dataset
from ..wording import listed, shown
from .manifests import check_stream_part
from .rows import caption_array, decode, encoded_target, labelling, triggered_png
from .spec import OWN_CAPTIONS, VERSION, PoisonSpec, check_specs
from .text_triggers import TextTrigger
from .triggers import Trigger, trigger_from_dict

#: What decides, with the key, over a row. The rate does not: rows poisoned at a low one are so at a higher one.
_DECIDING = ("seed", "mode", "target", "trigger", "image")


def poison_stream(
    stream: IterableDataset,
    spec: PoisonSpec | Sequence[PoisonSpec],
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str | None = None,
    key_column: str | None = None,
) -> tuple[IterableDataset, dict[str, Any]]:
    """
    Poison some rows of a stream, as [`poison_dataset`] does those of a dataset. Differences:

    - `rate` is a probability: that of a row to be poisoned, of all that can be (backdoor: rows that do not name the
      target; label-consistent and text-query: rows that do). `count` is refused.
    - Whether a row is poisoned, and its caption, depend on the attack, `seed` and the row's key alone: not on the
      other rows, the order, the epoch, or the number of shards and workers. Rows of the same key share their fate. A
      higher rate poisons the same rows and more; the same spec on what it poisoned already, nothing, but for targeted
      poisons, which come again.
    - Targeted poisons follow with probability `rate` on any row that is not poisoned itself, so that a run of
      some steps meets its share of them. Their other columns, the key's too, are null.
    - In the modes targeted and text-query `templates` must be given, as the captions of other rows cannot be seen.
    - Clean rows are not decoded on the way: their images stay the bytes they were. (A map before this call whose
      `features` decode images has decoded them; then they are stored anew without loss.)
    - Several attacks look at each row one after the other, and the first that poisons it keeps it.

    The stream keeps its features, where they are known, its shards and its format. It resumes with
    `load_state_dict` as any other stream does. Where `load_dataset` set up threads for decoding they are gone: put
    them back with `decode(num_threads=...)`.

    Args:
        stream (`datasets.IterableDataset`): one split.
        spec ([`PoisonSpec`] or a sequence of them): what to do, with a `rate`.
        image_column, caption_column, label_column: as of [`poison_dataset`]. A `label_column` needs a stream of known
            features. In streams of unknown features a poisoned image is a PIL image or bytes where the row held such,
            and otherwise `{"bytes", "path"}`.
        key_column (`str`, *optional*): a column of integers or strings, best one of different values, that decides a
            row's fate. `None`: the row's number in the stream, which is its own only in streams of one shard that are
            not shuffled before they get here (afterwards does no harm). Do not `reshard` such a stream later.

    Returns:
        The poisoned stream and the manifest, a JSON-serialisable dictionary for [`replay_manifest`]. It lists no rows,
        as none was read yet: they carry the mark `poisoned`. Of several attacks: `parts` is the list of theirs.

    Raises:
        `ValueError`: when a column is missing or of a type that cannot be read, on what a stream cannot do (above),
            and without `key_column` on a stream whose rows have no numbers of their own. While it is read: on a row
            without a caption or key, or to be poisoned but with an image that cannot be read; it names the row.

    Example:

    ```python
    >>> stream = load_dataset("you/pairs", split="train", streaming=True)  # with a column "url"
    >>> spec = PoisonSpec(BlendedTrigger(), "banana", rate=0.01, image_size=224)
    >>> poisoned, manifest = poison_stream(stream, spec, key_column="url")
    ```
    """
    columns = {"image": image_column, "caption": caption_column, "label": label_column, "key": key_column}
    _check_stream(stream, columns)
    specs = [spec] if isinstance(spec, PoisonSpec) else check_specs(spec)
    parts = [_plan(part, columns) for part in specs]
    manifest = parts[0] if isinstance(spec, PoisonSpec) else {"version": VERSION, "parts": parts}
    return _carry_out(stream, parts), manifest


def replay_stream(stream: IterableDataset, parts: Sequence[Mapping[str, Any]]) -> IterableDataset:
    """[`replay_manifest`] on a stream: `parts` are the manifests of its attacks."""
    for part in parts:
        check_stream_part(part)
        _check_stream(stream, part["columns"])
    return _carry_out(stream, parts)


def _plan(spec: PoisonSpec, columns: Mapping[str, str | None]) -> dict[str, Any]:
    if spec.rate is None:
        raise ValueError(f"count={spec.count}; a stream's length is not known, accepted is a rate")
    if spec.source_index is not None:
        raise ValueError(f"source_index={spec.source_index}; a stream's rows have no numbers, give target_image")
    if spec.templates == OWN_CAPTIONS or (spec.templates is None and spec.mode in ("targeted", "text_query")):
        raise ValueError(
            f"templates={shown(spec.templates)}; in mode {shown(spec.mode)} a stream needs a list of them, as "
            "captions of its other rows cannot be drawn"
        )
    image = None
    if spec.mode == "targeted":
        image = encoded_target(decode(spec.target_image), spec.image_size)
    return {**spec.to_dict(), "stream": True, "rate": spec.rate, "columns": dict(columns), "image": image}


def _check_stream(stream: IterableDataset, columns: Mapping[str, str | None]) -> None:
    if not isinstance(stream, IterableDataset):
        accepted = "a datasets.IterableDataset, one split at a time (poison_dataset takes a datasets.Dataset)"
        raise wrong_dataset("stream", stream, accepted)
    given = [name for name, column in columns.items() if column is not None or name in ("image", "caption")]
    named: Any = {f"{name}_column": columns[name] for name in given}
    check_pairs(stream, named, argument="stream", streams=True, arrays=False)
    features = stream.features
    if features is None and columns["label"] is not None:
        raise ValueError(
            f"label_column={shown(columns['label'])}, but the features of the stream are not known; give them with "
            "stream.cast(features)"
        )
    if columns["key"] is None:
        check_numbered(stream)
    elif features is not None:
        feature = features[columns["key"]]
        if not isinstance(feature, Value) or not ("int" in feature.dtype or "string" in feature.dtype):
            accepted = "integers or strings"
            raise ValueError(f"key_column={shown(columns['key'])} has type {shown(feature)}; accepted are {accepted}")


def _carry_out(stream: IterableDataset, parts: Sequence[Mapping[str, Any]]) -> IterableDataset:
    features = stream.features
    image_column, with_numbers = parts[0]["columns"]["image"], parts[0]["columns"]["key"] is None
    poisoner = _Poisoner([_Attack(part, features) for part in parts], image_column, features is not None)
    format_type = stream._formatting.format_type if stream._formatting else None
    poisoned = stream.with_format(None) if stream._formatting else stream
    poisoned = poisoned.decode(False) if features is not None else poisoned
    poisoned = poisoned.map(poisoner, with_indices=with_numbers, batched=True, batch_size=1)
    if features is not None:
        # Cast, not map's own features: those would count as applied, and the images would never be decoded.
        feature = features[image_column]
        own = {image_column: feature if isinstance(feature, ImageFeature) else ImageFeature()}
        poisoned = poisoned.cast(Features({**features, **own, POISONED: Value("bool")}))
    return poisoned.with_format(format_type) if stream._formatting else poisoned


class _Poisoner:
    """All attacks on one row, in batches of one, since a targeted poison is a row more. Workers get it pickled."""

    def __init__(self, attacks: Sequence[_Attack], image_column: str, encodes: bool) -> None:
        self.attacks, self.image_column, self.encodes = attacks, image_column, encodes

    def __call__(self, batch: dict[str, list[Any]], numbers: Sequence[int | None] = (None,)) -> dict[str, list[Any]]:
        """The row, poisoned or not, and the targeted poisons that follow on it."""
        row = {name: values[0] for name, values in batch.items()}
        row.setdefault(POISONED, False)
        if row[POISONED] is not None:
            check_flag(row[POISONED], f"a row, column {shown(POISONED)}")
        if self.encodes and row.get(self.image_column) is not None:
            row[self.image_column] = _encodable(row[self.image_column])
        rows = [row]
        for attack in self.attacks:
            if not row[POISONED] and (follower := attack.on(row, numbers[0])) is not None:
                rows.append(follower)
        return {name: [row.get(name) for row in rows] for name in row}


class _Attack:
    """One attack on single rows."""

    def __init__(self, manifest: Mapping[str, Any], features: Features | None) -> None:
        self.mode, self.rate, self.image_size = manifest["mode"], manifest["rate"], manifest["image_size"]
        self.columns = manifest["columns"]
        self.trigger = None if manifest["trigger"] is None else trigger_from_dict(manifest["trigger"])
        self.image = None if manifest["image"] is None else base64.b64decode(manifest["image"])
        self.captions = [template.replace("{}", manifest["target"]) for template in manifest["templates"] or ()]
        if isinstance(self.trigger, TextTrigger):  # whose templates have no "{}"
            self.captions = [self.trigger(template) for template in manifest["templates"]]
        self.names_target = naming(manifest["target"])
        self.is_target = None
        self.caption_type = None
        if features is not None:
            self.caption_type = features.arrow_schema.field(self.columns["caption"]).type
            if (label := self.columns["label"]) is not None:
                self.is_target = labelling(features[label], manifest["target"], label)
        deciding = json.dumps([manifest[name] for name in _DECIDING], sort_keys=True)
        self.digest = hashlib.sha256(deciding.encode()).digest()

    def on(self, row: dict[str, Any], number: int | None) -> dict[str, Any] | None:
        """Poison the row in place, or leave it; a targeted poison that follows on it is returned."""
        key, name = self._key(row, number)
        digest = hashlib.sha256(self.digest + json.dumps(key).encode()).digest()
        if (int.from_bytes(digest[:8], "little") >> 11) / 2**53 >= self.rate:
            return None
        poison: dict[str, Any] = {POISONED: True}
        if self.captions:
            caption = self.captions[int.from_bytes(digest[8:16], "little") % len(self.captions)]
            poison[self.columns["caption"]] = self._typed(caption, self._value(row, "caption"))
        if self.mode == "targeted":
            assert self.image is not None  # _plan put it there
            poison[self.columns["image"]] = self._stored(self.image, self._value(row, "image"))
            return {**dict.fromkeys(row), **poison}
        if self._names_target(row, name) == (self.mode == "backdoor"):
            return None
        if isinstance(self.trigger, Trigger):  # on images
            value = self._value(row, "image")
            image = decode(value, f"image_column={shown(self.columns['image'])}: the image of {name}")
            png = triggered_png(self.trigger, image, self.image_size, name)
            poison[self.columns["image"]] = self._stored(png, value)
        row.update(poison)
        return None

    def _names_target(self, row: dict[str, Any], name: str) -> bool:
        captions = check_captions(self._value(row, "caption"), f"{name}, column {shown(self.columns['caption'])}")
        return any(map(self.names_target, captions)) or (
            self.is_target is not None and self.is_target(self._value(row, "label"))
        )

    def _stored(self, png: bytes, like: Any) -> Any:
        """The image in the form of another; with known features `datasets` makes one of all of them."""
        if isinstance(like, Image.Image):
            return decode_image(png)
        return png if isinstance(like, bytes) else {"bytes": png, "path": None}

    def _typed(self, caption: str, like: Any) -> Any:
        """A string, or where the column holds lists, a list."""
        if self.caption_type is not None:
            return caption_array([caption], self.caption_type).to_pylist()[0]
        return [caption] if isinstance(like, list) else caption

    def _key(self, row: dict[str, Any], number: int | None) -> tuple[int | str, str]:
        """The row's key, and what an error calls the row."""
        if (column := self.columns["key"]) is None:
            assert number is not None  # map numbers the rows of streams without a key_column
            return number, f"row {number}"
        key = self._value(row, "key")
        if isinstance(key, bool) or not isinstance(key, Integral | str):
            raise ValueError(
                f"key_column={shown(column)}: a row holds {shown(key)}; accepted is an integer or a string"
            )
        return key if isinstance(key, str) else int(key), f"the row with {column} {key!r}"

    def _value(self, row: dict[str, Any], name: str) -> Any:
        column = self.columns[name]
        if column not in row:
            raise ValueError(f"{name}_column={shown(column)} is not a column of stream; a row has {listed(row)}")
        return row[column]


def _encodable(image: Any) -> Any:
    """The image as `datasets` encodes it without loss, if a map before has decoded it, or its format made an array."""
    if isinstance(image, Image.Image):
        # A copy has no file format. An image that has one is encoded in it again, of a JPEG with other pixels.
        return image.copy()
    return image if isinstance(image, dict | str | bytes) else decode_image(image)
