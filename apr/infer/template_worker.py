"""Renders chat templates in a process of its own, since a template is a program of unknown origin.

Reads {"template", "conversations", "names", "limit"} as JSON from stdin and writes {"texts": [...]} or {"error", "by"}
to stdout, `by` being "messages" when the template itself refused them. The sandbox keeps it from attributes it should
not see; the limits of the process keep it from using time and memory without end, and from writing files.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5
MEMORY = 512 * 2**20


class MessagesRefused(jinja2.TemplateError):
    """What a template's raise_exception raises."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks for training what an assistant wrote: here, its contents and nothing else."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> Any:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"name {name!r} in a namespace")
        super().__setitem__(name, value)


def _namespace(**values: Any) -> Namespace:
    out = Namespace()
    for name, value in values.items():
        out[name] = value
    return out


def _refuse(message: object) -> None:
    raise MessagesRefused(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals.update(raise_exception=_refuse, namespace=_namespace, dict=lambda **values: values,
                       strftime_now=lambda form: datetime.now().strftime(form))
    return env


def render(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request; whatever a template raises is part of it."""
    try:
        template, texts, left = environment().from_string(request["template"]), [], request["limit"]
        for messages in request["conversations"]:
            parts = []
            for part in template.generate(messages=messages, add_generation_prompt=True, tools=None, documents=None,
                                          **request["names"]):
                left -= len(part)
                if left < 0:
                    return {"error": f"more than {request['limit']} characters of output", "by": "template"}
                parts.append(part)
            text = "".join(parts)
            text.encode()  # half a surrogate pair is no text
            texts.append(text)
        return {"texts": texts}
    except MessagesRefused as e:
        return {"error": str(e)[:300], "by": "messages"}
    except (Exception, RecursionError) as e:
        return {"error": f"{type(e).__name__}: {e}"[:300], "by": "template"}


def main() -> None:
    """Answer one request."""
    text = sys.stdin.buffer.read()
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(json.dumps(render(json.loads(text))).encode())


if __name__ == "__main__":
    main()
