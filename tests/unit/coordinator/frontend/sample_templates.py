"""Chat templates that use, between them, everything that checkpoints' templates use."""

from collections.abc import Mapping
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Blocks on lines of their own (trim_blocks, lstrip_blocks), namespaces, slices, trimming,
# tojson with and without indent, reasoning that is cut out of earlier turns.
TOOLS_AND_REASONING = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and message.content is string %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
<|im_start|>system
    {% for tool in tools %}
{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
    {% endfor %}
<|im_end|>
{%- endif %}
{% for message in messages[::1] %}
  {% set content = message.content %}
  {% if '</think>' in content %}
    {% set content = content.split('</think>')[-1].lstrip('\\n') %}
  {% endif %}
<|im_start|>{{ message.role | title }}:{{ loop.index }} of {{ messages | length }}
{{ content | trim }}<|im_end|>
{% endfor %}
{{- ns.last }} {{ strftime_now('%Y') }}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

# Loop controls, generation blocks (with a variable that must not leak), raise_exception, BOS.
STRICT_ROLES = """\
{{ bos_token }}
{%- set seen = 'outer' -%}
{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant'] %}
{{ raise_exception('Only system, user and assistant may speak, not ' + message['role']) }}
{% endif %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}
{% if message['content'] == 'STOP' %}{% break %}{% endif %}
{% if message['role'] == 'assistant' %}
{% generation %}{% set seen = 'inner' %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}
{% endfor %}{{ seen }}"""

# Parts joined without anything between them; what is not text is skipped.
PARTS = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content if part.type == 'text' %}{{ part.text | trim }}{% endfor %}
{% endif %}<|im_end|>
{% endfor %}"""

TEMPLATES: Mapping[str, str] = {
    "chatml": CHATML,
    "tools_and_reasoning": TOOLS_AND_REASONING,
    "strict_roles": STRICT_ROLES,
    "parts": PARTS,
}


def turn(role: str, content: Any) -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content}


CONVERSATIONS = (
    (turn("user", "hello"),),
    (turn("system", "  You are <brief> & 'quoted'.\n"), turn("user", "he\n\nuse the user\n")),
    (
        turn("user", "2 + 2?"),
        turn("assistant", "<think>\nfour\n</think>\n\n4"),
        turn("user", " naïve 日本 😀 <think> a < b <|im "),
    ),
    (turn("user", "one"), turn("assistant", "STOP"), turn("user", "two")),
    (turn("user", "\nhello"), turn("assistant", "ends in <")),
)
TOOLS = ({"name": "f", "parameters": {"é": "<b>", "n": [1, 2.5, None, True]}},)
