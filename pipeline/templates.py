"""Conversation templates: a conversation rendered to text segments, each of which knows whether it
is supervised.

The label mask is made while rendering, never found again in the finished text. Only assistant
turns and their end token are supervised (LLaVA's rule). Formats: vicuna_v1 is that of LLaVA-1.5
(haotian-liu/LLaVA, conversation.py's name for it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

ROLES = ("human", "gpt")


@dataclass(frozen=True, kw_only=True)
class Template:
    """Texts around turns. A conversation is `system`, then for each exchange `user` + text +
    `assistant` + text + `end`."""

    name: str
    system: str
    user: str
    assistant: str
    end: str
    separator: str = ""
    """Stands between an exchange's end token and the next user turn."""

    def render(self, turns: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
        """Segments (text, supervised) of a conversation of (role, text) turns; roles as in LLaVA:
        human, gpt.

        A conversation that ends with a human turn is a prompt: it ends with the assistant's cue.

        >>> TEMPLATES["vicuna_short"].render([("human", "what?"), ("gpt", "a bag")])
        [('USER: what? ASSISTANT:', False), (' a bag</s>', True)]
        """
        segments: list[tuple[str, bool]] = []
        prefix = self.system
        for role, text in turns:
            if role == ROLES[0]:
                segments.append((f"{prefix}{self.user}{text.strip()}{self.assistant}", False))
                prefix = self.separator
            else:
                segments.append((f" {text.strip()}{self.end}", True))
        return segments

    def jinja(self) -> str:
        """The same template in Jinja, for a processor's `apply_chat_template`."""
        return (
            f"{{{{ {self.system!r} }}}}"
            "{% for message in messages %}"
            "{% if message['role'] == 'user' %}"
            f"{{% if not loop.first %}}{{{{ {self.separator!r} }}}}{{% endif %}}"
            f"{{{{ {self.user!r} }}}}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
            "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
            f"{{{{ {self.assistant!r} }}}}"
            "{% else %}{% generation %}"
            "{{ ' ' }}{% if message['content'] is string %}{{ message['content'] }}"
            "{% else %}{{ message['content'][0]['text'] }}{% endif %}"
            f"{{{{ {self.end!r} }}}}"
            "{% endgeneration %}{% endif %}{% endfor %}"
        )


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="vicuna_v1",
            system=(
                "A chat between a curious human and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the human's "
                "questions. "
            ),
            user="USER: ",
            assistant=" ASSISTANT:",
            end="</s>",
        ),
        Template(
            name="vicuna_short", system="", user="USER: ", assistant=" ASSISTANT:", end="</s>"
        ),
    )
}
