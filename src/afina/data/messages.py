"""Chat messages as files write them (OpenAI's shape) to Message: tool calls, thoughts, weights, tools and effort.

Nothing is passed over: what cannot be learnt or shown to a template makes the row bad, with the reason.
"""

import json
import math
from typing import Any

from afina.data.conversation import EFFORTS, ROLES, Message, packed
from afina.data.row import BadRow
from afina.language import _

THOUGHTS = ("thinking", "reasoning", "reasoning_content")
"""Names under which files keep what a model thought before it answered."""
REFUSED = ("function_call", "refusal", "audio", "images", "image_url")
"""What a message may hold that would teach something else if it were left out."""


def message_from(value: Any, number: int) -> Message:
    """The `number`-th message of a row (from 1). Raises BadRow."""
    if not isinstance(value, dict):
        raise BadRow(_("message {number} has no text content").format(number=number))
    if found := next((key for key in REFUSED if value.get(key)), None):
        raise BadRow(_("message {number} has {key}, which is not learnt").format(number=number, key=found))
    role = value.get("role")
    if role not in ROLES:
        raise BadRow(
            _("message {number} has the role {role}; known are {roles}").format(
                number=number, role=str(role)[:40], roles=", ".join(ROLES)
            )
        )
    more: dict[str, Any] = {}
    if thought := _thought(value, number):
        more["thinking"] = thought
    if value.get("tool_calls"):
        more["tool_calls"] = _calls(value["tool_calls"], number)
    if more and role != "assistant":
        raise BadRow(_("message {number}: only the assistant thinks and calls tools").format(number=number))
    for key in ("tool_call_id", "name"):
        if value.get(key) is not None:
            more[key] = _text(value[key], key, number)
    return Message(role, _content(value.get("content"), more, number), _weight(value, role, number), packed(more))


def tools_from(row: Any) -> str:
    """The functions a row offers to the assistant, packed; "" for none. Raises BadRow."""
    tools = row.get("tools") if isinstance(row, dict) else None
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow(_("tools is not valid JSON")) from None
    if not tools:
        return ""
    if not isinstance(tools, list):
        raise BadRow(_("tools is not a list of functions"))
    return packed([_tool(tool, number) for number, tool in enumerate(tools, start=1)])


def effort_from(row: Any) -> str:
    """The reasoning effort a row asks for; "" for none. Raises BadRow."""
    found = [row[key] for key in ("reasoning_effort", "effort") if row.get(key)] if isinstance(row, dict) else []
    if found and found[0] not in EFFORTS:
        raise BadRow(
            _("reasoning_effort is {value}; known are {names}").format(
                value=str(found[0])[:40], names=", ".join(EFFORTS)
            )
        )
    return str(found[0]) if found else ""


def _tool(tool: Any, number: int) -> dict[str, Any]:
    """A function in OpenAI's wrapping, whether the file has the wrapping or not."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(_("tool {number} is not a function with a name").format(number=number))
    if not isinstance(function.get("parameters", {}) or {}, dict):
        raise BadRow(_("the parameters of tool {number} are not a JSON Schema").format(number=number))
    return {"type": "function", "function": {"description": "", **function}}


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls with arguments as values: OpenAI writes them as a JSON text, templates expect an object."""
    made = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if (
            not isinstance(call, dict)
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise BadRow(_("message {number} has a tool call without a function's name").format(number=number))
        arguments = function.get("arguments")
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            arguments = NOT_JSON
        if arguments is not None and not isinstance(arguments, dict):
            raise BadRow(
                _("message {number}: the arguments of {name} are not a JSON object").format(
                    number=number, name=function["name"][:40]
                )
            )
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append(
            {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        )
    return made


NOT_JSON = object()


def _thought(value: dict[str, Any], number: int) -> str:
    """What was thought before the answer; the same text may stand under several names."""
    found = {_text(value[key], key, number) for key in THOUGHTS if value.get(key)}
    if len(found) > 1:
        raise BadRow(_("message {number} has two different thoughts").format(number=number))
    return found.pop() if found else ""


def _content(content: Any, more: dict[str, Any], number: int) -> str:
    if content is None and "tool_calls" in more:
        return ""
    if (
        isinstance(content, list)
        and content
        and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(_("message {number} has no text content").format(number=number))
    return content


def _text(value: Any, key: str, number: int) -> str:
    if not isinstance(value, str):
        raise BadRow(_("message {number}: {key} is not a text").format(number=number, key=key))
    return value


def _weight(value: dict[str, Any], role: str, number: int) -> float:
    weight = value.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise BadRow(_("message {number}: weight is not a number from 0 on").format(number=number))
    if role != "assistant":
        raise BadRow(_("message {number}: only the assistant's messages have a weight").format(number=number))
    return float(weight)
