"""From SYNTH's parquet shards to a data set of Harmony tokens and spans in the bucket. No module here imports torch.

`preprocess` is the step, `dataset.resolve` names a run's data set and `index.read_index` reads what trainers need of a part.
docs/data_pipeline.md describes the whole.
"""

from vpmoe.data.dataset import DatasetRef, resolve
from vpmoe.data.index import Index, read_index

__all__ = ["DatasetRef", "Index", "read_index", "resolve"]
