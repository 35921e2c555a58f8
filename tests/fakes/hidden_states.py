"""The engine of a TeacherForced teacher in a process of its own: documents in, hidden states out."""

import sys
from pathlib import Path

from tests.fakes.tiny_teacher import serve
from vpmoe.inference.teacher_hidden import HiddenStateEngine

if __name__ == "__main__":
    engine = HiddenStateEngine(Path(sys.argv[2]), int(sys.argv[3]))
    serve(sys.argv[1], lambda request: engine.hidden_states(request["documents"]).float().cpu().numpy())
