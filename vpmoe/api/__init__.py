"""The DistillRun API as pydantic models: the one source of the CRD, of the defaults and of the validation.

Imports pydantic (and PyYAML to read files) and nothing else of ours, so the operator's image needs no more.
"""

from vpmoe.api.invalid import Invalid
from vpmoe.api.run import DistillRun, load_run
from vpmoe.api.spec import Spec
from vpmoe.api.stages import OnPolicy, Rescored, Stage, StageFields, TeacherForced, Vanilla

__all__ = [
    "DistillRun",
    "Invalid",
    "OnPolicy",
    "Rescored",
    "Spec",
    "Stage",
    "StageFields",
    "TeacherForced",
    "Vanilla",
    "load_run",
]
