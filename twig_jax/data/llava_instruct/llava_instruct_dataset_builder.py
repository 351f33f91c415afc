"""The TFDS builder; its name follows from its package's. Runs without TensorFlow."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes examples in the order given; images are open image files, kept as they are."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, examples: Iterator[tuple[int, dict[str, Any]]], **settings: Any) -> None:
        """examples: (key, example); keys are unique, as ids are not in LLaVA's data."""
        self._examples = examples
        super().__init__(file_format="array_record", **settings)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        said = {"from": features.Text(), "value": features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about images, in the format of LLaVA's instruction data.",
            features=features.FeaturesDict(
                {
                    "id": features.Text(),
                    "images": features.Sequence(features.Image(shape=(None, None, None))),
                    "conversations": features.Sequence(said),
                }
            ),
            disable_shuffling=True,  # training shuffles, and samples are found by their number
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from self._examples
