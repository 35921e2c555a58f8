"""The teacher's process of a TeacherForced stage, and the trainer's side of it."""
