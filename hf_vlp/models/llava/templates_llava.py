"""The templates that LLaVA is trained with as Jinja, for `apply_chat_template` and the pipelines of transformers.

Each writes, character by character, what the template of the same name in `hf_vlp.data.conversations` writes in
training, and marks what is learned there as `{% generation %}`. A test compares the two.
"""

IMAGE_TOKEN = "<image>"

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = VICUNA_SYSTEM.replace("user", "human")
MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


def flatten(image: str = IMAGE_TOKEN) -> str:
    """Jinja that makes messages whose contents are lists of parts (or strings with image tokens) to texts.

    Pictures stand in front of the words of their turn, a line each, wherever the message has them: as in LLaVA's
    training. A message is left with `content` and, beside it, `images`, its pictures alone.

    Args:
        image: what is written for a picture.
    """
    return (
        "{%- set flat = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        "{%- set parts = namespace(text='', images=[]) -%}"
        "{%- if message['content'] is string -%}"
        f"{{%- set pieces = message['content'].split('{IMAGE_TOKEN}') -%}}"
        "{%- set parts.text = pieces | join -%}"
        f"{{%- set parts.images = ['{image}'] * (pieces | length - 1) -%}}"
        "{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{%- set parts.text = parts.text ~ part['text'] -%}"
        f"{{%- elif part['type'] == 'image' -%}}{{%- set parts.images = parts.images + ['{image}'] -%}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{%- set text = parts.text -%}"
        "{%- if parts.images -%}"
        "{%- set text = (parts.images + ([text | trim] if text | trim else [])) | join('\\n') -%}"
        "{%- endif -%}"
        "{%- set one = {'role': message['role'], 'content': text, 'images': parts.images | join} -%}"
        "{%- set flat.messages = flat.messages + [one] -%}"
        "{%- endfor -%}"
        "{%- set messages = flat.messages -%}"
    )


def _words_of_the_system(default: str) -> str:
    """Jinja that takes the system's message out of the others, or `default` in its place."""
    quoted = default.replace("'", "\\'")
    return (
        f"{{%- set system = '{quoted}' -%}}"
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- set system = messages[0]['content'] -%}{%- set messages = messages[1:] -%}"
        "{%- endif -%}"
    )


# An answer without a question, as LLaVA's data has it where longer conversations were cut, is not written.
_FROM_USER = (
    "{%- if messages and messages[0]['role'] == 'assistant' -%}{%- set messages = messages[1:] -%}{%- endif -%}"
)


def _turns(user: str, assistant: tuple[str, str], prompt: str, end: str = "''") -> str:
    """Jinja of the turns; every argument is a Jinja expression.

    Args:
        user: what a turn of the user's writes.
        assistant: what invites an answer and what is learned of it.
        prompt: what stands behind the last turn to have it answered.
        end: what stands there otherwise.
    """
    return (
        "{%- for message in messages -%}"
        f"{{%- if message['role'] == 'user' -%}}{{{{ {user} }}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ {assistant[0]} }}}}{{% generation %}}{{{{ {assistant[1]} }}}}{{% endgeneration %}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{{{ {prompt} if add_generation_prompt else {end} }}}}"
    )


def _vicuna(system: str, image: str = IMAGE_TOKEN) -> str:
    return (
        flatten(image)
        + _words_of_the_system(system)
        + _FROM_USER
        + "{{ system ~ ' ' if system else '' }}"
        + _turns(
            "'USER: ' ~ message['content'] ~ ' '",
            ("'ASSISTANT:'", "' ' ~ message['content'] ~ eos_token"),
            "'ASSISTANT:'",
        )
    )


# Name of a training template -> Jinja.
CHAT_TEMPLATES: dict[str, str] = {
    "plain": flatten() + _turns("message['images']", ("''", "message['content'] ~ '\\n'"), "''"),
    "vicuna_v1": _vicuna(VICUNA_SYSTEM),
    "llava_v1": _vicuna(HUMAN_SYSTEM),
    "v1_mmtag": _vicuna(MMTAG_SYSTEM, f"<Image>{IMAGE_TOKEN}</Image>"),
    "v0": flatten()
    + _words_of_the_system(HUMAN_SYSTEM)
    + "{{ system ~ '\\n\\n###' }}"
    + _turns(
        "' Human: ' ~ message['content'] ~ '\\n###'",
        ("' Assistant:'", "' ' ~ message['content'] ~ '\\n###'"),
        "' Assistant:'",
        end="' '",
    ),
    "llama_2": flatten()
    + _words_of_the_system(LLAMA_2_SYSTEM)
    + _FROM_USER
    + _turns(
        "('' if loop.first else bos_token) ~ '[INST] ' "
        "~ ('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if loop.first and system else '') "
        "~ message['content'] ~ ' [/INST]'",
        ("''", "' ' ~ message['content'] ~ ' ' ~ eos_token"),
        "''",
    ),
    "mpt": flatten()
    + _words_of_the_system(MPT_SYSTEM)
    + _FROM_USER
    + "{{ '<|im_start|>system\\n' ~ system ~ '<|im_end|>' if system else '' }}"
    + _turns(
        "'<|im_start|>user\\n' ~ message['content'] ~ '<|im_end|>'",
        ("'<|im_start|>assistant\\n'", "message['content'] ~ '<|im_end|>'"),
        "'<|im_start|>assistant\\n'",
    ),
}

__all__ = ["CHAT_TEMPLATES", "IMAGE_TOKEN", "flatten"]
