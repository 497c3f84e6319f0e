"""How QwenImagePipeline asks Qwen2.5-VL for a prompt's encoding: within a template of its own."""

from senseflow.teachers.chat import Chat

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
CHAT = Chat(thinking=False, layers=(-1,), template=TEMPLATE)
