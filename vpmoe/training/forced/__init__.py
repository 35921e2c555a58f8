"""The teacher beside the students of a TeacherForced stage: its process, what goes between it and them, and the students' end of it.

channel.py is the way between them, teacher.py the model, serve.py the teacher's process, remote.py what a student sees of it. What is
minimised is vpmoe.objectives.forced's business.
"""
