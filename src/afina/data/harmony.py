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


def mended(template: str) -> str:
    """The template with default values of tools written as the library does; one that is not gpt-oss's stays as it is.

    The published one writes `days?: number, // default: 3,`, the library, and so the model's training, no last comma.
    """
    if "namespace functions" not in template and 'render_tool_namespace("functions"' not in template:
        return template
    found = _LINE_END.search(template)
    if found is None or len(_DEFAULTS.findall(template)) < 3:
        return template
    ending = '{{- "\\n" if param_spec.default is defined and not param_spec.oneOf else ",\\n" }}'
    return template[: found.start()] + ending + template[found.end() :]
