"""gpt-oss's format, Harmony: where the published chat template departs from the format's own library, and how it is set
right. Channels and reasoning effort need nothing of their own: the renderer finds what the assistant writes.

The reference is openai-harmony; tests/data/test_harmony.py holds the two against each other.
"""

import re

_DEFAULTS = re.compile(r'\{\{- "(, )?// default: " \+ param_spec\.default(\|tojson)? \}\}')
"""How the published template writes a parameter's default value: `, // default: 3`, and then one more comma."""
_LINE_END = re.compile(
    r"\{%- if not loop\.last %\}\s*\{\{- \",\\n\" \}\}\s*\{%- else %\}\s*\{\{- \",\\n\" \}\}\s*\{%- endif -%\}"
)
_INSTRUCTIONS = re.compile(r'(\{\{- developer_message \}\}\s*\{\{- "\\n\\n") \}\}')
"""How it ends the developer's instructions: with two line ends, whether tools follow or not."""


def mended(template: str) -> str:
    """The template with instructions and default values of tools as the library writes them; another stays as it is.

    The published one writes `days?: number, // default: 3,` and two line ends after instructions that end the message.
    The library, and so the model's training, has neither that comma nor those line ends.
    """
    if "namespace functions" not in template and 'render_tool_namespace("functions"' not in template:
        return template
    found = _LINE_END.search(template)
    if found is None or len(_DEFAULTS.findall(template)) < 3:
        return template
    ending = '{{- "\\n" if param_spec.default is defined and not param_spec.oneOf else ",\\n" }}'
    template = template[: found.start()] + ending + template[found.end() :]
    return _INSTRUCTIONS.sub(r'\1 if tools else "" }}', template)
