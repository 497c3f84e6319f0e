"""How Z-Image's pipeline asks Qwen3 for a prompt's encoding."""

from senseflow.teachers.chat import Chat

CHAT = Chat(thinking=True, layers=(-2,))  # the state that its last layer is given
