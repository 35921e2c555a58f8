"""Be a teacher beside the ranks of a TeacherForced stage. All the work is in vpmoe.trainer.teacher_forced;
this file binds it to a process that the launcher of jobs.train starts.

It is not a part of jobs.train, because it needs vLLM, which only the inference image has.
"""

import os

from jobs.entrypoint import entrypoint
from vpmoe.inference.vllm_options import prepare_environment
from vpmoe.process import launcher
from vpmoe.process.environment import STARTED_BY_LAUNCHER, read_number, teacher_ports
from vpmoe.process.memory import no_collection
from vpmoe.teacher.folder import teacher_folder


def main() -> None:
    """Answer this teacher's students until they disconnect."""
    launcher.set_parent_death_signal()
    run, context = entrypoint("train")
    ports = teacher_ports()
    teacher = read_number("VPMOE_TEACHER", 0, len(ports) - 1, STARTED_BY_LAUNCHER)
    prepare_environment()  # before torch is imported
    with no_collection():
        from vpmoe.trainer.teacher_forced.server import serve

    serve(
        run,
        context.bucket,
        teacher=teacher,
        students=int(os.environ["WORLD_SIZE"]),
        address=os.environ["MASTER_ADDR"],
        ports=ports,
        folder=teacher_folder(),
        stopping=context.stopping,
    )


if __name__ == "__main__":
    main()
