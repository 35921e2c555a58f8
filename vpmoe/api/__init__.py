"""The DistillRun API as pydantic models: the only source of the CRD, of the defaults and of the validation.

This package imports pydantic and PyYAML only, so that the operator's image stays small.
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
