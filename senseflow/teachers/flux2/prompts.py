"""How Flux2KleinPipeline encodes prompts."""

from senseflow.teachers.chat import Chat

CHAT = Chat(thinking=False, layers=(9, 18, 27))
